// Sample: one block of 32 warps for each row of logits. Nothing is sorted: the logits become whole steps
// below the largest, and a threshold is the bin of steps in which a running sum reaches what is wanted, then
// the step in that bin. Weights are whole numbers, so that sums are exact in any order. Logits are adjusted
// as they are read, in those rows alone whose slot is active.
//
// Defines: THREADS (1024), WIDTH floats of a load, PART_BITS, LIMIT and BIN_BITS as in sample.py.
#include "common.cuh"

typedef unsigned long long uint64;

#define AHEAD 4  // loads of a thread in flight
#define BINS (1 << BIN_BITS)
#define OWN (BINS / THREADS)  // bins of a thread

struct __align__(4 * WIDTH) Chunk {
    float logits[WIDTH];
};

#define PROMPT 0x8000u  // of a mark, as in sample.py
#define END 0x4000u
#define BIASED 0x2000u
#define COUNT 0x1fffu

// The logits as they are.
struct Plain {
    __device__ float operator()(float logit, int) const { return logit; }
};

// The logits after mask, minimum length, biases and penalties; rounded after each operation, as the
// reference.
struct Adjusted {
    const uint32* mask;  // of shared memory, or null
    const uint16* marks;
    const int* bias_tokens;
    const float* biases;
    int bias_count;
    bool early;  // END tokens may not be drawn yet
    float repetition, frequency, presence;

    __device__ float operator()(float logit, int token) const {
        if (mask && !(mask[token >> 5] >> (token & 31) & 1)) return -INFINITE;
        const uint32 mark = marks[token];
        if (mark == 0) return logit;
        if (early && mark & END) return -INFINITE;
        if (mark & BIASED) logit = __fadd_rn(logit, bias_of(token));
        const uint32 count = mark & COUNT;
        if (count > 0 || mark & PROMPT)
            logit = logit > 0.f ? __fdiv_rn(logit, repetition) : __fmul_rn(logit, repetition);
        if (count > 0) logit = __fsub_rn(__fsub_rn(logit, __fmul_rn(frequency, (float)count)), presence);
        return logit;
    }

    __device__ float bias_of(int token) const {
        int low = 0, high = bias_count - 1;
        while (low < high) {
            const int middle = (low + high) / 2;
            if (bias_tokens[middle] < token) low = middle + 1;
            else high = middle;
        }
        return bias_tokens[low] == token ? biases[low] : 0.f;
    }
};

struct Room {
    int64 sums[32];
    int64 before;  // sum before what was found
    int found;
};

// Calls `body(logit, token)` for every token of the chunks first, first + stride, ... before `end`.
template <class Adjust, class Body>
__device__ inline void visit(
    const Chunk* row, const Adjust& adjust, int first, int end, int stride, Body body) {
    for (; first < end; first += AHEAD * stride) {
        Chunk chunks[AHEAD];
#pragma unroll
        for (int i = 0; i < AHEAD; i++)
            if (first + i * stride < end) chunks[i] = row[first + i * stride];
#pragma unroll
        for (int i = 0; i < AHEAD; i++) {
            const int at = first + i * stride;
            if (at < end) {
#pragma unroll
                for (int j = 0; j < WIDTH; j++) {
                    const int token = at * WIDTH + j;
                    body(adjust(chunks[i].logits[j], token), token);
                }
            }
        }
    }
}

// The largest logit of a warp's lanes; of equals the one with the lowest token.
__device__ inline void warp_best(float& logit, int& token) {
#pragma unroll
    for (int offset = 16; offset > 0; offset >>= 1) {
        const float other = __shfl_xor_sync(FULL_WARP, logit, offset);
        const int place = __shfl_xor_sync(FULL_WARP, token, offset);
        if (other > logit || (other == logit && place < token)) logit = other, token = place;
    }
}

// As `block_before` of common.cuh, for 32 warps and 64 bits.
__device__ inline int64 block_before(int64 value, int64* sums, int64& total) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    int64 inclusive = value;
#pragma unroll
    for (int offset = 1; offset < 32; offset <<= 1) {
        const int64 other = __shfl_up_sync(FULL_WARP, inclusive, offset);
        if (lane >= offset) inclusive += other;
    }
    __syncthreads();
    if (lane == 31) sums[warp] = inclusive;
    __syncthreads();
    const int64 mine = sums[lane];
    int64 running = mine;
#pragma unroll
    for (int offset = 1; offset < 32; offset <<= 1) {
        const int64 other = __shfl_up_sync(FULL_WARP, running, offset);
        if (lane >= offset) running += other;
    }
    total = __shfl_sync(FULL_WARP, running, 31);
    return __shfl_sync(FULL_WARP, running - mine, warp) + inclusive - value;
}

// NaN becomes LIMIT, as does a logit that lies too far below the top.
__device__ inline int steps_below(float top, float logit, float rate) {
    return (int)fminf((top - logit) * rate, (float)LIMIT);
}

__device__ inline int64 weight_of(int steps) {
    const uint32 part = (uint32)steps << (32 - PART_BITS);
    uint32 power = 2017903u;
    power = 19743523u - __umulhi(power, part);
    power = 118729907u - __umulhi(power, part);
    power = 515776670u - __umulhi(power, part);
    power = 1488514207u - __umulhi(power, part);
    power = 0x80000000u - __umulhi(power, part);
    return (int64)((uint64)power << 9 >> (steps >> PART_BITS));
}

// The steps at which a sum over the tokens down to `last`, beginning with the most likely ones, reaches
// `wanted` tokens or, BY_WEIGHT, a share `wanted` of all their weight; `last` where it never does. `low` and
// `high` are the halves of BINS sums: there is no 64-bit addition to shared memory.
template <bool BY_WEIGHT, class Adjust, class Wanted>
__device__ inline int reach(
    const Chunk* row, const Adjust& adjust, int chunks, float top, float rate, int last, Wanted wanted,
    uint32* low, uint32* high, Room& room) {
    int prefix = 0;
    int64 lacking = 0;
    for (int shift = BIN_BITS; shift >= 0; shift -= BIN_BITS) {
        for (int bin = threadIdx.x; bin < BINS; bin += THREADS) low[bin] = high[bin] = 0;
        __syncthreads();
        visit(row, adjust, threadIdx.x, chunks, THREADS, [&](float logit, int) {
            const int steps = steps_below(top, logit, rate);
            if (steps > last || steps >> (shift + BIN_BITS) != prefix) return;
            const int bin = steps >> shift & (BINS - 1);
            if (BY_WEIGHT) {
                const int64 weight = weight_of(steps);
                const uint32 half = (uint32)weight, sum = atomicAdd(&low[bin], half) + half;
                const uint32 rest = (uint32)(weight >> 32) + (sum < half);
                if (rest) atomicAdd(&high[bin], rest);
            } else {
                atomicAdd(&low[bin], 1u);
            }
        });
        __syncthreads();
        int64 held[OWN], sum = 0, total;
#pragma unroll
        for (int i = 0; i < OWN; i++) {
            const int bin = threadIdx.x * OWN + i;
            held[i] = (int64)high[bin] << 32 | low[bin];
            sum += held[i];
        }
        int64 running = block_before(sum, room.sums, total);
        if (shift > 0) {
            lacking = BY_WEIGHT ? max(1ll, (int64)ceil((double)wanted * (double)total)) : (int64)wanted;
            if (total < lacking) return last;
        }
#pragma unroll
        for (int i = 0; i < OWN; i++) {
            if (running < lacking && running + held[i] >= lacking)
                room.found = threadIdx.x * OWN + i, room.before = running;
            running += held[i];
        }
        __syncthreads();
        prefix = prefix << BIN_BITS | room.found;
        lacking -= room.before;
    }
    return prefix;
}

__device__ inline double uniform(uint64 seed, uint64 position) {
    uint64 x = seed + (position + 1) * 0x9e3779b97f4a7c15ull;
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9ull;
    x = (x ^ x >> 27) * 0x94d049bb133111ebull;
    x ^= x >> 31;
    return (double)(x >> 11) * 0x1p-53;
}

// The token of a row, by one of the threads that call this, which writes it to `drawn`.
template <class Adjust>
__device__ inline void draw(
    const Chunk* row, const Adjust& adjust, int64 vocab, float temperature, float share, int64 k, int64 least,
    uint64 seed, uint64 position, int64* drawn, uint32* bins, Room& room, float* tops, int* places) {
    const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
    const int chunks = (int)vocab / WIDTH;

    float top = -INFINITE;
    int place = 0;
    visit(row, adjust, thread, chunks, THREADS, [&](float logit, int token) {
        if (logit > top) top = logit, place = token;
    });
    warp_best(top, place);
    if (lane == 0) tops[warp] = top, places[warp] = place;
    __syncthreads();
    top = tops[lane], place = places[lane];
    warp_best(top, place);
    if (temperature == 0.f) {
        if (thread == 0) *drawn = place;
        return;
    }

    const float rate = __frcp_rn(fmaxf(temperature, 1e-6f)) * (LOG2E * (1 << PART_BITS));
    int last = (int)least;
    uint32 *low = bins, *high = bins + BINS;
    if (k > 0 && k < vocab) last = reach<false>(row, adjust, chunks, top, rate, last, k, low, high, room);
    if (share < 1.f) last = reach<true>(row, adjust, chunks, top, rate, last, share, low, high, room);

    // each warp sums a stretch of the row; the token is then sought in one of them
    const int stretch = (chunks + 31) / 32;
    int64 sum = 0, total;
    visit(row, adjust, warp * stretch + lane, min(chunks, (warp + 1) * stretch), 32, [&](float logit, int) {
        const int steps = steps_below(top, logit, rate);
        if (steps <= last) sum += weight_of(steps);
    });
    int64 before = block_before(sum, room.sums, total);
    if (total == 0) {  // no token has a weight, so any of them will do
        if (thread == 0) *drawn = place;
        return;
    }
    const int64 target = min((int64)(uniform(seed, position) * (double)total), total - 1);
    const int64 after = __shfl_sync(FULL_WARP, before + sum, 31);
    if (lane == 0 && before <= target && target < after) room.found = warp, room.before = before;
    __syncthreads();
    const int end = min(chunks, (room.found + 1) * stretch);
    int64 running = room.before;
    for (int first = room.found * stretch; first < end; first += THREADS) {
        const int at = first + thread;
        int64 weights[WIDTH];
        sum = 0;
#pragma unroll
        for (int j = 0; j < WIDTH; j++) {
            const int token = at * WIDTH + j;
            const int steps = at < end ? steps_below(top, adjust(row[at].logits[j], token), rate) : LIMIT;
            weights[j] = steps <= last ? weight_of(steps) : 0;
            sum += weights[j];
        }
        before = running + block_before(sum, room.sums, total);
#pragma unroll
        for (int j = 0; j < WIDTH; j++) {
            if (before <= target && target < before + weights[j]) *drawn = at * WIDTH + j;
            before += weights[j];
        }
        running += total;
    }
}

extern "C" __global__ void __launch_bounds__(THREADS) sample(
    const float* logits, const int64* slots, const int64* lengths, const float* temperature,
    const float* top_p, const int64* top_k, const int64* min_p, const int64* seed, const uint8* active,
    const uint16* marks, const float* penalties, const int64* min_length, const int* bias_tokens,
    const float* biases, const uint8* masked, const uint32* mask, const int64* mask_length, int64* drawn,
    int64 vocab, int64 bias_count, int64 words) {
    extern __shared__ uint32 memory[];  // [2, BINS], then the mask
    __shared__ Room room;
    __shared__ float tops[32];
    __shared__ int places[32];
    __shared__ int64 known;
    const int line = blockIdx.x, thread = threadIdx.x;
    const int64 slot = slots[line], length = lengths[slot];
    const Chunk* row = (const Chunk*)(logits + line * vocab);
    drawn += line;
    if (!active[slot]) {
        draw(
            row, Plain(), vocab, temperature[slot], top_p[slot], top_k[slot], min_p[slot], seed[slot], length,
            drawn, memory, room, tops, places);
        return;
    }
    uint32* allowed = 0;
    if (masked[slot]) {
        // The host writes a mask and then for which length it is: whoever sees that sees the mask.
        if (thread == 0)
            asm volatile("ld.acquire.sys.global.s64 %0, [%1];"
                         : "=l"(known)
                         : "l"(mask_length + slot)
                         : "memory");
        __syncthreads();
        if (known != length) {
            if (thread == 0) *drawn = -1;
            return;
        }
        allowed = memory + 2 * BINS;
        for (int word = thread; word < words; word += THREADS) allowed[word] = mask[slot * words + word];
        __syncthreads();
    }
    Adjusted adjust;
    adjust.mask = allowed;
    adjust.marks = marks + slot * vocab;
    adjust.bias_tokens = bias_tokens + slot * bias_count;
    adjust.biases = biases + slot * bias_count;
    adjust.bias_count = (int)bias_count;
    adjust.early = length < min_length[slot];
    adjust.repetition = penalties[slot * 3];
    adjust.frequency = penalties[slot * 3 + 1];
    adjust.presence = penalties[slot * 3 + 2];
    draw(
        row, adjust, vocab, temperature[slot], top_p[slot], top_k[slot], min_p[slot], seed[slot], length,
        drawn, memory, room, tops, places);
}

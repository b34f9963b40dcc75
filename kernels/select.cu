// Select: 8-bit queries against 2-bit codes on the integer tensor cores, then the k best without sorting.
#include "common.cuh"

#ifdef DIM
// ------------------------------------------------------------------------------------------------- prepare
// Blocks with z = 0 rotate and round the queries of one (KV head, sequence), one thread an entry; the others
// multiply them with the centres of PREPARED pages each.
extern "C" __global__ void prepare(
    const Element* query, const float* rotation, const float* centres, const float* norm, const uint8* miss,
    const int64* lengths, const int64* table, int64 pages, int64 table_width, int8* integers, float* steps,
    float* centre_scores, float scale) {
    __shared__ float group[GROUP][DIM];
    __shared__ float room[32];
    const int kv_heads = gridDim.x, head = blockIdx.x, batch = blockIdx.y;
    const int64 line = (int64)batch * kv_heads + head;
    if (!miss[line]) return;
    const int first_page = (blockIdx.z - 1) * PREPARED;
    if (blockIdx.z > 0 && (int64)first_page * BLOCK_TOKENS >= lengths[batch]) return;
    for (int i = threadIdx.x; i < GROUP * DIM; i += blockDim.x)
        group[0][i] = to_float(query[line * GROUP * DIM + i]);
    __syncthreads();
    if (blockIdx.z > 0) {
        const int lane = threadIdx.x % 32;
        for (int i = threadIdx.x / 32; i < PREPARED; i += blockDim.x / 32) {
            const int page = first_page + i;
            if (page >= pages || (int64)page * BLOCK_TOKENS >= lengths[batch]) break;
            const float* centre = centres + (table[batch * table_width + page] * kv_heads + head) * DIM;
            float sums[GROUP];
#pragma unroll
            for (int q = 0; q < GROUP; q++) sums[q] = 0.f;
#pragma unroll
            for (int entry = lane; entry < DIM; entry += 32) {
                const float value = centre[entry];
#pragma unroll
                for (int q = 0; q < GROUP; q++) sums[q] += group[q][entry] * value;
            }
#pragma unroll
            for (int q = 0; q < GROUP; q++) {
                const float sum = warp_sum(sums[q]);
                if (lane == 0)
                    centre_scores[(line * pages + page) * GROUP + q] = (sum * scale - norm[line * GROUP + q]) * LOG2E;
            }
        }
        return;
    }
    const int entry = threadIdx.x;
    float rotated[GROUP];
#pragma unroll
    for (int q = 0; q < GROUP; q++) rotated[q] = 0.f;
    if (entry < DIM) {
#pragma unroll 16
        for (int i = 0; i < DIM; i++) {
            const float weight = rotation[i * DIM + entry];
#pragma unroll
            for (int q = 0; q < GROUP; q++) rotated[q] += group[q][i] * weight;
        }
    }
#pragma unroll
    for (int q = 0; q < GROUP; q++) {
        const float step = fmaxf(block_max(fabsf(rotated[q]), room), 1e-20f) / 127.f;
        if (entry < DIM) integers[(line * GROUP + q) * DIM + entry] = (int8)rintf(rotated[q] / step);
        if (entry == 0) steps[line * GROUP + q] = step;
    }
}

// --------------------------------------------------------------------------------------------- weigh_codes
// A warp takes 64 tokens at a time and loads the next ones meanwhile: four tiles of 16 tokens x 8 queries of
// mma.m16n8k32. The four planes of a byte of codes are four entries that lie DIM / 4 apart; entries go through
// the tensor cores in the order in which the bytes hold them, doubled, and the accumulators start at -3 times
// the sum of the queries: the levels are then odd numbers, twice those of the quantiser.
#define WORDS (DIM / 16)           // 32-bit words of codes a token
#define UNITS ((WORDS + 3) / 4)    // of them a lane
#define COLUMNS ((GROUP + 7) / 8)  // tiles of 8 queries
#define MAGIC 0x4b400000           // as float 1.5 * 2**23: integers added to it become floats without a conversion

__device__ inline void mma(int (&c)[4], uint32 a0, uint32 a1, uint32 a2, uint32 a3, uint32 b0, uint32 b1) {
    asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

__device__ inline uint32 doubled(uint32 word, int plane) {
    return (plane == 0 ? word << 1 : word >> (2 * plane - 1)) & 0x06060606;
}

struct Tokens {
    uint32 words[4][2][UNITS];
    uint32 scales;  // of tokens 2 * lane and 2 * lane + 1
    int page;
};

__device__ inline void load(
    Tokens& tokens, int base, const int64* blocks, int head, int kv_heads, const uint8* codes,
    const uint16* scales) {
    const int lane = threadIdx.x % 32, row = lane / 4, quad = lane % 4;
    tokens.page = base / BLOCK_TOKENS;
    const int64 token = (blocks[tokens.page] * kv_heads + head) * BLOCK_TOKENS + base % BLOCK_TOKENS;
    tokens.scales = __ldcs((const uint32*)(scales + token) + lane);
#pragma unroll
    for (int tile = 0; tile < 4; tile++)
#pragma unroll
        for (int side = 0; side < 2; side++) {
            const int64 at = token + tile * 16 + side * 8 + row;
            const uint32* source = (const uint32*)(codes + at * (DIM / 4)) + quad * UNITS;
            uint32* words = tokens.words[tile][side];
#if DIM % 64 == 0 && UNITS == 4
            const uint4 loaded = __ldcs((const uint4*)source);
            words[0] = loaded.x, words[1] = loaded.y, words[2] = loaded.z, words[3] = loaded.w;
#elif DIM % 32 == 0 && UNITS == 2
            uint2 loaded = make_uint2(0, 0);
            if (quad * UNITS < WORDS) loaded = __ldcs((const uint2*)source);
            words[0] = loaded.x, words[1] = loaded.y;
#else
#pragma unroll
            for (int unit = 0; unit < UNITS; unit++)
                words[unit] = quad * UNITS + unit < WORDS ? __ldcs(source + unit) : 0;
#endif
        }
}

extern "C" __global__ void __launch_bounds__(128) weigh_codes(
    const int8* integers, const float* steps, const float* centre_scores, const uint8* codes,
    const uint16* scales, const uint8* miss, const int64* lengths, const int64* table, int64 pages,
    int64 table_width, short* keys, int64 sinks, int64 tail, float scale) {
    const int kv_heads = gridDim.y, head = blockIdx.y, batch = blockIdx.z;
    const int64 line = (int64)batch * kv_heads + head;
    if (!miss[line]) return;
    const int end = (int)(lengths[batch] - tail);
    const int lane = threadIdx.x % 32, row = lane / 4, quad = lane % 4;
    const int stride = gridDim.x * 256;
    int base = (blockIdx.x * 4 + threadIdx.x / 32) * 64;
    if (base >= end) return;
    const int64* blocks = table + batch * table_width;
    keys += line * pages * BLOCK_TOKENS;
    Tokens next;
    load(next, base, blocks, head, kv_heads, codes, scales);

    uint32 weights[COLUMNS][UNITS][4];  // queries as the B operand
    float factor[COLUMNS][2];
    int start[COLUMNS][2];
#pragma unroll
    for (int column = 0; column < COLUMNS; column++) {
        int sum = 0;
        const int member = column * 8 + row;
        const uint32* source = (const uint32*)(integers + (line * GROUP + member) * DIM);
#pragma unroll
        for (int unit = 0; unit < UNITS; unit++)
#pragma unroll
            for (int plane = 0; plane < 4; plane++) {
                const int word = quad * UNITS + unit;
                const uint32 four = member < GROUP && word < WORDS ? source[plane * WORDS + word] : 0;
                weights[column][unit][plane] = four;
                sum = __dp4a((int)four, 0x01010101, sum);
            }
        sum += __shfl_xor_sync(FULL_WARP, sum, 1);
        sum += __shfl_xor_sync(FULL_WARP, sum, 2);
#pragma unroll
        for (int pair = 0; pair < 2; pair++) {
            const int mine = column * 8 + quad * 2 + pair;
            factor[column][pair] = mine < GROUP ? steps[line * GROUP + mine] * scale * (LOG2E / 2) : 0.f;
            start[column][pair] = MAGIC - 3 * __shfl_sync(FULL_WARP, sum, (quad * 2 + pair) * 4);
        }
    }

    for (; base < end; base += stride) {
        const Tokens tokens = next;
        if (base + stride < end) load(next, base + stride, blocks, head, kv_heads, codes, scales);
        float centre[COLUMNS][2];
#pragma unroll
        for (int column = 0; column < COLUMNS; column++)
#pragma unroll
            for (int pair = 0; pair < 2; pair++) {
                const int mine = column * 8 + quad * 2 + pair;
                centre[column][pair] =
                    mine < GROUP ? centre_scores[(line * pages + tokens.page) * GROUP + mine] : -INFINITE;
            }
#pragma unroll
        for (int tile = 0; tile < 4; tile++) {
            float magnitude[2], weight[2] = {0.f, 0.f};
#pragma unroll
            for (int side = 0; side < 2; side++) {
                const uint32 two = __shfl_sync(FULL_WARP, tokens.scales, tile * 8 + side * 4 + row / 2);
                magnitude[side] = half_to_float((uint16)(row % 2 ? two >> 16 : two));
            }
#pragma unroll
            for (int column = 0; column < COLUMNS; column++) {
                int sums[4] = {start[column][0], start[column][1], start[column][0], start[column][1]};
#pragma unroll
                for (int unit = 0; unit < UNITS; unit++) {
                    const uint32 low = tokens.words[tile][0][unit], high = tokens.words[tile][1][unit];
#pragma unroll
                    for (int plane = 0; plane < 4; plane += 2)
                        mma(sums, doubled(low, plane), doubled(high, plane), doubled(low, plane + 1),
                            doubled(high, plane + 1), weights[column][unit][plane],
                            weights[column][unit][plane + 1]);
                }
#pragma unroll
                for (int side = 0; side < 2; side++)
#pragma unroll
                    for (int pair = 0; pair < 2; pair++)
                        weight[side] += exp2f(
                            (__int_as_float(sums[side * 2 + pair]) - __int_as_float(MAGIC)) *
                                (magnitude[side] * factor[column][pair]) +
                            centre[column][pair]);
            }
#pragma unroll
            for (int side = 0; side < 2; side++) {
                weight[side] += __shfl_xor_sync(FULL_WARP, weight[side], 1);
                weight[side] += __shfl_xor_sync(FULL_WARP, weight[side], 2);
            }
            const int position = base + tile * 16 + quad * 8 + row;
            const uint32 bits = __float_as_uint(quad ? weight[1] : weight[0]);
            if (quad < 2) keys[position] = position >= sinks && position < end ? (short)(bits >> 16) : -1;
        }
    }
}
#endif

#ifdef THREADS
// -------------------------------------------------------------------------------------------------- choose
// One block a (KV head, sequence). The k best keys lie in the k best stretches of 16, by their largest key: those
// are found first, and only they are looked at again. Then the set's members look themselves up among the chosen
// positions. Keys are counted by their high 11 bits, then by the low 4 of the bin that holds the k-th.

__device__ inline uint32 rank_of(uint32 word, int half) { return ((word >> (half * 16)) + 1) & 0xffff; }

// The bin in which the running count, from the last bin downwards or from the first upwards, reaches `wanted`;
// -1 where it never does. `before` becomes the count of the bins before it.
__device__ inline int find_bin(const int* bins, int count, bool downwards, int wanted, int* room, int& before) {
    __shared__ int found, counted;
    const int per = (count + THREADS - 1) / THREADS;
    if (threadIdx.x == 0) found = -1, counted = 0;
    int sum = 0;
    for (int i = 0; i < per; i++) {
        const int bin = threadIdx.x * per + i;
        if (bin < count) sum += bins[downwards ? count - 1 - bin : bin];
    }
    int total;
    int running = block_before(sum, room, total);
    for (int i = 0; i < per; i++) {
        const int bin = threadIdx.x * per + i;
        if (bin >= count) break;
        const int here = downwards ? count - 1 - bin : bin, held = bins[here];
        if (running < wanted && running + held >= wanted) found = here, counted = running;
        running += held;
    }
    __syncthreads();
    before = counted;
    const int result = found;
    __syncthreads();
    return result;
}

// The k-th largest of `count` ranks (0 is none), 0 where there are fewer; `above` becomes how many are larger.
__device__ inline uint32 find_rank(
    const uint16* ranks, int count, uint32 lowest, int k, int* bins, int* room, int& above) {
    for (int bin = threadIdx.x; bin < BINS; bin += THREADS) bins[bin] = 0;
    __syncthreads();
    for (int i = threadIdx.x; i < count; i += THREADS)
        if (ranks[i] >= lowest) atomicAdd(&bins[ranks[i] >> 4], 1);
    __syncthreads();
    const int bin = find_bin(bins, BINS, true, k, room, above);
    if (bin < 0) return 0;
    if (threadIdx.x < 16) bins[threadIdx.x] = 0;
    __syncthreads();
    for (int i = threadIdx.x; i < count; i += THREADS)
        if (ranks[i] >> 4 == bin && ranks[i] >= lowest) atomicAdd(&bins[ranks[i] & 15], 1);
    __syncthreads();
    int before;
    const int low = find_bin(bins, 16, true, k - above, room, before);
    above += before;
    return (uint32)(bin * 16 + low);
}

extern "C" __global__ void __launch_bounds__(THREADS, 2) choose(
    const short* keys, int64 span, int64 tail, const uint8* miss, const int64* lengths, int* members,
    int* stamps, int64* tally, int* slots, int* counts, int64 k64, int64 capacity64, int64 kv_heads) {
    extern __shared__ int memory[];
    __shared__ int room[32];
    const int k = (int)k64, capacity = (int)capacity64, thread = threadIdx.x, lane = thread % 32;
    const int64 line = blockIdx.x, batch = line / kv_heads;
    const int length = (int)lengths[batch];
    if (!miss[line] || length <= 0) {
        if (thread == 0) counts[line] = 0;
        return;
    }
    const int end = max(0, min((int)span, length - (int)tail)), groups = (end + 15) / 16;
    int* bins = memory;                       // [BINS]
    int* chosen = bins + BINS;                // [k] positions, ascending
    int* active = chosen + k;                 // [k] stretches, ascending; then whether a position is resident
    int* ages = active + k;                   // [capacity] stamps + 1
    uint16* ranks = (uint16*)(ages + capacity);  // [k * 16] of the active stretches
    uint16* tops = ranks + k * 16;            // [span / 16] largest of each stretch
    const uint4* source = (const uint4*)(keys + line * span);
    members += line * capacity;
    stamps += line * capacity;
    slots += line * k;

    // 1. the k best stretches
    for (int group = thread; group < groups; group += THREADS) {
        const uint4 low = source[group * 2], high = source[group * 2 + 1];
        const uint32 words[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
        uint32 top = 0;
#pragma unroll
        for (int i = 0; i < 16; i++)
            if (group * 16 + i < end) top = max(top, rank_of(words[i / 2], i % 2));
        tops[group] = (uint16)top;
    }
    __syncthreads();
    int above, sum;
    const uint32 top = max(1u, find_rank(tops, groups, 1, k, bins, room, above));
    const int equals = k - above;
    int better = 0, same = 0;  // stretches before this round with a higher rank, with just this one
    for (int first = 0; first < groups; first += THREADS) {
        const int group = first + thread;
        const uint32 rank = group < groups ? tops[group] : 0;
        const int packed = block_before((rank > top) | (rank == top) << 16, room, sum);
        const int place = better + (packed & 0xffff), equal = same + (packed >> 16);
        if (rank > top || (rank == top && equal < equals)) active[place + min(equal, equals)] = group;
        better += sum & 0xffff;
        same += sum >> 16;
    }
    const int total = better + min(same, equals);
    __syncthreads();
    const int looked_at = total * 16;
    for (int i = thread; i < total * 2; i += THREADS) {
        const int group = active[i / 2];
        const uint4 eight = source[group * 2 + i % 2];
        const uint32 words[4] = {eight.x, eight.y, eight.z, eight.w};
#pragma unroll
        for (int j = 0; j < 8; j++)
            ranks[i * 8 + j] = group * 16 + i % 2 * 8 + j < end ? (uint16)rank_of(words[j / 2], j % 2) : 0;
    }
    __syncthreads();

    // 2. the k best positions among them, in order
    const uint32 lowest = max(1u, find_rank(ranks, looked_at, top, k, bins, room, above));
    const int ties = k - above;
    better = same = 0;
    for (int first = 0; first < looked_at; first += THREADS * 4) {
        uint32 four[4];
        int mine = 0;
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const int i = first + thread * 4 + j;
            four[j] = i < looked_at ? ranks[i] : 0;
            mine += (four[j] > lowest) | (four[j] == lowest) << 16;
        }
        const int packed = block_before(mine, room, sum);
        int place = better + (packed & 0xffff), equal = same + (packed >> 16);
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const int i = first + thread * 4 + j;
            if (i >= looked_at) break;
            const int position = active[i / 16] * 16 + i % 16;
            if (four[j] > lowest) chosen[place++ + min(equal, ties)] = position;
            if (four[j] == lowest) {
                if (equal < ties) chosen[place + equal] = position;
                equal++;
            }
        }
        better += sum & 0xffff;
        same += sum >> 16;
    }
    const int count = better + min(same, ties);
    __syncthreads();
    int* known = active;
    for (int i = thread; i < count; i += THREADS) known[i] = 0;
    __syncthreads();

    // 3. those that are resident are marked
    for (int slot = thread; slot < capacity; slot += THREADS) {
        const int position = members[slot];
        int stamp = stamps[slot];
        int low = 0, high = count;
        while (low < high) {
            const int middle = (low + high) >> 1;
            if (chosen[middle] < position) low = middle + 1;
            else high = middle;
        }
        if (low < count && chosen[low] == position) {
            known[low] = 1;
            stamps[slot] = stamp = length;
        }
        ages[slot] = stamp + 1;
    }
    __syncthreads();
    int missing = 0;
    for (int base = 0; base < count; base += THREADS) {
        const int i = base + thread;
        const int position = i < count ? chosen[i] : 0;
        const bool lacks = i < count && !known[i];
        const int rank = missing + block_before(lacks, room, sum);
        // what is overwritten has been read by all threads: rank <= i, and block_before is a barrier
        if (lacks) chosen[rank] = position;
        missing += sum;
    }
    if (thread == 0) {
        counts[line] = missing;
        tally[line * 4 + 2] += count;
        tally[line * 4 + 3] += missing;
    }
    if (missing == 0) return;

    // 4. the others replace the rows selected longest ago
    uint32 prefix = 0;
    int wanted = missing;
    for (int shift = 16; shift >= 0; shift -= 8) {
        __syncthreads();
        if (thread < 256) bins[thread] = 0;
        __syncthreads();
        for (int base = 0; base < capacity; base += THREADS) {
            const int slot = base + thread;
            const uint32 age = slot < capacity ? (uint32)ages[slot] : 0xffffffffu;
            const int digit = age >> (shift + 8) == prefix ? (int)(age >> shift & 255) : -1;
            const uint32 same = __match_any_sync(FULL_WARP, digit);
            if (digit >= 0 && (same & ((1u << lane) - 1)) == 0) atomicAdd(&bins[digit], __popc(same));
        }
        __syncthreads();
        int before;
        prefix = prefix << 8 | (uint32)find_bin(bins, 256, false, wanted, room, before);
        wanted -= before;
    }
    const int per = (capacity + THREADS - 1) / THREADS;
    int older = 0;
    same = 0;
    for (int slot = thread * per; slot < min(capacity, (thread + 1) * per); slot++) {
        older += (uint32)ages[slot] < prefix;
        same += (uint32)ages[slot] == prefix;
    }
    const int packed = block_before(older | same << 16, room, sum);
    older = packed & 0xffff, same = packed >> 16;
    for (int slot = thread * per; slot < min(capacity, (thread + 1) * per); slot++) {
        const uint32 age = (uint32)ages[slot];
        int rank = -1;
        if (age < prefix) rank = older++ + min(same, wanted);
        if (age == prefix) {
            if (same < wanted) rank = older + same;
            same++;
        }
        if (rank >= 0) {
            slots[rank] = slot;
            members[slot] = chosen[rank];
            stamps[slot] = length;
        }
    }
}
#endif

// Select: 8-bit queries against 2-bit codes on the integer tensor cores, then the k best without sorting.
#include "common.cuh"

#define NEVER (-32768)

#ifdef DIM
// ------------------------------------------------------------------------------------------------- quantise
// One block a (KV head, sequence), one thread an entry (rounded up to whole warps).
extern "C" __global__ void quantise(
    const Element* query, const float* rotation, const uint8* miss, int8* integers, float* steps) {
    __shared__ float group[GROUP][DIM];
    __shared__ float room[32];
    const int64 line = (int64)blockIdx.y * gridDim.x + blockIdx.x;
    const int entry = threadIdx.x;
    if (!miss[line]) return;
    for (int i = entry; i < GROUP * DIM; i += blockDim.x) group[0][i] = to_float(query[line * GROUP * DIM + i]);
    __syncthreads();
    float rotated[GROUP];
#pragma unroll
    for (int q = 0; q < GROUP; q++) rotated[q] = 0.f;
    if (entry < DIM) {
#pragma unroll 8
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
// A block takes stretches of 512 tokens of one (KV head, sequence), a warp 128 of them, 64 at a time: four
// tiles of 16 tokens x 8 queries of mma.m16n8k32. The four planes of a byte of codes are four entries that lie
// DIM / 4 apart; entries go through the tensor cores in the order in which the bytes hold them.
#define WORDS (DIM / 16)             // 32-bit words of codes a token
#define UNITS ((WORDS + 3) / 4)      // of them a lane
#define COLUMNS ((GROUP + 7) / 8)    // tiles of 8 queries
#define STRETCH 512  // 4 warps x 128 tokens
#define PAGES (STRETCH / BLOCK_TOKENS > 1 ? STRETCH / BLOCK_TOKENS : 1)

__device__ inline void mma(int (&c)[4], uint32 a0, uint32 a1, uint32 a2, uint32 a3, uint32 b0, uint32 b1) {
    asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

extern "C" __global__ void __launch_bounds__(128) weigh_codes(
    const Element* query, const int8* integers, const float* steps, const uint8* codes, const uint16* scales,
    const float* centres, const float* norm, const uint8* miss, const int64* lengths, const int64* table,
    int64 pages, int64 table_width, short* keys, int64 sinks, int64 tail, float scale, float keys_per_nat) {
    __shared__ float centre_scores[PAGES][COLUMNS * 8];
    const int kv_heads = gridDim.y, head = blockIdx.y, batch = blockIdx.z;
    const int64 line = (int64)batch * kv_heads + head;
    if (!miss[line]) return;
    const int end = (int)(lengths[batch] - tail);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, row = lane / 4, quad = lane % 4;
    const int64* blocks = table + batch * table_width;
    const int64 span = pages * BLOCK_TOKENS;

    uint32 weights[COLUMNS][UNITS][4];  // queries as the B operand
    float factor[COLUMNS][2], offset[COLUMNS][2];
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
        for (int side = 0; side < 2; side++) {
            const int mine = column * 8 + quad * 2 + side;
            factor[column][side] = mine < GROUP ? steps[line * GROUP + mine] * scale * LOG2E : 0.f;
            offset[column][side] = -1.5f * __shfl_sync(FULL_WARP, sum, (quad * 2 + side) * 4);
        }
    }

    for (int start = blockIdx.x * STRETCH; start < end; start += gridDim.x * STRETCH) {
        __syncthreads();
        for (int item = warp; item < PAGES * COLUMNS * 8; item += 4) {
            const int page = start / BLOCK_TOKENS + item / (COLUMNS * 8), member = item % (COLUMNS * 8);
            float score = -INFINITE;
            if (member < GROUP && page * BLOCK_TOKENS < end) {
                score = 0.f;
                const float* centre = centres + (blocks[page] * kv_heads + head) * DIM;
                for (int i = lane; i < DIM; i += 32)
                    score += to_float(query[(line * GROUP + member) * DIM + i]) * centre[i];
                score = (warp_sum(score) * scale - norm[line * GROUP + member]) * LOG2E;
            }
            if (lane == 0) centre_scores[item / (COLUMNS * 8)][member] = score;
        }
        __syncthreads();
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int base = start + warp * 128 + half * 64;
            if (base >= end) break;
            const int page = base / BLOCK_TOKENS;
            const int64 token = (blocks[page] * kv_heads + head) * BLOCK_TOKENS + base % BLOCK_TOKENS;
            uint32 words[4][2][UNITS];
            float magnitude[4][2];
#pragma unroll
            for (int tile = 0; tile < 4; tile++)
#pragma unroll
                for (int side = 0; side < 2; side++) {
                    const int64 at = token + tile * 16 + side * 8 + row;
                    const uint32* source = (const uint32*)(codes + at * (DIM / 4)) + quad * UNITS;
#if WORDS % 4 == 0 && UNITS == 4
                    const uint4 loaded = *(const uint4*)source;
                    words[tile][side][0] = loaded.x, words[tile][side][1] = loaded.y;
                    words[tile][side][2] = loaded.z, words[tile][side][3] = loaded.w;
#elif WORDS % 2 == 0 && UNITS == 2
                    uint2 loaded = make_uint2(0, 0);
                    if (quad * UNITS < WORDS) loaded = *(const uint2*)source;
                    words[tile][side][0] = loaded.x, words[tile][side][1] = loaded.y;
#else
#pragma unroll
                    for (int unit = 0; unit < UNITS; unit++)
                        words[tile][side][unit] = quad * UNITS + unit < WORDS ? source[unit] : 0;
#endif
                    magnitude[tile][side] = half_to_float(scales[at]);
                }
#pragma unroll
            for (int tile = 0; tile < 4; tile++) {
                float scores[2][COLUMNS * 2];
#pragma unroll
                for (int column = 0; column < COLUMNS; column++) {
                    int sums[4] = {0, 0, 0, 0};
#pragma unroll
                    for (int unit = 0; unit < UNITS; unit++) {
                        const uint32 low = words[tile][0][unit], high = words[tile][1][unit];
#pragma unroll
                        for (int plane = 0; plane < 4; plane += 2)
                            mma(sums, low >> (2 * plane) & 0x03030303, high >> (2 * plane) & 0x03030303,
                                low >> (2 * plane + 2) & 0x03030303, high >> (2 * plane + 2) & 0x03030303,
                                weights[column][unit][plane], weights[column][unit][plane + 1]);
                    }
#pragma unroll
                    for (int side = 0; side < 2; side++)
#pragma unroll
                        for (int pair = 0; pair < 2; pair++)
                            scores[side][column * 2 + pair] =
                                (sums[side * 2 + pair] + offset[column][pair]) * factor[column][pair] *
                                    magnitude[tile][side] +
                                centre_scores[page - start / BLOCK_TOKENS][column * 8 + quad * 2 + pair];
                }
                short found[2];
#pragma unroll
                for (int side = 0; side < 2; side++) {
                    float peak = -INFINITE, sum = 0.f;
#pragma unroll
                    for (int i = 0; i < COLUMNS * 2; i++) peak = fmaxf(peak, scores[side][i]);
                    peak = fmaxf(peak, __shfl_xor_sync(FULL_WARP, peak, 1));
                    peak = fmaxf(peak, __shfl_xor_sync(FULL_WARP, peak, 2));
#pragma unroll
                    for (int i = 0; i < COLUMNS * 2; i++) sum += exp2f(scores[side][i] - peak);
                    sum += __shfl_xor_sync(FULL_WARP, sum, 1);
                    sum += __shfl_xor_sync(FULL_WARP, sum, 2);
                    const float weight = (peak + log2f(sum)) * (LN2 * keys_per_nat);
                    const int position = base + tile * 16 + side * 8 + row;
                    const bool candidate = position >= sinks && position < end;
                    found[side] = candidate ? (short)fminf(fmaxf(floorf(weight), NEVER + 1), -NEVER - 1) : NEVER;
                }
                if (quad < 2) keys[line * span + base + tile * 16 + quad * 8 + row] = quad ? found[1] : found[0];
            }
        }
    }
}
#endif

#ifdef THREADS
// -------------------------------------------------------------------------------------------------- choose
// One block a (KV head, sequence). Keys are counted by their high 11 bits, then by the low 5 of the bin that
// holds the k-th; positions are compacted in order; the set's members look themselves up among them.

// The bin in which the running count of `bins`, from `highest` downwards (or upwards from 0), reaches `wanted`.
__device__ inline void find_bin(
    const int* bins, int count, bool downwards, int wanted, int* room, int* found, int* before_found) {
    const int per = (count + THREADS - 1) / THREADS;
    int sum = 0;
    for (int i = 0; i < per; i++) {
        const int bin = threadIdx.x * per + i;
        if (bin < count) sum += bins[downwards ? count - 1 - bin : bin];
    }
    int total;
    int before = block_before(sum, room, total);
    for (int i = 0; i < per; i++) {
        const int bin = threadIdx.x * per + i;
        if (bin >= count) break;
        const int here = downwards ? count - 1 - bin : bin, held = bins[here];
        if (before < wanted && before + held >= wanted) {
            *found = here;
            *before_found = before;
        }
        before += held;
    }
    __syncthreads();
}

extern "C" __global__ void __launch_bounds__(THREADS, 2) choose(
    const short* keys, int64 span, int64 tail, const uint8* miss, const int64* lengths, int* members,
    int* stamps, int64* tally, int* slots, int* counts, int64 k64, int64 capacity64, int64 kv_heads) {
    extern __shared__ int memory[];
    const int k = (int)k64, capacity = (int)capacity64, thread = threadIdx.x;
    int* bins = memory;              // [BINS]
    int* chosen = bins + BINS;       // [k] positions, ascending
    int* known = chosen + k;         // [k] whether resident
    int* ages = known + k;           // [capacity] stamps + 1
    __shared__ int room[32], warp_counts[2][32], found, before;
    const int64 line = blockIdx.x, batch = line / kv_heads;
    const int length = (int)lengths[batch];
    if (!miss[line] || length <= 0) {
        if (thread == 0) counts[line] = 0;
        return;
    }
    const int end = max(0, min((int)span, length - (int)tail));
    const uint4* source = (const uint4*)(keys + line * span);
    const int warp = thread / 32, lane = thread % 32;
    members += line * capacity;
    stamps += line * capacity;
    slots += line * k;

    // 1. the k-th largest key
    for (int bin = thread; bin < BINS; bin += THREADS) bins[bin] = 0;
    if (thread == 0) found = -1, before = 0;
    __syncthreads();
    for (int eight = thread; eight * 8 < end; eight += THREADS) {
        const uint4 loaded = source[eight];
        const uint32 words[4] = {loaded.x, loaded.y, loaded.z, loaded.w};
#pragma unroll
        for (int i = 0; i < 8; i++) {
            const uint32 key = (words[i / 2] >> (i % 2 * 16) & 0xffff) ^ 0x8000;
            if (key != 0 && eight * 8 + i < end) atomicAdd(&bins[key >> 5], 1);
        }
    }
    __syncthreads();
    find_bin(bins, BINS, true, k, room, &found, &before);
    const int bin = found;  // -1 where there are fewer than k candidates: all are chosen
    int above = before;
    uint32 lowest = 0;
    if (bin >= 0) {
        if (thread < 32) bins[thread] = 0;
        __syncthreads();
        for (int eight = thread; eight * 8 < end; eight += THREADS) {
            const uint4 loaded = source[eight];
            const uint32 words[4] = {loaded.x, loaded.y, loaded.z, loaded.w};
#pragma unroll
            for (int i = 0; i < 8; i++) {
                const uint32 key = (words[i / 2] >> (i % 2 * 16) & 0xffff) ^ 0x8000;
                if ((key >> 5) == bin && key != 0 && eight * 8 + i < end) atomicAdd(&bins[key & 31], 1);
            }
        }
        __syncthreads();
        find_bin(bins, 32, true, k - above, room, &found, &before);
        lowest = bin * 32 + found;
        above += before;
    }
    const int ties = bin >= 0 ? k - above : 0;  // rows with just this key that are chosen

    // 2. the chosen positions, in order: a warp takes a stretch
    const int stretch = ((end + 31) / 32 + 255) / 256 * 256;
    const int from = warp * stretch, to = min(end, from + stretch);
    for (int writing = 0; writing < 2; writing++) {
        int higher = writing ? warp_counts[0][warp] : 0, equal = writing ? warp_counts[1][warp] : 0;
        for (int at = from + lane * 8; at - lane * 8 < to; at += 256) {
            uint32 isabove = 0, isequal = 0;
            if (at < to) {
                const uint4 loaded = source[at / 8];
                const uint32 words[4] = {loaded.x, loaded.y, loaded.z, loaded.w};
#pragma unroll
                for (int i = 0; i < 8; i++) {
                    const uint32 key = (words[i / 2] >> (i % 2 * 16) & 0xffff) ^ 0x8000;
                    if (at + i < to && key > lowest) isabove |= 1u << i;
                    if (at + i < to && key == lowest && key != 0) isequal |= 1u << i;
                }
            }
            const int mine = __popc(isabove) | __popc(isequal) << 16;
            int inclusive = mine;
#pragma unroll
            for (int offset = 1; offset < 32; offset <<= 1) {
                const int other = __shfl_up_sync(FULL_WARP, inclusive, offset);
                if (lane >= offset) inclusive += other;
            }
            if (writing && mine) {
                int over = higher + ((inclusive - mine) & 0xffff), same = equal + ((inclusive - mine) >> 16);
                for (int i = 0; i < 8; i++) {
                    if (isabove >> i & 1) chosen[over++ + min(same, ties)] = at + i;
                    if (isequal >> i & 1) {
                        if (same < ties) chosen[over + same] = at + i;
                        same++;
                    }
                }
            }
            const int sums = __shfl_sync(FULL_WARP, inclusive, 31);
            higher += sums & 0xffff;
            equal += sums >> 16;
        }
        if (!writing) {
            if (lane == 0) warp_counts[0][warp] = higher, warp_counts[1][warp] = equal;
            __syncthreads();
            if (warp == 0) {
#pragma unroll
                for (int which = 0; which < 2; which++) {
                    const int mine = warp_counts[which][lane];
                    int inclusive = mine;
#pragma unroll
                    for (int offset = 1; offset < 32; offset <<= 1) {
                        const int other = __shfl_up_sync(FULL_WARP, inclusive, offset);
                        if (lane >= offset) inclusive += other;
                    }
                    warp_counts[which][lane] = inclusive - mine;
                    if (lane == 31) {
                        if (which == 0) found = inclusive;
                        else before = inclusive;
                    }
                }
            }
            __syncthreads();
        }
    }
    const int count = found + min(before, ties);
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
        int sum;
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
        find_bin(bins, 256, false, wanted, room, &found, &before);
        prefix = prefix << 8 | (uint32)found;
        wanted -= before;
    }
    const int per = (capacity + THREADS - 1) / THREADS;
    int older = 0, same = 0;
    for (int slot = thread * per; slot < min(capacity, (thread + 1) * per); slot++) {
        older += (uint32)ages[slot] < prefix;
        same += (uint32)ages[slot] == prefix;
    }
    int sum;
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

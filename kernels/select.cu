// Select: 8-bit queries against 2-bit codes on the integer tensor cores, then the k best without sorting.
#include "common.cuh"

#ifdef DIM
// ------------------------------------------------------------------------------------------------- prepare
// Blocks with z = 0 rotate and round the queries of one (KV head, sequence), PARTS threads an entry; in the
// others each warp multiplies them with the centre of a page.
#define PREPARE_THREADS ((PARTS * DIM + 31) / 32 * 32)
#define ROWS (DIM / PARTS)                // of the rotation a thread
#define BATCH (ROWS < 32 ? ROWS : 32)     // of them on their way at a time
#define LANE_ENTRIES ((DIM + 31) / 32)

extern "C" __global__ void __launch_bounds__(PREPARE_THREADS) prepare(
    const Element* query, const float* rotation, const float* centres, const float* norm, const uint8* miss,
    const int64* lengths, const int64* table, int64 pages, int64 table_width, int8* integers, float* steps,
    float* centre_scores, float scale) {
    __shared__ __align__(16) float sums[PARTS][GROUP][DIM];
    const int kv_heads = gridDim.x, head = blockIdx.x, batch = blockIdx.y;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
    const int64 line = (int64)batch * kv_heads + head;
    query += line * GROUP * DIM;
    if (blockIdx.z > 0) {
        const int page = (blockIdx.z - 1) * warps + warp;
        if (page >= pages || !miss[line] || (int64)page * BLOCK_TOKENS >= lengths[batch]) return;
        const float* centre = centres + (table[batch * table_width + page] * kv_heads + head) * DIM;
        float products[GROUP];
#pragma unroll
        for (int q = 0; q < GROUP; q++) products[q] = 0.f;
#pragma unroll
        for (int i = 0; i < LANE_ENTRIES; i++) {
            const int entry = i * 32 + lane;
            if (entry >= DIM) continue;
            const float value = centre[entry];
#pragma unroll
            for (int q = 0; q < GROUP; q++) products[q] += to_float(query[q * DIM + entry]) * value;
        }
#pragma unroll
        for (int q = 0; q < GROUP; q++) {
            const float product = warp_sum(products[q]) * scale - norm[line * GROUP + q];
            if (lane == 0) centre_scores[(line * pages + page) * GROUP + q] = product * LOG2E;
        }
        return;
    }
    if (!miss[line]) return;
    float(*group)[DIM] = sums[0];  // the queries lie where the sums of the first part will
    for (int i = threadIdx.x; i < GROUP * DIM; i += blockDim.x) group[0][i] = to_float(query[i]);
    const int part = min((int)threadIdx.x / DIM, PARTS - 1), entry = threadIdx.x % DIM;
    rotation += part * ROWS * DIM + entry;
    float rotated[GROUP];
#pragma unroll
    for (int q = 0; q < GROUP; q++) rotated[q] = 0.f;
#pragma unroll
    for (int first = 0; first < ROWS; first += BATCH) {
        float weights[BATCH];
#pragma unroll
        for (int i = 0; i < BATCH; i++) weights[i] = first + i < ROWS ? rotation[(first + i) * DIM] : 0.f;
        if (first == 0) __syncthreads();
#pragma unroll
        for (int i = 0; i < BATCH && first + i < ROWS; i += 4)
#pragma unroll
            for (int q = 0; q < GROUP; q++) {
                const float4 four = *(const float4*)&group[q][part * ROWS + first + i];
                rotated[q] += four.x * weights[i] + four.y * weights[i + 1];
                rotated[q] += four.z * weights[i + 2] + four.w * weights[i + 3];
            }
    }
    __syncthreads();
    if (threadIdx.x < PARTS * DIM) {
#pragma unroll
        for (int q = 0; q < GROUP; q++) sums[part][q][entry] = rotated[q];
    }
    __syncthreads();
    for (int q = warp; q < GROUP; q += warps) {
        float values[LANE_ENTRIES], peak = 0.f;
#pragma unroll
        for (int i = 0; i < LANE_ENTRIES; i++) {
            values[i] = 0.f;
#pragma unroll
            for (int p = 0; p < PARTS; p++)
                if (i * 32 + lane < DIM) values[i] += sums[p][q][i * 32 + lane];
            peak = fmaxf(peak, fabsf(values[i]));
        }
        const float step = fmaxf(warp_max(peak), 1e-20f) / 127.f;
#pragma unroll
        for (int i = 0; i < LANE_ENTRIES; i++)
            if (i * 32 + lane < DIM)
                integers[(line * GROUP + q) * DIM + i * 32 + lane] = (int8)rintf(values[i] / step);
        if (lane == 0) steps[line * GROUP + q] = step;
    }
}

// --------------------------------------------------------------------------------------------- weigh_codes
// A warp takes UNITS units of 64 tokens, through a ring of STAGES in shared memory of its own: four tiles of 16
// tokens x 8 queries of mma.m16n8k32 each. The four planes of a byte of codes are four entries that lie DIM / 4
// apart; entries go through the tensor cores in the order in which the bytes hold them. The odd planes go in
// four times too large, which saves their shifts, so they have accumulators of their own, which start at -6 times
// the sum of the queries: with 4 times the even ones that makes 4 times the levels of the quantiser.
//
// Row r of the four tiles takes the tokens 8 r to 8 r + 7 of a unit, so that a lane's scales lie together, and so
// do the keys: those of tokens 2 * lane and 2 * lane + 1 end up in a lane.
#define UNIT 64
#define WORDS (DIM / 16)                // 32-bit words of codes a token
#define LANE_WORDS ((WORDS + 3) / 4)    // of them a lane
#define COLUMNS ((GROUP + 7) / 8)       // tiles of 8 queries
#define DISTINCT (GROUP <= 4 ? 4 : 8)   // of them that differ: up to 4 queries stand in a tile twice
#define SIDES (GROUP <= 4 ? 1 : 2)      // halves of a tile that a lane weighs: of doubled queries, the lower quads
                                        // leave the rows from 8 on to the upper ones
#define MAGIC 0x4b400000  // as float 1.5 * 2**23: integers added to it become floats without a conversion

struct Stage {
    uint4 codes[DIM];
    uint16 scales[UNIT];
    float centres[COLUMNS * DISTINCT];
};

// Rows of a tile are 8 tokens apart; shuffled within those, the tokens that are read together lie in different
// banks.
__device__ inline int place_of(int token) { return DIM % 64 == 0 ? token ^ (token / 8 % 8) : token; }

__device__ inline int chunk_place(int chunk) {
#if DIM % 64 == 0
    return place_of(chunk / (DIM / 64)) * (DIM / 64) + chunk % (DIM / 64);
#else
    return chunk;
#endif
}

// Codes are read once, so they shall not drive the keys, which are read next, out of the L2 cache.
__device__ inline int64 passing() {
    int64 policy;
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}

__device__ inline void copy_16(void* shared, const void* global, int64 policy) {
    const uint32 target = (uint32)__cvta_generic_to_shared(shared);
    asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2;" ::"r"(target), "l"(global),
                 "l"(policy)
                 : "memory");
}

__device__ inline void copy_4(void* shared, const void* global) {
    const uint32 target = (uint32)__cvta_generic_to_shared(shared);
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(target), "l"(global) : "memory");
}

__device__ inline void close_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits for the copies of this thread, but for those of the last OPEN closed groups.
template <int OPEN>
__device__ inline void wait_for_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(OPEN) : "memory");
}

__device__ inline float power_of_two(float exponent) {
    float power;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(exponent));
    return power;
}

__device__ inline void mma(int (&c)[4], uint32 a0, uint32 a1, uint32 a2, uint32 a3, uint32 b0, uint32 b1) {
    asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

__device__ inline void load_words(uint32 (&words)[LANE_WORDS], const Stage& stage, int token) {
    const int quad = threadIdx.x % 4;
    const uint32* source = (const uint32*)stage.codes + place_of(token) * WORDS + quad * LANE_WORDS;
#if LANE_WORDS == 4 && WORDS == 16
    const uint4 loaded = *(const uint4*)source;
    words[0] = loaded.x, words[1] = loaded.y, words[2] = loaded.z, words[3] = loaded.w;
#elif LANE_WORDS == 2 && WORDS % 2 == 0
    uint2 loaded = make_uint2(0, 0);
    if (quad * LANE_WORDS < WORDS) loaded = *(const uint2*)source;
    words[0] = loaded.x, words[1] = loaded.y;
#else
#pragma unroll
    for (int i = 0; i < LANE_WORDS; i++) words[i] = quad * LANE_WORDS + i < WORDS ? source[i] : 0;
#endif
}

// Two lanes, `apart`, each have two sums of either's: the lower one keeps the first, the upper one the second.
__device__ inline float trade(float first, float second, bool upper, int apart) {
    return (upper ? second : first) + __shfl_xor_sync(FULL_WARP, upper ? first : second, apart);
}

extern "C" __global__ void __launch_bounds__(WARPS * 32) weigh_codes(
    const int8* integers, const float* steps, const float* centre_scores, const uint8* codes,
    const uint16* scales, const uint8* miss, const int64* lengths, const int64* table, int64 pages,
    int64 table_width, short* keys, int64 sinks, int64 tail, float scale) {
    extern __shared__ Stage stages[];
    const int kv_heads = gridDim.y, head = blockIdx.y, batch = blockIdx.z;
    const int64 line = (int64)batch * kv_heads + head;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, row = lane / 4, quad = lane % 4;
    const int first = (blockIdx.x * WARPS + warp) * UNITS;
    // each lane looks up one unit's block, while the rest of what decides whether there is one arrives
    const int page = min((first + min(lane, UNITS - 1)) * UNIT / BLOCK_TOKENS, (int)pages - 1);
    const int block = (int)table[batch * table_width + page];
    const int end = miss[line] ? (int)(lengths[batch] - tail) : 0;
    const int count = min(UNITS, (end + UNIT - 1) / UNIT - first);
    if (count <= 0) return;
    Stage* ring = stages + warp * STAGES;
    const int64 policy = passing();
    const auto fill = [&](int unit) {
        if (unit < count) {
            Stage& stage = ring[unit % STAGES];
            const int base = (first + unit) * UNIT;
            const int64 source = __shfl_sync(FULL_WARP, block, unit) * (int64)kv_heads + head;
            const int64 token = source * BLOCK_TOKENS + base % BLOCK_TOKENS;
#pragma unroll
            for (int i = 0; i < DIM; i += 32)
                if (i + lane < DIM)
                    copy_16(stage.codes + chunk_place(i + lane), (const uint4*)(codes + token * (DIM / 4)) + i + lane,
                            policy);
            if (lane < UNIT / 8) copy_16((uint4*)stage.scales + lane, (const uint4*)(scales + token) + lane, policy);
#pragma unroll
            for (int i = 0; i < GROUP; i += 32)
                if (i + lane < GROUP)
                    copy_4(stage.centres + i + lane,
                           centre_scores + (line * pages + base / BLOCK_TOKENS) * GROUP + i + lane);
        }
        close_copies();
    };
#pragma unroll
    for (int unit = 0; unit < STAGES - 1; unit++) fill(unit);
    if (GROUP + lane < COLUMNS * DISTINCT)  // queries that there are not weigh nothing
#pragma unroll
        for (int stage = 0; stage < STAGES; stage++) ring[stage].centres[GROUP + lane] = -INFINITE;

    uint32 weights[COLUMNS][LANE_WORDS][4];  // queries as the B operand
    float factor[COLUMNS][2];
    int start[COLUMNS][2];
#pragma unroll
    for (int column = 0; column < COLUMNS; column++) {
        int sum = 0;
        const int member = column * 8 + row % DISTINCT;
        const uint32* source = (const uint32*)(integers + (line * GROUP + member) * DIM);
#pragma unroll
        for (int i = 0; i < LANE_WORDS; i++)
#pragma unroll
            for (int plane = 0; plane < 4; plane++) {
                const int word = quad * LANE_WORDS + i;
                const uint32 four = member < GROUP && word < WORDS ? source[plane * WORDS + word] : 0;
                weights[column][i][plane] = four;
                sum = __dp4a((int)four, 0x01010101, sum);
            }
        sum += __shfl_xor_sync(FULL_WARP, sum, 1);
        sum += __shfl_xor_sync(FULL_WARP, sum, 2);
#pragma unroll
        for (int pair = 0; pair < 2; pair++) {
            const int mine = column * 8 + (quad * 2 + pair) % DISTINCT;
            factor[column][pair] = mine < GROUP ? steps[line * GROUP + mine] * scale * (LOG2E / 4) : 0.f;
            start[column][pair] = MAGIC - 6 * __shfl_sync(FULL_WARP, sum, (quad * 2 + pair) * 4);
        }
    }
    keys += line * pages * BLOCK_TOKENS;

    for (int unit = 0; unit < count; unit++) {
        wait_for_copies<STAGES - 2>();
        __syncwarp();  // every lane's copies are there, and every lane is done with the stage that comes next
        fill(unit + STAGES - 1);
        const Stage& stage = ring[unit % STAGES];
        float2 centre[COLUMNS];
#pragma unroll
        for (int column = 0; column < COLUMNS; column++)
            centre[column] = ((const float2*)stage.centres)[column * DISTINCT / 2 + quad % (DISTINCT / 2)];
        float magnitude[SIDES][4];
#pragma unroll
        for (int side = 0; side < SIDES; side++) {
            const uint2 four = ((const uint2*)stage.scales)[SIDES == 1 ? lane / 2 : row * 2 + side];
            magnitude[side][0] = half_to_float((uint16)(four.x & 0xffff));
            magnitude[side][1] = half_to_float((uint16)(four.x >> 16));
            magnitude[side][2] = half_to_float((uint16)(four.y & 0xffff));
            magnitude[side][3] = half_to_float((uint16)(four.y >> 16));
        }
        float weight[SIDES][4];
#pragma unroll
        for (int tile = 0; tile < 4; tile++) {
            uint32 low[LANE_WORDS], high[LANE_WORDS];
            load_words(low, stage, row * 8 + tile);
            load_words(high, stage, row * 8 + 4 + tile);
#pragma unroll
            for (int side = 0; side < SIDES; side++) weight[side][tile] = 0.f;
#pragma unroll
            for (int column = 0; column < COLUMNS; column++) {
                int even[4] = {0, 0, 0, 0};
                int odd[4] = {start[column][0], start[column][1], start[column][0], start[column][1]};
#pragma unroll
                for (int i = 0; i < LANE_WORDS; i++) {
                    const uint32(&planes)[4] = weights[column][i];
                    const uint32 low_half = low[i] >> 4, high_half = high[i] >> 4;
                    mma(even, low[i] & 0x03030303, high[i] & 0x03030303, low_half & 0x03030303,
                        high_half & 0x03030303, planes[0], planes[2]);
                    mma(odd, low[i] & 0x0c0c0c0c, high[i] & 0x0c0c0c0c, low_half & 0x0c0c0c0c,
                        high_half & 0x0c0c0c0c, planes[1], planes[3]);
                }
#pragma unroll
                for (int side = 0; side < SIDES; side++)
#pragma unroll
                    for (int pair = 0; pair < 2; pair++) {
                        const bool upper = SIDES == 1 ? quad >= 2 : side == 1;
                        const int level = 4 * (upper ? even[2 + pair] : even[pair]) + (upper ? odd[2 + pair] : odd[pair]);
                        weight[side][tile] += power_of_two(
                            (__int_as_float(level) - __int_as_float(MAGIC)) *
                                (magnitude[side][tile] * factor[column][pair]) +
                            (pair ? centre[column].y : centre[column].x));
                    }
            }
        }
        if (SIDES == 2)
#pragma unroll
            for (int tile = 0; tile < 4; tile++)
                weight[0][tile] = trade(weight[0][tile], weight[SIDES - 1][tile], quad >= 2, 2);
        const uint32 lower = __float_as_uint(trade(weight[0][0], weight[0][2], quad % 2, 1));
        const uint32 upper = __float_as_uint(trade(weight[0][1], weight[0][3], quad % 2, 1));
        const int position = (first + unit) * UNIT + lane * 2;
        uint32 both = __byte_perm(lower, upper, 0x7632);
        if (position < sinks) both |= 0x0000ffff;
        if (position + 1 < sinks) both |= 0xffff0000;
        *(uint32*)(keys + position) = both;
    }
}
#endif

#ifdef THREADS
// -------------------------------------------------------------------------------------------------- choose
// One block a (KV head, sequence). The k best keys lie in the k best stretches of 16, by their largest key: those
// are found first, and only they are looked at again. Then the set's members look themselves up among the chosen
// positions. The k-th best is found by counting: by the highest byte, then by the next byte of those that share
// it. A barrier costs as much as the little work between two of them, so every warp reads the counts for itself,
// and each byte has bins of its own, empty from the start.
#define BINS 256
#define HELD 4  // members that a thread looks up at the same time

__device__ inline int key_of(const uint4& eight, int i) {
    const uint32 words[4] = {eight.x, eight.y, eight.z, eight.w};
    return i % 2 ? (int)words[i / 2] >> 16 : (int)(short)(words[i / 2] & 0xffff);
}

// Those from `left` on are no candidates.
__device__ inline void cut(uint4& eight, int left) {
    uint32* words[4] = {&eight.x, &eight.y, &eight.z, &eight.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        if (left <= i * 2 + 1) *words[i] |= 0xffff0000;
        if (left <= i * 2) *words[i] |= 0x0000ffff;
    }
}

// The larger the byte, the earlier the bin.
__device__ inline void count(int* bins, int value, int shift) { atomicAdd(&bins[~value >> shift & (BINS - 1)], 1); }

// The bin in which the running count reaches `wanted`, -1 where it never does; `before` becomes the count of the
// bins before it. All lanes get the same.
__device__ inline int find_bin(const int* bins, int wanted, int& before) {
    const int lane = threadIdx.x % 32;
    const int4 low = ((const int4*)bins)[lane * 2], high = ((const int4*)bins)[lane * 2 + 1];
    const int held[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
    const int sum = low.x + low.y + low.z + low.w + (high.x + high.y + high.z + high.w);
    int running = sum;
#pragma unroll
    for (int offset = 1; offset < 32; offset <<= 1) {
        const int other = __shfl_up_sync(FULL_WARP, running, offset);
        if (lane >= offset) running += other;
    }
    const uint32 reached = __ballot_sync(FULL_WARP, running >= wanted);
    if (reached == 0) return -1;
    running -= sum;
    before = running;
    int bin = lane * 8;
#pragma unroll
    for (int i = 0; i < 8; i++) {
        running += held[i];
        if (running < wanted) bin++, before = running;
    }
    const int owner = __ffs(reached) - 1;
    before = __shfl_sync(FULL_WARP, before, owner);
    return __shfl_sync(FULL_WARP, bin, owner);
}

// The k-th largest of all values, 0 where fewer are counted; `ties` becomes how many of those that equal it are
// among the k. The byte at `shift` is counted in the first bins already; `each` calls its argument with the values.
template <typename Each>
__device__ inline int find_value(int (*bins)[BINS], int shift, int k, int& ties, Each each) {
    int found = 0;
    ties = k;
    while (true) {
        int before;
        const int bin = find_bin(*bins, ties, before);
        if (bin < 0) return 0;
        ties -= before;
        found = found << 8 | (BINS - 1 - bin);
        if (shift == 0) return found;
        bins++;
        each([&](int value) {
            if (value >> shift == found) count(*bins, value, shift - 8);
        });
        shift -= 8;
        __syncthreads();
    }
}

// Calls `take` with the ranks and indices, both ascending, of the values above `bound` and of the first `ties` that
// equal it; how many they are. `load` gets N of the values from an index on, -1 for what there is not.
template <int N, typename Load, typename Take>
__device__ inline int keep(int count, int bound, int ties, int* room, Load load, Take take) {
    int better = 0, same = 0;
    for (int first = 0; first < count; first += THREADS * N) {
        const int index = first + threadIdx.x * N;
        int values[N], mine = 0, sum;
#pragma unroll
        for (int i = 0; i < N; i++) values[i] = -1;
        if (index < count) load(index, values);
#pragma unroll
        for (int i = 0; i < N; i++) mine += (values[i] > bound) + ((values[i] == bound) << 16);
        const int packed = block_before(mine, room, sum);
        int above = better + (packed & 0xffff), equal = same + (packed >> 16);
        if (mine)
#pragma unroll
            for (int i = 0; i < N; i++) {
                if (values[i] > bound || (values[i] == bound && equal < ties))
                    take(above + min(equal, ties), index + i);
                above += values[i] > bound;
                equal += values[i] == bound;
            }
        better += sum & 0xffff;
        same += sum >> 16;
    }
    return better + min(same, ties);
}

extern "C" __global__ void __launch_bounds__(THREADS, 2) choose(
    const short* keys, int64 span, int64 tail, const uint8* miss, const int64* lengths, int* members,
    int* stamps, int64* tally, int* slots, int* counts, int64 k64, int64 capacity64, int64 kv_heads) {
    extern __shared__ uint4 memory[];
    __shared__ int room[32];
    const int k = (int)k64, capacity = (int)capacity64, thread = threadIdx.x;
    const int64 line = blockIdx.x, batch = line / kv_heads;
    const int places = (k + 15) / 16 * 16;
    uint4* eights = memory;  // [span / 128] largest keys of the stretches; then [2 * k] the keys of the best ones
    int(*bins)[BINS] = (int(*)[BINS])(eights + max(2 * k, ((int)span + 127) / 128));  // [7]
    uint8* known = (uint8*)(bins + 7);     // [places] whether a chosen position is resident
    int* chosen = (int*)(known + places);  // [places] positions, ascending
    int* active = chosen + places;         // [places] the best stretches, ascending; then positions to move
    int* idle = active + places;           // [capacity] steps since a member was selected
    for (int i = thread; i < 7 * BINS + places / 4; i += THREADS) bins[0][i] = 0;  // `known` too
    __syncthreads();
    const int length = (int)lengths[batch];
    if (!miss[line] || length <= 0) {
        if (thread == 0) counts[line] = 0;
        return;
    }
    const int end = max(0, min((int)span, length - (int)tail));
    const uint4* source = (const uint4*)(keys + line * span);
    members += line * capacity;
    stamps += line * capacity;
    slots += line * k;

    // 1. the k best stretches
    const int groups = (end + 127) / 128;  // of eight stretches
    for (int first = 0; first < groups * 16; first += LOADS * THREADS) {
        uint4 loaded[LOADS];
#pragma unroll
        for (int i = 0; i < LOADS; i++) {
            const int at = first + i * THREADS + thread;
            loaded[i] = make_uint4(0, 0, 0, 0);
            if (at * 8 < end) loaded[i] = source[at];
        }
#pragma unroll
        for (int i = 0; i < LOADS; i++) {
            const int at = first + i * THREADS + thread;
            uint4& eight = loaded[i];
            cut(eight, end - at * 8);
            uint32 best = __vmaxs2(__vmaxs2(eight.x, eight.y), __vmaxs2(eight.z, eight.w));
            best = __vmaxs2(best, __shfl_xor_sync(FULL_WARP, best, 1));
            const int top = max((int)best >> 16, (int)(short)(best & 0xffff));
            if (thread % 2 || at >= groups * 16) continue;
            ((short*)eights)[at / 2] = (short)top;
            if (top >= 0) count(bins[0], top, 8);
        }
    }
    __syncthreads();
    const auto of_eights = [&](int index, int(&values)[8]) {
        const uint4 eight = eights[index / 8];
#pragma unroll
        for (int i = 0; i < 8; i++) values[i] = key_of(eight, i);
    };
    int looked_at = groups;  // eights
    const auto each_key = [&](auto visit) {
        for (int i = thread; i < looked_at; i += THREADS) {
            const uint4 eight = eights[i];
#pragma unroll
            for (int j = 0; j < 8; j++) visit(key_of(eight, j));
        }
    };
    int ties;
    int bound = find_value(bins, 8, k, ties, each_key);
    const int stretches = keep<8>(
        groups * 8, bound, ties, room, of_eights, [&](int rank, int stretch) { active[rank] = stretch; });
    __syncthreads();

    // 2. the k best positions in them: none of these has a key below that of the last stretch
    looked_at = stretches * 2;
    for (int i = thread; i < looked_at; i += THREADS) {
        const int at = active[i / 2] * 2 + i % 2;
        uint4 eight = source[at];
        cut(eight, end - at * 8);
        eights[i] = eight;
#pragma unroll
        for (int j = 0; j < 8; j++)
            if (key_of(eight, j) >= bound) count(bins[2], key_of(eight, j), 8);
    }
    __syncthreads();
    bound = find_value(bins + 2, 8, k, ties, each_key);
    const int positions = keep<8>(looked_at * 8, bound, ties, room, of_eights, [&](int rank, int index) {
        chosen[rank] = active[index / 16] * 16 + index % 16;
    });
    __syncthreads();

    // 3. those that are resident are marked
    for (int first = 0; first < capacity; first += HELD * THREADS) {
        int member[HELD], stamp[HELD];
#pragma unroll
        for (int i = 0; i < HELD; i++) {
            const int slot = first + i * THREADS + thread;
            member[i] = slot < capacity ? members[slot] : -1;
            stamp[i] = slot < capacity ? stamps[slot] : 0;
        }
#pragma unroll
        for (int i = 0; i < HELD; i++) {
            const int slot = first + i * THREADS + thread;
            if (slot >= capacity) break;
            int low = 0, high = positions;
            while (low < high) {
                const int middle = (low + high) >> 1;
                if (chosen[middle] < member[i]) low = middle + 1;
                else high = middle;
            }
            if (low < positions && chosen[low] == member[i]) {
                known[low] = 1;
                stamps[slot] = stamp[i] = length;
            }
            idle[slot] = length - stamp[i];
            count(bins[4], length - stamp[i], 16);
        }
    }
    __syncthreads();
    int missing = 0;
    for (int first = 0; first < positions; first += THREADS) {
        const int i = first + thread;
        const bool lacks = i < positions && !known[i];
        int sum;
        const int rank = missing + block_before(lacks, room, sum);
        if (lacks) active[rank] = chosen[i];
        missing += sum;
    }
    if (thread == 0) {
        counts[line] = missing;
        tally[line * 4 + 2] += positions;
        tally[line * 4 + 3] += missing;
    }
    if (missing == 0) return;
    __syncthreads();

    // 4. the others take the places of those selected longest ago
    bound = find_value(bins + 4, 16, missing, ties, [&](auto visit) {
        for (int slot = thread; slot < capacity; slot += THREADS) visit(idle[slot]);
    });
    keep<2>(
        capacity, bound, ties, room,
        [&](int index, int(&values)[2]) {
#pragma unroll
            for (int i = 0; i < 2; i++) values[i] = index + i < capacity ? idle[index + i] : -1;
        },
        [&](int rank, int slot) {
            members[slot] = active[rank];
            stamps[slot] = length;
            slots[rank] = slot;
        });
}
#endif

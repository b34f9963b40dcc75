// 8-bit queries against 2-bit codes on the integer tensor cores.
//
// A warp takes UNITS units of 64 tokens, through a ring of STAGES in shared memory of its own: four tiles of
// 16 tokens x 8 queries of mma.m16n8k32 each. The four planes of a byte of codes are four entries that lie
// DIM / 4 apart; entries go through the tensor cores in the order in which the bytes hold them. The odd
// planes go in four times too large, which saves their shifts, so they have accumulators of their own, which
// start at -6 times the sum of the queries: with 4 times the even ones that makes 4 times the levels of the
// quantiser.
//
// Row r of the four tiles takes the tokens 8 r to 8 r + 7 of a unit, so that a lane's scales lie together,
// and so do the scores: those of tokens 2 * lane and 2 * lane + 1 end up in a lane, a run of 16 in 8 lanes.
#include "common.cuh"

#define UNIT 64
#define RUN 16
#define WORDS (DIM / 16)               // 32-bit words of codes for a token
#define LANE_WORDS ((WORDS + 3) / 4)   // of them for a lane
#define COLUMNS ((GROUP + 7) / 8)      // tiles of 8 queries
#define DISTINCT (GROUP <= 4 ? 4 : 8)  // of them that differ: up to 4 queries stand in a tile twice
// Halves of a tile that a lane scores: where queries are doubled, the lower quads leave the rows from 8 on to
// the upper ones.
#define SIDES (GROUP <= 4 ? 1 : 2)
#define MAGIC 0x4b400000  // as float 1.5 * 2**23: integers added to it become floats without a conversion

struct Stage {
    uint4 codes[DIM];
    uint16 scales[UNIT];
    float offsets[COLUMNS * DISTINCT];
};

// Rows of a tile are 8 tokens apart; shuffled within those, the tokens that are read together lie in
// different banks.
__device__ inline int place_of(int token) { return DIM % 64 == 0 ? token ^ (token / 8 % 8) : token; }

__device__ inline int chunk_place(int chunk) {
#if DIM % 64 == 0
    return place_of(chunk / (DIM / 64)) * (DIM / 64) + chunk % (DIM / 64);
#else
    return chunk;
#endif
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

// Two lanes, `apart`, each hold a part of two sums: the lower one ends with the first sum, the upper one with
// the second.
__device__ inline float trade(float first, float second, bool upper, int apart) {
    return (upper ? second : first) + __shfl_xor_sync(FULL_WARP, upper ? first : second, apart);
}

extern "C" __global__ void __launch_bounds__(WARPS * 32) score_codes(
    const int8* integers, const float* steps, const float* offsets, const uint8* codes, const uint16* scales,
    const uint8* reselect, const int64* lengths, const int64* page_table, int64 max_blocks, int64 table_width,
    short* scores, uint32* runs, int64 sinks, int64 latest, float scale) {
    extern __shared__ Stage stages[];
    const int kv_heads = gridDim.y, head = blockIdx.y, batch = blockIdx.z;
    const int64 line = (int64)batch * kv_heads + head;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, row = lane / 4, quad = lane % 4;
    const int first = (blockIdx.x * WARPS + warp) * UNITS;
    // each lane looks up one unit's page, while the rest of what decides whether there is one arrives
    const int place = min((first + min(lane, UNITS - 1)) * UNIT / BLOCK_TOKENS, (int)max_blocks - 1);
    const int page = (int)page_table[batch * table_width + place];
    const int end = reselect[line] ? (int)(lengths[batch] - latest) : 0;
    const int count = min(UNITS, (end + UNIT - 1) / UNIT - first);
    if (count <= 0) return;
    Stage* ring = stages + warp * STAGES;
    const int64 policy = passing();
    const auto fill = [&](int unit) {
        if (unit < count) {
            Stage& stage = ring[unit % STAGES];
            const int base = (first + unit) * UNIT;
            const int64 source = __shfl_sync(FULL_WARP, page, unit) * (int64)kv_heads + head;
            const int64 token = source * BLOCK_TOKENS + base % BLOCK_TOKENS;
#pragma unroll
            for (int i = 0; i < DIM; i += 32)
                if (i + lane < DIM)
                    copy_16(
                        stage.codes + chunk_place(i + lane),
                        (const uint4*)(codes + token * (DIM / 4)) + i + lane, policy);
            if (lane < UNIT / 8)
                copy_16((uint4*)stage.scales + lane, (const uint4*)(scales + token) + lane, policy);
#pragma unroll
            for (int i = 0; i < GROUP; i += 32)
                if (i + lane < GROUP)
                    copy_4(
                        stage.offsets + i + lane,
                        offsets + (line * max_blocks + base / BLOCK_TOKENS) * GROUP + i + lane);
        }
        close_copies();
    };
#pragma unroll
    for (int unit = 0; unit < STAGES - 1; unit++) fill(unit);
    if (GROUP + lane < COLUMNS * DISTINCT)  // queries past the group add nothing
#pragma unroll
        for (int stage = 0; stage < STAGES; stage++) ring[stage].offsets[GROUP + lane] = -INFINITE;

    uint32 weights[COLUMNS][LANE_WORDS][4];  // queries as the B operand
    float factor[COLUMNS][2];
    int start[COLUMNS][2];
#pragma unroll
    for (int column = 0; column < COLUMNS; column++) {
        int sum = 0;
        const int query = column * 8 + row % DISTINCT;
        const uint32* source = (const uint32*)(integers + (line * GROUP + query) * DIM);
#pragma unroll
        for (int i = 0; i < LANE_WORDS; i++)
#pragma unroll
            for (int plane = 0; plane < 4; plane++) {
                const int word = quad * LANE_WORDS + i;
                const uint32 four = query < GROUP && word < WORDS ? source[plane * WORDS + word] : 0;
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
    scores += line * max_blocks * BLOCK_TOKENS;
    runs += line * max_blocks * (BLOCK_TOKENS / RUN);

    for (int unit = 0; unit < count; unit++) {
        wait_for_copies<STAGES - 2>();
        __syncwarp();  // every lane's copies are there, and every lane is done with the stage that comes next
        fill(unit + STAGES - 1);
        const Stage& stage = ring[unit % STAGES];
        float2 offset[COLUMNS];
#pragma unroll
        for (int column = 0; column < COLUMNS; column++)
            offset[column] = ((const float2*)stage.offsets)[column * DISTINCT / 2 + quad % (DISTINCT / 2)];
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
                        const int level =
                            4 * (upper ? even[2 + pair] : even[pair]) + (upper ? odd[2 + pair] : odd[pair]);
                        weight[side][tile] += power_of_2(
                            (__int_as_float(level) - __int_as_float(MAGIC)) *
                                (magnitude[side][tile] * factor[column][pair]) +
                            (pair ? offset[column].y : offset[column].x));
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
        if (position < sinks || position >= end) both |= 0x0000ffff;
        if (position + 1 < sinks || position + 1 >= end) both |= 0xffff0000;
        *(uint32*)(scores + position) = both;
        uint32 best = both;
        float sum = (int)(both << 16) > 0 ? __uint_as_float(both << 16) : 0.f;
        sum += (int)both >= 1 << 16 ? __uint_as_float(both & 0xffff0000) : 0.f;
#pragma unroll
        for (int apart = 1; apart < RUN / 2; apart *= 2) {
            best = __vmaxs2(best, __shfl_xor_sync(FULL_WARP, best, apart));
            sum += __shfl_xor_sync(FULL_WARP, sum, apart);
        }
        if (lane % (RUN / 2) == 0) {
            const int top = max((int)best >> 16, (int)(short)(best & 0xffff));
            runs[position / RUN] = __byte_perm(top, __float_as_uint(sum), 0x7610);
        }
    }
}

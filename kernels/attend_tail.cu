// Attention over the tail from 2-bit codes. A warp takes runs of 16 tokens: 8 queries times 16 keys on the
// integer tensor cores, as in score.cu, whose scores lie as the other tensor cores want the weights; then the
// weights times the values' codes. A code c of a value goes in as 1 + c / 4, which its bits and those of 1
// make without arithmetic; what is too much is the sum of the weights, taken off at the end.
//
// Weights are relative to the log-sum-exp of the step before, so that no maximum has to be found first.
//
//   RUNS    runs of a block
//   STAGES  runs on their way to a warp
#include "common.cuh"
#include "hadamard.cuh"

#define RUN 16
#define WARPS (THREADS / 32)
#define WORDS (DIM / 16)              // 32-bit words of codes for a key
#define LANE_WORDS ((WORDS + 3) / 4)  // of them for a lane
#define TILES ((GROUP + 7) / 8)       // tiles of 8 queries
#define CHUNKS (DIM / 8)
#define BLOCKS (DIM > 128 ? 1 : DIM % 64 ? 4 : 5)  // blocks on a multiprocessor that leave enough registers
#define MOST 100.f  // base-2 logarithm of a weight: sums of more would be infinite

struct Stage {  // a run on its way to a warp
    uint4 keys[DIM / 4], values[HALVES * 16];
    uint16 key_scales[RUN], value_scales[RUN];
    float offsets[8];
};

struct Total {
    float weights, rounded;  // sums of the weights, and of the weights times scales as they were multiplied
};

__device__ inline void multiply_codes(
    int (&c)[4], uint32 query_low, uint32 query_high, uint32 keys_low, uint32 keys_high) {
    asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.u8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %5}, {%7, %8}, "
        "{%0, %1, %2, %3};"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
        : "r"(query_low), "r"(0), "r"(query_high), "r"(keys_low), "r"(keys_high));
}

__device__ inline void multiply_values(
    float (&c)[4], uint32 a0, uint32 a1, uint32 a2, uint32 a3, const uint32 (&b)[2]) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b[0]), "r"(b[1]));
}

__device__ inline uint32 two_bfloats(float low, float high) {
    uint32 both;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    return both;
}

// The codes at place PLACE of two words, each as 1 + code / 4.
template <int PLACE>
__device__ inline uint32 code_pair(uint32 words) {
    const uint32 moved = 2 * PLACE < 5 ? words << (5 - 2 * PLACE) : words >> (2 * PLACE - 5);
    return (moved & 0x00600060) | 0x3f803f80;
}

__device__ inline void load_words(uint32 (&words)[LANE_WORDS], const Stage& stage, int token) {
    const int first = threadIdx.x % 4 * LANE_WORDS;
    const uint32* key = (const uint32*)stage.keys + token * WORDS;
#if LANE_WORDS == 4 && WORDS == 16
    const uint4 loaded = *(const uint4*)(key + first);
    words[0] = loaded.x, words[1] = loaded.y, words[2] = loaded.z, words[3] = loaded.w;
#elif LANE_WORDS == 2 && WORDS == 8
    const uint2 loaded = *(const uint2*)(key + first);
    words[0] = loaded.x, words[1] = loaded.y;
#else
#pragma unroll
    for (int i = 0; i < LANE_WORDS; i++) words[i] = first + i < WORDS ? key[first + i] : 0;
#endif
}

__device__ inline float half_of(uint32 pair, int which) {
    return half_to_float((uint16)(which ? pair >> 16 : pair & 0xffff));
}

__device__ inline float quad_sum(float value) {
    value += __shfl_xor_sync(FULL_WARP, value, 1);
    return value + __shfl_xor_sync(FULL_WARP, value, 2);
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) attend_tail(
    const int8* integers, const float* steps, const float* offsets, const uint8* codes, const uint16* scales,
    const uint2* value_codes, const uint16* value_scales, const int* tail_runs, const int* tail_masks,
    const int* tail_counts, int64 most, const int64* lengths, const int64* page_table, int64 max_blocks,
    int64 table_width, const float* lse, float* outs, float* sums, float* maxima, int64 parts,
    int64 first_part, float scale) {
    extern __shared__ __align__(16) float room[];  // the stages; at the end [WARPS][HALVES * 16][32]
    __shared__ Total totals[WARPS][8];
    const int kv_heads = gridDim.y, head = blockIdx.y, batch = blockIdx.z;
    const int part = blockIdx.x / TILES, tile = blockIdx.x % TILES;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, row = lane / 4, quad = lane % 4;
    const int64 line = (int64)batch * kv_heads + head;
    const int64 place = (line * parts + first_part + part) * GROUP + tile * 8;
    const int queries = min(8, GROUP - tile * 8);
    const int count = lengths[batch] > 0 ? min(RUNS, tail_counts[line] - part * RUNS) : 0;
    if (count <= 0) {
        for (int i = threadIdx.x; i < queries * DIM; i += THREADS) outs[place * DIM + i] = 0.f;
        if (threadIdx.x < queries) sums[place + threadIdx.x] = 0.f, maxima[place + threadIdx.x] = -INFINITE;
        return;
    }
    // lane i looks up the warp's i-th run
    const int mine = (count - warp + WARPS - 1) / WARPS;
    int run_of_lane = 0, mask_of_lane = 0, page_of_lane = 0;
    if (lane < mine) {
        const int64 entry = line * most + part * RUNS + warp + lane * WARPS;
        run_of_lane = tail_runs[entry], mask_of_lane = tail_masks[entry];
        page_of_lane = (int)page_table[batch * table_width + run_of_lane * RUN / BLOCK_TOKENS];
    }

    Stage* ring = (Stage*)room + warp * STAGES;
    const int64 policy = passing();
    const auto fill = [&](int i) {
        if (i < mine) {
            Stage& stage = ring[i % STAGES];
            const int run = __shfl_sync(FULL_WARP, run_of_lane, i);
            const int64 page = (int64)__shfl_sync(FULL_WARP, page_of_lane, i) * kv_heads + head;
            const int block = run * RUN / BLOCK_TOKENS;
            const int64 token = page * BLOCK_TOKENS + run * RUN % BLOCK_TOKENS;
#pragma unroll
            for (int at = 0; at < DIM / 4; at += 32)
                if (at + lane < DIM / 4)
                    copy_16(stage.keys + at + lane, codes + token * (DIM / 4) + (at + lane) * 16, policy);
#pragma unroll
            for (int at = 0; at < HALVES * 16; at += 32)
                if (at + lane < HALVES * 16)
                    copy_16(
                        stage.values + at + lane, value_codes + token / RUN * (HALVES * 32) + (at + lane) * 2,
                        policy);
            if (lane < 2) copy_16(stage.key_scales + lane * 8, scales + token + lane * 8, policy);
            else if (lane < 4)
                copy_16(stage.value_scales + lane * 8 - 16, value_scales + token + lane * 8 - 16, policy);
            else if (lane >= 8 && lane < 8 + queries)
                copy_4(
                    stage.offsets + lane - 8,
                    offsets + (line * max_blocks + block) * GROUP + tile * 8 + lane - 8);
        }
        close_copies();
    };
#pragma unroll
    for (int i = 0; i < STAGES - 1; i++) fill(i);

    const int query = tile * 8 + row;
    const bool used = query < GROUP;
    uint32 weights[LANE_WORDS][4];  // of the query, by planes
    int start = 0;
    {
        const uint32* source = (const uint32*)(integers + (line * GROUP + query) * DIM);
#pragma unroll
        for (int i = 0; i < LANE_WORDS; i++)
#pragma unroll
            for (int plane = 0; plane < 4; plane++) {
                const int word = quad * LANE_WORDS + i;
                const uint32 four = used && word < WORDS ? source[plane * WORDS + word] : 0;
                weights[i][plane] = four;
                start = __dp4a((int)four, 0x01010101, start);
            }
        start += __shfl_xor_sync(FULL_WARP, start, 1);
        start = -6 * (start + __shfl_xor_sync(FULL_WARP, start, 2));
    }
    const float factor = used ? steps[line * GROUP + query] * scale * (LOG2E / 4) : 0.f;

    float sum[HALVES][4][4] = {};  // [half][i][j]: place 2 * i + j / 2 of a chunk, query 2 * quad + j % 2
    Total total = {0.f, 0.f};      // of query `row`
#pragma unroll 1
    for (int i = 0; i < mine; i++) {
        wait_for_copies<STAGES - 2>();
        __syncwarp();  // every lane's copies are there, and every lane is done with the stage that comes next
        fill(i + STAGES - 1);
        const Stage& stage = ring[i % STAGES];
        const uint32 mask = __shfl_sync(FULL_WARP, mask_of_lane, i);
        const float offset = stage.offsets[row];
        uint32 rounded[2];
#pragma unroll
        for (int upper = 0; upper < 2; upper++) {
            uint32 words[LANE_WORDS];
            load_words(words, stage, upper * 8 + row);
            int even[4] = {0, 0, 0, 0}, odd[4] = {start, start, 0, 0};
#pragma unroll
            for (int w = 0; w < LANE_WORDS; w++) {
                const uint32 word = words[w], shifted = word >> 4;
                multiply_codes(even, weights[w][0], weights[w][2], word & 0x03030303, shifted & 0x03030303);
                multiply_codes(odd, weights[w][1], weights[w][3], word & 0x0c0c0c0c, shifted & 0x0c0c0c0c);
            }
            const uint32 key_scales = ((const uint32*)stage.key_scales)[upper * 4 + quad];
            const uint32 scales_of_values = ((const uint32*)stage.value_scales)[upper * 4 + quad];
            float scaled[2];
#pragma unroll
            for (int j = 0; j < 2; j++) {
                const float exponent =
                    (float)(4 * even[j] + odd[j]) * (half_of(key_scales, j) * factor) + offset;
                const bool counts = used && mask >> (upper * 8 + quad * 2 + j) & 1;
                const float weight = counts ? power_of_2(fminf(exponent, MOST)) : 0.f;
                total.weights += weight;
                // by choice, as the place of a token that is not there may hold anything, NaN too
                scaled[j] = counts ? weight * half_of(scales_of_values, j) : 0.f;
            }
            rounded[upper] = two_bfloats(scaled[0], scaled[1]);
            total.rounded +=
                __uint_as_float(rounded[upper] << 16) + __uint_as_float(rounded[upper] & 0xffff0000);
        }
#pragma unroll
        for (int half = 0; half < HALVES; half++) {
            const uint2 both = ((const uint2*)stage.values)[half * 32 + lane];
            const uint32 low = both.x, high = both.y;
            multiply_values(
                sum[half][0], code_pair<0>(low), code_pair<1>(low), code_pair<0>(high), code_pair<1>(high),
                rounded);
            multiply_values(
                sum[half][1], code_pair<2>(low), code_pair<3>(low), code_pair<2>(high), code_pair<3>(high),
                rounded);
            multiply_values(
                sum[half][2], code_pair<4>(low), code_pair<5>(low), code_pair<4>(high), code_pair<5>(high),
                rounded);
            multiply_values(
                sum[half][3], code_pair<6>(low), code_pair<7>(low), code_pair<6>(high), code_pair<7>(high),
                rounded);
        }
    }
    total.weights = quad_sum(total.weights);
    total.rounded = quad_sum(total.rounded);
    if (quad == 0) totals[warp][row] = total;
    wait_for_copies<0>();
    __syncthreads();  // the sums take the place of all stages
#pragma unroll
    for (int half = 0; half < HALVES; half++)
#pragma unroll
        for (int i = 0; i < 4; i++)
#pragma unroll
            for (int j = 0; j < 4; j++)
                room[(warp * HALVES * 16 + half * 16 + i * 4 + j) * 32 + lane] = sum[half][i][j];
    __syncthreads();
    if (warp > 1) return;

    // Warp 0 ends the even queries, warp 1 the odd ones: a query's values lie over the 8 lanes with its quad.
    const int own = quad * 2 + warp;
    total = {0.f, 0.f};
#pragma unroll
    for (int w = 0; w < WARPS; w++) {
        total.weights += totals[w][own].weights;
        total.rounded += totals[w][own].rounded;
    }
    float values[HALVES][8];
    const float share = total.weights > 0.f ? 4.f * rsqrtf((float)TRANSFORMED) / total.weights : 0.f;
#pragma unroll
    for (int half = 0; half < HALVES; half++)
#pragma unroll
        for (int at = 0; at < 8; at++) {
            float value = -1.375f * total.rounded;
#pragma unroll
            for (int w = 0; w < WARPS; w++)
                value += room[(w * HALVES * 16 + half * 16 + at / 2 * 4 + at % 2 * 2 + warp) * 32 + lane];
            values[half][at] = value * share;
        }
    transform<4>(values, row);
    if (tile * 8 + own >= GROUP) return;
#pragma unroll
    for (int half = 0; half < HALVES; half++) {
        const int chunk = half * 8 + row;
        if (chunk >= CHUNKS) break;
        float4* target = (float4*)(outs + (place + own) * DIM + chunk * 8);
#pragma unroll
        for (int four = 0; four < 2; four++) {
            const float* from = values[half] + four * 4;
            const int entry = chunk * 8 + four * 4;
            target[four] = make_float4(
                from[0] * sign_of(entry), from[1] * sign_of(entry + 1), from[2] * sign_of(entry + 2),
                from[3] * sign_of(entry + 3));
        }
    }
    if (row == 0) {
        const bool any = total.weights > 0.f;
        sums[place + own] = any ? 1.f : 0.f;
        maxima[place + own] =
            any ? lse[line * GROUP + tile * 8 + own] + __log2f(total.weights) * LN2 : -INFINITE;
    }
}

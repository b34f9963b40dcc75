// Attention over the tail from 2-bit codes. A warp takes runs of 16 tokens, two at a time: 8 queries times 16
// keys on the integer tensor cores, as in score.cu, whose scores lie as the other tensor cores want the
// weights; then the weights times the values' codes. A code c of a value goes in as 1 + c / 64, 1 + c / 16 or
// 1 + c / 4, which its bits and those of 1 make without arithmetic; what is too much is the sum of the
// weights, taken off at the end.
//
// Up to 4 queries stand in a tile of 8 twice: the lower half of the lanes weighs the first run for them, the
// upper half the second one.
//
// Weights are relative to the log-sum-exp of the step before, so that no maximum has to be found first.
//
//   RUNS    runs of a block
//   STAGES  pairs of runs on their way to a warp, or with it
#include "common.cuh"
#include "hadamard.cuh"

#define RUN 16
#define WARPS (THREADS / 32)
#define WORDS (DIM / 16)              // 32-bit words of codes for a key
#define LANE_WORDS ((WORDS + 3) / 4)  // of them for a lane
#define TILES ((GROUP + 7) / 8)       // tiles of 8 queries
#define CHUNKS (DIM / 8)
#define BLOCKS (DIM > 128 ? 1 : DIM == 64 ? 5 : 4)  // blocks on a multiprocessor that leave enough registers
#define PAGE_RUNS (BLOCK_TOKENS / RUN)
#define PAIRED (GROUP <= 4)        // queries stand in their tile twice
#define DISTINCT (PAIRED ? 4 : 8)  // queries of a tile
#define MOST 100.f                 // base-2 logarithm of a weight: sums of more would be infinite
#define MAGIC 0x4b400000  // as float 1.5 * 2**23: integers added to it become floats without a conversion

struct Run {
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

// By what the codes at a place are divided when they are multiplied.
__host__ __device__ constexpr float shrunk(int place) {
    return place % 3 == 0 ? 64.f : place % 3 == 1 ? 16.f : 4.f;
}

// The codes at place PLACE of two half words, each as 1 + code / shrunk(PLACE). Three places share a shift.
template <int PLACE>
__device__ inline uint32 code_pair(uint32 words) {
    const uint32 moved = PLACE < 3 ? words << 1 : words >> (PLACE / 3 * 6 - 1);
    return (moved & (0x00060006 << PLACE % 3 * 2)) | 0x3f803f80;
}

__device__ inline void load_words(uint32 (&words)[LANE_WORDS], const Run& run, int token) {
    const int first = threadIdx.x % 4 * LANE_WORDS;
    const uint32* key = (const uint32*)run.keys + token * WORDS;
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
    const int* tail_counts, const float* tail_boosts, int64 most, const int64* lengths,
    const int64* page_table, int64 max_blocks, int64 table_width, const float* lse, float* outs, float* sums,
    float* maxima, int64 parts, int64 first_part, float scale) {
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
        wait_for_previous();  // whoever waits for this kernel may reuse the memory of that one
        for (int i = threadIdx.x; i < queries * DIM; i += THREADS) outs[place * DIM + i] = 0.f;
        if (threadIdx.x < queries) sums[place + threadIdx.x] = 0.f, maxima[place + threadIdx.x] = -INFINITE;
        return;
    }
    // lane i looks up the warp's i-th run
    const int mine = (count - warp + WARPS - 1) / WARPS;
    int place_of_lane = 0, offsets_of_lane = 0, mask_of_lane = 0;
    if (lane < mine) {
        const int64 entry = line * most + part * RUNS + warp + lane * WARPS;
        const int run = tail_runs[entry], block = run / PAGE_RUNS;
        const int page = (int)page_table[batch * table_width + block];
        place_of_lane = (page * kv_heads + head) * PAGE_RUNS + run % PAGE_RUNS;
        offsets_of_lane = (int)(line * max_blocks + block) * GROUP + tile * 8;
        mask_of_lane = tail_masks[entry];
    }

    Run(*ring)[2] = (Run(*)[2])room + warp * STAGES;
    const int64 policy = passing();
    const auto fill = [&](int first, bool with_offsets) {
#pragma unroll
        for (int which = 0; which < 2; which++) {
            const int i = first + which;
            if (i >= mine) break;
            Run& run = ring[i / 2 % STAGES][which];
            const int64 place = __shfl_sync(FULL_WARP, place_of_lane, i);
            const int at_offsets = __shfl_sync(FULL_WARP, offsets_of_lane, i);
#pragma unroll
            for (int at = 0; at < DIM / 4; at += 32)
                if (at + lane < DIM / 4)
                    copy_16(
                        run.keys + at + lane, (const uint4*)codes + place * (DIM / 4) + at + lane, policy);
#pragma unroll
            for (int at = 0; at < HALVES * 16; at += 32)
                if (at + lane < HALVES * 16)
                    copy_16(
                        run.values + at + lane, (const uint4*)value_codes + place * (HALVES * 16) + at + lane,
                        policy);
            if (lane < 2)
                copy_16((uint4*)run.key_scales + lane, (const uint4*)scales + place * 2 + lane, policy);
            else if (lane < 4)
                copy_16(
                    (uint4*)run.value_scales + lane - 2, (const uint4*)value_scales + place * 2 + lane - 2,
                    policy);
            else if (with_offsets && lane >= 8 && lane < 8 + queries)
                copy_4(run.offsets + lane - 8, offsets + at_offsets + lane - 8);
        }
        close_copies();
    };
#pragma unroll
    for (int i = 0; i < STAGES - 1; i++) fill(i * 2, false);
    wait_for_previous();  // for the query
#pragma unroll
    for (int i = 0; i < (STAGES - 1) * 2; i++) {
        const int at_offsets = __shfl_sync(FULL_WARP, offsets_of_lane, i);
        if (i < mine && lane < queries) ring[i / 2][i % 2].offsets[lane] = offsets[at_offsets + lane];
    }

    const int query = tile * 8 + row % DISTINCT;
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
        start = MAGIC - 6 * (start + __shfl_xor_sync(FULL_WARP, start, 2));
    }
    const float factor = used ? steps[line * GROUP + query] * scale * (LOG2E / 4) : 0.f;

    float sum[HALVES][4][4] = {};  // [half][i][j]: place 2 * i + j / 2 of a chunk, row 2 * quad + j % 2
    Total total = {0.f, 0.f};      // of row `row`
#pragma unroll 1
    for (int i = 0; i < mine; i += 2) {
        wait_for_copies<STAGES - 2>();
        __syncwarp();  // every lane's copies are there, and every lane is done with the stage that comes next
        fill(i + (STAGES - 1) * 2, true);
        const Run(&pair)[2] = ring[i / 2 % STAGES];
        int levels[2][2][2];  // [run][upper][j], 4 times, added to MAGIC
#pragma unroll
        for (int which = 0; which < 2; which++)
#pragma unroll
            for (int upper = 0; upper < 2; upper++) {
                uint32 words[LANE_WORDS];
                load_words(words, pair[which], upper * 8 + row);
                int even[4] = {0, 0, 0, 0}, odd[4] = {start, start, 0, 0};
#pragma unroll
                for (int w = 0; w < LANE_WORDS; w++) {
                    const uint32 word = words[w], shifted = word >> 4;
                    multiply_codes(
                        even, weights[w][0], weights[w][2], word & 0x03030303, shifted & 0x03030303);
                    multiply_codes(
                        odd, weights[w][1], weights[w][3], word & 0x0c0c0c0c, shifted & 0x0c0c0c0c);
                }
#pragma unroll
                for (int j = 0; j < 2; j++) levels[which][upper][j] = 4 * even[j] + odd[j];
            }
        uint32 rounded[2][2] = {};  // [run][upper], as the other operand
#pragma unroll
        for (int side = 0; side < (PAIRED ? 1 : 2); side++) {
            const int which = PAIRED ? row / 4 : side;
            const Run& run = pair[which];
            const uint32 listed = __shfl_sync(FULL_WARP, mask_of_lane, i + which), mask = used ? listed : 0;
            const float offset = run.offsets[row % DISTINCT];
#pragma unroll
            for (int upper = 0; upper < 2; upper++) {
                const uint32 key_scales = ((const uint32*)run.key_scales)[upper * 4 + quad];
                const uint32 scales_of_values = ((const uint32*)run.value_scales)[upper * 4 + quad];
                float scaled[2];
#pragma unroll
                for (int j = 0; j < 2; j++) {
                    const int level = which ? levels[1][upper][j] : levels[0][upper][j];
                    const float exponent =
                        (__int_as_float(level) - __int_as_float(MAGIC)) * (half_of(key_scales, j) * factor) +
                        offset;
                    // by choice, as the place of a token that is not there may hold anything, NaN too
                    const bool counts = mask >> (upper * 8 + quad * 2 + j) & 1;
                    const float weight = counts ? power_of_2(fminf(exponent, MOST)) : 0.f;
                    total.weights += weight;
                    scaled[j] = counts ? weight * half_of(scales_of_values, j) : 0.f;
                }
                const uint32 both = two_bfloats(scaled[0], scaled[1]);
                total.rounded += __uint_as_float(both << 16) + __uint_as_float(both & 0xffff0000);
                if (PAIRED) rounded[0][upper] = which ? 0 : both, rounded[1][upper] = which ? both : 0;
                else rounded[side][upper] = both;
            }
        }
#pragma unroll
        for (int which = 0; which < 2; which++)
#pragma unroll
            for (int half = 0; half < HALVES; half++) {
                const uint2 both = ((const uint2*)pair[which].values)[half * 32 + lane];
                const uint32 low = both.x, high = both.y;
                multiply_values(
                    sum[half][0], code_pair<0>(low), code_pair<1>(low), code_pair<0>(high),
                    code_pair<1>(high), rounded[which]);
                multiply_values(
                    sum[half][1], code_pair<2>(low), code_pair<3>(low), code_pair<2>(high),
                    code_pair<3>(high), rounded[which]);
                multiply_values(
                    sum[half][2], code_pair<4>(low), code_pair<5>(low), code_pair<4>(high),
                    code_pair<5>(high), rounded[which]);
                multiply_values(
                    sum[half][3], code_pair<6>(low), code_pair<7>(low), code_pair<6>(high),
                    code_pair<7>(high), rounded[which]);
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

    // Warp 0 ends the even queries, warp 1 the odd ones: a query's values lie over the 8 lanes with its quad;
    // of one that stands in its tile twice, half of each lies 2 lanes apart.
    const int own = quad * 2 + warp;
    total = {0.f, 0.f};
#pragma unroll
    for (int twice = 0; twice <= PAIRED; twice++)
#pragma unroll
        for (int w = 0; w < WARPS; w++) {
            total.weights += totals[w][own ^ twice * 4].weights;
            total.rounded += totals[w][own ^ twice * 4].rounded;
        }
    float values[HALVES][8];
    const float share = total.weights > 0.f ? rsqrtf((float)TRANSFORMED) / total.weights : 0.f;
#pragma unroll
    for (int half = 0; half < HALVES; half++)
#pragma unroll
        for (int at = 0; at < 8; at++) {
            float value = 0.f;
#pragma unroll
            for (int twice = 0; twice <= PAIRED; twice++)
#pragma unroll
                for (int w = 0; w < WARPS; w++)
                    value += room
                        [(w * HALVES * 16 + half * 16 + at / 2 * 4 + at % 2 * 2 + warp) * 32 +
                         (lane ^ twice * 2)];
            values[half][at] = ((value - total.rounded) * shrunk(at) - 1.5f * total.rounded) * share;
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
            any ? lse[line * GROUP + tile * 8 + own] + (__log2f(total.weights) + tail_boosts[line]) * LN2
                : -INFINITE;
    }
}

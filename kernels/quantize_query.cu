// Blocks with z = 0 rotate and round the queries of one (KV head, sequence), PARTS threads for an entry; in
// the other blocks each warp multiplies them with the centre of a page.
//
//   PARTS  of the rows of the rotation, each summed by threads of its own
//   ROPE   whether RoPE is still to be applied to the queries
#include "common.cuh"

#define QUANTIZE_THREADS ((PARTS * DIM + 31) / 32 * 32)
#define ROWS (DIM / PARTS)             // of the rotation, for a thread
#define BATCH (ROWS < 32 ? ROWS : 32)  // of them on their way at a time
#define LANE_ENTRIES ((DIM + 31) / 32)
#define PARTNER(entry) (((entry) + DIM / 2) % DIM)  // that RoPE turns an entry with

// An entry after RoPE, from it and its partner; with the sine of the other sign, before RoPE.
__device__ inline float turned(float value, float partner, int entry, float cosine, float sine) {
    return value * cosine + (entry < DIM / 2 ? -partner : partner) * sine;
}

extern "C" __global__ void __launch_bounds__(QUANTIZE_THREADS) quantize_query(
    const Element* query, int64 query_stride, const Element* cosines, const Element* sines,
    const float* rotation, const float* centres, const float* lse, const int64* lengths,
    const int64* page_table, int64 max_blocks, int64 table_width, int8* integers, float* steps,
    float* offsets, float scale) {
    __shared__ __align__(16) float sums[PARTS][GROUP][DIM];
    const int kv_heads = gridDim.x, head = blockIdx.x, batch = blockIdx.y;
    let_next_begin();
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
    const int64 line = (int64)batch * kv_heads + head;
    query += batch * query_stride + head * GROUP * DIM;
    if (ROPE) cosines += batch * DIM, sines += batch * DIM;
    if (blockIdx.z > 0) {
        const int page = (blockIdx.z - 1) * warps + warp;
        if (page >= max_blocks || (int64)page * BLOCK_TOKENS >= lengths[batch]) return;
        const float* centre = centres + (page_table[batch * table_width + page] * kv_heads + head) * DIM;
        float products[GROUP];
#pragma unroll
        for (int q = 0; q < GROUP; q++) products[q] = 0.f;
#pragma unroll
        for (int i = 0; i < LANE_ENTRIES; i++) {
            const int entry = i * 32 + lane;
            if (entry >= DIM) continue;
            float value = centre[entry];
            if (ROPE)  // instead of turning each query, turn the centre back: the products are the same
                value = turned(
                    value, centre[PARTNER(entry)], entry, to_float(cosines[entry]), -to_float(sines[entry]));
#pragma unroll
            for (int q = 0; q < GROUP; q++) products[q] += to_float(query[q * DIM + entry]) * value;
        }
#pragma unroll
        for (int q = 0; q < GROUP; q++) {
            const float product = warp_sum(products[q]) * scale - lse[line * GROUP + q];
            if (lane == 0) offsets[(line * max_blocks + page) * GROUP + q] = product * LOG2E;
        }
        return;
    }
    if (lengths[batch] <= 0) return;
    float (*group)[DIM] = sums[0];  // the queries lie where the sums of the first part will be
    for (int i = threadIdx.x; i < GROUP * DIM; i += blockDim.x) {
        float value = to_float(query[i]);
        if (ROPE) {
            const int entry = i % DIM;
            const float partner = to_float(query[i - entry + PARTNER(entry)]);
            value = turned(value, partner, entry, to_float(cosines[entry]), to_float(sines[entry]));
        }
        group[0][i] = value;
    }
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

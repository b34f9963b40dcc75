// Eight lanes take a value, each its chunks lane, lane + 8 and so on; a warp takes four values.
#include "common.cuh"
#include "hadamard.cuh"

#define CHUNKS (DIM / 8)
#define RUN 16

// Encodes the value that begins at `source`, of the 8 lanes to which this one belongs, where `there`.
__device__ inline void encode(
    const uint4* source, bool there, int64 line, int token, uint16* codes, uint16* scales, float step) {
    const int lane = threadIdx.x % 8;
    float values[HALVES][8];
#pragma unroll
    for (int half = 0; half < HALVES; half++) {
        const int chunk = half * 8 + lane;
#pragma unroll
        for (int part = 0; part < 8 / PER_CHUNK; part++) {
            uint4 loaded = make_uint4(0, 0, 0, 0);
            if (there && chunk < CHUNKS) loaded = source[chunk * (8 / PER_CHUNK) + part];
            float few[PER_CHUNK];
            unpack(loaded, few);
#pragma unroll
            for (int i = 0; i < PER_CHUNK; i++)
                values[half][part * PER_CHUNK + i] = few[i] * sign_of(chunk * 8 + part * PER_CHUNK + i);
        }
    }
    transform<1>(values, lane);
    const float unit = rsqrtf((float)TRANSFORMED);
    float squares = 0.f;
#pragma unroll
    for (int half = 0; half < HALVES; half++)
#pragma unroll
        for (int place = 0; place < 8; place++) {
            values[half][place] *= unit;
            squares += values[half][place] * values[half][place];
        }
#pragma unroll
    for (int offset = 1; offset < 8; offset *= 2) squares += __shfl_xor_sync(FULL_WARP, squares, offset);
    const float width = step * fmaxf(sqrtf(squares / DIM), 1e-12f);
    const int run = token / RUN, quad = token % 8 / 2, slot = token % 2 + 2 * (token % RUN / 8);
    float along = 0.f;
#pragma unroll
    for (int half = 0; half < HALVES; half++) {
        uint32 word = 0;
#pragma unroll
        for (int place = 0; place < 8; place++) {
            const float value = values[half][place];
            const float level = fminf(fmaxf(floorf(value / width) + 2.f, 0.f), 3.f);
            along += value * (level - 1.5f);
            word |= (uint32)level << (2 * place);
        }
        if (there && half * 8 + lane < CHUNKS)
            codes
                [((line * (BLOCK_TOKENS / RUN) + run) * HALVES + half) * 128 + (lane * 4 + quad) * 4 + slot] =
                    (uint16)word;
    }
#pragma unroll
    for (int offset = 1; offset < 8; offset *= 2) along += __shfl_xor_sync(FULL_WARP, along, offset);
    if (there && lane == 0)
        scales[line * BLOCK_TOKENS + token] = float_to_half(squares / fmaxf(along, 1e-30f));
}

extern "C" __global__ void __launch_bounds__(THREADS) encode_prompt_values(
    const uint4* values, int64 token_stride, int64 head_stride, const int64* starts, const int64* counts,
    const int64* page_numbers, uint16* codes, uint16* scales, float step) {
    const int part = blockIdx.z, head = blockIdx.y, count = (int)counts[part];
    const int token = blockIdx.x * (THREADS / 8) + threadIdx.x / 8;
    if (blockIdx.x * (THREADS / 8) >= count) return;
    const uint4* source = values + (starts[part] + min(token, count - 1)) * token_stride + head * head_stride;
    encode(source, token < count, page_numbers[part] * gridDim.y + head, token, codes, scales, step);
}

extern "C" __global__ void __launch_bounds__(THREADS) encode_new_values(
    const uint4* values, int64 batch_stride, int64 head_stride, int64 kv_heads, const int64* lengths,
    const int64* page_table, int64 table_width, uint16* codes, uint16* scales, float step) {
    const int batch = blockIdx.y, at = (int)lengths[batch] - 1;
    if (at < 0) return;
    const int head = blockIdx.x * 4 + threadIdx.x / 8;
    const int64 page = page_table[batch * table_width + at / BLOCK_TOKENS];
    const uint4* source = values + batch * batch_stride + min(head, (int)kv_heads - 1) * head_stride;
    encode(source, head < kv_heads, page * kv_heads + head, at % BLOCK_TOKENS, codes, scales, step);
}

// One block for each (KV head, sequence), one thread for each entry of the key (rounded up to whole warps).
#include "common.cuh"

extern "C" __global__ void encode_new(
    const Element* keys, int64 batch_stride, int64 head_stride, const int64* lengths, const int64* page_table,
    int64 table_width, uint8* codes, uint16* scales, float* centres, const float* rotation, float step) {
    __shared__ float centred[DIM];
    __shared__ uint8 levels[DIM];
    __shared__ float room[32];
    const int head = blockIdx.x, batch = blockIdx.y, kv_heads = gridDim.x, entry = threadIdx.x;
    const int at = (int)lengths[batch] - 1;
    if (at < 0) return;
    const int64* pages = page_table + batch * table_width;
    const int64 page = pages[at / BLOCK_TOKENS] * kv_heads + head;
    const int64 before = pages[(at > 0 ? at - 1 : 0) / BLOCK_TOKENS] * kv_heads + head;
    if (entry < DIM) {
        const float key = to_float(keys[batch * batch_stride + head * head_stride + entry]);
        const float centre = at == 0 ? key : centres[before * DIM + entry];
        if (at % BLOCK_TOKENS == 0) centres[page * DIM + entry] = centre;
        centred[entry] = key - centre;
    }
    __syncthreads();
    float rotated = 0.f;
    if (entry < DIM) {
#pragma unroll 16
        for (int i = 0; i < DIM; i++) rotated += centred[i] * rotation[i * DIM + entry];
    }
    const float squares = block_sum(rotated * rotated, room);
    const float sigma = fmaxf(sqrtf(squares / DIM), 1e-12f);
    const float level = fminf(fmaxf(floorf(rotated / (step * sigma)) + 2.f, 0.f), 3.f);
    const float value = entry < DIM ? level - 1.5f : 0.f;
    const float along = block_sum(rotated * value, room);
    if (entry < DIM) levels[entry] = (uint8)level;
    __syncthreads();
    const int64 token = page * BLOCK_TOKENS + at % BLOCK_TOKENS;
    if (entry < DIM / 4) {
        uint8 code = 0;
#pragma unroll
        for (int plane = 0; plane < 4; plane++) code |= levels[plane * (DIM / 4) + entry] << (2 * plane);
        codes[token * (DIM / 4) + entry] = code;
    }
    if (entry == 0) scales[token] = float_to_half(squares / fmaxf(along, 1e-30f));
}

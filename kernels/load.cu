// One thread takes 16-byte chunks in the order in which they lie in the arena, so that a warp reads them from
// the CPU's memory in long pieces. Several are on their way at a time: a read over PCIe takes microseconds.
#include "common.cuh"

#define READS 4  // of a thread on their way

extern "C" __global__ void load_blocks(
    uint4* rows, int64 kv_heads, int64 chunks, const int64* blocks, int64 parts, const char* arena,
    int64 block_stride, int64 head_stride) {
    const int line = (int)chunks, heads = (int)kv_heads;
    const int of_head = BLOCK_TOKENS * line, of_block = heads * of_head;
    const int64 total = parts * of_block, step = (int64)gridDim.x * blockDim.x;
    for (int64 first = (int64)blockIdx.x * blockDim.x + threadIdx.x; first < total; first += READS * step) {
        uint4 chunk[READS];
#pragma unroll
        for (int i = 0; i < READS; i++) {
            const int64 at = first + i * step;
            if (at >= total) break;
            const int item = (int)(at % of_block);
            const char* head = arena + blocks[at / of_block] * block_stride + item / of_head * head_stride;
            chunk[i] = ((const uint4*)head)[item % of_head];
        }
#pragma unroll
        for (int i = 0; i < READS; i++) {
            const int64 at = first + i * step;
            if (at >= total) break;
            const int item = (int)(at % of_block), token = item % of_head / line;
            const int64 row = (at / of_block * BLOCK_TOKENS + token) * heads + item / of_head;
            rows[row * line + item % line] = chunk[i];
        }
    }
}

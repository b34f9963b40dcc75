// One thread takes one 16-byte chunk at a time. Writes over PCIe need few multiprocessors, so blocks are few
// and walk through the chunks of all tokens.
#include "common.cuh"

extern "C" __global__ void store(
    const uint4* rows, int64 tokens, int64 kv_heads, int64 chunks, const int64* block_table, char* arena,
    int64 block_stride, int64 head_stride) {
    const int64 items = tokens * kv_heads * chunks;
    for (int64 item = (int64)blockIdx.x * blockDim.x + threadIdx.x; item < items;
         item += (int64)gridDim.x * blockDim.x) {
        const int64 chunk = item % chunks, row = item / chunks, head = row % kv_heads, token = row / kv_heads;
        char* part = arena + block_table[token / BLOCK_TOKENS] * block_stride + head * head_stride;
        ((uint4*)part)[token % BLOCK_TOKENS * chunks + chunk] = rows[item];
    }
}

// One block for each (KV head, sequence), one thread for each 16-byte chunk of its newest row.
extern "C" __global__ void store_new(
    const uint4* kv, int64 batch_stride, const int64* lengths, const int64* block_table, int64 table_width,
    char* arena, int64 block_stride, int64 head_stride) {
    const int head = blockIdx.x, batch = blockIdx.y, chunk = threadIdx.x, chunks = blockDim.x;
    const int at = (int)lengths[batch] - 1;
    if (at < 0) return;
    char* part =
        arena + block_table[batch * table_width + at / BLOCK_TOKENS] * block_stride + head * head_stride;
    ((uint4*)part)[at % BLOCK_TOKENS * chunks + chunk] = kv[batch * batch_stride + head * chunks + chunk];
}

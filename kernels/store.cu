// One thread takes one 16-byte chunk at a time. Writes over PCIe need few multiprocessors, so blocks are few
// and walk through the chunks of all tokens.
#include "common.cuh"

// Rows of the parts of many prompts. A thread counts chunks over all parts, so that those of a part that ends
// early go on with the next one, and its stride is never broken.
extern "C" __global__ void store_prompts(
    const uint4* rows, int64 kv_heads, int64 chunks, const int64* starts, const int64* counts,
    const int64* blocks, int64 parts, char* arena, int64 block_stride, int64 head_stride) {
    const int line = (int)chunks, heads = (int)kv_heads;
    int64 next = (int64)blockIdx.x * blockDim.x + threadIdx.x, before = 0;  // chunks of the parts before
    for (int64 part = 0; part < parts; part++) {
        const int64 end = before + counts[part] * heads * line;
        if (next < end) {
            const uint4* source = rows + starts[part] * heads * line;
            char* block = arena + blocks[part] * block_stride;
            for (; next < end; next += (int64)gridDim.x * blockDim.x) {
                const int item = (int)(next - before), chunk = item % line, row = item / line;
                char* head = block + row % heads * head_stride;
                ((uint4*)head)[row / heads * line + chunk] = source[item];
            }
        }
        before = end;
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

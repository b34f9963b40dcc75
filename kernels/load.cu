// One thread takes 16-byte chunks in the order in which they lie in the arena, so that a warp reads them from
// the CPU's memory in long pieces; several are on their way at a time, as a read over PCIe takes
// microseconds. All threads are with one KV head at a time: the GPU translates addresses that lie close
// together faster.
#include "common.cuh"

extern "C" __global__ void load_blocks(
    uint4* rows, int64 kv_heads, const int64* blocks, int64 parts, const char* arena, int64 block_stride,
    int64 head_stride) {
    const int total = (int)parts * BLOCK_TOKENS * CHUNKS, step = gridDim.x * blockDim.x;
    for (int head = 0; head < (int)kv_heads; head++) {
        const char* of_head = arena + head * head_stride;
        for (int first = blockIdx.x * blockDim.x + threadIdx.x; first < total; first += READS * step) {
            if (blocks[first / (BLOCK_TOKENS * CHUNKS)] < 0) break;
            uint4 chunk[READS];
#pragma unroll
            for (int i = 0; i < READS; i++) {
                const int at = min(first + i * step, total - 1);
                const int item = at % (BLOCK_TOKENS * CHUNKS);
                // of a block that is not read, any block
                const int64 block = max(blocks[at / (BLOCK_TOKENS * CHUNKS)], (int64)0);
                chunk[i] = ((const uint4*)(of_head + block * block_stride))[item];
            }
#pragma unroll
            for (int i = 0; i < READS; i++) {
                const int at = first + i * step;
                if (at < total) rows[(at / CHUNKS * kv_heads + head) * CHUNKS + at % CHUNKS] = chunk[i];
            }
        }
    }
}

// Some rows of each head, in place.
extern "C" __global__ void load_rows(
    uint4* rows, int64 kv_heads, const int* positions, int64 count, const int64* blocks, const char* arena,
    int64 block_stride, int64 head_stride) {
    const int total = (int)(kv_heads * count) * CHUNKS, step = gridDim.x * blockDim.x;
    for (int first = blockIdx.x * blockDim.x + threadIdx.x; first < total; first += READS * step) {
        uint4 chunk[READS];
        int64 place[READS];
#pragma unroll
        for (int i = 0; i < READS; i++) {
            const int at = min(first + i * step, total - 1), entry = at / CHUNKS, item = at % CHUNKS;
            const int head = entry / (int)count, position = positions[entry];
            place[i] = -1;
            if (position < 0) continue;
            const char* block = arena + blocks[position / BLOCK_TOKENS] * block_stride + head * head_stride;
            chunk[i] = ((const uint4*)block)[position % BLOCK_TOKENS * CHUNKS + item];
            place[i] = (position * kv_heads + head) * CHUNKS + item;
        }
#pragma unroll
        for (int i = 0; i < READS; i++)
            if (first + i * step < total && place[i] >= 0) rows[place[i]] = chunk[i];
    }
}

// A thread takes 16-byte chunks in the order in which they lie in the arena, several at a time, as load.cu
// does: all threads are with one KV head at a time, whose codes of a block are one piece of memory there.
#include "common.cuh"

#define HALVES ((DIM + 63) / 64)
// Chunks of a page and KV head: the keys' codes, a kind of scales, the centre, the values' codes.
#define KEYS (BLOCK_TOKENS * DIM / 64)
#define SCALES (BLOCK_TOKENS / 8)
#define CENTRE (DIM / 4)
#define VALUES (BLOCK_TOKENS * HALVES)
#define CHUNKS (KEYS + CENTRE + VALUES + 2 * SCALES)

struct Pages {
    uint4 *codes, *scales, *centres, *value_codes, *value_scales;
};

// Where a chunk lies; `line` counts pages times KV heads.
__device__ inline uint4* place(const Pages& pages, int64 line, int chunk) {
    if (chunk < KEYS) return pages.codes + line * KEYS + chunk;
    chunk -= KEYS;
    if (chunk < SCALES) return pages.scales + line * SCALES + chunk;
    chunk -= SCALES;
    if (chunk < CENTRE) return pages.centres + line * CENTRE + chunk;
    chunk -= CENTRE;
    if (chunk < VALUES) return pages.value_codes + line * VALUES + chunk;
    return pages.value_scales + line * SCALES + chunk - VALUES;
}

template <bool STORE>
__device__ inline void copy(
    const Pages& pages, int kv_heads, const int64* counts, const int64* blocks, const int64* page_numbers,
    int parts, char* arena, int64 block_stride, int64 head_stride) {
    const int64 total = (int64)parts * CHUNKS, step = gridDim.x * blockDim.x;
    for (int head = 0; head < kv_heads; head++) {
        char* of_head = arena + head * head_stride;
        for (int64 first = (int64)blockIdx.x * blockDim.x + threadIdx.x; first < total;
             first += READS * step) {
            uint4 chunks[READS], *targets[READS];
#pragma unroll
            for (int i = 0; i < READS; i++) {
                const int64 at = first + i * step;
                const int part = (int)(min(at, total - 1) / CHUNKS), chunk = (int)(at % CHUNKS);
                targets[i] = 0;
                if (at >= total || counts[part] == 0) continue;
                uint4* mine = place(pages, page_numbers[part] * kv_heads + head, chunk);
                uint4* its = (uint4*)(of_head + blocks[part] * block_stride) + chunk;
                chunks[i] = STORE ? *mine : *its;
                targets[i] = STORE ? its : mine;
            }
#pragma unroll
            for (int i = 0; i < READS; i++)
                if (targets[i]) *targets[i] = chunks[i];
        }
    }
}

extern "C" __global__ void store_codes(
    uint4* codes, uint4* scales, uint4* centres, uint4* value_codes, uint4* value_scales, int64 kv_heads,
    const int64* counts, const int64* blocks, const int64* page_numbers, int64 parts, char* arena,
    int64 block_stride, int64 head_stride) {
    const Pages pages = {codes, scales, centres, value_codes, value_scales};
    copy<true>(
        pages, (int)kv_heads, counts, blocks, page_numbers, (int)parts, arena, block_stride, head_stride);
}

extern "C" __global__ void load_codes(
    uint4* codes, uint4* scales, uint4* centres, uint4* value_codes, uint4* value_scales, int64 kv_heads,
    const int64* counts, const int64* blocks, const int64* page_numbers, int64 parts, char* arena,
    int64 block_stride, int64 head_stride) {
    const Pages pages = {codes, scales, centres, value_codes, value_scales};
    copy<false>(
        pages, (int)kv_heads, counts, blocks, page_numbers, (int)parts, arena, block_stride, head_stride);
}

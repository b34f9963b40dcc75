// Rows of whole pages from their codes: keys in the rotated space, centre included, for a product of matrices
// to turn back; values as they are. A block takes some tokens of one page and KV head, so that it reads its
// codes in one piece; what it writes is whole lines of one head.
#include "common.cuh"
#include "hadamard.cuh"

#define WORDS (DIM / 16)  // 32-bit words of codes for a key
#define QUARTER (DIM / 4)
#define CHUNKS (DIM / 8)
#define RUN 16

// Writes COUNT elements, as many as 8 bytes or a multiple of 16 hold, to an aligned place.
template <int COUNT>
__device__ inline void write(Element* target, const float (&values)[COUNT]) {
    union {
        Element elements[COUNT];
        uint2 pairs[COUNT * sizeof(Element) / 8];
    } packed;
#pragma unroll
    for (int i = 0; i < COUNT; i++) packed.elements[i] = to_element(values[i]);
    const int pairs = COUNT * sizeof(Element) / 8;
    if (pairs == 1) {
        *(uint2*)target = packed.pairs[0];
    } else {
#pragma unroll
        for (int i = 0; i + 1 < pairs; i += 2)
            ((uint4*)target)[i / 2] = make_uint4(
                packed.pairs[i].x, packed.pairs[i].y, packed.pairs[i + 1].x, packed.pairs[i + 1].y);
    }
}

// A thread unpacks one word of a key: four entries in each quarter of the head.
extern "C" __global__ void __launch_bounds__(THREADS) decode_keys(
    Element* keys, const int64* numbers, const uint8* codes, const uint16* scales, const float* centres) {
    const int page = blockIdx.z, head = blockIdx.y, kv_heads = gridDim.y, tokens = THREADS / WORDS;
    const int within = threadIdx.x / WORDS, entry = threadIdx.x % WORDS * 4;
    const int token = blockIdx.x * tokens + within;
    if (within >= tokens || token >= BLOCK_TOKENS || numbers[page] < 0) return;
    const int64 place = (numbers[page] * kv_heads + head) * BLOCK_TOKENS + token;
    const uint32 word = *(const uint32*)(codes + place * QUARTER + entry);
    const float scale = half_to_float(scales[place]);
    const float* centre = centres + ((int64)page * kv_heads + head) * DIM;
    Element* key = keys + (((int64)page * BLOCK_TOKENS + token) * kv_heads + head) * DIM;
#pragma unroll
    for (int plane = 0; plane < 4; plane++) {
        const int first = plane * QUARTER + entry;
        const float4 middle = *(const float4*)(centre + first);
        const float middles[4] = {middle.x, middle.y, middle.z, middle.w};
        float values[4];
#pragma unroll
        for (int i = 0; i < 4; i++)
            values[i] = ((float)(word >> (8 * i + 2 * plane) & 3) - 1.5f) * scale + middles[i];
        write(key + first, values);
    }
}

// Eight lanes take a value, each its chunks lane, lane + 8 and so on, as in encode_values.cu.
extern "C" __global__ void __launch_bounds__(THREADS)
    decode_values(Element* rows, const int64* numbers, const uint16* codes, const uint16* scales) {
    const int page = blockIdx.z, head = blockIdx.y, kv_heads = gridDim.y, lane = threadIdx.x % 8;
    const int token = blockIdx.x * (THREADS / 8) + threadIdx.x / 8;
    if (numbers[page] < 0) return;
    const int64 line = numbers[page] * kv_heads + head;
    const float scale = half_to_float(scales[line * BLOCK_TOKENS + token]) * rsqrtf((float)TRANSFORMED);
    const int run = token / RUN, quad = token % 8 / 2, slot = token % 2 + 2 * (token % RUN / 8);
    float values[HALVES][8];
#pragma unroll
    for (int half = 0; half < HALVES; half++) {
        uint32 word = 0;
        const bool there = half * 8 + lane < CHUNKS;
        if (there)
            word = codes
                [((line * (BLOCK_TOKENS / RUN) + run) * HALVES + half) * 128 + (lane * 4 + quad) * 4 + slot];
#pragma unroll
        for (int i = 0; i < 8; i++)
            values[half][i] = there ? ((float)(word >> (2 * i) & 3) - 1.5f) * scale : 0.f;
    }
    transform<1>(values, lane);
    Element* value = rows + ((((int64)page * BLOCK_TOKENS + token) * kv_heads + head) * 2 + 1) * DIM;
#pragma unroll
    for (int half = 0; half < HALVES; half++) {
        const int chunk = half * 8 + lane;
#pragma unroll
        for (int i = 0; i < 8; i++) values[half][i] *= sign_of(chunk * 8 + i);
        if (chunk < CHUNKS) write(value + chunk * 8, values[half]);
    }
}

// A block takes tiles of TOKENS keys of one part of a prompt and one KV head, every tile or, where blocks
// would be few, some of them. A tile is rotated as a product of matrices in float32: tensor cores would round
// the keys first, and codes near the boundaries would change.
//
// A thread computes 16 entries of KEYS keys: four in each quarter of the head, which are the four codes of
// each of four bytes. The centred keys of a tile stay in shared memory, and SLICE rows of the rotation at a
// time, while the next ones are on their way.
//
//   THREADS  threads of a block
//   LANES    threads that share a key
//   KEYS     keys of a thread
//   SLICE    rows of the rotation
#include "common.cuh"

#define CHUNKS (DIM / PER_CHUNK)         // 16-byte chunks of a key
#define GROUPS (THREADS / CHUNKS)        // keys that are summed at a time
#define QUARTER (DIM / 4)                // entries whose codes share a plane
#define TEAMS (32 / LANES)               // teams of LANES lanes in a warp
#define TOKENS (THREADS / LANES * KEYS)  // keys of a tile
#define STRIDE (DIM + 4)                 // of a tile's keys, so that eight of them lie in different banks
#define SLICES (DIM / SLICE)

extern __shared__ __align__(16) float shared[];  // [TOKENS][STRIDE] of the tile, [2][SLICE][DIM]

// The mean of a part's keys goes to `centre`.
__device__ inline void average(const uint4* keys, int64 token_stride, int count, float* centre) {
    const int chunk = threadIdx.x % CHUNKS, group = threadIdx.x / CHUNKS;
    if (group < GROUPS) {
        float sums[PER_CHUNK] = {};
#pragma unroll 8
        for (int token = group; token < count; token += GROUPS) {
            float values[PER_CHUNK];
            unpack(keys[token * token_stride + chunk], values);
#pragma unroll
            for (int e = 0; e < PER_CHUNK; e++) sums[e] += values[e];
        }
#pragma unroll
        for (int e = 0; e < PER_CHUNK; e++) shared[group * DIM + chunk * PER_CHUNK + e] = sums[e];
    }
    __syncthreads();
    if (threadIdx.x < DIM) {
        float sum = 0.f;
#pragma unroll 8
        for (int i = 0; i < GROUPS; i++) sum += shared[i * DIM + threadIdx.x];
        centre[threadIdx.x] = sum / count;
    }
    __syncthreads();
}

// Brings the keys from `begin` on into shared memory, less their centre; after the last one it is that again.
__device__ inline void bring_tile(
    const uint4* keys, int64 token_stride, int begin, int count, const float* centre) {
#pragma unroll 4
    for (int base = 0; base < TOKENS * CHUNKS; base += THREADS) {
        const int item = base + threadIdx.x, token = item / CHUNKS, chunk = item % CHUNKS;
        if (TOKENS * CHUNKS % THREADS && token >= TOKENS) break;
        float values[PER_CHUNK];
        unpack(keys[min(begin + token, count - 1) * token_stride + chunk], values);
#pragma unroll
        for (int e = 0; e < PER_CHUNK; e += 4) {
            const float4 mean = *(const float4*)(centre + chunk * PER_CHUNK + e);
            *(float4*)(shared + token * STRIDE + chunk * PER_CHUNK + e) = make_float4(
                values[e] - mean.x, values[e + 1] - mean.y, values[e + 2] - mean.z, values[e + 3] - mean.w);
        }
    }
}

// Asks for a slice of the rotation.
__device__ inline void ask_slice(float* slices, const float* rotation, int slice, int stage) {
    const float* source = rotation + (slice * SLICE * DIM + threadIdx.x * 4);
    const uint32 target = (uint32)__cvta_generic_to_shared(slices + stage * SLICE * DIM) + threadIdx.x * 16;
#pragma unroll
    for (int base = 0; base < SLICE * DIM / 4; base += THREADS)
        if (base + threadIdx.x < SLICE * DIM / 4)
            asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(target + base * 16),
                         "l"(source + base * 4)
                         : "memory");
    close_copies();
}

// Adds the products with a slice. `key` is the thread's first key from the slice's entry on, and `slice` the
// slice from the thread's column on.
__device__ inline void add_products(float (&rotated)[KEYS][16], const float* key, const float* slice) {
#pragma unroll 1
    for (int row = 0; row < SLICE; row += 4) {
        float keys[KEYS][4];
#pragma unroll
        for (int i = 0; i < KEYS; i++) {
            const float4 four = *(const float4*)(key + i * TEAMS * STRIDE + row);
            keys[i][0] = four.x, keys[i][1] = four.y, keys[i][2] = four.z, keys[i][3] = four.w;
        }
#pragma unroll
        for (int r = 0; r < 4; r++) {
#pragma unroll
            for (int plane = 0; plane < 4; plane++) {
                const float4 four = *(const float4*)(slice + (row + r) * DIM + plane * QUARTER);
#pragma unroll
                for (int i = 0; i < KEYS; i++) {
                    rotated[i][plane * 4] += keys[i][r] * four.x;
                    rotated[i][plane * 4 + 1] += keys[i][r] * four.y;
                    rotated[i][plane * 4 + 2] += keys[i][r] * four.z;
                    rotated[i][plane * 4 + 3] += keys[i][r] * four.w;
                }
            }
        }
    }
}

// Sum over the lanes that share a key.
__device__ inline float team_sum(float value) {
#pragma unroll
    for (int offset = 2; offset <= LANES; offset <<= 1) value += __shfl_xor_sync(FULL_WARP, value, offset);
    return value;
}

extern "C" __global__ void __launch_bounds__(THREADS, 2) encode_prompts(
    const Element* all_keys, int64 token_stride, int64 head_stride, const int64* starts, const int64* counts,
    const int64* page_numbers, uint8* codes, uint16* scales, float* centres, const float* rotation,
    float step) {
    __shared__ __align__(16) float centre[DIM];
    const int head = blockIdx.x, piece = blockIdx.y, pieces = gridDim.y, part = blockIdx.z;
    const int count = (int)counts[part];
    if (piece * TOKENS >= count) return;
    float* slices = shared + TOKENS * STRIDE;
    ask_slice(slices, rotation, 0, 0);

    const uint4* keys = (const uint4*)all_keys + starts[part] * token_stride + head * head_stride;
    const int64 page = page_numbers[part] * gridDim.x + head;
    average(keys, token_stride, count, centre);
    if (piece == 0 && threadIdx.x < DIM) centres[page * DIM + threadIdx.x] = centre[threadIdx.x];

    // Lanes 2n and 2n + 1 take the same column of different keys, and lanes that differ in the second bit
    // the same key, so that a warp's reads of 16 bytes a lane go together.
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, column = lane / 2 % LANES;
    const int first = warp * TEAMS * KEYS;  // of the warp's keys in a tile
    const int mine = first + lane / 2 / LANES * 2 + lane % 2;
    const bool counted = column < DIM / 16;  // else the lane goes along with the last column
    const int entry = 4 * min(column, DIM / 16 - 1);
    int stage = 0;
    for (int begin = piece * TOKENS; begin < count; begin += pieces * TOKENS) {
        const bool last = begin + pieces * TOKENS >= count;
        bring_tile(keys, token_stride, begin, count, centre);
        float rotated[KEYS][16] = {};
        for (int slice = 0; slice < SLICES; slice++, stage ^= 1) {
            wait_for_copies<0>();
            __syncthreads();  // the slice is there, and all are done with the one before
            if (slice + 1 < SLICES || !last) ask_slice(slices, rotation, (slice + 1) % SLICES, stage ^ 1);
            if (begin + first < count)
                add_products(
                    rotated, shared + mine * STRIDE + slice * SLICE, slices + stage * SLICE * DIM + entry);
        }
        __syncthreads();  // the tile may be replaced
#pragma unroll
        for (int i = 0; i < KEYS; i++) {
            float squares = 0.f;
#pragma unroll
            for (int e = 0; e < 16; e++) squares += rotated[i][e] * rotated[i][e];
            squares = team_sum(counted ? squares : 0.f);
            const float level_step = step * fmaxf(sqrtf(squares / DIM), 1e-12f);
            // Levels are 0.5 or 1.5 from zero. A bit of `positive` and `outer` is that of an entry's code.
            uint32 positive = 0, outer = 0;
            float all = 0.f, far = 0.f;  // sums of magnitudes, `far` of those that belong to outer levels
#pragma unroll
            for (int e = 0; e < 16; e++) {
                const uint32 bit = 1u << (e % 4 * 8 + e / 4 * 2);
                const float size = fabsf(rotated[i][e]);
                all += size;
                if (rotated[i][e] >= 0.f) positive |= bit;
                if (size >= level_step) outer |= bit, far += size;
            }
            const float along = team_sum(counted ? 0.5f * all + far : 0.f);
            const int token = begin + mine + i * TEAMS;
            if (token < count && counted) {
                const int64 place = page * BLOCK_TOKENS + token;
                *(uint32*)(codes + place * QUARTER + entry) =
                    positive << 1 | ((positive ^ ~outer) & 0x55555555);  // 2 + outer, or 1 - outer
                if (column == 0) scales[place] = float_to_half(squares / fmaxf(along, 1e-30f));
            }
        }
    }
}

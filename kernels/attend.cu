// Decode attention over resident rows: a block takes up to ROWS rows of one (KV head, sequence), and the whole
// query group of the KV head shares one read of K and V. All rows of a batch are asked for at once and staged in
// shared memory; then the lanes of a row reduce its scores, a warp a query takes the softmax, and each thread
// sums its entries of V.
#include "common.cuh"

#define WARPS (THREADS / 32)
#define CHUNKS (DIM / PER_CHUNK)                    // 16-byte chunks of a key
#define LANES (CHUNKS <= 8 ? 8 : CHUNKS <= 16 ? 16 : 32)  // that share a row
#define PER_LANE ((CHUNKS + LANES - 1) / LANES)     // chunks
#define WIDTH (PER_LANE * PER_CHUNK)                // entries a lane
#define PADDED (TILE <= 1 ? 1 : TILE <= 2 ? 2 : TILE <= 4 ? 4 : 8)
#define TILES ((GROUP + TILE - 1) / TILE)           // of TILE queries each
#define STRIDE (THREADS / LANES)                    // rows at a time

struct Batch {
    float scores[ROWS][PADDED];  // then weights
    int rows[ROWS];              // -1 where there is none
    float highest[PADDED], total[PADDED], rescale[PADDED];  // of each query, so far
};

struct Lane {
    float query[TILE][WIDTH];
    float out[TILE][WIDTH];
};

__device__ inline bool in_row(int lane, int part) { return lane + part * LANES < CHUNKS; }

__device__ inline void begin(Batch& batch, Lane& mine, const Element* query, int tile, float scale) {
    const int lane = threadIdx.x % LANES;
    if (threadIdx.x < PADDED) batch.highest[threadIdx.x] = -INFINITE, batch.total[threadIdx.x] = 0.f;
#pragma unroll
    for (int q = 0; q < TILE; q++)
#pragma unroll
        for (int part = 0; part < PER_LANE; part++) {
            uint4 chunk = make_uint4(0, 0, 0, 0);
            if (tile * TILE + q < GROUP && in_row(lane, part))
                chunk = ((const uint4*)query)[(tile * TILE + q) * CHUNKS + lane + part * LANES];
            float values[PER_CHUNK];
            unpack(chunk, values);
#pragma unroll
            for (int e = 0; e < PER_CHUNK; e++) {
                mine.query[q][part * PER_CHUNK + e] = values[e] * scale * LOG2E;
                mine.out[q][part * PER_CHUNK + e] = 0.f;
            }
        }
}

__device__ inline void copy_async(uint4* shared, const void* global) {
    const uint32 target = (uint32)__cvta_generic_to_shared(shared);
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(target), "l"(global));
}

__device__ inline void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// Sums over the lanes of a row; lane i of the row ends with the sum of query `query_of(i)`.
__device__ inline float reduce(float (&values)[PADDED]) {
    int count = PADDED;
#pragma unroll
    for (int offset = LANES / 2; offset > 0; offset >>= 1) {
        if (count > 1) {
            count /= 2;
            const bool upper = threadIdx.x & offset;
#pragma unroll
            for (int i = 0; i < PADDED / 2; i++)
                if (i < count) {
                    const float sent = upper ? values[i] : values[i + count];
                    const float kept = upper ? values[i + count] : values[i];
                    values[i] = kept + __shfl_xor_sync(FULL_WARP, sent, offset);
                }
        } else {
            values[0] += __shfl_xor_sync(FULL_WARP, values[0], offset);
        }
    }
    return values[0];
}

__device__ inline int query_of(int lane) {
    int query = 0, count = PADDED;
#pragma unroll
    for (int offset = LANES / 2; offset > 0; offset >>= 1)
        if (count > 1) {
            count /= 2;
            if (lane & offset) query += count;
        }
    return query;
}

// Adds the staged rows, `count` of them (a multiple of STRIDE) with those of `batch.rows` that are not -1.
__device__ inline void add_rows(Batch& batch, Lane& mine, const uint4* stage, int count) {
    const int lane = threadIdx.x % LANES, group = threadIdx.x / LANES;
    const int query = query_of(lane);
    const bool writes = (lane & (LANES / PADDED - 1)) == 0;
#pragma unroll 2
    for (int i = group; i < count; i += STRIDE) {
        float scores[PADDED];
#pragma unroll
        for (int q = 0; q < PADDED; q++) scores[q] = 0.f;
#pragma unroll
        for (int part = 0; part < PER_LANE; part++) {
            float key[PER_CHUNK];
            unpack(stage[i * 2 * CHUNKS + min(lane + part * LANES, CHUNKS - 1)], key);  // else the query is 0
#pragma unroll
            for (int q = 0; q < TILE; q++)
#pragma unroll
                for (int e = 0; e < PER_CHUNK; e++) scores[q] += mine.query[q][part * PER_CHUNK + e] * key[e];
        }
        const float score = reduce(scores);
        if (writes) batch.scores[i][query] = batch.rows[i] >= 0 ? score : -INFINITE;
    }
    __syncthreads();
    for (int q = threadIdx.x / 32; q < TILE; q += WARPS) {
        const float old = batch.highest[q];
        float peak = old, sum = 0.f;
        for (int i = threadIdx.x % 32; i < count; i += 32) peak = fmaxf(peak, batch.scores[i][q]);
        peak = warp_max(peak);
        const float base = fmaxf(peak, -1e30f);
        for (int i = threadIdx.x % 32; i < count; i += 32) {
            const float weight = exp2f(batch.scores[i][q] - base);
            batch.scores[i][q] = weight;
            sum += weight;
        }
        sum = warp_sum(sum);
        if (threadIdx.x % 32 == 0) {
            const float rescale = exp2f(old - base);
            batch.rescale[q] = rescale;
            batch.highest[q] = peak;
            batch.total[q] = batch.total[q] * rescale + sum;
        }
    }
    __syncthreads();
#pragma unroll
    for (int q = 0; q < TILE; q++) {
        const float rescale = batch.rescale[q];
#pragma unroll
        for (int e = 0; e < WIDTH; e++) mine.out[q][e] *= rescale;
    }
#pragma unroll 2
    for (int i = group; i < count; i += STRIDE) {
        if (batch.rows[i] < 0) continue;  // its place may hold anything, NaN too
#pragma unroll
        for (int part = 0; part < PER_LANE; part++) {
            float value[PER_CHUNK];
            unpack(stage[i * 2 * CHUNKS + CHUNKS + min(lane + part * LANES, CHUNKS - 1)], value);
#pragma unroll
            for (int q = 0; q < TILE; q++) {
                const float weight = batch.scores[i][q];
#pragma unroll
                for (int e = 0; e < PER_CHUNK; e++) mine.out[q][part * PER_CHUNK + e] += weight * value[e];
            }
        }
    }
    __syncthreads();
}

// Sums the threads' parts of the output into shared [TILE][DIM], which may be the stage.
__device__ inline void gather_out(Lane& mine, float* shared) {
    const int lane = threadIdx.x % LANES, warp = threadIdx.x / 32;
#pragma unroll
    for (int q = 0; q < TILE; q++)
#pragma unroll
        for (int e = 0; e < WIDTH; e++) {
            float value = mine.out[q][e];
#pragma unroll
            for (int offset = LANES; offset < 32; offset <<= 1) value += __shfl_xor_sync(FULL_WARP, value, offset);
            const int entry = (lane + e / PER_CHUNK * LANES) * PER_CHUNK + e % PER_CHUNK;
            if (threadIdx.x % 32 < LANES && entry < DIM) shared[(warp * TILE + q) * DIM + entry] = value;
        }
    __syncthreads();
    for (int i = threadIdx.x; i < TILE * DIM; i += THREADS) {
        float sum = shared[i];
#pragma unroll
        for (int other = 1; other < WARPS; other++) sum += shared[other * TILE * DIM + i];
        shared[i] = sum;
    }
    __syncthreads();
}

extern "C" __global__ void __launch_bounds__(THREADS, 3) attend_held(
    const Element* query, const char* resident, const int* members, const int64* lengths, const int* slots,
    const int* counts, float* out, float* total, float* peak, int64 splits, int64 kv_heads, int64 first,
    int64 capacity, int64 k, float scale) {
    extern __shared__ uint4 stage[];
    __shared__ Batch batch;
    const int split = blockIdx.x / TILES, tile = blockIdx.x % TILES;
    const int64 line = (int64)blockIdx.z * kv_heads + blockIdx.y;
    const int start = split * ROWS, length = (int)lengths[blockIdx.z];
    if (length <= 0) return;
    const int count = min(ROWS, (int)(first + capacity) - start);
    const uint4* source = (const uint4*)(resident + (line * (first + capacity) + start) * ROW_BYTES);
    for (int i = threadIdx.x; i < count * 2 * CHUNKS; i += THREADS) copy_async(stage + i, source + i);
    Lane mine;
    begin(batch, mine, query + line * GROUP * DIM, tile, scale);
    for (int i = threadIdx.x; i < ROWS; i += THREADS) {
        const int row = start + i;
        bool held = i < count && (row >= first || row < length);
        if (held && row >= first) held = members[line * capacity + row - first] >= 0;
        batch.rows[i] = held ? row : -1;
    }
    __syncthreads();
    if (counts)
        for (int i = threadIdx.x; i < counts[line]; i += THREADS) {
            const int place = (int)first + slots[line * k + i] - start;
            if (place >= 0 && place < ROWS) batch.rows[place] = -1;
        }
    wait_for_copies();
    __syncthreads();
    add_rows(batch, mine, stage, (count + STRIDE - 1) / STRIDE * STRIDE);
    float* gathered = (float*)stage;
    gather_out(mine, gathered);
    const int64 part = (line * splits + split) * GROUP + tile * TILE;
    for (int i = threadIdx.x; i < TILE * DIM; i += THREADS)
        if (tile * TILE + i / DIM < GROUP) out[part * DIM + i] = gathered[i];
    if (threadIdx.x < TILE && tile * TILE + threadIdx.x < GROUP) {
        total[part + threadIdx.x] = batch.total[threadIdx.x];
        peak[part + threadIdx.x] = batch.highest[threadIdx.x] * LN2;
    }
}

extern "C" __global__ void __launch_bounds__(THREADS) attend_fresh(
    const float* parts, const float* totals, const float* peaks, const Element* query, const char* resident,
    const int64* lengths, const int* slots, const int* counts, float* norm, Element* out, int64 splits64,
    int64 kv_heads, int64 first, int64 capacity, int64 k, float scale) {
    extern __shared__ uint4 stage[];
    __shared__ Batch batch;
    __shared__ float weights[TILE][MAX_SPLITS + 1];  // of each part, the last one for the rows here
    __shared__ float sums[TILE];
    const int tile = blockIdx.x, splits = (int)splits64;
    const int64 line = (int64)blockIdx.z * kv_heads + blockIdx.y;
    if (lengths[blockIdx.z] <= 0) return;
    const int count = counts ? counts[line] : 0;
    Lane mine;
    begin(batch, mine, query + line * GROUP * DIM, tile, scale);
    const char* rows = resident + line * (first + capacity) * ROW_BYTES;
    for (int start = 0; start < count; start += ROWS) {
        const int here = min(ROWS, count - start), padded = (here + STRIDE - 1) / STRIDE * STRIDE;
        for (int i = threadIdx.x; i < padded; i += THREADS)
            batch.rows[i] = i < here ? (int)first + slots[line * k + start + i] : -1;
        __syncthreads();
        for (int i = threadIdx.x; i < here * 2 * CHUNKS; i += THREADS)
            copy_async(stage + i, rows + (int64)batch.rows[i / (2 * CHUNKS)] * ROW_BYTES + i % (2 * CHUNKS) * 16);
        wait_for_copies();
        __syncthreads();
        add_rows(batch, mine, stage, padded);
    }
    float* gathered = (float*)stage;
    gather_out(mine, gathered);
    for (int q = threadIdx.x / 32; q < TILE; q += WARPS) {  // a warp a query: the weight of each part
        const int member = tile * TILE + q, lane = threadIdx.x % 32;
        if (member >= GROUP) break;
        const int64 base = line * splits * GROUP + member;
        float top = batch.highest[q];
        for (int split = lane; split < splits; split += 32) top = fmaxf(top, peaks[base + split * GROUP] * LOG2E);
        top = warp_max(top);
        float sum = lane == 0 ? batch.total[q] * exp2f(batch.highest[q] - top) : 0.f;
        for (int split = lane; split < splits; split += 32) {
            const float weight = exp2f(peaks[base + split * GROUP] * LOG2E - top);
            weights[q][split] = weight;
            sum += totals[base + split * GROUP] * weight;
        }
        sum = warp_sum(sum);
        if (lane == 0) {
            weights[q][MAX_SPLITS] = exp2f(batch.highest[q] - top);
            sums[q] = sum;
            norm[line * GROUP + member] = (top + log2f(sum)) * LN2;
        }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < TILE * DIM; i += THREADS) {
        const int q = i / DIM, member = tile * TILE + q;
        if (member >= GROUP) break;
        const float* source = parts + (line * splits * GROUP + tile * TILE) * DIM + i;
        float value = gathered[i] * weights[q][MAX_SPLITS];
#pragma unroll 8
        for (int split = 0; split < splits; split++) value += source[(int64)split * GROUP * DIM] * weights[q][split];
        out[(line * GROUP + tile * TILE) * DIM + i] = to_element(value / sums[q]);
    }
}

// Decode attention over resident rows, one block a (split, KV head, sequence); the whole query group of a KV
// head shares one read of K and V. A batch of rows goes through three phases: scores of all rows (lanes of a
// row reduce), softmax, then the weighted sum of V. Few rows a batch, so that blocks are many and balanced.
#include "common.cuh"

#define WARPS (THREADS / 32)
#define CHUNKS (DIM / PER_CHUNK)  // of a key
#define LANES_POW2 (CHUNKS <= 8 ? 8 : CHUNKS <= 16 ? 16 : 32)
#define LANES LANES_POW2                                 // that share a row
#define PER_LANE ((CHUNKS + LANES - 1) / LANES)          // chunks
#define WIDTH (PER_LANE * PER_CHUNK)                     // entries a lane
#define PADDED (TILE <= 1 ? 1 : TILE <= 2 ? 2 : TILE <= 4 ? 4 : 8)
#define TILES ((GROUP + TILE - 1) / TILE)
#define STRIDE (THREADS / LANES)                         // rows at a time
#define UNROLL 4

struct Batch {
    float scores[ROWS][PADDED];  // then weights
    int rows[ROWS];              // -1 where there is none
    float highest[PADDED], sums[PADDED];
};

struct Lane {
    float query[TILE][WIDTH];
    float out[TILE][WIDTH];
};

__device__ inline bool in_row(int lane, int part) { return LANES * PER_LANE == CHUNKS || lane + part * LANES < CHUNKS; }

__device__ inline void load_queries(Lane& mine, const Element* query, int tile, float scale) {
    const int lane = threadIdx.x % LANES;
#pragma unroll
    for (int q = 0; q < TILE; q++)
#pragma unroll
        for (int part = 0; part < PER_LANE; part++) {
            const bool there = tile * TILE + q < GROUP && in_row(lane, part);
#pragma unroll
            for (int e = 0; e < PER_CHUNK; e++) {
                const int entry = (lane + part * LANES) * PER_CHUNK + e;
                mine.query[q][part * PER_CHUNK + e] =
                    there ? to_float(query[(tile * TILE + q) * DIM + entry]) * scale * LOG2E : 0.f;
                mine.out[q][part * PER_CHUNK + e] = 0.f;
            }
        }
}

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

// Adds the rows of `batch` to `mine.out`, `highest` and `total` (per query, the same in all threads).
__device__ inline void add_rows(
    Batch& batch, Lane& mine, const char* resident, float (&highest)[TILE], float (&total)[TILE]) {
    const int lane = threadIdx.x % LANES, group = threadIdx.x / LANES;
    const int query = query_of(lane);
    const bool writes = (lane & (LANES / PADDED - 1)) == 0;
    for (int base = group; base < ROWS; base += STRIDE * UNROLL) {
        uint4 keys[UNROLL][PER_LANE];
#pragma unroll
        for (int u = 0; u < UNROLL; u++) {
            const int row = max(batch.rows[base + u * STRIDE], 0);
#pragma unroll
            for (int part = 0; part < PER_LANE; part++) {
                keys[u][part] = make_uint4(0, 0, 0, 0);
                if (in_row(lane, part))
                    keys[u][part] = *(const uint4*)(resident + (int64)row * ROW_BYTES + (lane + part * LANES) * 16);
            }
        }
#pragma unroll
        for (int u = 0; u < UNROLL; u++) {
            float scores[PADDED];
#pragma unroll
            for (int q = 0; q < PADDED; q++) scores[q] = 0.f;
#pragma unroll
            for (int part = 0; part < PER_LANE; part++) {
                float key[PER_CHUNK];
                unpack(keys[u][part], key);
#pragma unroll
                for (int q = 0; q < TILE; q++)
#pragma unroll
                    for (int e = 0; e < PER_CHUNK; e++) scores[q] += mine.query[q][part * PER_CHUNK + e] * key[e];
            }
            const float score = reduce(scores);
            if (writes) {
                const int place = base + u * STRIDE;
                batch.scores[place][query] = batch.rows[place] >= 0 ? score : -INFINITE;
            }
        }
    }
    __syncthreads();
    for (int q = threadIdx.x / 32; q < TILE; q += WARPS) {
        float peak = -INFINITE, sum = 0.f;
        for (int row = threadIdx.x % 32; row < ROWS; row += 32) peak = fmaxf(peak, batch.scores[row][q]);
        peak = warp_max(peak);
        const float base = fmaxf(peak, -1e30f);
        for (int row = threadIdx.x % 32; row < ROWS; row += 32) {
            const float weight = exp2f(batch.scores[row][q] - base);
            batch.scores[row][q] = weight;
            sum += weight;
        }
        sum = warp_sum(sum);
        if (threadIdx.x % 32 == 0) {
            batch.highest[q] = peak;
            batch.sums[q] = sum;
        }
    }
    __syncthreads();
    float factor[TILE];  // of this batch's weights
#pragma unroll
    for (int q = 0; q < TILE; q++) {
        const float peak = fmaxf(highest[q], batch.highest[q]), base = fmaxf(peak, -1e30f);
        const float old = exp2f(highest[q] - base);
        factor[q] = exp2f(batch.highest[q] - base);
        total[q] = total[q] * old + batch.sums[q] * factor[q];
        highest[q] = peak;
#pragma unroll
        for (int e = 0; e < WIDTH; e++) mine.out[q][e] *= old;
    }
    for (int base = group; base < ROWS; base += STRIDE * UNROLL) {
        uint4 values[UNROLL][PER_LANE];
#pragma unroll
        for (int u = 0; u < UNROLL; u++) {
            const int row = batch.rows[base + u * STRIDE];
#pragma unroll
            for (int part = 0; part < PER_LANE; part++) {
                values[u][part] = make_uint4(0, 0, 0, 0);  // a row that is not there may hold anything
                if (row >= 0 && in_row(lane, part))
                    values[u][part] = *(const uint4*)(
                        resident + (int64)row * ROW_BYTES + ROW_BYTES / 2 + (lane + part * LANES) * 16);
            }
        }
#pragma unroll
        for (int u = 0; u < UNROLL; u++) {
#pragma unroll
            for (int part = 0; part < PER_LANE; part++) {
                float value[PER_CHUNK];
                unpack(values[u][part], value);
#pragma unroll
                for (int q = 0; q < TILE; q++) {
                    const float weight = batch.scores[base + u * STRIDE][q] * factor[q];
#pragma unroll
                    for (int e = 0; e < PER_CHUNK; e++) mine.out[q][part * PER_CHUNK + e] += weight * value[e];
                }
            }
        }
    }
}

// Sums the threads' parts of the output: returns shared [TILE][DIM].
__device__ inline void gather_out(Lane& mine, float (*shared)[TILE][DIM]) {
    const int lane = threadIdx.x % LANES, warp = threadIdx.x / 32;
#pragma unroll
    for (int q = 0; q < TILE; q++)
#pragma unroll
        for (int e = 0; e < WIDTH; e++) {
            float value = mine.out[q][e];
#pragma unroll
            for (int offset = LANES; offset < 32; offset <<= 1) value += __shfl_xor_sync(FULL_WARP, value, offset);
            const int entry = (lane + e / PER_CHUNK * LANES) * PER_CHUNK + e % PER_CHUNK;
            if (threadIdx.x % 32 < LANES && entry < DIM) shared[warp][q][entry] = value;
        }
    __syncthreads();
    for (int i = threadIdx.x; i < TILE * DIM; i += THREADS) {
        float sum = shared[0][0][i];
#pragma unroll
        for (int other = 1; other < WARPS; other++) sum += shared[other][0][i];
        shared[0][0][i] = sum;
    }
    __syncthreads();
}

extern "C" __global__ void __launch_bounds__(THREADS) attend_held(
    const Element* query, const char* resident, const int* members, const int64* lengths, const int* slots,
    const int* counts, float* out, float* total, float* peak, int64 splits, int64 kv_heads, int64 first,
    int64 capacity, int64 k, float scale) {
    __shared__ Batch batch;
    __shared__ float shared[WARPS][TILE][DIM];
    const int split = blockIdx.x / TILES, tile = blockIdx.x % TILES;
    const int64 line = (int64)blockIdx.z * kv_heads + blockIdx.y;
    const int start = split * ROWS, length = (int)lengths[blockIdx.z];
    if (length <= 0) return;
    Lane mine;
    load_queries(mine, query + line * GROUP * DIM, tile, scale);
    for (int i = threadIdx.x; i < ROWS; i += THREADS) {
        const int row = start + i;
        bool held = row < first ? row < length : row < first + capacity;
        if (held && row >= first) held = members[line * capacity + row - first] >= 0;
        batch.rows[i] = held ? row : -1;
    }
    __syncthreads();
    if (counts)
        for (int i = threadIdx.x; i < counts[line]; i += THREADS) {
            const int place = (int)first + slots[line * k + i] - start;
            if (place >= 0 && place < ROWS) batch.rows[place] = -1;
        }
    __syncthreads();
    float highest[TILE], sum[TILE];
#pragma unroll
    for (int q = 0; q < TILE; q++) highest[q] = -INFINITE, sum[q] = 0.f;
    add_rows(batch, mine, resident + line * (first + capacity) * ROW_BYTES, highest, sum);
    gather_out(mine, shared);
    const int64 part = line * splits + split;
    for (int i = threadIdx.x; i < TILE * DIM; i += THREADS)
        if (tile * TILE + i / DIM < GROUP) out[(part * GROUP + tile * TILE) * DIM + i] = shared[0][0][i];
#pragma unroll
    for (int q = 0; q < TILE; q++)
        if (threadIdx.x == q && tile * TILE + q < GROUP) {
            total[part * GROUP + tile * TILE + q] = sum[q];
            peak[part * GROUP + tile * TILE + q] = highest[q] * LN2;
        }
}

extern "C" __global__ void __launch_bounds__(THREADS) attend_fresh(
    const float* parts, const float* totals, const float* peaks, const Element* query, const char* resident,
    const int64* lengths, const int* slots, const int* counts, float* norm, Element* out, int64 splits,
    int64 kv_heads, int64 first, int64 capacity, int64 k, float scale) {
    __shared__ Batch batch;
    __shared__ float shared[WARPS][TILE][DIM];
    const int tile = blockIdx.x;
    const int64 line = (int64)blockIdx.z * kv_heads + blockIdx.y;
    if (lengths[blockIdx.z] <= 0) return;
    Lane mine;
    load_queries(mine, query + line * GROUP * DIM, tile, scale);
    float highest[TILE], sum[TILE];
#pragma unroll
    for (int q = 0; q < TILE; q++) highest[q] = -INFINITE, sum[q] = 0.f;
    const int count = counts ? counts[line] : 0;
    for (int start = 0; start < count; start += ROWS) {
        __syncthreads();
        for (int i = threadIdx.x; i < ROWS; i += THREADS)
            batch.rows[i] = start + i < count ? (int)first + slots[line * k + start + i] : -1;
        __syncthreads();
        add_rows(batch, mine, resident + line * (first + capacity) * ROW_BYTES, highest, sum);
    }
    gather_out(mine, shared);
#pragma unroll
    for (int q = 0; q < TILE; q++) {
        const int member = tile * TILE + q;
        if (member >= GROUP) break;
        float top = highest[q];
        for (int split = 0; split < splits; split++)
            top = fmaxf(top, peaks[(line * splits + split) * GROUP + member] * LOG2E);
        const float own = exp2f(highest[q] - top);
        float all = sum[q] * own;
        for (int split = 0; split < splits; split++) {
            const int64 part = (line * splits + split) * GROUP + member;
            all += totals[part] * exp2f(peaks[part] * LOG2E - top);
        }
        for (int i = threadIdx.x; i < DIM; i += THREADS) {
            float value = shared[0][q][i] * own;
            for (int split = 0; split < splits; split++) {
                const int64 part = (line * splits + split) * GROUP + member;
                value += parts[part * DIM + i] * exp2f(peaks[part] * LOG2E - top);
            }
            out[(line * GROUP + member) * DIM + i] = to_element(value / all);
        }
        if (threadIdx.x == 0) norm[line * GROUP + member] = (top + log2f(all)) * LN2;
    }
}

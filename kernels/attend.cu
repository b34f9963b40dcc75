// Decode attention over resident rows: a block takes rows of one (KV head, sequence), and the query group of
// the KV head shares one read of K and V. Each warp streams its own rows through a ring of stages in shared
// memory and keeps a running softmax. A lane copies the same chunks that it will read, so it waits for its
// own copies only, and copies are under way all the time.
#include "common.cuh"

#define WARPS (THREADS / 32)
#define CHUNKS (DIM / PER_CHUNK)                          // 16-byte chunks of a key
#define LANES (CHUNKS <= 8 ? 8 : CHUNKS <= 16 ? 16 : 32)  // lanes that share a row
#define PER_LANE ((CHUNKS + LANES - 1) / LANES)           // chunks of a key for a lane
#define WIDTH (PER_LANE * PER_CHUNK)                      // entries of a key for a lane
#define PADDED (TILE <= 1 ? 1 : TILE <= 2 ? 2 : TILE <= 4 ? 4 : 8)
#define TILES ((GROUP + TILE - 1) / TILE)                  // tiles of TILE queries each
#define TEAMS (32 / LANES)                                 // teams of LANES lanes each
#define DEPTH (PER_LANE == 1 ? 4 : PER_LANE == 2 ? 2 : 1)  // rows of a team in a batch
#define BATCH (TEAMS * DEPTH)                              // rows that a warp takes together
#define SCORES (PADDED * DEPTH)                            // scores of a team in a batch
#define KEPT (SCORES > LANES ? SCORES / LANES : 1)         // scores with which a lane ends
#define COPIES (SCORES > LANES ? 1 : LANES / SCORES)       // lanes that end with the same ones
#define STAGE (DEPTH * PER_LANE * 2 * 32)                  // chunks of a batch
#define FOURS (DIM / 4)                                    // float4s of an output
#define UNITS ((TILE * FOURS + THREADS - 1) / THREADS)     // float4s of the outputs for a thread
#define AT_ONCE (SPLITS < 16 ? SPLITS : 16)                // parts that a thread reads at a time
#define RESIDENT (TILE * WIDTH <= 32 ? 4 : 2)  // blocks on a multiprocessor that leave enough registers

static_assert(TEAMS * TILE * FOURS <= STAGES * STAGE, "the outputs of a warp take the place of its stages");

struct __align__(4 * DEPTH) Weights {
    float of[DEPTH];  // one for each row of a team
};

struct Shared {
    Weights weights[WARPS][TEAMS][PADDED];
    float maxima[WARPS][PADDED], sums[WARPS][PADDED];
};

struct Lane {
    float query[TILE][WIDTH];
    float out[TILE][WIDTH];
    // Of the query whose scores `reduce` leaves to the lane. Scores, and so maxima, are base-2 logarithms.
    float max, sum;
};

struct State {  // of an attention over some rows, before normalisation
    float4 out;
    float sum, max;
};

struct __align__(4 * sizeof(Element)) Four {
    Element of[4];
};

__device__ inline float logarithm(float value) {
    float exponent;
    asm("lg2.approx.f32 %0, %1;" : "=f"(exponent) : "f"(value));
    return exponent;
}

// Copies 16 bytes to shared memory; where `there` is false it writes zeros and reads nothing.
__device__ inline void copy_async(uint4* shared, const void* global, bool there, int64 policy) {
    const uint32 target = (uint32)__cvta_generic_to_shared(shared);
    asm volatile(
        "{ .reg .pred absent; setp.eq.s32 absent, %2, 0; "
        "cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, absent, %3; }" ::"r"(target),
        "l"(global), "r"((int)there), "l"(policy)
        : "memory");
}

__device__ inline bool in_row(int lane, int part) { return lane + part * LANES < CHUNKS; }

__device__ inline void begin(Lane& mine, const Element* query, int tile, float scale) {
    const int lane = threadIdx.x % LANES;
    mine.max = -INFINITE, mine.sum = 0.f;
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

// The first row of a batch that the lane's team takes.
__device__ inline int first_row(int batch) { return batch * BATCH + threadIdx.x % 32 / LANES * DEPTH; }

// Asks for the lane's chunks of a batch. Of `count` rows in all, the i-th begins at `row_of(i)`.
template <class RowOf>
__device__ inline void copy(uint4* stage, int batch, int count, RowOf row_of) {
    const int64 policy = passing();
#pragma unroll
    for (int r = 0; r < DEPTH; r++) {
        const int i = first_row(batch) + r;
        const char* row = row_of(i);
#pragma unroll
        for (int part = 0; part < PER_LANE; part++) {
            // a lane past the end of the row goes with the last one, so that it reads numbers too
            const int chunk = min((int)threadIdx.x % LANES + part * LANES, CHUNKS - 1);
            uint4* target = stage + (r * PER_LANE + part) * 64;
            copy_async(target, row + chunk * 16, i < count, policy);
            copy_async(target + 32, row + (CHUNKS + chunk) * 16, i < count, policy);
        }
    }
}

__device__ inline uint4* lane_ring(uint4* rings) {
    return rings + threadIdx.x / 32 * STAGES * STAGE + threadIdx.x % 32;
}

// Asks for the warp's first batches.
template <class RowOf>
__device__ inline void fill(uint4* ring, int count, RowOf row_of) {
#pragma unroll
    for (int s = 0; s < STAGES; s++) {
        copy(ring + s * STAGE, threadIdx.x / 32 + s * WARPS, count, row_of);
        close_copies();
    }
}

// Sums over the lanes of a row; lane i of them ends with the sums of the KEPT values from i * SCORES / LANES
// on.
__device__ inline void reduce(float (&values)[SCORES]) {
    int count = SCORES;
#pragma unroll
    for (int offset = LANES / 2; offset > 0; offset >>= 1) {
        if (count > 1) {
            count /= 2;
            const bool upper = threadIdx.x & offset;
#pragma unroll
            for (int i = 0; i < SCORES / 2; i++)
                if (i < count) {
                    const float sent = upper ? values[i] : values[i + count];
                    const float kept = upper ? values[i + count] : values[i];
                    values[i] = kept + __shfl_xor_sync(FULL_WARP, sent, offset);
                }
        } else {
            values[0] += __shfl_xor_sync(FULL_WARP, values[0], offset);
        }
    }
}

// Adds a staged batch; row i counts where `held(i)`, and `start` is the team's first row.
template <class Held>
__device__ inline void add_batch(
    Lane& mine, Weights (&weights)[TEAMS][PADDED], const uint4* stage, int start, Held held) {
    const int lane = threadIdx.x % LANES, team = threadIdx.x % 32 / LANES;
    float scores[SCORES];  // by query, then row
#pragma unroll
    for (int i = 0; i < SCORES; i++) scores[i] = 0.f;
#pragma unroll
    for (int r = 0; r < DEPTH; r++)
#pragma unroll
        for (int part = 0; part < PER_LANE; part++) {
            float key[PER_CHUNK];
            unpack(stage[(r * PER_LANE + part) * 64], key);
#pragma unroll
            for (int q = 0; q < TILE; q++)
#pragma unroll
                for (int e = 0; e < PER_CHUNK; e++)
                    scores[q * DEPTH + r] += mine.query[q][part * PER_CHUNK + e] * key[e];
        }
    reduce(scores);
    const int query = lane / (LANES / PADDED), row = lane / COPIES * KEPT % DEPTH;
    float peak = mine.max;
#pragma unroll
    for (int i = 0; i < KEPT; i++) {
        if (!held(start + row + i)) scores[i] = -INFINITE;  // by choice, as it may be NaN
        peak = fmaxf(peak, scores[i]);
    }
#pragma unroll
    for (int offset = COPIES; offset < 32; offset <<= 1)
        if (offset < LANES / PADDED || offset >= LANES)
            peak = fmaxf(peak, __shfl_xor_sync(FULL_WARP, peak, offset));
    const float base = fmaxf(peak, -1e30f);
    const float rescale = power_of_2(mine.max - base);
    const bool moved = __any_sync(FULL_WARP, peak > mine.max);
    mine.max = peak;
    mine.sum *= rescale;
    __syncwarp();  // the weights of the batch before have been read
#pragma unroll
    for (int i = 0; i < KEPT; i++) {
        const float weight = power_of_2(scores[i] - base);
        mine.sum += weight;
        weights[team][query].of[row + i] = weight;
    }
    __syncwarp();
    if (moved)
#pragma unroll
        for (int q = 0; q < TILE; q++) {
            const float factor = __shfl_sync(FULL_WARP, rescale, q * (LANES / PADDED));
#pragma unroll
            for (int e = 0; e < WIDTH; e++) mine.out[q][e] *= factor;
        }
    Weights mix[TILE];
#pragma unroll
    for (int q = 0; q < TILE; q++) mix[q] = weights[team][q];
#pragma unroll
    for (int r = 0; r < DEPTH; r++) {
        const bool counts = held(start + r);
#pragma unroll
        for (int part = 0; part < PER_LANE; part++) {
            uint4 chunk = stage[(r * PER_LANE + part) * 64 + 32];
            if (!counts) chunk = make_uint4(0, 0, 0, 0);  // its place may hold anything, NaN too
            float value[PER_CHUNK];
            unpack(chunk, value);
#pragma unroll
            for (int q = 0; q < TILE; q++)
#pragma unroll
                for (int e = 0; e < PER_CHUNK; e++)
                    mine.out[q][part * PER_CHUNK + e] += mix[q].of[r] * value[e];
        }
    }
}

// Attends the warp's share of `count` rows, after `fill`.
template <class RowOf, class Held>
__device__ inline void stream(Lane& mine, Shared& shared, uint4* ring, int count, RowOf row_of, Held held) {
    int stage = 0;
    for (int batch = threadIdx.x / 32; batch * BATCH < count; batch += WARPS) {
        wait_for_copies<STAGES - 1>();
        add_batch(mine, shared.weights[threadIdx.x / 32], ring + stage * STAGE, first_row(batch), held);
        const int next = batch + STAGES * WARPS;
        if (next * BATCH < count) copy(ring + stage * STAGE, next, count, row_of);
        close_copies();
        stage = stage + 1 < STAGES ? stage + 1 : 0;
    }
}

// Puts what each warp has into shared memory: outputs [TEAMS][TILE][DIM] over its own ring, sums and maxima.
__device__ inline void leave(Lane& mine, Shared& shared, uint4* rings) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % LANES, team = threadIdx.x % 32 / LANES;
#pragma unroll
    for (int offset = COPIES; offset < 32; offset <<= 1)
        if (offset < LANES / PADDED || offset >= LANES)
            mine.sum += __shfl_xor_sync(FULL_WARP, mine.sum, offset);
    const int query = lane / (LANES / PADDED);
    shared.maxima[warp][query] = mine.max;
    shared.sums[warp][query] = mine.sum;
    wait_for_copies<0>();  // the zeros past the end
    __syncwarp();
    float4* out = (float4*)(rings + warp * STAGES * STAGE) + team * TILE * FOURS;
#pragma unroll
    for (int q = 0; q < TILE; q++)
#pragma unroll
        for (int e = 0; e < WIDTH; e += 4) {
            const int part = e / PER_CHUNK;
            const int four = (lane + part * LANES) * (PER_CHUNK / 4) + e % PER_CHUNK / 4;
            const float* values = mine.out[q] + e;
            if (in_row(lane, part))
                out[q * FOURS + four] = make_float4(values[0], values[1], values[2], values[3]);
        }
    __syncthreads();
}

// The sum of N parts.
template <int N, class StateOf>
__device__ inline State combine(StateOf state_of) {
    State states[N];
#pragma unroll
    for (int i = 0; i < N; i++) states[i] = state_of(i);
    State state = {make_float4(0.f, 0.f, 0.f, 0.f), 0.f, -INFINITE};
#pragma unroll
    for (int i = 0; i < N; i++) state.max = fmaxf(state.max, states[i].max);
    const float base = fmaxf(state.max, -1e30f);
#pragma unroll
    for (int i = 0; i < N; i++) {
        const float weight = power_of_2(states[i].max - base);
        state.sum += states[i].sum * weight;
        state.out.x += states[i].out.x * weight;
        state.out.y += states[i].out.y * weight;
        state.out.z += states[i].out.z * weight;
        state.out.w += states[i].out.w * weight;
    }
    return state;
}

// Sums over the warps what `leave` has put into shared memory: float4 `unit` of the outputs.
__device__ inline State gather(const Shared& shared, const uint4* rings, int unit) {
    return combine<WARPS>([&](int warp) {
        const float4* out = (const float4*)(rings + warp * STAGES * STAGE) + unit;
        State state = {out[0], shared.sums[warp][unit / FOURS], shared.maxima[warp][unit / FOURS]};
#pragma unroll
        for (int team = 1; team < TEAMS; team++) {
            const float4 other = out[team * TILE * FOURS];
            state.out.x += other.x, state.out.y += other.y, state.out.z += other.z, state.out.w += other.w;
        }
        return state;
    });
}

// The u-th float4 of the tile's outputs that this thread writes; those beyond the end repeat the last one.
__device__ inline int unit_of(int u, int tile) {
    return min((int)threadIdx.x + u * THREADS, min(TILE, GROUP - tile * TILE) * FOURS - 1);
}

extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT) attend_resident(
    const Element* query, int64 query_stride, const char* kv, int64 kv_stride, const char* resident_rows,
    const int* positions, const int64* lengths, const int* entries, const int* counts, float* outs,
    float* sums, float* maxima, int64 kv_heads, int64 sinks, int64 recent, int64 capacity, int64 k,
    float scale) {
    extern __shared__ uint4 rings[];
    __shared__ Shared shared;
    // [ROWS, rounded up to whole batches], whether a row counts
    uint8* held = (uint8*)(rings + WARPS * STAGES * STAGE);
    const int split = blockIdx.x / TILES, tile = blockIdx.x % TILES;
    const int64 line = (int64)blockIdx.z * kv_heads + blockIdx.y;
    const int start = split * ROWS, length = (int)lengths[blockIdx.z], first = (int)(sinks + recent);
    if (length <= 0) return;
    // The rows are those after `append`: the new one is in the ring, and what it displaces in the set, while
    // that has room.
    const int at = length - 1, place = at < sinks ? at : (int)sinks + (at - (int)sinks) % (int)recent;
    const int oldest = at - (int)recent, home = oldest - (int)sinks;
    const bool moves = home >= 0 && home < capacity && positions[line * capacity + home] != oldest;
    const int moved = moves ? first + home : -1;
    const int coming = counts ? counts[line] : 0;
    // while all of a sequence is resident its rows are the first ones
    const int count = min(ROWS, min(length, first + (int)capacity) - start);
    const char* rows = resident_rows + line * (first + capacity) * ROW_BYTES;
    const char* new_row = kv + blockIdx.z * kv_stride + blockIdx.y * ROW_BYTES;
    const auto row_of = [&](int i) {
        const int row = start + i;
        return row == place ? new_row : rows + (int64)(row == moved ? place : row) * ROW_BYTES;
    };
    uint4* ring = lane_ring(rings);
    fill(ring, count, row_of);
    Lane mine;
    begin(mine, query + blockIdx.z * query_stride + blockIdx.y * GROUP * DIM, tile, scale);
    for (int i = threadIdx.x; i < (ROWS + BATCH - 1) / BATCH * BATCH; i += THREADS) {
        const int row = start + i;
        bool counts_in = i < count && (row >= first || row < length);
        if (counts_in && row >= first && row != moved)
            counts_in = positions[line * capacity + row - first] >= 0;
        held[i] = counts_in;
    }
    __syncthreads();
    for (int i = threadIdx.x; i < coming; i += THREADS) {
        const int row = first + entries[line * k + i] - start;
        if (row >= 0 && row < ROWS) held[row] = 0;
    }
    __syncthreads();
    stream(mine, shared, ring, count, row_of, [&](int i) { return held[i] != 0; });
    leave(mine, shared, rings);
    const int64 part = (line * SPLITS + split) * GROUP + tile * TILE;
#pragma unroll
    for (int u = 0; u < UNITS; u++) {
        const int unit = unit_of(u, tile);
        const State state = gather(shared, rings, unit);
        ((float4*)outs)[part * FOURS + unit] = state.out;
        if (unit % FOURS == 0) {
            sums[part + unit / FOURS] = state.sum;
            maxima[part + unit / FOURS] = state.max * LN2;
        }
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT < 3 ? RESIDENT : 3) merge_fetched(
    const float* outs, const float* sums, const float* maxima, const Element* query, int64 query_stride,
    const char* resident_rows, const int64* lengths, const int* entries, const int* counts, float* lse,
    Element* out, int64* counters, int64 tail, int64 kv_heads, int64 first, int64 capacity, int64 k,
    float scale) {
    extern __shared__ uint4 rings[];
    __shared__ Shared shared;
    const int tile = blockIdx.x;
    const int64 line = (int64)blockIdx.z * kv_heads + blockIdx.y;
    const char* rows = resident_rows + (line * (first + capacity) + first) * ROW_BYTES;
    const auto row_of = [&](int i) {
        return rows + (int64)entries[line * k + min(i, (int)k - 1)] * ROW_BYTES;
    };
    uint4* ring = lane_ring(rings);
    const bool used = lengths[blockIdx.z] > 0;
    int count = 0;
    Lane mine;
    if (counts) {
        count = counts[line];
        if (!used) count = 0;
        fill(ring, count, row_of);
        begin(mine, query + blockIdx.z * query_stride + blockIdx.y * GROUP * DIM, tile, scale);
    }
    State states[UNITS];
#pragma unroll
    for (int u = 0; u < UNITS; u++) {
        const int unit = unit_of(u, tile);
        const auto read = [&](int from) {
            return combine<AT_ONCE>([&](int i) -> State {
                if (from + i >= SPLITS) return {make_float4(0.f, 0.f, 0.f, 0.f), 0.f, -INFINITE};
                const int64 part = (line * SPLITS + from + i) * GROUP + tile * TILE;
                const int query = unit / FOURS;
                return {
                    ((const float4*)outs)[part * FOURS + unit], sums[part + query],
                    maxima[part + query] * LOG2E};
            });
        };
        states[u] = read(0);
#pragma unroll
        for (int from = AT_ONCE; from < SPLITS; from += AT_ONCE) {
            const State next = read(from);
            states[u] = combine<2>([&](int i) { return i ? next : states[u]; });
        }
    }
    if (count > 0) {
        stream(mine, shared, ring, count, row_of, [&](int i) { return i < count; });
        leave(mine, shared, rings);
#pragma unroll
        for (int u = 0; u < UNITS; u++) {
            const State next = gather(shared, rings, unit_of(u, tile));
            states[u] = combine<2>([&](int i) { return i ? next : states[u]; });
        }
    }
    if (!used) return;
    const int64 first_query = line * GROUP + tile * TILE;
#pragma unroll
    for (int u = 0; u < UNITS; u++) {
        const int unit = unit_of(u, tile);
        const State state = states[u];
        const float share = 1.f / state.sum;
        ((Four*)out)[first_query * FOURS + unit] = {
            to_element(state.out.x * share), to_element(state.out.y * share), to_element(state.out.z * share),
            to_element(state.out.w * share)};
        if (unit % FOURS == 0) {
            const float whole = state.max + logarithm(state.sum);
            lse[first_query + unit / FOURS] = whole * LN2;
            if (!counters) continue;
            float weighs = 0.f;  // the tail, of 1
            for (int i = SPLITS - (int)tail; i < SPLITS; i++) {
                const int64 part = (line * SPLITS + i) * GROUP + tile * TILE + unit / FOURS;
                weighs += sums[part] * power_of_2(maxima[part] * LOG2E - whole);
            }
            atomicAdd(
                (unsigned long long*)(counters + line * COUNTERS + 4),
                (unsigned long long)(fminf(fmaxf(weighs, 0.f), 1.f) * (1e6f / GROUP)));
        }
    }
}

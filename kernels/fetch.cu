// Reads from CPU memory need requests in flight, not multiprocessors, and no more requests than the latency
// asks for: those that queue at PCIe hold up the reads of all other kernels. So blocks are few, fewer where
// rows are few. All blocks walk through the rows side by side, so that the addresses in flight stay close
// together (the GPU's reach of address translation into CPU memory is about 1 GiB).
//
// Rows come by loads of threads. From `many` rows on PCIe bounds the launch whatever it does, and the first
// warp of each block takes them by bulk asynchronous copies, of which PCIe carries a little more; with few
// rows these cost the kernels beside them more than loads do.
//
//   THREADS  threads of a block
//   STAGES   groups of rows on their way to a block in bulk; 0: never in bulk
//   LANES    rows of such a group
#include "common.cuh"

#define BULK (STAGES && __CUDA_ARCH__ >= 900)

extern __shared__ __align__(128) char shared[];  // bulk copies to less aligned places run at half the rate

// A thread looks up its next chunk of 16 bytes while the present one is on its way.
template <typename Locate>
__device__ inline void load(int rows, int blocks, Locate locate) {
    const int chunks = ROW_BYTES / 16;
    const int64 total = (int64)rows * chunks, stride = (int64)blocks * THREADS;
    int64 item = (int64)blockIdx.x * THREADS + threadIdx.x;
    const char* source;
    char* target;
    const auto next = [&]() {
        target = 0;
        if (item >= total) return;
        locate((int)(item / chunks), source, target);
        source += item % chunks * 16;
        target += item % chunks * 16;
    };
    next();
    while (target) {
        uint4 value;
        asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                     : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
                     : "l"(source));
        char* const place = target;
        item += stride;
        next();
        *(uint4*)place = value;
    }
}

#if BULK
__device__ inline uint32 shared_address(const void* place) { return (uint32)__cvta_generic_to_shared(place); }

// Ends one phase of a barrier once so many bytes have arrived.
__device__ inline void expect(uint32 barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
                 : "memory");
}

__device__ inline void wait_for_phase(uint32 barrier, int parity) {
    uint32 ended = 0;
    while (!ended)
        asm volatile(
            "{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
            : "=r"(ended)
            : "r"(barrier), "r"(parity)
            : "memory");
}

// For one warp: each lane asks for one row of a group; it goes through `staged` [STAGES][LANES][ROW_BYTES].
template <typename Locate>
__device__ inline void copy_in_bulk(char* staged, int rows, int blocks, Locate locate) {
    __shared__ __align__(8) int64 barriers[STAGES];
    const int lane = threadIdx.x, stride = blocks * LANES;
    if (lane < STAGES)
        asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(&barriers[lane]))
                     : "memory");
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    __syncwarp();

    int begin = (int)blockIdx.x * LANES;  // first row of the next group that is asked for
    const char* source;
    char *target = 0, *targets[STAGES];
    const auto next = [&]() {
        target = 0;
        if (lane < LANES && begin + lane < rows) locate(begin + lane, source, target);
    };
    const auto ask = [&](int stage) {
        targets[stage] = target;
        if (begin >= rows) return;
        const uint32 barrier = shared_address(&barriers[stage]);
        if (lane == 0) expect(barrier, min(LANES, rows - begin) * ROW_BYTES);
        __syncwarp();
        if (target)
            asm volatile(
                "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
                    "r"(shared_address(staged + (stage * LANES + lane) * ROW_BYTES)),
                "l"(source), "n"(ROW_BYTES), "r"(barrier)
                : "memory");
        begin += stride;
        next();  // while these are on their way
    };
    int group = begin, parity = 0;  // of the group that arrives next
    next();
#pragma unroll
    for (int stage = 0; stage < STAGES; stage++) ask(stage);
    for (; group < rows; parity ^= 1) {
#pragma unroll
        for (int stage = 0; stage < STAGES; stage++) {
            if (group >= rows) break;
            wait_for_phase(shared_address(&barriers[stage]), parity);
            if (targets[stage])
                asm volatile(
                    "cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(targets[stage]),
                    "r"(shared_address(staged + (stage * LANES + lane) * ROW_BYTES)), "n"(ROW_BYTES)
                    : "memory");
            asm volatile("cp.async.bulk.commit_group;\ncp.async.bulk.wait_group.read 0;" ::: "memory");
            __syncwarp();
            ask(stage);
            group += stride;
        }
    }
    asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
}
#endif

extern "C" __global__ void __launch_bounds__(THREADS) fetch(
    const int* entries, const int* counts, const int* positions, const int64* block_table, int64 table_width,
    const char* arena, int64 block_stride, int64 head_stride, char* resident_rows, int64 k, int64 capacity,
    int64 first, int64 lines, int64 kv_heads, int64 rows_per_block, int64 many) {
    int* starts = (int*)(shared + STAGES * LANES * ROW_BYTES);  // [lines + 1], rows of the lines before
    __shared__ int room[32];
    int rows = 0;
    for (int base = 0; base < lines; base += THREADS) {
        const int line = base + threadIdx.x;
        int sum;
        const int before = block_before(line < lines ? counts[line] : 0, room, sum);
        if (line < lines) starts[line] = rows + before;
        rows += sum;
    }
    const int blocks = min((int)gridDim.x, max(2, rows / (int)rows_per_block));
    if (blockIdx.x >= blocks) return;
    if (threadIdx.x == 0) starts[lines] = rows;
    __syncthreads();

    const auto locate = [&](int row, const char*& source, char*& target) {
        int low = 0, high = (int)lines;  // starts[low] <= row < starts[high]
        while (high - low > 1) {
            const int middle = (low + high) >> 1;
            if (starts[middle] <= row) low = middle;
            else high = middle;
        }
        const int batch = low / (int)kv_heads, head = low % (int)kv_heads;
        const int entry = entries[low * k + (row - starts[low])];
        const int position = positions[low * capacity + entry];
        const int64 block = block_table[batch * table_width + position / BLOCK_TOKENS];
        source = arena + block * block_stride + head * head_stride + position % BLOCK_TOKENS * ROW_BYTES;
        target = resident_rows + (low * (first + capacity) + first + entry) * ROW_BYTES;
    };
#if BULK
    if (rows >= many) {
        if (threadIdx.x < 32) copy_in_bulk(shared, rows, blocks, locate);
        return;
    }
#endif
    load(rows, blocks, locate);
}

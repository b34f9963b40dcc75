// Few blocks of many threads, each with several 16-byte loads in flight: PCIe wants requests in flight, not
// multiprocessors. All blocks walk through the rows side by side, so that the addresses in flight stay close
// together (the GPU's reach of address translation into CPU memory is about 1 GiB).
#include "common.cuh"

#ifndef LOADS
#define LOADS 4
#endif
#define CHUNKS (ROW_BYTES / 16)

extern "C" __global__ void __launch_bounds__(THREADS) fetch(
    const int* slots, const int* counts, const int* members, const int64* table, int64 table_width,
    const char* arena, int64 block_stride, int64 head_stride, char* resident, int64 k, int64 capacity, int64 first, int64 lines,
    int64 kv_heads) {
    extern __shared__ int starts[];  // [lines + 1], rows of the lines before
    __shared__ int room[32];
    int rows = 0;
    for (int base = 0; base < lines; base += THREADS) {
        const int line = base + threadIdx.x;
        int sum;
        const int before = block_before(line < lines ? counts[line] : 0, room, sum);
        if (line < lines) starts[line] = rows + before;
        rows += sum;
    }
    if (threadIdx.x == 0) starts[lines] = rows;
    __syncthreads();

    const int64 total = (int64)rows * CHUNKS;
    for (int64 base = (int64)blockIdx.x * THREADS * LOADS; base < total;
         base += (int64)gridDim.x * THREADS * LOADS) {
        uint4 values[LOADS];
        char* targets[LOADS];
#pragma unroll
        for (int load = 0; load < LOADS; load++) {
            const int64 item = base + load * THREADS + threadIdx.x;
            targets[load] = 0;
            if (item >= total) continue;
            const int row = (int)(item / CHUNKS), chunk = (int)(item % CHUNKS);
            int low = 0, high = (int)lines;  // starts[low] <= row < starts[high]
            while (high - low > 1) {
                const int middle = (low + high) >> 1;
                if (starts[middle] <= row) low = middle;
                else high = middle;
            }
            const int batch = low / (int)kv_heads, head = low % (int)kv_heads;
            const int slot = slots[low * k + (row - starts[low])];
            const int position = members[low * capacity + slot];
            const int64 block = table[batch * table_width + position / BLOCK_TOKENS];
            const char* source = arena + block * block_stride + head * head_stride +
                                 position % BLOCK_TOKENS * ROW_BYTES + chunk * 16;
            asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                         : "=r"(values[load].x), "=r"(values[load].y), "=r"(values[load].z),
                           "=r"(values[load].w)
                         : "l"(source));
            targets[load] = resident + (low * (first + capacity) + first + slot) * ROW_BYTES + chunk * 16;
        }
#pragma unroll
        for (int load = 0; load < LOADS; load++)
            if (targets[load]) *(uint4*)targets[load] = values[load];
    }
}

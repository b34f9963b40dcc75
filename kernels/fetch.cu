// Reads from CPU memory want requests in flight, not multiprocessors, and no more of them than the latency needs:
// what queues at PCIe holds up the reads of all other kernels. So blocks are few, fewer where rows are few; a
// thread looks up its next chunk while the present one is on its way. All blocks walk through the rows side by
// side, so that the addresses in flight stay close together (the GPU's reach of address translation into CPU
// memory is about 1 GiB).
// Bulk asynchronous copies (cp.async.bulk) carry a little more where nothing runs beside them, and cost a decode
// step more than loads do.
#include "common.cuh"

#define CHUNKS (ROW_BYTES / 16)

extern "C" __global__ void __launch_bounds__(THREADS) fetch(
    const int* slots, const int* counts, const int* members, const int64* table, int64 table_width,
    const char* arena, int64 block_stride, int64 head_stride, char* resident, int64 k, int64 capacity, int64 first,
    int64 lines, int64 kv_heads, int64 rows_per_block) {
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
    const int blocks = min((int)gridDim.x, max(2, rows / (int)rows_per_block));
    if (blockIdx.x >= blocks) return;
    if (threadIdx.x == 0) starts[lines] = rows;
    __syncthreads();

    const int64 total = (int64)rows * CHUNKS, stride = (int64)blocks * THREADS;
    const auto locate = [&](int64 item, const char*& source, char*& target) {
        target = 0;
        if (item >= total) return;
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
        source = arena + block * block_stride + head * head_stride + position % BLOCK_TOKENS * ROW_BYTES +
                 chunk * 16;
        target = resident + (low * (first + capacity) + first + slot) * ROW_BYTES + chunk * 16;
    };
    int64 item = (int64)blockIdx.x * THREADS + threadIdx.x;
    const char* source;
    char* target;
    locate(item, source, target);
    while (target) {
        uint4 value;
        asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                     : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
                     : "l"(source));
        char* const place = target;
        item += stride;
        locate(item, source, target);
        *(uint4*)place = value;
    }
}

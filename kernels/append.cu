// One block for each (KV head, sequence), one thread for each 16-byte chunk of the row.
#include "common.cuh"

extern "C" __global__ void append(
    const uint4* kv, int64 batch_stride, const int64* lengths, uint4* resident_rows, int* positions,
    int* last_used, int64 sinks, int64 recent, int64 capacity) {
    const int head = blockIdx.x, batch = blockIdx.y, kv_heads = gridDim.x, chunk = threadIdx.x;
    const int chunks = blockDim.x;
    const uint4 value = kv[batch * batch_stride + head * chunks + chunk];
    const int at = (int)lengths[batch] - 1;
    if (at < 0) return;
    const int64 line = (int64)batch * kv_heads + head;
    const int first = (int)(sinks + recent);
    const int place = at < sinks ? at : (int)sinks + (at - (int)sinks) % (int)recent;
    const int oldest = at - (int)recent, home = oldest - (int)sinks;
    uint4* rows = resident_rows + line * (first + capacity) * chunks;
    // where the displaced token has moved already, this step is repeated
    const bool moves = home >= 0 && home < capacity && positions[line * capacity + home] != oldest;
    __syncthreads();
    if (moves) {
        rows[(int64)(first + home) * chunks + chunk] = rows[(int64)place * chunks + chunk];
        if (chunk == 0) {
            positions[line * capacity + home] = oldest;
            last_used[line * capacity + home] = at;
        }
    }
    rows[(int64)place * chunks + chunk] = value;
}

// A block takes some rows of the resident rows of one (KV head, sequence), and a thread one 16-byte chunk at
// a time.
#include "common.cuh"

extern "C" __global__ void fill_resident(
    const uint4* prompt_rows, int64 row_chunks, const int64* starts, const int64* lengths, const int64* slots,
    const int* chosen, uint4* resident_rows, int* positions, int* last_used, int64 sinks, int64 recent,
    int64 capacity, int64 rows_per_block) {
    const int head = blockIdx.y, sequence = blockIdx.z, kv_heads = gridDim.y, chunks = (int)row_chunks;
    const int first = (int)(sinks + recent), per_block = (int)rows_per_block;
    const int length = (int)lengths[sequence], candidates = length - first;
    const int taken = max(0, min(candidates, (int)capacity));
    const bool in_order = !chosen || candidates <= capacity;
    const int64 line = slots[sequence] * kv_heads + head;
    const int* choice = chosen + ((int64)sequence * kv_heads + head) * capacity;
    const uint4* source = prompt_rows + (starts[sequence] * kv_heads + head) * chunks;
    uint4* target = resident_rows + line * (first + capacity) * chunks;

    const int begin = (int)blockIdx.x * per_block, end = min(begin + per_block, first + (int)capacity);
    for (int item = threadIdx.x; item < (end - begin) * chunks; item += blockDim.x) {
        const int row = begin + item / chunks, chunk = item % chunks, entry = row - first;
        int position;  // of the token that belongs into the row, negative for none
        if (row < sinks) {
            position = row < length ? row : -1;
        } else if (entry < 0) {  // the latest position that has this place in the ring
            const int behind = length - 1 - row;
            position = behind < 0 ? -1 : row + behind / (int)recent * (int)recent;
        } else {
            position = entry >= taken ? -1 : in_order ? (int)sinks + entry : choice[entry];
            if (chunk == 0) {
                positions[line * capacity + entry] = position;
                last_used[line * capacity + entry] = max(-1, taken - 1 - entry);
            }
        }
        if (position >= 0)
            target[(int64)row * chunks + chunk] = source[(int64)position * kv_heads * chunks + chunk];
    }
}

// One block a (KV head, sequence): which rows of the set come anew, drawn by hashing the step, the call and
// the line; row i lies in the i-th part of the sequence and of the set, so all are distinct and ascend. A
// head that does not select gets none, nor does one whose set holds all rows of a short sequence.
#include "common.cuh"

__device__ inline uint32 hash(uint32 x) {
    x ^= x >> 16, x *= 0x7feb352du;
    x ^= x >> 15, x *= 0x846ca68bu;
    return x ^ x >> 16;
}

extern "C" __global__ void replay(
    const int64* lengths, const uint8* reselect, int64 call, int64 rows, int64 kv_heads, int64 k,
    int64 capacity, int64 sinks, int64 latest, int* positions, int* entries, int* counts) {
    const int64 line = blockIdx.x;
    const int64 length = lengths[line / kv_heads], candidates = length - sinks - latest;
    const bool fetches = reselect[line] && candidates > capacity;
    if (threadIdx.x == 0) counts[line] = fetches ? (int)rows : 0;
    if (!fetches) return;
    const uint32 span = (uint32)(candidates / rows), part = (uint32)(capacity / rows);
    for (uint32 i = threadIdx.x; i < rows; i += blockDim.x) {
        // the length is one more at each step
        const uint32 drawn = hash(hash(hash((uint32)length) + (uint32)call) + (uint32)(line * 4096 + i));
        const int entry = (int)(i * part + (drawn >> 20) % part);
        entries[line * k + i] = entry;
        positions[line * capacity + entry] = (int)(sinks + i * span + drawn % span);
    }
}

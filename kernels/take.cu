// One block; a thread for each row, as no two rows are of one slot.
#include "common.cuh"

extern "C" __global__ void take(
    const int64* drawn, int64 rows, const int64* slots, int64* lengths, int64* tokens, const uint8* active,
    uint16* marks, int64 vocab, int64 most) {
    for (int64 row = threadIdx.x; row < rows; row += blockDim.x) {
        const int64 slot = slots[row], token = drawn[row];
        if (lengths[slot] == 0) continue;
        if (token < 0) {
            lengths[slot] -= 1;
            continue;
        }
        tokens[slot] = token;
        if (!active[slot]) continue;
        uint16* mark = marks + slot * vocab + token;
        if ((*mark & most) < most) *mark += 1;
    }
}

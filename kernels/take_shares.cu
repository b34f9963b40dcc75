// 8 bytes at a time, as one token has. The blocks meet again when all that was left has been read.
#include "meeting.cuh"

extern "C" __global__ void __launch_bounds__(1024) take_shares(
    int64* taken, int64 sources, int64 words, const int64* shares, const int64* flags, uint32* met,
    int64 rank) {
    const uint32 number = met[blockIdx.x] + 1;
    meet(flags, rank, number);
    for (int64 source = 0; source < sources; source++) {
        const int64* share = (const int64*)shares[source];
#pragma unroll 4
        for (int64 i = (int64)blockIdx.x * blockDim.x + threadIdx.x; i < words; i += gridDim.x * blockDim.x)
            taken[source * words + i] = share[i];
    }
    __syncthreads();
    meet(flags, rank, number + 1);
    if (threadIdx.x == 0) met[blockIdx.x] = number + 1;
}

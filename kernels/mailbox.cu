// One block. The flag is released to the whole system only after the tokens: whoever sees it sees them.
#include "common.cuh"

extern "C" __global__ void post(
    const int64* tokens, int64 count, int64* counter, int64* mailbox, int64 entries, int64 width) {
    const int64 number = *counter + 1;
    int64* entry = mailbox + number % entries * width;
    for (int64 i = threadIdx.x; i < count; i += blockDim.x) entry[1 + i] = tokens[i];
    __threadfence_system();
    __syncthreads();
    if (threadIdx.x == 0) {
        *counter = number;
        asm volatile("st.release.sys.global.s64 [%0], %1;" ::"l"(entry), "l"(number) : "memory");
    }
}

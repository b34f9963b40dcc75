// How the ranks of a group meet: each writes the number of a meeting to the flags of all, and waits for
// theirs in its own. All of this is plain stores, which a rank waits for once, where atomics over the GPUs'
// link would take a way there and back.
#pragma once
#include "common.cuh"

__device__ inline void say(uint32* flag, uint32 number) {
    asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(flag), "r"(number) : "memory");
}

__device__ inline uint32 heard(const uint32* flag) {
    uint32 number;
    asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(number) : "l"(flag) : "memory");
    return number;
}

// This block meets the same block of each other rank; all of its threads have to call it.
__device__ inline void meet(const int64* flags, int64 rank, uint32 number) {
    if (threadIdx.x < RANKS) {
        say((uint32*)flags[threadIdx.x] + blockIdx.x * RANKS + rank, number);
        const uint32* own = (const uint32*)flags[rank] + blockIdx.x * RANKS + threadIdx.x;
        while ((int)(heard(own) - number) < 0) {}
    }
    __syncthreads();
}

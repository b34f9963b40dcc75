// What all kernels share. Compiled by NVRTC, so without any header of CUDA.
//
// Defines that the host sets where a kernel needs them:
//   ELEMENT  0 bfloat16, 1 float16, 2 float32: type of queries, keys and values
//   DIM      head_dim
//   GROUP    query heads that share a KV head
//   BLOCK_TOKENS  tokens of a block
#pragma once

typedef long long int64;
typedef unsigned char uint8;
typedef signed char int8;
typedef unsigned short uint16;
typedef unsigned int uint32;

#define COUNTERS 6  // of a head, see clo.gpu_worker.cache.layer.LayerState
#define FULL_WARP 0xffffffffu
#define LOG2E 1.4426950408889634f
#define LN2 0.6931471805599453f
#define INFINITE __int_as_float(0x7f800000)

__device__ inline float half_to_float(uint16 bits) {
    float value;
    asm("{ .reg .b16 h; mov.b16 h, %1; cvt.f32.f16 %0, h; }" : "=f"(value) : "h"(bits));
    return value;
}

__device__ inline uint16 float_to_half(float value) {
    uint16 bits;
    asm("{ .reg .b16 h; cvt.rn.f16.f32 h, %1; mov.b16 %0, h; }" : "=h"(bits) : "f"(value));
    return bits;
}

// From here on the next kernel of the stream may begin, if it was launched as `early`.
__device__ inline void let_next_begin() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Waits until the kernel before this one on the stream has ended.
__device__ inline void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

#ifdef ELEMENT
#if ELEMENT == 0
typedef uint16 Element;
__device__ inline float to_float(Element bits) { return __uint_as_float((uint32)bits << 16); }
__device__ inline Element to_element(float value) {
    uint16 bits;
    asm("{ .reg .b16 h; cvt.rn.bf16.f32 h, %1; mov.b16 %0, h; }" : "=h"(bits) : "f"(value));
    return bits;
}
#elif ELEMENT == 1
typedef uint16 Element;
__device__ inline float to_float(Element bits) { return half_to_float(bits); }
__device__ inline Element to_element(float value) { return float_to_half(value); }
#else
typedef float Element;
__device__ inline float to_float(Element value) { return value; }
__device__ inline Element to_element(float value) { return value; }
#endif

#define PER_CHUNK (16 / (int)sizeof(Element))  // elements of a 16-byte chunk

__device__ inline void unpack(const uint4& chunk, float (&values)[PER_CHUNK]) {
    const uint32 words[4] = {chunk.x, chunk.y, chunk.z, chunk.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
#if ELEMENT == 2
        values[i] = __uint_as_float(words[i]);
#else
        values[2 * i] = to_float((Element)(words[i] & 0xffff));
        values[2 * i + 1] = to_float((Element)(words[i] >> 16));
#endif
    }
}

__device__ inline uint4 pack(const float (&values)[PER_CHUNK]) {
    uint32 words[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
#if ELEMENT == 2
        words[i] = __float_as_uint(values[i]);
#else
        words[i] = (uint32)to_element(values[2 * i]) | (uint32)to_element(values[2 * i + 1]) << 16;
#endif
    }
    return make_uint4(words[0], words[1], words[2], words[3]);
}
#endif

__device__ inline float power_of_2(float exponent) {
    float value;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(value) : "f"(exponent));
    return value;
}

// The cache policy for data that is read once a step: it must not drive out of L2 what is read again soon.
__device__ inline int64 passing() {
    int64 policy;
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}

// Copy 16 bytes, or 4, to shared memory asynchronously.
__device__ inline void copy_16(void* shared, const void* global, int64 policy) {
    const uint32 target = (uint32)__cvta_generic_to_shared(shared);
    asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2;" ::"r"(target), "l"(global),
                 "l"(policy)
                 : "memory");
}

__device__ inline void copy_4(void* shared, const void* global) {
    const uint32 target = (uint32)__cvta_generic_to_shared(shared);
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(target), "l"(global) : "memory");
}

// Ends a group of asynchronous copies of this thread.
__device__ inline void close_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits for all copies of this thread except those of the last OPEN closed groups.
template <int OPEN>
__device__ inline void wait_for_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(OPEN) : "memory");
}

__device__ inline float warp_sum(float value) {
#pragma unroll
    for (int offset = 16; offset > 0; offset >>= 1) value += __shfl_xor_sync(FULL_WARP, value, offset);
    return value;
}

__device__ inline float warp_max(float value) {
#pragma unroll
    for (int offset = 16; offset > 0; offset >>= 1)
        value = fmaxf(value, __shfl_xor_sync(FULL_WARP, value, offset));
    return value;
}

// Sum over all threads of a block of at most 1024; `room` is 32 floats of shared memory.
__device__ inline float block_sum(float value, float* room) {
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, warps = (blockDim.x + 31) >> 5;
    value = warp_sum(value);
    __syncthreads();
    if (lane == 0) room[warp] = value;
    __syncthreads();
    return warp_sum(lane < warps ? room[lane] : 0.f);
}

// Sum over the threads before this one; `total` becomes the sum over all. `room` is 32 ints.
__device__ inline int block_before(int value, int* room, int& total) {
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, warps = (blockDim.x + 31) >> 5;
    int inclusive = value;
#pragma unroll
    for (int offset = 1; offset < 32; offset <<= 1) {
        const int other = __shfl_up_sync(FULL_WARP, inclusive, offset);
        if (lane >= offset) inclusive += other;
    }
    __syncthreads();
    if (lane == 31) room[warp] = inclusive;
    __syncthreads();
    int sums = lane < warps ? room[lane] : 0;
#pragma unroll
    for (int offset = 1; offset < 32; offset <<= 1) {
        const int other = __shfl_up_sync(FULL_WARP, sums, offset);
        if (lane >= offset) sums += other;
    }
    total = __shfl_sync(FULL_WARP, sums, 31);
    const int before = warp == 0 ? 0 : __shfl_sync(FULL_WARP, sums, warp - 1);
    return before + inclusive - value;
}

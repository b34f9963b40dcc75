// The Hadamard transform of vectors that lie over 8 lanes, in blocks of the largest power of 2 that divides
// DIM. A lane has `values[half][place]`, entry 64 * half + 8 * lane + place; those past the end are zero and
// stay so. Neighbours are STEP lanes apart.
#pragma once

#define HALVES ((DIM + 63) / 64)
#define TRANSFORMED (DIM & -DIM)  // entries of a block

template <int STEP>
__device__ inline void transform(float (&values)[HALVES][8], int lane) {
#pragma unroll
    for (int half = 0; half < HALVES; half++)
#pragma unroll
        for (int step = 1; step < 8; step *= 2)
#pragma unroll
            for (int place = 0; place < 8; place++)
                if (!(place & step)) {
                    const float low = values[half][place], high = values[half][place + step];
                    values[half][place] = low + high, values[half][place + step] = low - high;
                }
#pragma unroll
    for (int step = 1; step < 8; step *= 2)
        if (8 * step < TRANSFORMED)
#pragma unroll
            for (int half = 0; half < HALVES; half++)
#pragma unroll
                for (int place = 0; place < 8; place++) {
                    const float mine = values[half][place];
                    const float other = __shfl_xor_sync(FULL_WARP, mine, step * STEP);
                    values[half][place] = lane & step ? other - mine : mine + other;
                }
#pragma unroll
    for (int step = 1; step < HALVES; step *= 2)
        if (64 * step < TRANSFORMED)
#pragma unroll
            for (int half = 0; half < HALVES; half++)
                if (!(half & step))
#pragma unroll
                    for (int place = 0; place < 8; place++) {
                        const int above = half + step < HALVES ? half + step : half;
                        const float low = values[half][place], high = values[above][place];
                        values[half][place] = low + high, values[above][place] = low - high;
                    }
}

// The sign that an entry gets before the transform: 1 or -1.
__device__ inline float sign_of(int entry) {
    return ((uint32)MIX >> (entry % 32) ^ (uint32)(entry / 32)) & 1 ? -1.f : 1.f;
}

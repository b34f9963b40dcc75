// A block has one row, or of many rows every n-th, where there are n blocks. While it adds up one, the next
// one's shares are on their way.
#include "meeting.cuh"

extern "C" __global__ void __launch_bounds__(THREADS) add_shares(
    const uint4* hidden, const uint4* weight, uint4* total, uint4* normed, int64 rows, int64 chunks,
    const int64* shares, const int64* flags, uint32* met, int64 rank, float eps) {
    __shared__ float room[32];
    const uint32 number = met[blockIdx.x] + 1;
    uint4 before[CHUNKS], factors[CHUNKS], given[CHUNKS][RANKS];
    const auto each_chunk = [&](auto visit) {
#pragma unroll
        for (int i = 0; i < CHUNKS; i++) {
            const int64 chunk = threadIdx.x + i * blockDim.x;
            if (chunk < chunks) visit(i, chunk);
        }
    };
    int64 row = blockIdx.x;
    each_chunk(
        [&](int i, int64 chunk) { before[i] = hidden[row * chunks + chunk], factors[i] = weight[chunk]; });
    meet(flags, rank, number);
    if (threadIdx.x == 0) met[blockIdx.x] = number;
    const auto load_shares = [&](int i, int64 chunk) {
#pragma unroll
        for (int other = 0; other < RANKS; other++)
            given[i][other] = ((const uint4*)shares[other])[row * chunks + chunk];
    };
    each_chunk(load_shares);
    while (true) {
        const int64 place = row * chunks;
        float values[CHUNKS][PER_CHUNK], squares = 0.f;
        each_chunk([&](int i, int64 chunk) {
            float sum[PER_CHUNK] = {};
#pragma unroll
            for (int other = 0; other < RANKS; other++) {  // in one order at all ranks
                float part[PER_CHUNK];
                unpack(given[i][other], part);
#pragma unroll
                for (int j = 0; j < PER_CHUNK; j++) sum[j] += part[j];
            }
            unpack(before[i], values[i]);
#pragma unroll
            for (int j = 0; j < PER_CHUNK; j++) {
                values[i][j] = to_float(to_element(values[i][j] + sum[j]));
                squares += values[i][j] * values[i][j];
            }
        });
        row += gridDim.x;
        if (row < rows)
            each_chunk([&](int i, int64 chunk) {
                load_shares(i, chunk);
                before[i] = hidden[row * chunks + chunk];
            });
        each_chunk([&](int i, int64 chunk) { total[place + chunk] = pack(values[i]); });
        squares = block_sum(squares, room);
        const float factor = rsqrtf(squares / (float)(chunks * PER_CHUNK) + eps);
        each_chunk([&](int i, int64 chunk) {
            float scales[PER_CHUNK];
            unpack(factors[i], scales);
#pragma unroll
            for (int j = 0; j < PER_CHUNK; j++) scales[j] *= values[i][j] * factor;
            normed[place + chunk] = pack(scales);
        });
        if (row >= rows) break;
    }
}

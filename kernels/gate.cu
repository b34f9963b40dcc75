// One block for each (KV head, sequence).
#include "common.cuh"

extern "C" __global__ void gate(
    const Element* query, int64 query_stride, Element* selection_query, const float* threshold,
    const int64* lengths, int64 whole, int64* counters, uint8* reselect) {
    __shared__ float room[32];
    const int head = blockIdx.x, batch = blockIdx.y, kv_heads = gridDim.x;
    const int64 line = (int64)batch * kv_heads + head;
    if (lengths[batch] <= whole) {
        if (threadIdx.x == 0) reselect[line] = 0;
        return;
    }
    query += batch * query_stride + head * GROUP * DIM;
    selection_query += line * GROUP * DIM;
    float product = 0.f, now = 0.f, past = 0.f;
    for (int i = threadIdx.x; i < GROUP * DIM; i += blockDim.x) {
        const float a = to_float(query[i]), b = to_float(selection_query[i]);
        product += a * b;
        now += a * a;
        past += b * b;
    }
    product = block_sum(product, room);
    now = block_sum(now, room);
    past = block_sum(past, room);
    const bool selects = product / fmaxf(sqrtf(now * past), 1e-30f) < threshold[head];
    if (selects)
        for (int i = threadIdx.x; i < GROUP * DIM; i += blockDim.x) selection_query[i] = query[i];
    if (threadIdx.x == 0) {
        reselect[line] = selects;
        counters[line * COUNTERS] += 1;
        counters[line * COUNTERS + 1] += selects;
    }
}

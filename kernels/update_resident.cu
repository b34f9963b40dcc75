// One block for each (KV head, sequence). The k best scores lie in the k best stretches of 16, by their
// largest score: those are found first, and only in them single scores are looked at, each raised by that
// before it, which leaves a stretch's largest as it is. Then the set's positions look themselves up among the
// chosen positions. The k-th best is found by counting: by the highest byte, then by the next byte of those
// that share it. A barrier costs as much as the little work between two of them, so every warp reads the
// counts for itself, and each byte has bins of its own, empty from the start.
//
// The tail is the best of the same stretches by the sum of what their tokens weigh that are not resident. A
// map of one bit for each token says which are; where a stretch has one, the sum that came with the scores
// counts too much, and is taken anew. Its scores are those that came, not raised ones.
//
// Defines: THREADS of a block, and SUCCESSOR_BITS of clo.kernels.update_resident, 0 where no score is raised.
#include "common.cuh"

#define BINS 256
#define MOST 1e6f  // times its own weight that the tail stands for, at most, beside itself
#define HELD 4     // positions that a thread looks up at the same time

__device__ inline int score_of(const uint4& eight, int i) {
    const uint32 words[4] = {eight.x, eight.y, eight.z, eight.w};
    return i % 2 ? (int)words[i / 2] >> 16 : (int)(short)(words[i / 2] & 0xffff);
}

// Scores from `left` on are not candidates.
__device__ inline void cut(uint4& eight, int left) {
    uint32* words[4] = {&eight.x, &eight.y, &eight.z, &eight.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        if (left <= i * 2 + 1) *words[i] |= 0xffff0000;
        if (left <= i * 2) *words[i] |= 0x0000ffff;
    }
}

// Makes each of eight scores at least that before it less SUCCESSOR_BITS; those below zero stay below. The
// upper half of `before` is the score before the eight, or zero where a stretch begins. It takes two at a
// time: a score below SUCCESSOR_BITS, and so each below zero, counts as that much and leaves zero, so that
// neither half of a difference borrows from the other.
__device__ inline void raise(uint4& eight, uint32 before) {
    const uint32 bits = SUCCESSOR_BITS * 0x00010001u;
    uint32* words[4] = {&eight.x, &eight.y, &eight.z, &eight.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const uint32 own = *words[i], previous = __funnelshift_l(before, own, 16);
        *words[i] = __vmaxs2(own, __vmaxs2(previous, bits) - bits) | (own & 0x80008000);
        before = own;
    }
}

// The larger the byte, the earlier the bin.
__device__ inline void count(int* bins, int value, int shift) {
    atomicAdd(&bins[~value >> shift & (BINS - 1)], 1);
}

// The same for four values, some of which may be below zero and do not count. Neighbours mostly share a bin,
// and a bin takes one thread at a time.
__device__ inline void count_four(int* bins, const int (&values)[4], int shift) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
        int alike = values[i] >= 0;
        bool first = alike;
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const bool same = values[j] >= 0 && values[i] >> shift == values[j] >> shift;
            if (j < i) first = first && !same;
            else if (j > i) alike += same;
        }
        if (first) atomicAdd(&bins[~values[i] >> shift & (BINS - 1)], alike);
    }
}

// What those of eight scores weigh that `absent` has a bit for, in the order in which score.cu adds.
__device__ inline float weigh_absent(const uint4& eight, uint32 absent) {
    float weights[8];
#pragma unroll
    for (int i = 0; i < 8; i++) {
        const int score = score_of(eight, i);
        weights[i] = absent >> i & 1 && score > 0 ? __int_as_float(score << 16) : 0.f;
    }
#pragma unroll
    for (int width = 4; width > 0; width /= 2)
#pragma unroll
        for (int i = 0; i < 4; i++)
            if (i < width) weights[i] = weights[2 * i] + weights[2 * i + 1];
    return weights[0];
}

// Sums over the block, for the first warp. `room` is 32 float4.
__device__ inline float4 block_sum_of_four(float4 values, float4* room) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    values = {warp_sum(values.x), warp_sum(values.y), warp_sum(values.z), warp_sum(values.w)};
    __syncthreads();
    if (lane == 0) room[warp] = values;
    __syncthreads();
    if (warp > 0) return values;
    values = lane < THREADS / 32 ? room[lane] : make_float4(0.f, 0.f, 0.f, 0.f);
    return {warp_sum(values.x), warp_sum(values.y), warp_sum(values.z), warp_sum(values.w)};
}

// The bin in which the running count reaches `wanted`, -1 where it never does; `before` becomes the count of
// the bins before it. All lanes get the same.
__device__ inline int find_bin(const int* bins, int wanted, int& before) {
    const int lane = threadIdx.x % 32;
    const int4 low = ((const int4*)bins)[lane * 2], high = ((const int4*)bins)[lane * 2 + 1];
    const int held[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
    const int sum = low.x + low.y + low.z + low.w + (high.x + high.y + high.z + high.w);
    int running = sum;
#pragma unroll
    for (int offset = 1; offset < 32; offset <<= 1) {
        const int other = __shfl_up_sync(FULL_WARP, running, offset);
        if (lane >= offset) running += other;
    }
    const uint32 reached = __ballot_sync(FULL_WARP, running >= wanted);
    if (reached == 0) return -1;
    running -= sum;
    before = running;
    int bin = lane * 8;
#pragma unroll
    for (int i = 0; i < 8; i++) {
        running += held[i];
        if (running < wanted) bin++, before = running;
    }
    const int owner = __ffs(reached) - 1;
    before = __shfl_sync(FULL_WARP, before, owner);
    return __shfl_sync(FULL_WARP, bin, owner);
}

// The k-th largest of all values, 0 where fewer are counted; `ties` becomes how many of those that equal it
// are among the k. The byte at `shift` is counted in the first bins already; `each` calls its argument with
// the values.
template <typename Each>
__device__ inline int find_value(int (*bins)[BINS], int shift, int k, int& ties, Each each) {
    int found = 0;
    ties = k;
    while (true) {
        int before;
        const int bin = find_bin(*bins, ties, before);
        if (bin < 0) return 0;
        ties -= before;
        found = found << 8 | (BINS - 1 - bin);
        if (shift == 0) return found;
        bins++;
        each([&](int value) {
            if (value >> shift == found) count(*bins, value, shift - 8);
        });
        shift -= 8;
        __syncthreads();
    }
}

// Counts by their high bytes those scores that may be among the k largest, of `groups` times eight: from the
// k-th largest of the threads' own largest ones on, as that is not above the k-th largest of all. To count
// all takes long where they are many, for most fall into a few bins. The first two of `bins` are empty
// before; after, the first holds the counts.
__device__ inline void count_largest(int (*bins)[BINS], const uint4* eights, int groups, int k) {
    __syncthreads();
    int top = -1, ties;
    for (int i = threadIdx.x; i < groups; i += THREADS) {
        const uint4 eight = eights[i];
#pragma unroll
        for (int j = 0; j < 8; j++) top = max(top, score_of(eight, j));
    }
    if (top >= 0) count(bins[0], top, 8);
    __syncthreads();
    const int least = find_value(bins, 8, k, ties, [&](auto visit) { visit(top); });
    __syncthreads();
    for (int i = threadIdx.x; i < 2 * BINS; i += THREADS) bins[0][i] = 0;
    __syncthreads();
    for (int i = threadIdx.x; i < groups; i += THREADS) {
        const uint4 eight = eights[i];
#pragma unroll
        for (int j = 0; j < 8; j++)
            if (score_of(eight, j) >= least) count(bins[0], score_of(eight, j), 8);
    }
}

// Calls `take` with the ranks and indices, both ascending, of the values above `bound` and of the first
// `ties` that equal it, and returns how many they are. `load` gets N of the values from an index on, -1 past
// the end.
template <int N, typename Load, typename Take>
__device__ inline int keep(int count, int bound, int ties, int* room, Load load, Take take) {
    int better = 0, same = 0;
    for (int first = 0; first < count; first += THREADS * N) {
        const int index = first + threadIdx.x * N;
        int values[N], mine = 0, sum;
#pragma unroll
        for (int i = 0; i < N; i++) values[i] = -1;
        if (index < count) load(index, values);
#pragma unroll
        for (int i = 0; i < N; i++) mine += (values[i] > bound) + ((values[i] == bound) << 16);
        const int packed = block_before(mine, room, sum);
        int above = better + (packed & 0xffff), equal = same + (packed >> 16);
        if (mine)
#pragma unroll
            for (int i = 0; i < N; i++) {
                if (values[i] > bound || (values[i] == bound && equal < ties))
                    take(above + min(equal, ties), index + i);
                above += values[i] > bound;
                equal += values[i] == bound;
            }
        better += sum & 0xffff;
        same += sum >> 16;
    }
    return better + min(same, ties);
}

extern "C" __global__ void __launch_bounds__(THREADS, 1024 / THREADS) update_resident(
    const short* scores, const uint32* runs, int64 span, int64 latest, const uint8* reselect,
    const int64* lengths, int* positions, int* last_used, int64* counters, int* entries, int* counts,
    int64 k64, int64 capacity64, int64 kv_heads, int* tail_runs, int* tail_masks, int* tail_counts,
    float* tail_boosts, int64 tail64, int64 sinks, int64 recent, uint4* room_for_map) {
    extern __shared__ uint4 memory[];
    __shared__ int room[32];
    const int k = (int)k64, capacity = (int)capacity64, tail = (int)tail64, thread = threadIdx.x;
    const int64 line = blockIdx.x, batch = line / kv_heads;
    const int places = (k + 15) / 16 * 16;
    // [span / 128] the largest score of each stretch; then [2 * k] the scores of the best stretches
    uint4* eights = memory;
    int (*bins)[BINS] = (int (*)[BINS])(eights + max(2 * k, ((int)span + 127) / 128));  // [9]
    uint8* known = (uint8*)(bins + 9);     // [places] whether a chosen position is resident
    int* chosen = (int*)(known + places);  // [places] positions, ascending
    int* active = chosen + places;         // [places] the best stretches, ascending; then positions to move
    int* idle = active + places;           // [capacity] tokens since an entry was last selected
    // [span / 128] what the tokens of each stretch weigh that are not resident, and the map; a long context
    // has them in global memory
    const int eighths = ((int)span + 127) / 128;
    uint4* sums =
        room_for_map ? room_for_map + blockIdx.x * (eighths * 2) : (uint4*)(idle + (capacity + 3) / 4 * 4);
    uint32* map = (uint32*)(sums + eighths);
    for (int i = thread; i < 9 * BINS + places / 4; i += THREADS) bins[0][i] = 0;  // `known` too
    if (tail)
        for (int i = thread; i < eighths; i += THREADS) ((uint4*)map)[i] = make_uint4(0, 0, 0, 0);
    __syncthreads();
    const int length = (int)lengths[batch];
    if (!reselect[line] || length <= 0) {
        if (thread == 0) counts[line] = 0;
        return;
    }
    const int end = max(0, min((int)span, length - (int)latest));
    const uint4* source = (const uint4*)(scores + line * span);
    const int stretches_there = (end + 15) / 16;
    const auto load_four = [&](int at) {  // stretches; the halves of each word are its largest score and sum
        return at * 4 < stretches_there ? ((const uint4*)(runs + line * (span / 16)))[at]
                                        : make_uint4(0, 0, 0, 0);
    };
    uint4 next = load_four(thread);
    positions += line * capacity;
    last_used += line * capacity;
    entries += line * k;
    if (tail) {
        for (int entry = thread; entry < capacity; entry += THREADS) {
            const int position = positions[entry];
            if (position >= 0 && position < span) atomicOr(map + position / 32, 1u << position % 32);
        }
        __syncthreads();
    }

    // 1. the k best stretches
    const int groups = (end + 127) / 128;    // of eight stretches
    const bool many = groups * 2 > THREADS;  // then a pass over all of them takes less than counting all
    for (int at = thread; at < groups * 2; at += THREADS) {
        const uint4 four = next;
        next = load_four(at + THREADS);
        int tops[4], totals[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const bool there = at * 4 + i < stretches_there;
            tops[i] = there ? score_of(four, 2 * i) : -1;
            totals[i] = there ? score_of(four, 2 * i + 1) : -1;
        }
        ((uint2*)eights)[at] =
            make_uint2(__byte_perm(tops[0], tops[1], 0x5410), __byte_perm(tops[2], tops[3], 0x5410));
        if (!many) count_four(bins[0], tops, 8);
        if (!tail) continue;
        const uint2 bits = ((const uint2*)map)[at];
#pragma unroll
        for (int pair = 0; pair < 2; pair++) {  // more at a time would take more registers than there are
            uint4 low[2], high[2];
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const int stretch = at * 4 + pair * 2 + i;
                if ((pair ? bits.y : bits.x) >> i * 16 & 0xffff && stretch < stretches_there)
                    low[i] = source[stretch * 2], high[i] = source[stretch * 2 + 1];
            }
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const int stretch = at * 4 + pair * 2 + i;
                int& total = totals[pair * 2 + i];
                const uint32 resident = (pair ? bits.y : bits.x) >> i * 16 & 0xffff;
                if (resident && stretch < stretches_there) {
                    const int left = end - stretch * 16;
                    cut(low[i], left), cut(high[i], left - 8);
                    const float sum = weigh_absent(low[i], ~resident) + weigh_absent(high[i], ~resident >> 8);
                    total = __float_as_int(sum) >> 16;
                }
                if (total <= 0) total = -1;
            }
        }
        ((uint2*)sums)[at] =
            make_uint2(__byte_perm(totals[0], totals[1], 0x5410), __byte_perm(totals[2], totals[3], 0x5410));
        if (!many) count_four(bins[7], totals, 8);
    }
    if (many) {
        count_largest(bins, eights, groups, k);
        if (tail) count_largest(bins + 7, sums, groups, tail);
    }
    __syncthreads();
    const auto of_eights = [&](int index, int (&values)[8]) {
        const uint4 eight = eights[index / 8];
#pragma unroll
        for (int i = 0; i < 8; i++) values[i] = score_of(eight, i);
    };
    int looked_at = groups;  // eights
    const auto each_score = [&](auto visit) {
        for (int i = thread; i < looked_at; i += THREADS) {
            const uint4 eight = eights[i];
#pragma unroll
            for (int j = 0; j < 8; j++) visit(score_of(eight, j));
        }
    };
    int ties;
    int bound = find_value(bins, 8, k, ties, each_score);
    const int stretches = keep<8>(
        groups * 8, bound, ties, room, of_eights, [&](int rank, int stretch) { active[rank] = stretch; });
    __syncthreads();

    // 2. the k best positions in them: none of these has a score below that of the last stretch
    looked_at = stretches * 2;
    for (int i = thread; i < looked_at; i += THREADS) {
        const int at = active[i / 2] * 2 + i % 2;
        uint4 eight = source[at];
        // beside it the last score of the first half of a stretch, where this is the second
        if (SUCCESSOR_BITS) raise(eight, i % 2 ? ((const uint32*)source)[at * 4 - 1] : 0);
        cut(eight, end - at * 8);  // only now, as it also takes what was raised there
        eights[i] = eight;
#pragma unroll
        for (int j = 0; j < 8; j++)
            if (score_of(eight, j) >= bound) count(bins[2], score_of(eight, j), 8);
    }
    __syncthreads();
    bound = find_value(bins + 2, 8, k, ties, each_score);
    const int selected = keep<8>(looked_at * 8, bound, ties, room, of_eights, [&](int rank, int index) {
        chosen[rank] = active[index / 16] * 16 + index % 16;
    });
    __syncthreads();

    // 3. those that are resident are marked
    for (int first = 0; first < capacity; first += HELD * THREADS) {
        int position[HELD], used[HELD];
#pragma unroll
        for (int i = 0; i < HELD; i++) {
            const int entry = first + i * THREADS + thread;
            position[i] = entry < capacity ? positions[entry] : -1;
            used[i] = entry < capacity ? last_used[entry] : 0;
        }
#pragma unroll
        for (int i = 0; i < HELD; i++) {
            const int entry = first + i * THREADS + thread;
            if (entry >= capacity) break;
            int low = 0, high = selected;
            while (low < high) {
                const int middle = (low + high) >> 1;
                if (chosen[middle] < position[i]) low = middle + 1;
                else high = middle;
            }
            if (low < selected && chosen[low] == position[i]) {
                known[low] = 1;
                last_used[entry] = used[i] = length;
            }
            idle[entry] = length - used[i];
            count(bins[4], length - used[i], 16);
        }
    }
    __syncthreads();
    int missing = 0;
    for (int first = 0; first < selected; first += THREADS) {
        const int i = first + thread;
        const bool lacks = i < selected && !known[i];
        int sum;
        const int rank = missing + block_before(lacks, room, sum);
        if (lacks) active[rank] = chosen[i];
        missing += sum;
    }
    if (thread == 0) {
        counts[line] = missing;
        counters[line * COUNTERS + 2] += selected;
        counters[line * COUNTERS + 3] += missing;
    }
    __syncthreads();

    // 4. the others take the places of those selected longest ago
    if (missing > 0) {
        bound = find_value(bins + 4, 16, missing, ties, [&](auto visit) {
            for (int entry = thread; entry < capacity; entry += THREADS) visit(idle[entry]);
        });
        keep<2>(
            capacity, bound, ties, room,
            [&](int index, int (&values)[2]) {
#pragma unroll
                for (int i = 0; i < 2; i++) values[i] = index + i < capacity ? idle[index + i] : -1;
            },
            [&](int rank, int entry) {
                const int before = positions[entry], now = active[rank];
                if (tail) {
                    if (before >= 0 && before < span) atomicAnd(map + before / 32, ~(1u << before % 32));
                    atomicOr(map + now / 32, 1u << now % 32);
                }
                positions[entry] = now;
                last_used[entry] = length;
                entries[rank] = entry;
            });
    }
    if (tail == 0) return;
    __syncthreads();

    // 5. the tail: the best stretches, and which of their tokens nobody else attends to
    // The tail stands for all that is not resident: for what its own tokens weigh now, and for the others.
    // These are added up by themselves, as a difference of sums would be lost beside what is on its way.
    float of_tail = 0.f, others = 0.f, alike = 0.f, within = 0.f;
    const auto of_sums = [&](int index, int (&values)[8]) {
        const uint4 eight = sums[index / 8];
#pragma unroll
        for (int i = 0; i < 8; i++) {
            values[i] = score_of(eight, i);
            const float weight = values[i] > 0 ? __int_as_float(values[i] << 16) : 0.f;
            if (values[i] > bound) of_tail += weight;
            else if (values[i] < bound) others += weight;
            else alike += 1.f;
        }
    };
    bound = find_value(bins + 7, 8, tail, ties, [&](auto visit) {
        for (int i = thread; i < groups; i += THREADS) {
            const uint4 eight = sums[i];
#pragma unroll
            for (int j = 0; j < 8; j++) visit(score_of(eight, j));
        }
    });
    const int listed = keep<8>(groups * 8, bound, ties, room, of_sums, [&](int rank, int run) {
        uint32 absent = ~(map[run / 2] >> run % 2 * 16) & 0xffff;
        const int low = (int)sinks - run * 16, high = length - (int)recent - run * 16;
        if (low > 0) absent &= low < 16 ? ~0u << low : 0u;
        if (high < 16) absent &= high > 0 ? ~(~0u << high) : 0u;
        tail_runs[line * tail + rank] = run;
        tail_masks[line * tail + rank] = (int)absent;
    });
    __syncthreads();
    for (int rank = thread; rank < listed; rank += THREADS) {
        const int run = tail_runs[line * tail + rank], left = end - run * 16;
        const uint32 absent = (uint32)tail_masks[line * tail + rank];
        uint4 low = source[run * 2], high = source[run * 2 + 1];
        cut(low, left), cut(high, left - 8);
        within += weigh_absent(low, absent) + weigh_absent(high, absent >> 8);
    }
    const float4 total = block_sum_of_four(make_float4(of_tail, others, alike, within), (float4*)bins[0]);
    if (thread == 0) {
        tail_counts[line] = listed;
        const float weight = __int_as_float(bound << 16), taken = fminf(total.z, (float)ties);
        of_tail = total.x + taken * weight;
        others = total.y + (total.z - taken) * weight;
        tail_boosts[line] = total.w > 0.f ? __log2f(1.f + fminf(others / total.w, MOST)) : 0.f;
        if (of_tail > 0.f) counters[line * COUNTERS + 5] += (int64)(1e6f * (others / (of_tail + others)));
    }
}

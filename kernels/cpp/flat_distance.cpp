// squared_distance. Compiled without fused multiply-adds (CMakeLists.txt), so that every processor gives the same bits.
#include "flat.h"

#include <algorithm>
#include <cstdlib>  // defines __GLIBC__, whose loader can choose
#include <vector>

#include "parallel.h"

// FOR_EACH_VECTOR_UNIT before a function compiles it once for each width of vectors; the loader takes the widest that
// the processor has. So one binary is fast on a new machine and still starts on an old one.
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__)
#define FOR_EACH_VECTOR_UNIT __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define FOR_EACH_VECTOR_UNIT
#endif

namespace {

constexpr std::size_t kBlock = 1 << 15;  // elements; a sum a block, whoever computes it
constexpr std::size_t kGrain = 16;       // blocks that take one thread longer (60 us) than it takes to start another
constexpr std::size_t kLanes = 16;  // independent sums: the order is fixed, and yet a vector unit can do them at once

template <typename T>
FOR_EACH_VECTOR_UNIT double block_sum(const T* a, const T* b, std::size_t size) {
    double lanes[kLanes] = {};
    std::size_t i = 0;
    for (; i + kLanes <= size; i += kLanes) {
        for (std::size_t lane = 0; lane < kLanes; ++lane) {
            const double difference = static_cast<double>(a[i + lane]) - static_cast<double>(b[i + lane]);
            lanes[lane] += difference * difference;
        }
    }
    for (; i < size; ++i) {
        const double difference = static_cast<double>(a[i]) - static_cast<double>(b[i]);
        lanes[i % kLanes] += difference * difference;
    }
    double sum = 0;
    for (const double lane : lanes) sum += lane;
    return sum;
}

}  // namespace

template <typename T>
double squared_distance(const T* a, const T* b, std::size_t size, int threads) {
    const std::size_t blocks = (size + kBlock - 1) / kBlock;
    std::vector<double> sums(blocks);
    parallel_for(blocks, kGrain, threads, [&](std::size_t block) {
        const std::size_t begin = block * kBlock;
        sums[block] = block_sum(a + begin, b + begin, std::min(kBlock, size - begin));
    });
    double sum = 0;
    for (const double block : sums) sum += block;
    return sum;
}

template double squared_distance(const float*, const float*, std::size_t, int);
template double squared_distance(const double*, const double*, std::size_t, int);
template double squared_distance(const BFloat16*, const BFloat16*, std::size_t, int);

// Loops over the planes of a group of channels. Only for files that are compiled once for each vector unit; see simd.h.
#pragma once

#include "pack.h"
#include "planes.h"

namespace {

// One group of channels of one sample: its first channel and the number of channels, and offsets into tensors.
template <typename T>
struct Group {
    std::size_t first, count;
    std::size_t statistic;      // of a statistic of the planes, (B, C)
    std::size_t pixel, pooled;  // of the first pixel of the planes, and of the pooled planes

    Group(const PlaneShape& shape, std::size_t sample, std::size_t group)
        : first(group * Pack<T>::lanes),
          count(shape.channels - first < Pack<T>::lanes ? shape.channels - first : Pack<T>::lanes),
          statistic(sample * shape.channels + first),
          pixel(sample * shape.height * shape.width * shape.channels + first),
          pooled(sample * (shape.height / 2) * (shape.width / 2) * shape.channels + first) {}
};

// Store the means of 2×2 pixels in `p` (dual: and `p_dot`). `add(pixel, z, z_dot)` adds the value of a pixel to z, and
// its derivative to z_dot.
template <bool dual, typename T, typename Add>
INLINE void pool(const PlaneShape& shape, const Group<T>& at, T* p, T* p_dot, const Add& add) {
    const std::size_t rows = shape.height / 2, columns = shape.width / 2;
    for (std::size_t i = 0; i < rows; ++i) {
        for (std::size_t j = 0; j < columns; ++j) {
            Pack<T> z{}, z_dot{};
            for (std::size_t corner = 0; corner < 4; ++corner) {
                add((2 * i + corner / 2) * shape.width + 2 * j + corner % 2, z, z_dot);
            }
            const std::size_t to = at.pooled + (i * columns + j) * shape.channels;
            store(p + to, z * T(0.25), at.count);
            if constexpr (dual) store(p_dot + to, z_dot * T(0.25), at.count);
        }
    }
}

}  // namespace

// |a - b|^2 of two vectors, accumulated in double.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

// The upper half of a float. A double holds it exactly, as it does a float.
struct BFloat16 {
    std::uint16_t bits;

    operator double() const {
        const std::uint32_t wide = static_cast<std::uint32_t>(bits) << 16;
        float value;
        std::memcpy(&value, &wide, sizeof value);
        return value;
    }
};

// The result depends on the values and the size alone, not on `threads`.
template <typename T>
double squared_distance(const T* a, const T* b, std::size_t size, int threads);

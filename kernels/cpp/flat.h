// Operations on flat vectors: sgd_step and adjoint_step, of which a call computes elements [begin, end), and
// squared_distance.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

// Vectors that are not used are null.
template <typename T>
struct SgdStep {
    const T *theta, *gradient, *velocity;
    T rate, momentum, weight_decay;
    T *out, *velocity_out;
};

template <typename T>
struct AdjointStep {
    const T *adjoint, *hessian_v, *direction, *incoming;
    T scale, weight_decay;
    T* out;
};

// The upper half of a float. The conversion to double is exact.
struct BFloat16 {
    std::uint16_t bits;

    operator double() const {
        const std::uint32_t wide = static_cast<std::uint32_t>(bits) << 16;
        float value;
        std::memcpy(&value, &wide, sizeof value);
        return value;
    }
};

// |a - b|^2 of two vectors, accumulated in double. The result does not depend on `threads`.
template <typename T>
double squared_distance(const T* a, const T* b, std::size_t size, int threads);

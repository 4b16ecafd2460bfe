// sgd_step and adjoint_step: one pass over flat vectors. One call does the elements [begin, end).
#pragma once

#include <cstddef>

// A vector that does not take part is null.
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

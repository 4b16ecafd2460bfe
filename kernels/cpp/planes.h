// norm_relu_pool and bias_relu_pool, with the three derivatives of each, on channels-last tensors: (B, H, W, C) in memory. The formulas are those of
// kernels/reference.py. One call does one sample and one group of channels; those are independent of each other.
#pragma once

#include <cstddef>

struct PlaneShape {
    std::size_t batch, height, width, channels;
};

// What does not apply to the primal operation alone is null: all dots.
template <typename T>
struct PlaneForward {
    PlaneShape shape;
    const T *y, *y_dot;                             // (B, H, W, C)
    const T *gamma, *beta, *gamma_dot, *beta_dot;  // (C,)
    double eps;
    T *p, *p_dot;                  // (B, H/2, W/2, C)
    T *mean, *rstd, *k1, *k2;      // (B, C)
};

template <typename T>
struct PlaneBackward {
    PlaneShape shape;
    const T *y, *y_dot;                             // (B, H, W, C)
    const T *mean, *rstd, *k1, *k2;                // (B, C)
    const T *gamma, *beta, *gamma_dot, *beta_dot;  // (C,)
    const T *p_bar, *p_bar_dot;                    // (B, H/2, W/2, C)
    T *y_bar, *y_bar_dot;                          // (B, H, W, C)
    T *gamma_sum, *beta_sum;  // (B, C): each sample's part of the gradient (dual: of its derivative) to gamma and beta
};

template <typename T>
struct BiasForward {
    PlaneShape shape;
    const T *y, *y_dot;        // (B, H, W, C)
    const T *beta, *beta_dot;  // (C,)
    T *p, *p_dot;              // (B, H/2, W/2, C)
};

template <typename T>
struct BiasBackward {
    PlaneShape shape;
    const T* y;                  // (B, H, W, C)
    const T* beta;               // (C,)
    const T *p_bar, *p_bar_dot;  // (B, H/2, W/2, C)
    T *y_bar, *y_bar_dot;        // (B, H, W, C)
    T* beta_sum;                 // (B, C), as above
};

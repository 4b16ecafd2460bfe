// norm_relu_pool and its three derivatives on channels-last tensors, (B, H, W, C) in memory. The formulas are those of
// kernels/reference/norm.py. One call computes one sample and one group of channels, which are independent.
#pragma once

#include "planes.h"

// All dots are null in the primal operation.
template <typename T>
struct NormForward {
    PlaneShape shape;
    const T *y, *y_dot;                            // (B, H, W, C)
    const T *gamma, *beta, *gamma_dot, *beta_dot;  // (C,)
    double eps;
    T *p, *p_dot;              // (B, H/2, W/2, C)
    T *mean, *rstd, *k1, *k2;  // (B, C)
};

template <typename T>
struct NormBackward {
    PlaneShape shape;
    const T *y, *y_dot;                            // (B, H, W, C)
    const T *mean, *rstd, *k1, *k2;                // (B, C)
    const T *gamma, *beta, *gamma_dot, *beta_dot;  // (C,)
    const T *p_bar, *p_bar_dot;                    // (B, H/2, W/2, C)
    T *y_bar, *y_bar_dot;                          // (B, H, W, C)
    T *gamma_sum, *beta_sum;  // (B, C): summands, per sample, of the gradients (dual: their derivatives)
};

// bias_relu_pool and its three derivatives on channels-last tensors, (B, H, W, C) in memory. The formulas are those of
// kernels/reference/bias.py. One call computes one sample and one group of channels, which are independent.
#pragma once

#include "planes.h"

// All dots are null in the primal operation.
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
    T* beta_sum;                 // (B, C): summands, per sample, of the gradient (dual: its derivative)
};

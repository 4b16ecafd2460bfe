// Softmax and cross-entropy of a batch of logits, their gradient, and its tangent. The formulas are those of
// kernels/reference/classifier.py. One call computes one sample; samples are independent.
#pragma once

#include <cstddef>
#include <cstdint>

// All dots are null in the primal operation.
template <typename T>
struct CrossEntropy {
    std::size_t batch, classes;
    const T *bias, *bias_dot;     // (K,)
    const std::int64_t* indices;  // (B,), or null where the labels are soft
    const T* labels;              // (B, K), or null where they are indices
    bool of_logits;               // the target is the softmax of `labels`
    T *logits, *logits_dot;       // (B, K), without the bias; overwritten by o_bar and o_bar_dot
    T* losses;                    // (B,): summands, per sample, of the loss (dual: its derivative)
    T* labels_bar_dot;            // (B, K), or null
};

// Convolution 3×3 with stride 1 on channels-last tensors: y = W∗x, its tangent W_dot∗x + W∗x_dot, and the gradients of
// both. Two algorithms:
//
// Winograd's F(2×2, 3×3) for many channels. An output tile of 2×2 is computed from an input tile of 4×4 by 16 products
// per pair of channels instead of 36:   y = Aᵀ [(G w Gᵀ) ⊙ (Bᵀ x B)] A   (Lavin & Gray 2016). Over all channels and
// tiles these are 16 matrix products. Both terms of a tangent are summed before they are transformed back. The gradient
// of x is such a convolution of y_bar; that of w is the transpose,  Gᵀ [Σ (A y_bar Aᵀ) ⊙ (Bᵀ x B)] G.
//
// im2col for images, which have few channels: the 9 C numbers under the filter at a pixel are a row of a matrix.
#pragma once

#include <cstddef>

constexpr std::size_t kTiles = 24;         // tiles in a block of the forward; both operands stay in the L2 cache
constexpr std::size_t kTilesSummed = 128;  // tiles that are transformed at once in the weight gradient
constexpr std::size_t kTilesOfPart = 512;  // least tiles in a part of the weight gradient, the work of one thread
constexpr std::size_t kMostParts = 16;     // of the weight gradient; each has its own sum in memory

struct ConvShape {
    std::size_t batch, height, width, channels;  // of x
    std::size_t out_height, out_width, filters;  // of y
    std::ptrdiff_t padding;                      // if negative, a border of x is ignored

    std::size_t tile_rows() const { return (out_height + 1) / 2; }
    std::size_t tile_columns() const { return (out_width + 1) / 2; }
    std::size_t tiles() const { return batch * tile_rows() * tile_columns(); }
};

// y = W∗x, y_dot = W_dot∗x + W∗x_dot, or both.
template <typename T>
struct WinogradForward {
    ConvShape shape;
    const T *x, *x_dot;  // (B, H, W, C)
    const T *u, *u_dot;  // (panels, 16, C, lanes): transformed weights; a panel has the filters of one Pack
    const T* zeros;      // (C,)
    T *y, *y_dot;        // (B, H', W', K)
};

// One part of the sum over tiles in W_bar = y_bar ⋆ x, or in W_bar_dot = y_bar_dot ⋆ x + y_bar ⋆ x_dot.
template <typename T>
struct WinogradSum {
    ConvShape shape;
    std::size_t parts;
    const T *x, *x_dot, *y_bar, *y_bar_dot;
    const T* zeros;  // (max(C, K),)
    T* sums;         // (parts, 16, C, K rounded up to lanes), zeroed
};

// For few channels: y = W∗x; W_bar = y_bar ⋆ x of one sample; x_bar = W_dotᵀ∗y_bar + Wᵀ∗y_bar_dot. Each function uses
// only the tensors of its formula.
template <typename T>
struct Patches {
    ConvShape shape;
    const T* x;                    // (B, H, W, C)
    const T* w;                    // (panels, 9 C, lanes)
    T* y;                          // (B, H', W', K)
    const T *y_bar, *y_bar_dot;    // (B, H', W', K)
    const T *w_taps, *w_taps_dot;  // (tap panels, K, lanes)
    T* x_bar;                      // (B, H, W, C), zeroed
    T* w_bar;                      // (B, 9 C, K rounded up to lanes)
};

// Convolution 3×3 with stride 1 on channels-last tensors: y = W∗x together with its tangent W_dot∗x + W∗x_dot, and the
// gradients of the two, as the mixed step asks for them. Two algorithms:
//
// Winograd's F(2×2, 3×3) for many channels. An output tile of 2×2 comes from an input tile of 4×4 by 16 products a pair
// of channels in place of 36:   y = Aᵀ [(G w Gᵀ) ⊙ (Bᵀ x B)] A   (Lavin & Gray 2016). Over all channels and tiles that
// is 16 matrix products. Both terms of a tangent are summed before they are transformed back. The gradient to x is such
// a convolution of y_bar; the one to w is the transpose,  Gᵀ [Σ (A y_bar Aᵀ) ⊙ (Bᵀ x B)] G.
//
// Patches for images: their 27 numbers under the kernel as the row of a matrix.
#pragma once

#include <cstddef>

constexpr std::size_t kTiles = 24;         // of one block of the forward transform: both operands stay in the L2 cache
constexpr std::size_t kTilesSummed = 128;  // that are transformed before their products are summed
constexpr std::size_t kTilesOfPart = 512;  // at least, of one part of the weight gradient: a part is one thread's
constexpr std::size_t kMostParts = 16;     // each needs a sum of its own

struct ConvShape {
    std::size_t batch, height, width, channels;  // of x
    std::size_t out_height, out_width, filters;  // of y
    std::ptrdiff_t padding;                      // negative: a border of x is not looked at

    std::size_t tile_rows() const { return (out_height + 1) / 2; }
    std::size_t tile_columns() const { return (out_width + 1) / 2; }
    std::size_t tiles() const { return batch * tile_rows() * tile_columns(); }
};

// y = W∗x. With the dots: also y_dot = W_dot∗x + W∗x_dot, or that alone.
template <typename T>
struct WinogradForward {
    ConvShape shape;
    const T *x, *x_dot;  // (B, H, W, C)
    const T *u, *u_dot;  // (panels, 16, C, lanes): transformed weights, a panel the filters of one Pack
    const T* zeros;      // (C,)
    T *y, *y_dot;        // (B, H', W', K)
};

// W_bar = y_bar ⋆ x, or with the dots  y_bar_dot ⋆ x + y_bar ⋆ x_dot: the sum over one part of the tiles.
template <typename T>
struct WinogradSum {
    ConvShape shape;
    std::size_t parts;
    const T *x, *x_dot, *y_bar, *y_bar_dot;
    const T* zeros;  // (max(C, K),)
    T* sums;         // (parts, 16, C, K rounded up to lanes), zeroed
};

// For few channels: y = W∗x; W_bar = y_bar ⋆ x of one sample; x_bar = W_dotᵀ∗y_bar + Wᵀ∗y_bar_dot. Each reads and
// writes the tensors that it names.
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

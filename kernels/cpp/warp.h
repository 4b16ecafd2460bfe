// colour_warp_mask and its transpose, on contiguous tensors. The formulas are those of kernels/reference/warp.py. One
// call computes one image; images are independent.
#pragma once

#include <cstddef>
#include <cstdint>

struct WarpShape {
    // In the scratch memory an image is pixels of four channels, one vector each, with a border of zeros. Positions
    // outside are clamped to the border, so that reads need no test.
    static constexpr std::size_t lanes = 4, margin = 2;

    std::size_t batch, channels, height, width;

    std::size_t groups() const { return (channels + lanes - 1) / lanes; }
    std::size_t breadth() const { return width + 2 * margin; }
    std::size_t group_size() const { return (height + 2 * margin) * breadth() * lanes; }
    std::size_t image_size() const { return channels * height * width; }
};

// The columns of the parameters, in the order of kernels/types.py.
template <typename T>
struct WarpNumbers {
    T brightness, saturation, contrast;
    T row_by_row, row_by_column, row_shift, column_by_row, column_by_column, column_shift;
    T top, bottom, left, right;
};

template <typename T>
struct Warp {
    WarpShape shape;
    const T* from;                  // (B, C, H, W)
    const WarpNumbers<T>* numbers;  // (B,)
    T* to;                          // (B, C, H, W)
};

template <typename T>
struct WarpScratch {
    T* image;   // (groups, H + 4, W + 4, 4)
    T* pixels;  // (W, 4): a row of one group, pixel by pixel
    T* rows;    // (4, W): the same, channel by channel
    // for each target pixel of a row: the offset of the source pixel in a group, and the fractions beyond that pixel
    std::int32_t* place;
    T *down, *right;  // (W,)
};

// Compiled once for each vector unit; see simd.h.
#include "warp.h"

#include <algorithm>
#include <cmath>

#include "pack.h"
#include "simd.h"

namespace {

constexpr std::size_t kLanes = WarpShape::lanes, kMargin = WarpShape::margin;

template <typename T>
struct FourOf;
template <>
struct FourOf<float> {
    typedef float Type __attribute__((vector_size(16)));
};
template <>
struct FourOf<double> {
    typedef double Type __attribute__((vector_size(32)));
};
template <typename T>
using Four = typename FourOf<T>::Type;

template <typename T>
INLINE void load(const T* from, Four<T>& four) {
    std::memcpy(&four, from, sizeof four);
}

template <typename T>
INLINE void store(T* to, const Four<T>& four) {
    std::memcpy(to, &four, sizeof four);
}

// NaN becomes `low`.
template <typename T>
INLINE T clamped(T value, T low, T high) {
    const T above = value > low ? value : low;
    return above < high ? above : high;
}

template <typename T>
T mean(const T* values, std::size_t count) {
    constexpr std::size_t part = 1024;  // a sum of short sums keeps rounding errors small
    Pack<T> sum{};
    for (std::size_t begin = 0; begin < count; begin += part) {
        const std::size_t end = std::min(begin + part, count);
        Pack<T> partial{};
        for (std::size_t at = begin; at < end; at += Pack<T>::lanes) {
            partial += load(values + at, std::min(Pack<T>::lanes, end - at));
        }
        sum += partial;
    }
    return sum_of_lanes(sum) / T(count);
}

// Compute `place`, `down` and `right` for the targets in row `i`. The fractions are never added to a pixel's number,
// which would round them.
template <typename T>
INLINE void place_row(const WarpShape& shape, const WarpNumbers<T>& number, std::size_t i,
                      const WarpScratch<T>& scratch) {
    const T below = T(i) - T(shape.height - 1) / 2, centre = T(shape.width - 1) / 2, outside = -T(kMargin);
    const T down_row = number.row_by_row * below + number.row_shift, down_by = number.row_by_column;
    const T right_row = number.column_by_row * below + number.column_shift, right_by = number.column_by_column;
    const T height = T(shape.height), width = T(shape.width), target = T(i);
    const int breadth = static_cast<int>(shape.breadth()), columns = static_cast<int>(shape.width);
    T* __restrict down_share = scratch.down;
    T* __restrict right_share = scratch.right;
    std::int32_t* __restrict place = scratch.place;
    for (int j = 0; j < columns; ++j) {
        const T down = down_row + down_by * (T(j) - centre), right = right_row + right_by * (T(j) - centre);
        const T down_whole = std::floor(down), right_whole = std::floor(right);
        down_share[j] = down - down_whole;
        right_share[j] = right - right_whole;
        const int row = static_cast<int>(clamped(target + down_whole, outside, height));
        const int column = static_cast<int>(clamped(T(j) + right_whole, outside, width));
        place[j] = ((row + int(kMargin)) * breadth + column + int(kMargin)) * int(kLanes);
    }
}

// Call body(begin, end) for the ranges of columns of row `i` that are not masked.
template <typename T, typename Body>
INLINE void visible(const WarpShape& shape, const WarpNumbers<T>& number, std::size_t i, const Body& body) {
    const bool masked = T(i) >= number.top && T(i) < number.bottom;
    const T width = T(shape.width);
    const auto left = static_cast<std::size_t>(masked ? clamped(number.left, T(0), width) : width);
    const auto right = static_cast<std::size_t>(masked ? clamped(number.right, T(left), width) : width);
    body(std::size_t{0}, left);
    body(right, shape.width);
}

template <typename T>
INLINE void interleave(const WarpScratch<T>& scratch, std::size_t width, T* __restrict to) {
    const T* __restrict rows = scratch.rows;
    for (std::size_t j = 0; j < width; ++j) {
        for (std::size_t lane = 0; lane < kLanes; ++lane) to[j * kLanes + lane] = rows[lane * width + j];
    }
}

template <typename T>
INLINE void separate(const T* __restrict from, std::size_t width, const WarpScratch<T>& scratch) {
    T* __restrict rows = scratch.rows;
    for (std::size_t j = 0; j < width; ++j) {
        for (std::size_t lane = 0; lane < kLanes; ++lane) rows[lane * width + j] = from[j * kLanes + lane];
    }
}

// Call body(c, row) for the channels of a group and their rows in the scratch memory.
template <typename T, typename Body>
INLINE void each_row(const WarpShape& shape, std::size_t group, const WarpScratch<T>& scratch, const Body& body) {
    const std::size_t first = group * kLanes, last = std::min(first + kLanes, shape.channels);
    for (std::size_t c = first; c < last; ++c) body(c, scratch.rows + (c - first) * shape.width);
}

// Row `i` of a group's image, past the margin.
template <typename T>
INLINE T* row_of(const WarpShape& shape, std::size_t group, std::size_t i, const WarpScratch<T>& scratch) {
    return scratch.image + group * shape.group_size() + ((i + kMargin) * shape.breadth() + kMargin) * kLanes;
}

// The mean over channels of each pixel of a row, in memory that `place_row` uses later.
template <typename T>
T* grey_row(const WarpShape& shape, const T* from, std::size_t i, const WarpScratch<T>& scratch) {
    T* __restrict grey = scratch.down;
    std::fill_n(grey, shape.width, T(0));
    for (std::size_t c = 0; c < shape.channels; ++c) {
        const T* row = from + (c * shape.height + i) * shape.width;
        for (std::size_t j = 0; j < shape.width; ++j) grey[j] += row[j];
    }
    for (std::size_t j = 0; j < shape.width; ++j) grey[j] /= T(shape.channels);
    return grey;
}

// From planes to the image in the scratch memory, zero around it and in channels that do not exist.
template <typename T>
void coloured(const WarpShape& shape, const WarpNumbers<T>& number, const T* from, const WarpScratch<T>& scratch) {
    const std::size_t width = shape.width;
    const T average = number.contrast != 0 ? mean(from, shape.image_size()) + number.brightness : T(0);
    std::fill_n(scratch.image, shape.groups() * shape.group_size(), T(0));
    std::fill_n(scratch.rows, kLanes * width, T(0));
    for (std::size_t i = 0; i < shape.height; ++i) {
        const T* __restrict grey = grey_row(shape, from, i, scratch);
        for (std::size_t group = 0; group < shape.groups(); ++group) {
            each_row(shape, group, scratch, [&](std::size_t c, T* __restrict row) INLINE_LAMBDA {
                const T* x = from + (c * shape.height + i) * width;
                for (std::size_t j = 0; j < width; ++j) {
                    const T bright = x[j] + number.brightness;
                    const T saturated = bright + number.saturation * (x[j] - grey[j]);
                    row[j] = saturated + number.contrast * (saturated - average);
                }
            });
            interleave(scratch, width, row_of(shape, group, i, scratch));
        }
    }
}

template <typename T>
void warp(const Warp<T>& a, std::size_t sample, const WarpScratch<T>& scratch) {
    const WarpShape& shape = a.shape;
    const WarpNumbers<T> number = a.numbers[sample];
    const std::size_t width = shape.width, below = shape.breadth() * kLanes;
    coloured(shape, number, a.from + sample * shape.image_size(), scratch);
    for (std::size_t i = 0; i < shape.height; ++i) {
        place_row(shape, number, i, scratch);
        for (std::size_t group = 0; group < shape.groups(); ++group) {
            const T* image = scratch.image + group * shape.group_size();
            std::fill_n(scratch.pixels, width * kLanes, T(0));
            visible(shape, number, i, [&](std::size_t begin, std::size_t end) INLINE_LAMBDA {
                for (std::size_t j = begin; j < end; ++j) {
                    const T* at = image + scratch.place[j];
                    const T down = scratch.down[j], right = scratch.right[j], up = 1 - down, left = 1 - right;
                    Four<T> corners[4];
                    load(at, corners[0]);
                    load(at + kLanes, corners[1]);
                    load(at + below, corners[2]);
                    load(at + below + kLanes, corners[3]);
                    store<T>(scratch.pixels + j * kLanes, up * left * corners[0] + up * right * corners[1] +
                                                              down * left * corners[2] + down * right * corners[3]);
                }
            });
            separate(scratch.pixels, width, scratch);
            each_row(shape, group, scratch, [&](std::size_t c, const T* row) INLINE_LAMBDA {
                std::copy_n(row, width, a.to + ((sample * shape.channels + c) * shape.height + i) * width);
            });
        }
    }
}

// The transpose of `coloured`.
template <typename T>
void uncoloured(const WarpShape& shape, const WarpNumbers<T>& number, const WarpScratch<T>& scratch, T* to) {
    const std::size_t width = shape.width;
    for (std::size_t i = 0; i < shape.height; ++i) {
        for (std::size_t group = 0; group < shape.groups(); ++group) {
            separate(row_of(shape, group, i, scratch), width, scratch);
            each_row(shape, group, scratch, [&](std::size_t c, const T* row) INLINE_LAMBDA {
                std::copy_n(row, width, to + (c * shape.height + i) * width);
            });
        }
    }
    if (number.contrast == 0 && number.saturation == 0) return;
    const T average = mean(to, shape.image_size());
    for (std::size_t i = 0; i < shape.height; ++i) {
        const T* __restrict grey = grey_row(shape, to, i, scratch);
        for (std::size_t c = 0; c < shape.channels; ++c) {
            T* row = to + (c * shape.height + i) * width;
            for (std::size_t j = 0; j < width; ++j) {
                const T saturated = row[j] + number.saturation * (row[j] - grey[j]);
                row[j] = saturated + number.contrast * (saturated - average);
            }
        }
    }
}

template <typename T>
void transpose(const Warp<T>& a, std::size_t sample, const WarpScratch<T>& scratch) {
    const WarpShape& shape = a.shape;
    const WarpNumbers<T> number = a.numbers[sample];
    const std::size_t width = shape.width, below = shape.breadth() * kLanes;
    std::fill_n(scratch.image, shape.groups() * shape.group_size(), T(0));
    std::fill_n(scratch.rows, kLanes * width, T(0));
    for (std::size_t i = 0; i < shape.height; ++i) {
        place_row(shape, number, i, scratch);
        for (std::size_t group = 0; group < shape.groups(); ++group) {
            T* image = scratch.image + group * shape.group_size();
            each_row(shape, group, scratch, [&](std::size_t c, T* row) INLINE_LAMBDA {
                std::copy_n(a.from + ((sample * shape.channels + c) * shape.height + i) * width, width, row);
            });
            interleave(scratch, width, scratch.pixels);
            visible(shape, number, i, [&](std::size_t begin, std::size_t end) INLINE_LAMBDA {
                for (std::size_t j = begin; j < end; ++j) {
                    T* at = image + scratch.place[j];
                    const T down = scratch.down[j], right = scratch.right[j], up = 1 - down, left = 1 - right;
                    Four<T> y, corners[4];
                    load(scratch.pixels + j * kLanes, y);
                    load(at, corners[0]);
                    load(at + kLanes, corners[1]);
                    load(at + below, corners[2]);
                    load(at + below + kLanes, corners[3]);
                    store<T>(at, corners[0] + up * left * y);
                    store<T>(at + kLanes, corners[1] + up * right * y);
                    store<T>(at + below, corners[2] + down * left * y);
                    store<T>(at + below + kLanes, corners[3] + down * right * y);
                }
            });
        }
    }
    uncoloured(shape, number, scratch, a.to + sample * shape.image_size());
}

}  // namespace

namespace UNIT {

template <typename T>
WarpUnit<T> warp_unit() {
    return {warp<T>, transpose<T>};
}
template WarpUnit<float> warp_unit<float>();
template WarpUnit<double> warp_unit<double>();

}  // namespace UNIT

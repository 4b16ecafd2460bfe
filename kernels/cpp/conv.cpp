// Compiled once for each vector unit; see simd.h.
#include "conv.h"

#include "pack.h"
#include "simd.h"

namespace {

// Rows of a matrix product that are accumulated in registers: two registers per row, and two for the right factor.
constexpr std::size_t kRows = VECTOR_BYTES == 64 ? 12 : 6;

// sums[r] += Σ_k a[r, k] b[k, :]. `a` has any strides, so that it can be transposed.
template <std::size_t rows, typename T>
INLINE void multiply(const T* a, std::size_t a_row, std::size_t a_depth, const T* b, std::size_t b_depth,
                     std::size_t count, std::size_t depth, Pack<T> (&sums)[rows]) {
    for (std::size_t k = 0; k < depth; ++k) {
        const Pack<T> row = load(b + k * b_depth, count);
#pragma GCC unroll 16
        for (std::size_t r = 0; r < rows; ++r) sums[r] += row * a[r * a_row + k * a_depth];
    }
}

// Call use(row, Rows<n>) for blocks of n rows from `row` on: blocks of kRows, then of 8, 4, 2 and 1.
template <std::size_t n>
struct Rows {
    static constexpr std::size_t value = n;
};
template <typename Use>
INLINE void for_rows(std::size_t rows, const Use& use) {
    std::size_t row = 0;
    for (; row + kRows <= rows; row += kRows) use(row, Rows<kRows>{});
    if (kRows > 8 && row + 8 <= rows) use(row, Rows<8>{}), row += 8;
    if (row + 4 <= rows) use(row, Rows<4>{}), row += 4;
    if (row + 2 <= rows) use(row, Rows<2>{}), row += 2;
    if (row < rows) use(row, Rows<1>{});
}

// ---------------------------------------------------------------------------------------------- Winograd

// Pointers to the pixels of a tile in a (B, height, width, channels) tensor, whose first pixel is (row, column).
// Outside of the planes they point to `zeros`.
template <std::size_t side, typename T>
INLINE void tile_pixels(const T* tensor, std::size_t sample, std::ptrdiff_t row, std::ptrdiff_t column,
                        std::size_t height, std::size_t width, std::size_t channels, const T* zeros,
                        const T* (&pixels)[side * side]) {
    for (std::size_t i = 0; i < side; ++i) {
        for (std::size_t j = 0; j < side; ++j) {
            const std::ptrdiff_t r = row + std::ptrdiff_t(i), c = column + std::ptrdiff_t(j);
            const bool inside = r >= 0 && c >= 0 && r < std::ptrdiff_t(height) && c < std::ptrdiff_t(width);
            pixels[i * side + j] =
                inside ? tensor + ((sample * height + std::size_t(r)) * width + std::size_t(c)) * channels : zeros;
        }
    }
}

struct Tile {
    std::size_t sample;
    std::ptrdiff_t row, column;
};
INLINE Tile tile_at(const ConvShape& shape, std::size_t index) {
    const std::size_t columns = shape.tile_columns(), each = shape.tile_rows() * columns;
    return {index / each, 2 * std::ptrdiff_t(index % each / columns), 2 * std::ptrdiff_t(index % columns)};
}

// v = Bᵀ d B of one input tile d, for all channels; `stride` is the distance of the 16 numbers of a tile.
template <typename T>
INLINE void transform_input(const ConvShape& shape, const T* x, const T* zeros, std::size_t index, T* v,
                            std::size_t stride) {
    const Tile tile = tile_at(shape, index);
    const T* from[16];
    tile_pixels<4>(x, tile.sample, tile.row - shape.padding, tile.column - shape.padding, shape.height, shape.width,
                   shape.channels, zeros, from);
    for (std::size_t c = 0; c < shape.channels; c += Pack<T>::lanes) {
        const std::size_t n = shape.channels - c < Pack<T>::lanes ? shape.channels - c : Pack<T>::lanes;
        Pack<T> half[16];
#pragma GCC unroll 4
        for (std::size_t j = 0; j < 4; ++j) {
            const Pack<T> d0 = load(from[j] + c, n), d1 = load(from[4 + j] + c, n);
            const Pack<T> d2 = load(from[8 + j] + c, n), d3 = load(from[12 + j] + c, n);
            half[j] = d0 - d2;
            half[4 + j] = d1 + d2;
            half[8 + j] = d2 - d1;
            half[12 + j] = d1 - d3;
        }
#pragma GCC unroll 4
        for (std::size_t i = 0; i < 4; ++i) {
            const Pack<T>* d = half + 4 * i;
            T* to = v + 4 * i * stride + c;
            store(to, d[0] - d[2], n);
            store(to + stride, d[1] + d[2], n);
            store(to + 2 * stride, d[2] - d[1], n);
            store(to + 3 * stride, d[1] - d[3], n);
        }
    }
}

// z = A d Aᵀ of one tile d of y_bar; lanes past the last filter become zero.
template <typename T>
INLINE void transform_output_gradient(const ConvShape& shape, const T* y_bar, const T* zeros, std::size_t index, T* z,
                                      std::size_t stride) {
    const Tile tile = tile_at(shape, index);
    const T* from[4];
    tile_pixels<2>(y_bar, tile.sample, tile.row, tile.column, shape.out_height, shape.out_width, shape.filters, zeros,
                   from);
    for (std::size_t k = 0; k < shape.filters; k += Pack<T>::lanes) {
        const std::size_t n = shape.filters - k < Pack<T>::lanes ? shape.filters - k : Pack<T>::lanes;
        const Pack<T> d[4] = {load(from[0] + k, n), load(from[1] + k, n), load(from[2] + k, n), load(from[3] + k, n)};
        const Pack<T> none{};
        const Pack<T> left[4] = {d[0], d[0] + d[2], d[0] - d[2], none - d[2]};
        const Pack<T> right[4] = {d[1], d[1] + d[3], d[1] - d[3], none - d[3]};
#pragma GCC unroll 4
        for (std::size_t i = 0; i < 4; ++i) {
            T* to = z + 4 * i * stride + k;
            store(to, left[i], Pack<T>::lanes);
            store(to + stride, left[i] + right[i], Pack<T>::lanes);
            store(to + 2 * stride, left[i] - right[i], Pack<T>::lanes);
            store(to + 3 * stride, none - right[i], Pack<T>::lanes);
        }
    }
}

// y = Aᵀ m A of one tile and one panel of filters.
template <typename T>
INLINE void transform_output(const ConvShape& shape, const T* m, std::size_t stride, std::size_t index,
                             std::size_t filter, T* y) {
    const std::size_t lanes = Pack<T>::lanes;
    const std::size_t n = shape.filters - filter < lanes ? shape.filters - filter : lanes;
    const Tile tile = tile_at(shape, index);
    Pack<T> half[8];
#pragma GCC unroll 4
    for (std::size_t j = 0; j < 4; ++j) {
        const Pack<T> m0 = load(m + j * stride, lanes), m1 = load(m + (4 + j) * stride, lanes);
        const Pack<T> m2 = load(m + (8 + j) * stride, lanes), m3 = load(m + (12 + j) * stride, lanes);
        half[j] = m0 + m1 + m2;
        half[4 + j] = m1 - m2 - m3;
    }
    for (std::size_t i = 0; i < 2; ++i) {
        const std::size_t row = std::size_t(tile.row) + i, column = std::size_t(tile.column);
        if (row >= shape.out_height) break;
        const Pack<T>* h = half + 4 * i;
        T* to = y + ((tile.sample * shape.out_height + row) * shape.out_width + column) * shape.filters + filter;
        store(to, h[0] + h[1] + h[2], n);
        if (column + 1 < shape.out_width) store(to + shape.filters, h[1] - h[2] - h[3], n);
    }
}

template <bool primal, bool tangent, typename T>
void winograd_forward(const WinogradForward<T>& a, std::size_t block, T* scratch) {
    constexpr std::size_t lanes = Pack<T>::lanes;
    const ConvShape& shape = a.shape;
    const std::size_t first = block * kTiles, left = shape.tiles() - first, tiles = left < kTiles ? left : kTiles;
    const std::size_t channels = shape.channels, v_stride = kTiles * channels, m_stride = kTiles * lanes;
    T *v = scratch, *v_dot = v + 16 * v_stride, *m = v_dot + (tangent ? 16 * v_stride : 0), *m_dot = m + 16 * m_stride;
    for (std::size_t t = 0; t < tiles; ++t) {
        transform_input(shape, a.x, a.zeros, first + t, v + t * channels, v_stride);
        if constexpr (tangent) transform_input(shape, a.x_dot, a.zeros, first + t, v_dot + t * channels, v_stride);
    }
    for (std::size_t filter = 0; filter < shape.filters; filter += lanes) {
        for (std::size_t place = 0; place < 16; ++place) {
            const std::size_t panel = (filter / lanes * 16 + place) * channels * lanes;
            for_rows(tiles, [&](std::size_t t, auto rows) INLINE_LAMBDA {
                const T* from = v + place * v_stride + t * channels;
                const std::size_t to = place * m_stride + t * lanes;
                if constexpr (primal) {
                    Pack<T> sums[rows.value] = {};
                    multiply(from, channels, 1, a.u + panel, lanes, lanes, channels, sums);
                    for (std::size_t r = 0; r < rows.value; ++r) store(m + to + r * lanes, sums[r], lanes);
                }
                if constexpr (tangent) {
                    const T* from_dot = v_dot + place * v_stride + t * channels;
                    Pack<T> sums_dot[rows.value] = {};
                    multiply(from, channels, 1, a.u_dot + panel, lanes, lanes, channels, sums_dot);
                    multiply(from_dot, channels, 1, a.u + panel, lanes, lanes, channels, sums_dot);
                    for (std::size_t r = 0; r < rows.value; ++r) store(m_dot + to + r * lanes, sums_dot[r], lanes);
                }
            });
        }
        for (std::size_t t = 0; t < tiles; ++t) {
            if constexpr (primal) transform_output(shape, m + t * lanes, m_stride, first + t, filter, a.y);
            if constexpr (tangent) transform_output(shape, m_dot + t * lanes, m_stride, first + t, filter, a.y_dot);
        }
    }
}

template <typename T>
INLINE std::size_t rounded(std::size_t filters) {
    return (filters + Pack<T>::lanes - 1) / Pack<T>::lanes * Pack<T>::lanes;
}

template <bool dual, typename T>
void winograd_sum(const WinogradSum<T>& a, std::size_t part, T* scratch) {
    constexpr std::size_t lanes = Pack<T>::lanes;
    const ConvShape& shape = a.shape;
    const std::size_t channels = shape.channels, filters = rounded<T>(shape.filters);
    const std::size_t v_stride = kTilesSummed * channels, z_stride = kTilesSummed * filters;
    T *v = scratch, *z = v + 16 * v_stride, *v_dot = z + 16 * z_stride, *z_dot = v_dot + 16 * v_stride;
    T* total = a.sums + part * 16 * channels * filters;
    const std::size_t end = (part + 1) * shape.tiles() / a.parts;
    for (std::size_t first = part * shape.tiles() / a.parts; first < end; first += kTilesSummed) {
        const std::size_t tiles = end - first < kTilesSummed ? end - first : kTilesSummed;
        for (std::size_t t = 0; t < tiles; ++t) {
            transform_input(shape, a.x, a.zeros, first + t, v + t * channels, v_stride);
            transform_output_gradient(shape, a.y_bar, a.zeros, first + t, z + t * filters, z_stride);
            if constexpr (dual) {
                transform_input(shape, a.x_dot, a.zeros, first + t, v_dot + t * channels, v_stride);
                transform_output_gradient(shape, a.y_bar_dot, a.zeros, first + t, z_dot + t * filters, z_stride);
            }
        }
        for (std::size_t place = 0; place < 16; ++place) {
            for (std::size_t filter = 0; filter < filters; filter += lanes) {
                const std::size_t at_z = place * z_stride + filter;
                for_rows(channels, [&](std::size_t c, auto rows) INLINE_LAMBDA {
                    const std::size_t at_v = place * v_stride + c;
                    T* sum = total + (place * channels + c) * filters + filter;
                    Pack<T> sums[rows.value];
                    for (std::size_t r = 0; r < rows.value; ++r) sums[r] = load(sum + r * filters, lanes);
                    multiply(v + at_v, 1, channels, (dual ? z_dot : z) + at_z, filters, lanes, tiles, sums);
                    if constexpr (dual) multiply(v_dot + at_v, 1, channels, z + at_z, filters, lanes, tiles, sums);
                    for (std::size_t r = 0; r < rows.value; ++r) store(sum + r * filters, sums[r], lanes);
                });
            }
        }
    }
}

// ---------------------------------------------------------------------------------------------- patches

// patches[pixel] = the 9 C numbers under the filter at each pixel of one row of y.
template <typename T>
INLINE void gather_row(const Patches<T>& a, std::size_t sample, std::size_t row, T* patches) {
    const ConvShape& s = a.shape;
    for (std::size_t i = 0; i < 3; ++i) {
        const std::ptrdiff_t r = std::ptrdiff_t(row + i) - s.padding;
        const bool row_inside = r >= 0 && r < std::ptrdiff_t(s.height);
        const T* from = a.x + (sample * s.height + std::size_t(r)) * s.width * s.channels;
        for (std::size_t column = 0; column < s.out_width; ++column) {
            T* to = patches + (9 * column + 3 * i) * s.channels;
            const std::ptrdiff_t c = std::ptrdiff_t(column) - s.padding;
            if (row_inside && c >= 0 && c + 3 <= std::ptrdiff_t(s.width)) {
                for (std::size_t at = 0; at < 3 * s.channels; ++at) to[at] = from[std::size_t(c) * s.channels + at];
                continue;
            }
            for (std::size_t at = 0; at < 3 * s.channels; ++at) {
                const std::ptrdiff_t place = c + std::ptrdiff_t(at / s.channels);
                const bool inside = row_inside && place >= 0 && place < std::ptrdiff_t(s.width);
                to[at] = inside ? from[std::size_t(place) * s.channels + at % s.channels] : T(0);
            }
        }
    }
}

template <typename T>
void patches_forward(const Patches<T>& a, std::size_t sample, T* scratch) {
    constexpr std::size_t lanes = Pack<T>::lanes;
    const ConvShape& s = a.shape;
    const std::size_t taps = 9 * s.channels;
    for (std::size_t row = 0; row < s.out_height; ++row) {
        gather_row(a, sample, row, scratch);
        T* y = a.y + (sample * s.out_height + row) * s.out_width * s.filters;
        for (std::size_t filter = 0; filter < s.filters; filter += lanes) {
            const std::size_t n = s.filters - filter < lanes ? s.filters - filter : lanes;
            for_rows(s.out_width, [&](std::size_t column, auto rows) INLINE_LAMBDA {
                Pack<T> sums[rows.value] = {};
                multiply(scratch + column * taps, taps, 1, a.w + filter * taps, lanes, lanes, taps, sums);
                for (std::size_t r = 0; r < rows.value; ++r) store(y + (column + r) * s.filters + filter, sums[r], n);
            });
        }
    }
}

template <typename T>
void patches_weight_gradient(const Patches<T>& a, std::size_t sample, T* scratch) {
    constexpr std::size_t lanes = Pack<T>::lanes;
    const ConvShape& s = a.shape;
    const std::size_t taps = 9 * s.channels, filters = rounded<T>(s.filters), pixels = s.out_height * s.out_width;
    for (std::size_t row = 0; row < s.out_height; ++row) gather_row(a, sample, row, scratch + row * s.out_width * taps);
    for (std::size_t filter = 0; filter < s.filters; filter += lanes) {
        const std::size_t n = s.filters - filter < lanes ? s.filters - filter : lanes;
        for_rows(taps, [&](std::size_t tap, auto rows) INLINE_LAMBDA {
            Pack<T> sums[rows.value] = {};
            multiply(scratch + tap, 1, taps, a.y_bar + sample * pixels * s.filters + filter, s.filters, n, pixels,
                     sums);
            T* to = a.w_bar + (sample * taps + tap) * filters + filter;
            for (std::size_t r = 0; r < rows.value; ++r) store(to + r * filters, sums[r], lanes);
        });
    }
}

template <typename T>
void patches_input_gradient(const Patches<T>& a, std::size_t sample, T* scratch) {
    constexpr std::size_t lanes = Pack<T>::lanes;
    const ConvShape& s = a.shape;
    const std::size_t taps = 9 * s.channels, taps_rounded = rounded<T>(taps);
    T* x_bar = a.x_bar + sample * s.height * s.width * s.channels;
    for (std::size_t row = 0; row < s.out_height; ++row) {
        const std::size_t begin = (sample * s.out_height + row) * s.out_width * s.filters;
        for (std::size_t tap = 0; tap < taps; tap += lanes) {
            for_rows(s.out_width, [&](std::size_t column, auto rows) INLINE_LAMBDA {
                const std::size_t from = begin + column * s.filters;
                Pack<T> sums[rows.value] = {};
                multiply(a.y_bar + from, s.filters, 1, a.w_taps_dot + tap * s.filters, lanes, lanes, s.filters, sums);
                multiply(a.y_bar_dot + from, s.filters, 1, a.w_taps + tap * s.filters, lanes, lanes, s.filters, sums);
                for (std::size_t r = 0; r < rows.value; ++r)
                    store(scratch + (column + r) * taps_rounded + tap, sums[r], lanes);
            });
        }
        for (std::size_t column = 0; column < s.out_width; ++column) {
            const T* from = scratch + column * taps_rounded;
            for (std::size_t i = 0; i < 3; ++i) {
                const std::ptrdiff_t r = std::ptrdiff_t(row + i) - s.padding;
                if (r < 0 || r >= std::ptrdiff_t(s.height)) continue;
                for (std::size_t j = 0; j < 3; ++j) {
                    const std::ptrdiff_t c = std::ptrdiff_t(column + j) - s.padding;
                    if (c < 0 || c >= std::ptrdiff_t(s.width)) continue;
                    T* to = x_bar + (std::size_t(r) * s.width + std::size_t(c)) * s.channels;
                    for (std::size_t channel = 0; channel < s.channels; ++channel) {
                        to[channel] += from[(3 * i + j) * s.channels + channel];
                    }
                }
            }
        }
    }
}

}  // namespace

namespace UNIT {

template <typename T>
ConvUnit<T> conv_unit() {
    return {Pack<T>::lanes,
            winograd_forward<true, false, T>,
            winograd_forward<true, true, T>,
            winograd_forward<false, true, T>,
            winograd_sum<false, T>,
            winograd_sum<true, T>,
            patches_forward<T>,
            patches_weight_gradient<T>,
            patches_input_gradient<T>};
}
template ConvUnit<float> conv_unit<float>();
template ConvUnit<double> conv_unit<double>();

}  // namespace UNIT

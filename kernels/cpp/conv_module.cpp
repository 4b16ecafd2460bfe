// The convolutions as Python functions, which transform weights and distribute blocks over threads. Tensors are
// channels-last: contiguous (B, H, W, C) in memory. The caller allocates results.
#include <nanobind/stl/array.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <array>
#include <vector>

#include "module.h"
#include "parallel.h"
#include "scratch.h"
#include "simd.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

// Memory that is kept between calls, in elements: of the calling thread, and of each thread.
struct Work {
    std::size_t shared, scratch;
};

std::size_t rounded(std::size_t count, std::size_t lanes) { return (count + lanes - 1) / lanes * lanes; }

// The nine weights from channel c to filter k. For the input gradient they are rotated by 180 degrees, and channels and
// filters are swapped.
template <typename T>
struct Weights {
    const T* values;  // (K, C, 3, 3), or (C, K, 3, 3) if rotated
    std::size_t channels, filters;
    bool rotated;

    T operator()(std::size_t k, std::size_t c, std::size_t tap) const {
        return rotated ? values[(c * filters + k) * 9 + 8 - tap] : values[(k * channels + c) * 9 + tap];
    }
};

// u = G w Gᵀ in panels of `lanes` filters: (panels, 16, C, lanes)
template <typename T>
void transform_weights(const Weights<T>& w, std::size_t lanes, int threads, T* u) {
    const std::size_t panels = rounded(w.filters, lanes) / lanes;
    parallel_for(panels * w.channels, 64, threads, [&](std::size_t block) {
        const std::size_t panel = block / w.channels, c = block % w.channels;
        for (std::size_t lane = 0; lane < lanes; ++lane) {
            const std::size_t k = panel * lanes + lane;
            T half[12];
            for (std::size_t j = 0; j < 3; ++j) {
                const T g0 = k < w.filters ? w(k, c, j) : T(0), g1 = k < w.filters ? w(k, c, 3 + j) : T(0);
                const T g2 = k < w.filters ? w(k, c, 6 + j) : T(0);
                half[j] = g0;
                half[3 + j] = (g0 + g1 + g2) / 2;
                half[6 + j] = (g0 - g1 + g2) / 2;
                half[9 + j] = g2;
            }
            for (std::size_t i = 0; i < 4; ++i) {
                const T* h = half + 3 * i;
                const T row[4] = {h[0], (h[0] + h[1] + h[2]) / 2, (h[0] - h[1] + h[2]) / 2, h[2]};
                for (std::size_t j = 0; j < 4; ++j) {
                    u[((panel * 16 + 4 * i + j) * w.channels + c) * lanes + lane] = row[j];
                }
            }
        }
    });
}

// w_bar = Gᵀ (Σ sums) G: (parts, 16, C, K rounded) -> (K, C, 3, 3). The parts are added in their order, into the first.
template <typename T>
void transform_weight_gradient(const ConvShape& s, std::size_t lanes, std::size_t parts, int threads, T* sum,
                               T* w_bar) {
    const std::size_t filters = rounded(s.filters, lanes), place = s.channels * filters;
    parallel_for(s.channels, grain_of(filters * 16 * (parts + 2)), threads, [&](std::size_t c) {
        for (std::size_t part = 1; part < parts; ++part) {
            for (std::size_t row = 0; row < 16; ++row) {
                T* to = sum + row * place + c * filters;
                const T* from = to + part * 16 * place;
                for (std::size_t k = 0; k < s.filters; ++k) to[k] += from[k];
            }
        }
        for (std::size_t k = 0; k < s.filters; ++k) {
            const T* from = sum + c * filters + k;
            T half[12];
            for (std::size_t j = 0; j < 4; ++j) {
                const T m0 = from[j * place], m1 = from[(4 + j) * place], m2 = from[(8 + j) * place],
                        m3 = from[(12 + j) * place];
                half[j] = m0 + (m1 + m2) / 2;
                half[4 + j] = (m1 - m2) / 2;
                half[8 + j] = (m1 + m2) / 2 + m3;
            }
            T* to = w_bar + (k * s.channels + c) * 9;
            for (std::size_t i = 0; i < 3; ++i) {
                const T* h = half + 4 * i;
                to[3 * i] = h[0] + (h[1] + h[2]) / 2;
                to[3 * i + 1] = (h[1] - h[2]) / 2;
                to[3 * i + 2] = (h[1] + h[2]) / 2 + h[3];
            }
        }
    });
}

template <typename T>
ConvShape conv_shape(const Input<T>& x, std::size_t filters, std::ptrdiff_t padding) {
    expect(x.ndim() == 4);
    ConvShape s{x.shape(0), x.shape(1), x.shape(2), x.shape(3), 0, 0, filters, padding};
    const std::ptrdiff_t height = std::ptrdiff_t(s.height) + 2 * padding - 2,
                         width = std::ptrdiff_t(s.width) + 2 * padding - 2;
    expect(height > 0 && width > 0);
    s.out_height = std::size_t(height);
    s.out_width = std::size_t(width);
    return s;
}

std::size_t output_size(const ConvShape& s) { return s.batch * s.out_height * s.out_width * s.filters; }

Work winograd_work(const ConvShape& s, std::size_t lanes, bool dual) {
    return {2 * 16 * s.channels * rounded(s.filters, lanes), (dual ? 32 : 16) * kTiles * (s.channels + lanes)};
}

std::size_t parts_of(const ConvShape& s) { return std::clamp<std::size_t>(s.tiles() / kTilesOfPart, 1, kMostParts); }

Work winograd_sum_work(const ConvShape& s, std::size_t lanes, bool dual) {
    const std::size_t filters = rounded(s.filters, lanes);
    return {parts_of(s) * 16 * s.channels * filters, (dual ? 32 : 16) * kTilesSummed * (s.channels + filters)};
}

// That of patches_weight_gradient, which needs the most: the scratch holds a sample's patches.
Work patches_work(const ConvShape& s, std::size_t lanes) {
    const std::size_t taps = 9 * s.channels;
    return {s.batch * taps * rounded(s.filters, lanes), s.out_height * s.out_width * taps};
}

std::size_t winograd_operations(const ConvShape& s, std::size_t tiles) {
    return tiles * 16 * 2 * s.channels * s.filters;
}

// Operations of a sample.
std::size_t patches_operations(const ConvShape& s) {
    return s.out_height * s.out_width * 9 * 2 * s.channels * s.filters;
}

// y = W∗x and, if the dots are given, y_dot = W_dot∗x + W∗x_dot; only those that there is room for. `rotated`: W is
// that of a convolution whose input gradient this is, (C, K, 3, 3), and the padding 2 minus its own.
template <typename T>
void winograd(const Input<T>& x, const Maybe<const T>& x_dot, const Input<T>& weight, const Maybe<const T>& weight_dot,
              std::ptrdiff_t padding, bool rotated, const Maybe<T>& y, const Maybe<T>& y_dot, int threads) {
    expect(weight.ndim() == 4);
    const ConvShape s = conv_shape<T>(x, weight.shape(rotated ? 1 : 0), padding);
    const bool dual = x_dot.has_value();
    expect(weight.size() == s.channels * s.filters * 9 && (y || y_dot));
    expect(dual == weight_dot.has_value() && dual == y_dot.has_value());
    const T *x_dot_data = data_of(x_dot, x.size()), *weight_dot_data = data_of(weight_dot, weight.size());
    T *y_data = data_of(y, output_size(s)), *y_dot_data = data_of(y_dot, output_size(s));
    const ConvUnit<T>& unit = conv_unit<T>();

    nb::gil_scoped_release release;
    const Work work = winograd_work(s, unit.lanes, dual);
    const std::size_t each = work.shared / 2;
    static thread_local Buffer<T> transformed;
    T* u = transformed.at_least(work.shared);
    transform_weights(Weights<T>{weight.data(), s.channels, s.filters, rotated}, unit.lanes, threads, u);
    if (dual)
        transform_weights(Weights<T>{weight_dot_data, s.channels, s.filters, rotated}, unit.lanes, threads, u + each);
    const std::vector<T> zeros(s.channels);
    const WinogradForward<T> arguments{s, x.data(), x_dot_data, u, u + each, zeros.data(), y_data, y_dot_data};
    const auto kernel = !dual    ? unit.winograd_forward
                        : y_data ? unit.winograd_dual_forward
                                 : unit.winograd_tangent_forward;
    const std::size_t grain = grain_of(winograd_operations(s, kTiles) * (dual ? 3 : 1));
    parallel_for((s.tiles() + kTiles - 1) / kTiles, grain, threads,
                 [&](std::size_t block) { kernel(arguments, block, scratch<T>(work.scratch)); });
}

// w_bar = y_bar ⋆ x, or with the dots  y_bar_dot ⋆ x + y_bar ⋆ x_dot
template <typename T>
void winograd_weight_gradient(const Input<T>& x, const Maybe<const T>& x_dot, const Input<T>& y_bar,
                              const Maybe<const T>& y_bar_dot, std::ptrdiff_t padding, Array<T> w_bar, int threads) {
    expect(y_bar.ndim() == 4);
    const ConvShape s = conv_shape<T>(x, y_bar.shape(3), padding);
    expect(y_bar.size() == output_size(s) && w_bar.size() == s.channels * s.filters * 9);
    expect(x_dot.has_value() == y_bar_dot.has_value());
    const T *x_dot_data = data_of(x_dot, x.size()), *y_bar_dot_data = data_of(y_bar_dot, y_bar.size());
    const ConvUnit<T>& unit = conv_unit<T>();

    nb::gil_scoped_release release;
    const bool dual = x_dot_data != nullptr;
    const std::size_t parts = parts_of(s);
    const Work work = winograd_sum_work(s, unit.lanes, dual);
    static thread_local Buffer<T> buffer;
    T* sums = buffer.at_least(work.shared);
    std::fill(sums, sums + work.shared, T(0));
    const std::vector<T> zeros(std::max(s.channels, s.filters));
    const WinogradSum<T> arguments{s, parts, x.data(), x_dot_data, y_bar.data(), y_bar_dot_data, zeros.data(), sums};
    const auto kernel = dual ? unit.winograd_dual_sum : unit.winograd_sum;
    const std::size_t grain = grain_of(winograd_operations(s, s.tiles() / parts) * (dual ? 2 : 1));
    parallel_for(parts, grain, threads, [&](std::size_t part) { kernel(arguments, part, scratch<T>(work.scratch)); });
    transform_weight_gradient(s, unit.lanes, parts, threads, sums, w_bar.data());
}

// y = W∗x for few channels
template <typename T>
void patches(const Input<T>& x, const Input<T>& weight, std::ptrdiff_t padding, Array<T> y, int threads) {
    const ConvShape s = conv_shape<T>(x, weight.shape(0), padding);
    const std::size_t taps = 9 * s.channels;
    expect(weight.size() == taps * s.filters && y.size() == output_size(s));
    const ConvUnit<T>& unit = conv_unit<T>();

    nb::gil_scoped_release release;
    std::vector<T> panels(taps * rounded(s.filters, unit.lanes));
    for (std::size_t k = 0; k < s.filters; ++k) {
        for (std::size_t i = 0; i < taps; ++i) {  // (panels, taps, lanes), the channel last in a tap
            const std::size_t tap = i / s.channels, c = i % s.channels;
            panels[(k / unit.lanes * taps + i) * unit.lanes + k % unit.lanes] =
                weight.data()[(k * s.channels + c) * 9 + tap];
        }
    }
    Patches<T> arguments{};
    arguments.shape = s;
    arguments.x = x.data();
    arguments.w = panels.data();
    arguments.y = y.data();
    parallel_for(s.batch, grain_of(patches_operations(s)), threads,
                 [&](std::size_t sample) { unit.patches_forward(arguments, sample, scratch<T>(s.out_width * taps)); });
}

// w_bar = y_bar ⋆ x for few channels: a sum for each sample, then over the samples in their order
template <typename T>
void patches_weight_gradient(const Input<T>& x, const Input<T>& y_bar, std::ptrdiff_t padding, Array<T> w_bar,
                             int threads) {
    expect(y_bar.ndim() == 4);
    const ConvShape s = conv_shape<T>(x, y_bar.shape(3), padding);
    const std::size_t taps = 9 * s.channels;
    expect(y_bar.size() == output_size(s) && w_bar.size() == taps * s.filters);
    const ConvUnit<T>& unit = conv_unit<T>();

    nb::gil_scoped_release release;
    const std::size_t filters = rounded(s.filters, unit.lanes);
    const Work work = patches_work(s, unit.lanes);
    static thread_local Buffer<T> buffer;
    Patches<T> arguments{};
    arguments.shape = s;
    arguments.x = x.data();
    arguments.y_bar = y_bar.data();
    arguments.w_bar = buffer.at_least(work.shared);
    parallel_for(s.batch, grain_of(patches_operations(s)), threads, [&](std::size_t sample) {
        unit.patches_weight_gradient(arguments, sample, scratch<T>(work.scratch));
    });
    std::vector<T> sum(taps * filters);
    for (std::size_t sample = 0; sample < s.batch; ++sample) {
        const T* from = arguments.w_bar + sample * taps * filters;
        for (std::size_t i = 0; i < sum.size(); ++i) sum[i] += from[i];
    }
    for (std::size_t k = 0; k < s.filters; ++k) {
        for (std::size_t i = 0; i < taps; ++i) {
            w_bar.data()[(k * s.channels + i % s.channels) * 9 + i / s.channels] = sum[i * filters + k];
        }
    }
}

// x_bar_dot = W_dotᵀ∗y_bar + Wᵀ∗y_bar_dot for few channels
template <typename T>
void patches_input_gradient(const Input<T>& y_bar, const Input<T>& y_bar_dot, const Input<T>& weight,
                            const Input<T>& weight_dot, std::ptrdiff_t padding, Array<T> x_bar_dot, int threads) {
    const ConvShape s = conv_shape<T>(Input<T>(x_bar_dot), weight.shape(0), padding);
    const std::size_t taps = 9 * s.channels;
    expect(y_bar.size() == output_size(s) && y_bar_dot.size() == output_size(s));
    expect(weight.size() == taps * s.filters && weight_dot.size() == weight.size());
    const ConvUnit<T>& unit = conv_unit<T>();

    nb::gil_scoped_release release;
    const std::size_t taps_rounded = rounded(taps, unit.lanes);
    std::vector<T> panels(taps_rounded * s.filters), panels_dot(panels.size());
    for (std::size_t k = 0; k < s.filters; ++k) {
        for (std::size_t i = 0; i < taps; ++i) {  // (panels, K, lanes)
            const std::size_t from = (k * s.channels + i % s.channels) * 9 + i / s.channels;
            const std::size_t to = (i / unit.lanes * s.filters + k) * unit.lanes + i % unit.lanes;
            panels[to] = weight.data()[from];
            panels_dot[to] = weight_dot.data()[from];
        }
    }
    std::fill(x_bar_dot.data(), x_bar_dot.data() + x_bar_dot.size(), T(0));
    Patches<T> arguments{};
    arguments.shape = s;
    arguments.y_bar = y_bar.data();
    arguments.y_bar_dot = y_bar_dot.data();
    arguments.w_taps = panels.data();
    arguments.w_taps_dot = panels_dot.data();
    arguments.x_bar = x_bar_dot.data();
    parallel_for(s.batch, grain_of(patches_operations(s)), threads, [&](std::size_t sample) {
        unit.patches_input_gradient(arguments, sample, scratch<T>(s.out_width * taps_rounded));
    });
}

// Bytes that all of one step's calls keep: layers in rows of (channels, height, width, filters, padding), of which
// those of at most `few` channels take patches. A buffer is as large as its largest use.
template <typename T>
std::size_t step_work(std::size_t batch, const std::vector<std::array<std::size_t, 5>>& layers, std::size_t few,
                      int threads) {
    const std::size_t lanes = conv_unit<T>().lanes;
    Work transformed{}, sums{}, patches{};
    const auto grow = [](Work& work, const Work& by) {
        work = {std::max(work.shared, by.shared), std::max(work.scratch, by.scratch)};
    };
    for (const auto& [channels, height, width, filters, padding] : layers) {
        const std::size_t grown = 2 * padding;
        const ConvShape s{
            batch, height, width, channels, height + grown - 2, width + grown - 2, filters, std::ptrdiff_t(padding)};
        const ConvShape back{batch, s.out_height, s.out_width, filters, height, width, channels, 2 - s.padding};
        if (channels <= few) {
            grow(patches, patches_work(s, lanes));
        } else {
            grow(transformed, winograd_work(s, lanes, true));
            grow(transformed, winograd_work(back, lanes, true));
            grow(sums, winograd_sum_work(s, lanes, true));
        }
    }
    const std::size_t scratch = std::max({transformed.scratch, sums.scratch, patches.scratch});
    const std::size_t shared = transformed.shared + sums.shared + patches.shared;
    return sizeof(T) * (shared + scratch * std::size_t(std::max(threads, 1)));
}

template <typename T>
void define(nb::module_& module, const char* step_work_name) {
    module.def(step_work_name, step_work<T>);
    module.def("winograd", winograd<T>, "x"_a.noconvert(), "x_dot"_a.none(), "weight"_a.noconvert(),
               "weight_dot"_a.none(), "padding"_a, "rotated"_a, "y"_a.none(), "y_dot"_a.none(), "threads"_a);
    module.def("winograd_weight_gradient", winograd_weight_gradient<T>, "x"_a.noconvert(), "x_dot"_a.none(),
               "y_bar"_a.noconvert(), "y_bar_dot"_a.none(), "padding"_a, "w_bar"_a.noconvert(), "threads"_a);
    module.def("patches", patches<T>);
    module.def("patches_weight_gradient", patches_weight_gradient<T>);
    module.def("patches_input_gradient", patches_input_gradient<T>);
}

}  // namespace

void define_conv(nb::module_& module) {
    define<float>(module, "step_work_float32");
    define<double>(module, "step_work_float64");
}

// Compiled once for each vector unit; see simd.h.
#include "bias.h"

#include "pack.h"
#include "plane_walks.h"
#include "simd.h"

namespace {

template <bool dual, typename T>
void forward(const BiasForward<T>& a, std::size_t sample, std::size_t group) {
    const Group<T> at(a.shape, sample, group);
    const std::size_t n = at.count, channels = a.shape.channels;
    const T *y = a.y + at.pixel, *y_dot = dual ? a.y_dot + at.pixel : nullptr;
    const Pack<T> beta = load(a.beta + at.first, n), beta_dot = dual ? load(a.beta_dot + at.first, n) : Pack<T>{};
    pool<dual>(a.shape, at, a.p, a.p_dot, [&](std::size_t pixel, Pack<T>& z, Pack<T>& z_dot) INLINE_LAMBDA {
        const Pack<T> u = load(y + pixel * channels, n) + beta;
        z += rectified(u, u);
        if constexpr (dual) z_dot += rectified(u, load(y_dot + pixel * channels, n) + beta_dot);
    });
}

template <bool dual, typename T>
void backward(const BiasBackward<T>& a, std::size_t sample, std::size_t group) {
    const Group<T> at(a.shape, sample, group);
    const std::size_t n = at.count, channels = a.shape.channels;
    const std::size_t height = a.shape.height, width = a.shape.width, rows = height / 2, columns = width / 2;
    const Pack<T> beta = load(a.beta + at.first, n);
    Pack<T> sum{};  // a sum of row sums: each is short, so the rounding errors stay small
    for (std::size_t i = 0; i < height; ++i) {
        Pack<T> row{};
        for (std::size_t j = 0; j < width; ++j) {
            const std::size_t pixel = at.pixel + (i * width + j) * channels;
            const std::size_t pooled = at.pooled + (i / 2 * columns + j / 2) * channels;
            const bool in_pool = i < 2 * rows && j < 2 * columns;
            const Pack<T> u = load(a.y + pixel, n) + beta;
            const Pack<T> u_bar = in_pool ? where_positive(u, load(a.p_bar + pooled, n) * T(0.25)) : Pack<T>{};
            store(a.y_bar + pixel, u_bar, n);
            if constexpr (dual) {
                const Pack<T> u_bar_dot =
                    in_pool ? where_positive(u, load(a.p_bar_dot + pooled, n) * T(0.25)) : Pack<T>{};
                store(a.y_bar_dot + pixel, u_bar_dot, n);
                row += u_bar_dot;
            } else {
                row += u_bar;
            }
        }
        sum += row;
    }
    store(a.beta_sum + at.statistic, sum, n);
}

}  // namespace

namespace UNIT {

template <typename T>
BiasUnit<T> bias_unit() {
    return {Pack<T>::lanes, forward<false, T>, forward<true, T>, backward<false, T>, backward<true, T>};
}
template BiasUnit<float> bias_unit<float>();
template BiasUnit<double> bias_unit<double>();

}  // namespace UNIT

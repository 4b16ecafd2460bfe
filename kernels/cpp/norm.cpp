// Compiled once for each vector unit; see simd.h.
#include "norm.h"

#include <cmath>

#include "pack.h"
#include "plane_walks.h"
#include "simd.h"

namespace {

// Statistics and parameters of planes, one lane per channel.
template <typename T>
struct Norm {
    Pack<T> mean, rstd, gamma, beta;      // primal
    Pack<T> k1, k2, gamma_dot, beta_dot;  // tangent

    INLINE Pack<T> h(const Pack<T>& y) const { return (y - mean) * rstd; }
    INLINE Pack<T> h_dot(const Pack<T>& h, const Pack<T>& y_dot) const { return rstd * (y_dot - k1 - h * k2); }
    INLINE Pack<T> u(const Pack<T>& h) const { return gamma * h + beta; }
    INLINE Pack<T> u_dot(const Pack<T>& h, const Pack<T>& h_dot) const {
        return gamma_dot * h + gamma * h_dot + beta_dot;
    }
};

template <typename T>
INLINE Pack<T> inverse_root(Pack<T> value) {
    T lanes[Pack<T>::lanes];
    std::memcpy(lanes, &value, sizeof value);
    for (T& lane : lanes) lane = T(1) / std::sqrt(lane);
    std::memcpy(&value, lanes, sizeof value);
    return value;
}

// Sum two values per pixel over the plane: term(pixel, row) adds them to row. Rows are summed first, so that rounding
// errors stay small.
template <typename T, typename Term>
INLINE void sum_plane(const PlaneShape& shape, Pack<T> (&sums)[2], const Term& term) {
    sums[0] = sums[1] = Pack<T>{};
    for (std::size_t i = 0; i < shape.height; ++i) {
        Pack<T> row[2] = {};
        for (std::size_t j = 0; j < shape.width; ++j) term(i * shape.width + j, row);
        sums[0] += row[0];
        sums[1] += row[1];
    }
}

template <bool dual, typename T>
void forward(const NormForward<T>& a, std::size_t sample, std::size_t group) {
    const Group<T> at(a.shape, sample, group);
    const std::size_t first = at.first, n = at.count, channels = a.shape.channels, plane = at.statistic;
    const T *y = a.y + at.pixel, *y_dot = dual ? a.y_dot + at.pixel : nullptr;
    const T share = T(1) / T(a.shape.height * a.shape.width);

    Norm<T> norm{};
    norm.gamma = load(a.gamma + first, n);
    norm.beta = load(a.beta + first, n);
    Pack<T> sums[2];
    sum_plane(a.shape, sums, [&](std::size_t pixel, Pack<T>(&row)[2]) {
        row[0] += load(y + pixel * channels, n);
        if constexpr (dual) row[1] += load(y_dot + pixel * channels, n);
    });
    norm.mean = sums[0] * share;
    norm.k1 = sums[1] * share;
    sum_plane(a.shape, sums, [&](std::size_t pixel, Pack<T>(&row)[2]) {
        const Pack<T> centred = load(y + pixel * channels, n) - norm.mean;
        row[0] += centred * centred;
        if constexpr (dual) row[1] += centred * load(y_dot + pixel * channels, n);
    });
    norm.rstd = inverse_root(sums[0] * share + broadcast(T(a.eps)));
    store(a.mean + plane, norm.mean, n);
    store(a.rstd + plane, norm.rstd, n);
    if constexpr (dual) {
        norm.k2 = sums[1] * share * norm.rstd;
        norm.gamma_dot = load(a.gamma_dot + first, n);
        norm.beta_dot = load(a.beta_dot + first, n);
        store(a.k1 + plane, norm.k1, n);
        store(a.k2 + plane, norm.k2, n);
    }

    pool<dual>(a.shape, at, a.p, a.p_dot, [&](std::size_t pixel, Pack<T>& z, Pack<T>& z_dot) INLINE_LAMBDA {
        const Pack<T> h = norm.h(load(y + pixel * channels, n)), u = norm.u(h);
        z += rectified(u, u);
        if constexpr (dual) z_dot += rectified(u, norm.u_dot(h, norm.h_dot(h, load(y_dot + pixel * channels, n))));
    });
}

template <bool dual, typename T>
void backward(const NormBackward<T>& a, std::size_t sample, std::size_t group) {
    const Group<T> at(a.shape, sample, group);
    const std::size_t first = at.first, n = at.count, channels = a.shape.channels, plane = at.statistic;
    const std::size_t height = a.shape.height, width = a.shape.width, rows = height / 2, columns = width / 2;
    const T *y = a.y + at.pixel, *y_dot = dual ? a.y_dot + at.pixel : nullptr;
    T *y_bar = a.y_bar + at.pixel, *y_bar_dot = dual ? a.y_bar_dot + at.pixel : nullptr;
    const T *p_bar = a.p_bar + at.pooled, *p_bar_dot = dual ? a.p_bar_dot + at.pooled : nullptr;
    const T share = T(1) / T(height * width);

    Norm<T> norm{};
    norm.mean = load(a.mean + plane, n);
    norm.rstd = load(a.rstd + plane, n);
    norm.gamma = load(a.gamma + first, n);
    norm.beta = load(a.beta + first, n);
    if constexpr (dual) {
        norm.k1 = load(a.k1 + plane, n);
        norm.k2 = load(a.k2 + plane, n);
        norm.gamma_dot = load(a.gamma_dot + first, n);
        norm.beta_dot = load(a.beta_dot + first, n);
    }

    // sums of u_bar and u_bar h over the plane, and their derivatives
    Pack<T> u_sum{}, uh_sum{}, u_dot_sum{}, uh_dot_sum{};
    for (std::size_t i = 0; i < 2 * rows; ++i) {
        Pack<T> u_row{}, uh_row{}, u_dot_row{}, uh_dot_row{};
        for (std::size_t j = 0; j < 2 * columns; ++j) {
            const std::size_t pixel = (i * width + j) * channels, pooled = (i / 2 * columns + j / 2) * channels;
            const Pack<T> h = norm.h(load(y + pixel, n)), u = norm.u(h);
            const Pack<T> u_bar = where_positive(u, load(p_bar + pooled, n) * T(0.25));
            u_row += u_bar;
            uh_row += u_bar * h;
            if constexpr (dual) {
                const Pack<T> u_bar_dot = where_positive(u, load(p_bar_dot + pooled, n) * T(0.25));
                u_dot_row += u_bar_dot;
                uh_dot_row += u_bar_dot * h + u_bar * norm.h_dot(h, load(y_dot + pixel, n));
            }
        }
        u_sum += u_row;
        uh_sum += uh_row;
        u_dot_sum += u_dot_row;
        uh_dot_sum += uh_dot_row;
    }
    store(a.gamma_sum + plane, dual ? uh_dot_sum : uh_sum, n);
    store(a.beta_sum + plane, dual ? u_dot_sum : u_sum, n);

    const Pack<T> mean_h_bar = norm.gamma * u_sum * share, along = norm.gamma * uh_sum * share;
    const Pack<T> mean_h_bar_dot = (norm.gamma_dot * u_sum + norm.gamma * u_dot_sum) * share;
    const Pack<T> along_dot = (norm.gamma_dot * uh_sum + norm.gamma * uh_dot_sum) * share;
    const Pack<T> rstd_dot = norm.rstd * norm.k2;  // −(the derivative of rstd) / rstd
    for (std::size_t i = 0; i < height; ++i) {
        for (std::size_t j = 0; j < width; ++j) {
            const std::size_t pixel = (i * width + j) * channels, pooled = (i / 2 * columns + j / 2) * channels;
            const bool in_pool = i < 2 * rows && j < 2 * columns;
            const Pack<T> h = norm.h(load(y + pixel, n)), u = norm.u(h);
            const Pack<T> u_bar = in_pool ? where_positive(u, load(p_bar + pooled, n) * T(0.25)) : Pack<T>{};
            const Pack<T> q = norm.gamma * u_bar - mean_h_bar - h * along;
            store(y_bar + pixel, norm.rstd * q, n);
            if constexpr (dual) {
                const Pack<T> h_dot = norm.h_dot(h, load(y_dot + pixel, n));
                const Pack<T> u_bar_dot =
                    in_pool ? where_positive(u, load(p_bar_dot + pooled, n) * T(0.25)) : Pack<T>{};
                const Pack<T> h_bar_dot = norm.gamma_dot * u_bar + norm.gamma * u_bar_dot;
                const Pack<T> q_dot = h_bar_dot - mean_h_bar_dot - h_dot * along - h * along_dot;
                store(y_bar_dot + pixel, norm.rstd * (q_dot - rstd_dot * q), n);
            }
        }
    }
}

}  // namespace

namespace UNIT {

template <typename T>
NormUnit<T> norm_unit() {
    return {Pack<T>::lanes, forward<false, T>, forward<true, T>, backward<false, T>, backward<true, T>};
}
template NormUnit<float> norm_unit<float>();
template NormUnit<double> norm_unit<double>();

}  // namespace UNIT

// norm_relu_pool and its derivatives as Python functions; see planes_module.h. All dots are None in the primal
// operation.
#include "planes_module.h"
#include "simd.h"

namespace nb = nanobind;

namespace {

template <typename T>
void norm_relu_pool(const Input<T>& y, const Maybe<const T>& y_dot, const Input<T>& gamma, const Input<T>& beta,
                    const Maybe<const T>& gamma_dot, const Maybe<const T>& beta_dot, double eps, const Array<T>& p,
                    const Maybe<T>& p_dot, const Array<T>& mean, const Array<T>& rstd, const Maybe<T>& k1,
                    const Maybe<T>& k2, int threads) {
    const PlaneShape s = shape_of<T>(y);
    const std::size_t size = s.size(), pooled = s.pooled_size(), planes = s.planes(), channels = s.channels;
    expect_together(y_dot, gamma_dot, beta_dot, p_dot, k1, k2);
    const NormForward<T> arguments{s,
                                   y.data(),
                                   data_of(y_dot, size),
                                   data_of(gamma, channels),
                                   data_of(beta, channels),
                                   data_of(gamma_dot, channels),
                                   data_of(beta_dot, channels),
                                   eps,
                                   data_of(p, pooled),
                                   data_of(p_dot, pooled),
                                   data_of(mean, planes),
                                   data_of(rstd, planes),
                                   data_of(k1, planes),
                                   data_of(k2, planes)};
    const NormUnit<T>& unit = norm_unit<T>();
    for_each_group(arguments, unit.channels, y_dot ? unit.dual_forward : unit.forward, threads);
}

template <typename T>
void norm_relu_pool_backward(const Input<T>& y, const Maybe<const T>& y_dot, const Input<T>& mean, const Input<T>& rstd,
                             const Maybe<const T>& k1, const Maybe<const T>& k2, const Input<T>& gamma,
                             const Input<T>& beta, const Maybe<const T>& gamma_dot, const Maybe<const T>& beta_dot,
                             const Input<T>& p_bar, const Maybe<const T>& p_bar_dot, const Array<T>& y_bar,
                             const Maybe<T>& y_bar_dot, const Array<T>& gamma_sum, const Array<T>& beta_sum,
                             int threads) {
    const PlaneShape s = shape_of<T>(y);
    const std::size_t size = s.size(), pooled = s.pooled_size(), planes = s.planes(), channels = s.channels;
    expect_together(y_dot, k1, k2, gamma_dot, beta_dot, p_bar_dot, y_bar_dot);
    const NormBackward<T> arguments{s,
                                    y.data(),
                                    data_of(y_dot, size),
                                    data_of(mean, planes),
                                    data_of(rstd, planes),
                                    data_of(k1, planes),
                                    data_of(k2, planes),
                                    data_of(gamma, channels),
                                    data_of(beta, channels),
                                    data_of(gamma_dot, channels),
                                    data_of(beta_dot, channels),
                                    data_of(p_bar, pooled),
                                    data_of(p_bar_dot, pooled),
                                    data_of(y_bar, size),
                                    data_of(y_bar_dot, size),
                                    data_of(gamma_sum, planes),
                                    data_of(beta_sum, planes)};
    const NormUnit<T>& unit = norm_unit<T>();
    for_each_group(arguments, unit.channels, y_dot ? unit.dual_backward : unit.backward, threads);
}

template <typename T>
void define(nb::module_& module) {
    module.def("norm_relu_pool", norm_relu_pool<T>);
    module.def("norm_relu_pool_backward", norm_relu_pool_backward<T>);
}

}  // namespace

void define_norm(nb::module_& module) {
    define<float>(module);
    define<double>(module);
}

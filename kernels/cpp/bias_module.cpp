// bias_relu_pool and its derivatives as Python functions; see planes_module.h. All dots are None in the primal
// operation.
#include "planes_module.h"
#include "simd.h"

namespace nb = nanobind;

namespace {

template <typename T>
void bias_relu_pool(const Input<T>& y, const Maybe<const T>& y_dot, const Input<T>& beta,
                    const Maybe<const T>& beta_dot, const Array<T>& p, const Maybe<T>& p_dot, int threads) {
    const PlaneShape s = shape_of<T>(y);
    expect_together(y_dot, beta_dot, p_dot);
    const BiasForward<T> arguments{s,
                                   y.data(),
                                   data_of(y_dot, s.size()),
                                   data_of(beta, s.channels),
                                   data_of(beta_dot, s.channels),
                                   data_of(p, s.pooled_size()),
                                   data_of(p_dot, s.pooled_size())};
    const BiasUnit<T>& unit = bias_unit<T>();
    for_each_group(arguments, unit.channels, y_dot ? unit.dual_forward : unit.forward, threads);
}

template <typename T>
void bias_relu_pool_backward(const Input<T>& y, const Input<T>& beta, const Input<T>& p_bar,
                             const Maybe<const T>& p_bar_dot, const Array<T>& y_bar, const Maybe<T>& y_bar_dot,
                             const Array<T>& beta_sum, int threads) {
    const PlaneShape s = shape_of<T>(y);
    expect_together(p_bar_dot, y_bar_dot);
    const BiasBackward<T> arguments{s,
                                    y.data(),
                                    data_of(beta, s.channels),
                                    data_of(p_bar, s.pooled_size()),
                                    data_of(p_bar_dot, s.pooled_size()),
                                    data_of(y_bar, s.size()),
                                    data_of(y_bar_dot, s.size()),
                                    data_of(beta_sum, s.planes())};
    const BiasUnit<T>& unit = bias_unit<T>();
    for_each_group(arguments, unit.channels, p_bar_dot ? unit.dual_backward : unit.backward, threads);
}

template <typename T>
void define(nb::module_& module) {
    module.def("bias_relu_pool", bias_relu_pool<T>);
    module.def("bias_relu_pool_backward", bias_relu_pool_backward<T>);
}

}  // namespace

void define_bias(nb::module_& module) {
    define<float>(module);
    define<double>(module);
}

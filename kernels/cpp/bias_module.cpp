// bias_relu_pool and its derivatives as Python functions; see planes_module.h.
#include "module.h"
#include "planes_module.h"
#include "simd.h"

namespace nb = nanobind;

namespace {

template <typename T>
void define(nb::module_& module) {
    module.def("bias_relu_pool", [](const Input<T>& y, const Input<T>& beta, Array<T> p, int threads) {
        const PlaneShape s = shape_of<T>(y);
        expect_size<T>(s.channels, beta);
        expect_size<T>(s.batch * (s.height / 2) * (s.width / 2) * s.channels, p);
        const BiasForward<T> arguments{s, y.data(), nullptr, beta.data(), nullptr, p.data(), nullptr};
        for_each_group<T>(arguments, bias_unit<T>().channels, bias_unit<T>().forward, threads);
    });
    module.def("bias_relu_pool_dual", [](const Input<T>& y, const Input<T>& y_dot, const Input<T>& beta,
                                         const Input<T>& beta_dot, Array<T> p, Array<T> p_dot, int threads) {
        const PlaneShape s = shape_of<T>(y);
        expect_size<T>(y.size(), y_dot);
        expect_size<T>(s.channels, beta, beta_dot);
        expect_size<T>(s.batch * (s.height / 2) * (s.width / 2) * s.channels, p, p_dot);
        const BiasForward<T> arguments{s, y.data(), y_dot.data(), beta.data(), beta_dot.data(), p.data(), p_dot.data()};
        for_each_group<T>(arguments, bias_unit<T>().channels, bias_unit<T>().dual_forward, threads);
    });
    module.def("bias_relu_pool_backward", [](const Input<T>& y, const Input<T>& beta, const Input<T>& p_bar,
                                             Array<T> y_bar, Array<T> beta_sum, int threads) {
        const PlaneShape s = shape_of<T>(y);
        expect_size<T>(y.size(), y_bar);
        expect_size<T>(s.channels, beta);
        expect_size<T>(s.batch * s.channels, beta_sum);
        expect_size<T>(s.batch * (s.height / 2) * (s.width / 2) * s.channels, p_bar);
        const BiasBackward<T> arguments{s,       y.data(),     beta.data(), p_bar.data(),
                                        nullptr, y_bar.data(), nullptr,     beta_sum.data()};
        for_each_group<T>(arguments, bias_unit<T>().channels, bias_unit<T>().backward, threads);
    });
    module.def("bias_relu_pool_dual_backward", [](const Input<T>& y, const Input<T>& beta, const Input<T>& p_bar,
                                                  const Input<T>& p_bar_dot, Array<T> y_bar, Array<T> y_bar_dot,
                                                  Array<T> beta_sum, int threads) {
        const PlaneShape s = shape_of<T>(y);
        expect_size<T>(y.size(), y_bar, y_bar_dot);
        expect_size<T>(s.channels, beta);
        expect_size<T>(s.batch * s.channels, beta_sum);
        expect_size<T>(s.batch * (s.height / 2) * (s.width / 2) * s.channels, p_bar, p_bar_dot);
        const BiasBackward<T> arguments{
            s, y.data(), beta.data(), p_bar.data(), p_bar_dot.data(), y_bar.data(), y_bar_dot.data(), beta_sum.data()};
        for_each_group<T>(arguments, bias_unit<T>().channels, bias_unit<T>().dual_backward, threads);
    });
}

}  // namespace

void define_bias(nb::module_& module) {
    define<float>(module);
    define<double>(module);
}

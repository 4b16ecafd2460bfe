// norm_relu_pool and its derivatives as Python functions; see planes_module.h.
#include "module.h"
#include "planes_module.h"
#include "simd.h"

namespace nb = nanobind;

namespace {

template <typename T>
void define(nb::module_& module) {
    module.def("norm_relu_pool", [](const Input<T>& y, const Input<T>& gamma, const Input<T>& beta, double eps,
                                    Array<T> p, Array<T> mean, Array<T> rstd, int threads) {
        const PlaneShape s = shape_of<T>(y);
        expect_size<T>(s.channels, gamma, beta);
        expect_size<T>(s.batch * s.channels, mean, rstd);
        expect_size<T>(s.batch * (s.height / 2) * (s.width / 2) * s.channels, p);
        const NormForward<T> arguments{s,   y.data(), nullptr, gamma.data(), beta.data(), nullptr, nullptr,
                                       eps, p.data(), nullptr, mean.data(),  rstd.data(), nullptr, nullptr};
        for_each_group<T>(arguments, norm_unit<T>().channels, norm_unit<T>().forward, threads);
    });
    module.def("norm_relu_pool_dual",
               [](const Input<T>& y, const Input<T>& y_dot, const Input<T>& gamma, const Input<T>& beta,
                  const Input<T>& gamma_dot, const Input<T>& beta_dot, double eps, Array<T> p, Array<T> p_dot,
                  Array<T> mean, Array<T> rstd, Array<T> k1, Array<T> k2, int threads) {
                   const PlaneShape s = shape_of<T>(y);
                   expect_size<T>(y.size(), y_dot);
                   expect_size<T>(s.channels, gamma, beta, gamma_dot, beta_dot);
                   expect_size<T>(s.batch * s.channels, mean, rstd, k1, k2);
                   expect_size<T>(s.batch * (s.height / 2) * (s.width / 2) * s.channels, p, p_dot);
                   const NormForward<T> arguments{
                       s,   y.data(), y_dot.data(), gamma.data(), beta.data(), gamma_dot.data(), beta_dot.data(),
                       eps, p.data(), p_dot.data(), mean.data(),  rstd.data(), k1.data(),        k2.data()};
                   for_each_group<T>(arguments, norm_unit<T>().channels, norm_unit<T>().dual_forward, threads);
               });
    module.def("norm_relu_pool_backward", [](const Input<T>& y, const Input<T>& mean, const Input<T>& rstd,
                                             const Input<T>& gamma, const Input<T>& beta, const Input<T>& p_bar,
                                             Array<T> y_bar, Array<T> gamma_sum, Array<T> beta_sum, int threads) {
        const PlaneShape s = shape_of<T>(y);
        expect_size<T>(y.size(), y_bar);
        expect_size<T>(s.channels, gamma, beta);
        expect_size<T>(s.batch * s.channels, mean, rstd, gamma_sum, beta_sum);
        expect_size<T>(s.batch * (s.height / 2) * (s.width / 2) * s.channels, p_bar);
        const NormBackward<T> arguments{
            s,       y.data(),     nullptr,     mean.data(),      rstd.data(),    nullptr,
            nullptr, gamma.data(), beta.data(), nullptr,          nullptr,        p_bar.data(),
            nullptr, y_bar.data(), nullptr,     gamma_sum.data(), beta_sum.data()};
        for_each_group<T>(arguments, norm_unit<T>().channels, norm_unit<T>().backward, threads);
    });
    module.def("norm_relu_pool_dual_backward",
               [](const Input<T>& y, const Input<T>& y_dot, const Input<T>& mean, const Input<T>& rstd,
                  const Input<T>& k1, const Input<T>& k2, const Input<T>& gamma, const Input<T>& beta,
                  const Input<T>& gamma_dot, const Input<T>& beta_dot, const Input<T>& p_bar, const Input<T>& p_bar_dot,
                  Array<T> y_bar, Array<T> y_bar_dot, Array<T> gamma_sum, Array<T> beta_sum, int threads) {
                   const PlaneShape s = shape_of<T>(y);
                   expect_size<T>(y.size(), y_dot, y_bar, y_bar_dot);
                   expect_size<T>(s.channels, gamma, beta, gamma_dot, beta_dot);
                   expect_size<T>(s.batch * s.channels, mean, rstd, k1, k2, gamma_sum, beta_sum);
                   expect_size<T>(s.batch * (s.height / 2) * (s.width / 2) * s.channels, p_bar, p_bar_dot);
                   const NormBackward<T> arguments{s,
                                                   y.data(),
                                                   y_dot.data(),
                                                   mean.data(),
                                                   rstd.data(),
                                                   k1.data(),
                                                   k2.data(),
                                                   gamma.data(),
                                                   beta.data(),
                                                   gamma_dot.data(),
                                                   beta_dot.data(),
                                                   p_bar.data(),
                                                   p_bar_dot.data(),
                                                   y_bar.data(),
                                                   y_bar_dot.data(),
                                                   gamma_sum.data(),
                                                   beta_sum.data()};
                   for_each_group<T>(arguments, norm_unit<T>().channels, norm_unit<T>().dual_backward, threads);
               });
}

}  // namespace

void define_norm(nb::module_& module) {
    define<float>(module);
    define<double>(module);
}

// The plane kernels as Python functions. The tensors are channels-last, so (B, H, W, C) and contiguous in memory; those
// that hold results were allocated by the caller.
#include "planes_module.h"

#include <nanobind/ndarray.h>

#include <stdexcept>

#include "parallel.h"
#include "units.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

constexpr std::size_t kOperations = 16;  // a number of a plane, in and out

template <typename T>
using Array = nb::ndarray<T, nb::c_contig, nb::device::cpu>;
template <typename T>
using Input = Array<const T>;

template <typename T>
PlaneShape shape_of(const Input<T>& y) {
    if (y.ndim() != 4) throw std::invalid_argument("planes: expected (B, H, W, C)");
    return {y.shape(0), y.shape(1), y.shape(2), y.shape(3)};
}

// Sizes are checked by the caller in Python; this is the last line of defence against memory that is not ours.
template <typename T, typename... Arrays>
void expect_size(std::size_t size, const Arrays&... arrays) {
    if (((arrays.size() != size) || ...)) throw std::invalid_argument("planes: sizes differ");
}

template <typename T, typename Arguments, typename Kernel>
void for_each_group(const Arguments& arguments, std::size_t lanes, Kernel kernel, int threads) {
    const std::size_t groups = (arguments.shape.channels + lanes - 1) / lanes;
    const std::size_t grain = grain_of(kOperations * lanes * arguments.shape.height * arguments.shape.width);
    nb::gil_scoped_release release;
    parallel_for(arguments.shape.batch * groups, grain, threads,
                 [&](std::size_t block) { kernel(arguments, block / groups, block % groups); });
}

template <typename T>
void define_norm(nb::module_& module) {
    module.def("norm_relu_pool", [](const Input<T>& y, const Input<T>& gamma, const Input<T>& beta, double eps, Array<T> p,
                                    Array<T> mean, Array<T> rstd, int threads) {
        const PlaneShape s = shape_of<T>(y);
        expect_size<T>(s.channels, gamma, beta);
        expect_size<T>(s.batch * s.channels, mean, rstd);
        expect_size<T>(s.batch * (s.height / 2) * (s.width / 2) * s.channels, p);
        const PlaneForward<T> arguments{s,   y.data(), nullptr, gamma.data(), beta.data(), nullptr, nullptr,
                                        eps, p.data(), nullptr, mean.data(),  rstd.data(), nullptr, nullptr};
        for_each_group<T>(arguments, plane_unit<T>().channels, plane_unit<T>().forward, threads);
    });
    module.def("norm_relu_pool_dual",
               [](const Input<T>& y, const Input<T>& y_dot, const Input<T>& gamma, const Input<T>& beta,
                  const Input<T>& gamma_dot, const Input<T>& beta_dot, double eps, Array<T> p, Array<T> p_dot, Array<T> mean,
                  Array<T> rstd, Array<T> k1, Array<T> k2, int threads) {
                   const PlaneShape s = shape_of<T>(y);
                   expect_size<T>(y.size(), y_dot);
                   expect_size<T>(s.channels, gamma, beta, gamma_dot, beta_dot);
                   expect_size<T>(s.batch * s.channels, mean, rstd, k1, k2);
                   expect_size<T>(s.batch * (s.height / 2) * (s.width / 2) * s.channels, p, p_dot);
                   const PlaneForward<T> arguments{s,           y.data(),         y_dot.data(),    gamma.data(),
                                                   beta.data(), gamma_dot.data(), beta_dot.data(), eps,
                                                   p.data(),    p_dot.data(),     mean.data(),     rstd.data(),
                                                   k1.data(),   k2.data()};
                   for_each_group<T>(arguments, plane_unit<T>().channels, plane_unit<T>().dual_forward, threads);
               });
    module.def("norm_relu_pool_backward",
               [](const Input<T>& y, const Input<T>& mean, const Input<T>& rstd, const Input<T>& gamma, const Input<T>& beta,
                  const Input<T>& p_bar, Array<T> y_bar, Array<T> gamma_sum, Array<T> beta_sum, int threads) {
                   const PlaneShape s = shape_of<T>(y);
                   expect_size<T>(y.size(), y_bar);
                   expect_size<T>(s.channels, gamma, beta);
                   expect_size<T>(s.batch * s.channels, mean, rstd, gamma_sum, beta_sum);
                   expect_size<T>(s.batch * (s.height / 2) * (s.width / 2) * s.channels, p_bar);
                   const PlaneBackward<T> arguments{s,
                                                    y.data(),
                                                    nullptr,
                                                    mean.data(),
                                                    rstd.data(),
                                                    nullptr,
                                                    nullptr,
                                                    gamma.data(),
                                                    beta.data(),
                                                    nullptr,
                                                    nullptr,
                                                    p_bar.data(),
                                                    nullptr,
                                                    y_bar.data(),
                                                    nullptr,
                                                    gamma_sum.data(),
                                                    beta_sum.data()};
                   for_each_group<T>(arguments, plane_unit<T>().channels, plane_unit<T>().backward, threads);
               });
    module.def("norm_relu_pool_dual_backward",
               [](const Input<T>& y, const Input<T>& y_dot, const Input<T>& mean, const Input<T>& rstd, const Input<T>& k1,
                  const Input<T>& k2, const Input<T>& gamma, const Input<T>& beta, const Input<T>& gamma_dot,
                  const Input<T>& beta_dot, const Input<T>& p_bar, const Input<T>& p_bar_dot, Array<T> y_bar,
                  Array<T> y_bar_dot, Array<T> gamma_sum, Array<T> beta_sum, int threads) {
                   const PlaneShape s = shape_of<T>(y);
                   expect_size<T>(y.size(), y_dot, y_bar, y_bar_dot);
                   expect_size<T>(s.channels, gamma, beta, gamma_dot, beta_dot);
                   expect_size<T>(s.batch * s.channels, mean, rstd, k1, k2, gamma_sum, beta_sum);
                   expect_size<T>(s.batch * (s.height / 2) * (s.width / 2) * s.channels, p_bar, p_bar_dot);
                   const PlaneBackward<T> arguments{
                       s,           y.data(),         y_dot.data(),    mean.data(),  rstd.data(),      k1.data(),
                       k2.data(),   gamma.data(),     beta.data(),     gamma_dot.data(), beta_dot.data(), p_bar.data(),
                       p_bar_dot.data(), y_bar.data(), y_bar_dot.data(), gamma_sum.data(), beta_sum.data()};
                   for_each_group<T>(arguments, plane_unit<T>().channels, plane_unit<T>().dual_backward, threads);
               });
}

template <typename T>
void define_bias(nb::module_& module) {
    module.def("bias_relu_pool", [](const Input<T>& y, const Input<T>& beta, Array<T> p, int threads) {
        const PlaneShape s = shape_of<T>(y);
        expect_size<T>(s.channels, beta);
        expect_size<T>(s.batch * (s.height / 2) * (s.width / 2) * s.channels, p);
        const BiasForward<T> arguments{s, y.data(), nullptr, beta.data(), nullptr, p.data(), nullptr};
        for_each_group<T>(arguments, plane_unit<T>().channels, plane_unit<T>().bias_forward, threads);
    });
    module.def("bias_relu_pool_dual", [](const Input<T>& y, const Input<T>& y_dot, const Input<T>& beta,
                                         const Input<T>& beta_dot, Array<T> p, Array<T> p_dot, int threads) {
        const PlaneShape s = shape_of<T>(y);
        expect_size<T>(y.size(), y_dot);
        expect_size<T>(s.channels, beta, beta_dot);
        expect_size<T>(s.batch * (s.height / 2) * (s.width / 2) * s.channels, p, p_dot);
        const BiasForward<T> arguments{s,        y.data(), y_dot.data(), beta.data(), beta_dot.data(),
                                       p.data(), p_dot.data()};
        for_each_group<T>(arguments, plane_unit<T>().channels, plane_unit<T>().bias_dual_forward, threads);
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
        for_each_group<T>(arguments, plane_unit<T>().channels, plane_unit<T>().bias_backward, threads);
    });
    module.def("bias_relu_pool_dual_backward",
               [](const Input<T>& y, const Input<T>& beta, const Input<T>& p_bar, const Input<T>& p_bar_dot, Array<T> y_bar,
                  Array<T> y_bar_dot, Array<T> beta_sum, int threads) {
                   const PlaneShape s = shape_of<T>(y);
                   expect_size<T>(y.size(), y_bar, y_bar_dot);
                   expect_size<T>(s.channels, beta);
                   expect_size<T>(s.batch * s.channels, beta_sum);
                   expect_size<T>(s.batch * (s.height / 2) * (s.width / 2) * s.channels, p_bar, p_bar_dot);
                   const BiasBackward<T> arguments{s,
                                                   y.data(),
                                                   beta.data(),
                                                   p_bar.data(),
                                                   p_bar_dot.data(),
                                                   y_bar.data(),
                                                   y_bar_dot.data(),
                                                   beta_sum.data()};
                   for_each_group<T>(arguments, plane_unit<T>().channels, plane_unit<T>().bias_dual_backward, threads);
               });
}

}  // namespace

void define_planes(nb::module_& module) {
    define_norm<float>(module);
    define_norm<double>(module);
    define_bias<float>(module);
    define_bias<double>(module);
}

// The operations over flat vectors as Python functions. `out` of a step may be one of its arguments.
#include <algorithm>

#include "module.h"
#include "parallel.h"
#include "simd.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace nanobind::detail {
template <>
struct dtype_traits<BFloat16> {
    static constexpr dlpack::dtype value{static_cast<uint8_t>(dlpack::dtype_code::Bfloat), 16, 1};
    static constexpr auto name = const_name("bfloat16");
};
}  // namespace nanobind::detail

namespace {

constexpr std::size_t kBlock = 1 << 14;  // elements, a multiple of every vector's
constexpr std::size_t kGrain = 8;        // blocks that are worth a thread

template <typename Arguments, typename Kernel>
void for_each_block(const Arguments& arguments, Kernel kernel, std::size_t size, int threads) {
    nb::gil_scoped_release release;
    parallel_for((size + kBlock - 1) / kBlock, kGrain, threads,
                 [&](std::size_t block) { kernel(arguments, block * kBlock, std::min(size, (block + 1) * kBlock)); });
}

template <typename T>
void sgd_step(const Input<T>& theta, const Input<T>& gradient, double rate, const Array<T>& out,
              const Maybe<const T>& velocity, const Maybe<T>& velocity_out, double momentum, double weight_decay,
              int threads) {
    const std::size_t size = theta.size();
    const SgdStep<T> arguments{
        theta.data(), data_of(gradient, size), data_of(velocity, size), T(rate),
        T(momentum),  T(weight_decay),         data_of(out, size),      data_of(velocity_out, size)};
    for_each_block(arguments, flat_unit<T>().sgd, size, threads);
}

template <typename T>
void adjoint_step(const Input<T>& adjoint, const Input<T>& hessian_v, const Maybe<const T>& direction, double scale,
                  const Array<T>& out, const Maybe<const T>& incoming, double weight_decay, int threads) {
    const std::size_t size = adjoint.size();
    const AdjointStep<T> arguments{
        adjoint.data(), data_of(hessian_v, size), data_of(direction, size), data_of(incoming, size),
        T(scale),       T(weight_decay),          data_of(out, size)};
    for_each_block(arguments, flat_unit<T>().adjoint, size, threads);
}

template <typename T>
void define(nb::module_& module) {
    module.def("sgd_step", sgd_step<T>, "theta"_a.noconvert(), "gradient"_a.noconvert(), "rate"_a, "out"_a.noconvert(),
               "velocity"_a.none(), "velocity_out"_a.none(), "momentum"_a, "weight_decay"_a, "threads"_a);
    module.def("adjoint_step", adjoint_step<T>, "adjoint"_a.noconvert(), "hessian_v"_a.noconvert(),
               "direction"_a.none(), "scale"_a, "out"_a.noconvert(), "incoming"_a.none(), "weight_decay"_a,
               "threads"_a);
}

template <typename T>
void define_squared_distance(nb::module_& module) {
    module.def(
        "squared_distance",
        [](const Input<T>& a, const Input<T>& b, int threads) {
            const T* other = data_of(b, a.size());
            nb::gil_scoped_release release;
            return squared_distance(a.data(), other, a.size(), threads);
        },
        "a"_a.noconvert(), "b"_a.noconvert(), "threads"_a);
}

}  // namespace

void define_flat(nb::module_& module) {
    define<float>(module);
    define<double>(module);
    define_squared_distance<float>(module);
    define_squared_distance<double>(module);
    define_squared_distance<BFloat16>(module);
}

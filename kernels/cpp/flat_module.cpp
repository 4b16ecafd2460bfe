// The operations over flat vectors as Python functions. `out` of a step may be one of its arguments.
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>

#include <algorithm>
#include <optional>
#include <stdexcept>

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

template <typename T>
using Vector = nb::ndarray<T, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
template <typename T>
using Maybe = std::optional<Vector<T>>;

// Sizes are checked by the caller in Python; this is the last line of defence against memory that is not ours.
void expect(bool condition) {
    if (!condition) throw std::invalid_argument("flat: sizes differ");
}

template <typename T>
T* data(const Maybe<T>& vector, std::size_t size) {
    expect(!vector || vector->size() == size);
    return vector ? vector->data() : nullptr;
}

template <typename Arguments, typename Kernel>
void for_each_block(const Arguments& arguments, Kernel kernel, std::size_t size, int threads) {
    nb::gil_scoped_release release;
    parallel_for((size + kBlock - 1) / kBlock, kGrain, threads,
                 [&](std::size_t block) { kernel(arguments, block * kBlock, std::min(size, (block + 1) * kBlock)); });
}

template <typename T>
void sgd_step(const Vector<const T>& theta, const Vector<const T>& gradient, double rate, Vector<T> out,
              const Maybe<const T>& velocity, const Maybe<T>& velocity_out, double momentum, double weight_decay,
              int threads) {
    const std::size_t size = theta.size();
    expect(gradient.size() == size && out.size() == size);
    const SgdStep<T> arguments{theta.data(), gradient.data(), data(velocity, size), T(rate),
                               T(momentum),  T(weight_decay), out.data(),           data(velocity_out, size)};
    for_each_block(arguments, flat_unit<T>().sgd, size, threads);
}

template <typename T>
void adjoint_step(const Vector<const T>& adjoint, const Vector<const T>& hessian_v, const Maybe<const T>& direction,
                  double scale, Vector<T> out, const Maybe<const T>& incoming, double weight_decay, int threads) {
    const std::size_t size = adjoint.size();
    expect(hessian_v.size() == size && out.size() == size);
    const AdjointStep<T> arguments{
        adjoint.data(),  hessian_v.data(), data(direction, size), data(incoming, size), T(scale),
        T(weight_decay), out.data()};
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
        [](const Vector<const T>& a, const Vector<const T>& b, int threads) {
            if (a.size() != b.size()) throw std::invalid_argument("squared_distance: sizes differ");
            nb::gil_scoped_release release;
            return squared_distance(a.data(), b.data(), a.size(), threads);
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

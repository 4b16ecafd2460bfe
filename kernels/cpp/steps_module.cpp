// The steps over flat vectors as Python functions. `out` may be one of the arguments.
#include "steps_module.h"

#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>

#include <algorithm>
#include <optional>
#include <stdexcept>

#include "parallel.h"
#include "units.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

constexpr std::size_t kBlock = 1 << 14;  // elements, a multiple of every vector's
constexpr std::size_t kGrain = 8;        // blocks that are worth a thread

template <typename T>
using Vector = nb::ndarray<T, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
template <typename T>
using Maybe = std::optional<Vector<T>>;

// Sizes are checked by the caller in Python; this is the last line of defence against memory that is not ours.
void expect(bool condition) {
    if (!condition) throw std::invalid_argument("steps: sizes differ");
}

template <typename T>
T* data(const Maybe<T>& vector, std::size_t size) {
    expect(!vector || vector->size() == size);
    return vector ? vector->data() : nullptr;
}

template <typename Arguments, typename Kernel>
void for_each_block(const Arguments& arguments, Kernel kernel, std::size_t size, int threads) {
    nb::gil_scoped_release release;
    parallel_for((size + kBlock - 1) / kBlock, kGrain, threads, [&](std::size_t block) {
        kernel(arguments, block * kBlock, std::min(size, (block + 1) * kBlock));
    });
}

template <typename T>
void sgd_step(const Vector<const T>& theta, const Vector<const T>& gradient, double rate, Vector<T> out,
              const Maybe<const T>& velocity, const Maybe<T>& velocity_out, double momentum, double weight_decay,
              int threads) {
    const std::size_t size = theta.size();
    expect(gradient.size() == size && out.size() == size);
    const SgdStep<T> arguments{theta.data(), gradient.data(), data(velocity, size),   T(rate), T(momentum),
                               T(weight_decay), out.data(),   data(velocity_out, size)};
    for_each_block(arguments, step_unit<T>().sgd, size, threads);
}

template <typename T>
void adjoint_step(const Vector<const T>& adjoint, const Vector<const T>& hessian_v, const Maybe<const T>& direction,
                  double scale, Vector<T> out, const Maybe<const T>& incoming, double weight_decay, int threads) {
    const std::size_t size = adjoint.size();
    expect(hessian_v.size() == size && out.size() == size);
    const AdjointStep<T> arguments{adjoint.data(), hessian_v.data(), data(direction, size), data(incoming, size),
                                   T(scale),       T(weight_decay),  out.data()};
    for_each_block(arguments, step_unit<T>().adjoint, size, threads);
}

template <typename T>
void define(nb::module_& module) {
    module.def("sgd_step", sgd_step<T>, "theta"_a.noconvert(), "gradient"_a.noconvert(), "rate"_a, "out"_a.noconvert(),
               "velocity"_a.none(), "velocity_out"_a.none(), "momentum"_a, "weight_decay"_a, "threads"_a);
    module.def("adjoint_step", adjoint_step<T>, "adjoint"_a.noconvert(), "hessian_v"_a.noconvert(), "direction"_a.none(),
               "scale"_a, "out"_a.noconvert(), "incoming"_a.none(), "weight_decay"_a, "threads"_a);
}

}  // namespace

void define_steps(nb::module_& module) {
    define<float>(module);
    define<double>(module);
}

// mtt_fast.kernels._native: the kernels as Python functions. Tensors come in by DLPack, so nothing links to torch.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <stdexcept>

#include "conv_module.h"
#include "cross_entropy_module.h"
#include "distance.h"
#include "planes_module.h"
#include "pool.h"
#include "steps_module.h"
#include "warp_module.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace nanobind::detail {
template <>
struct dtype_traits<BFloat16> {
    static constexpr dlpack::dtype value{static_cast<uint8_t>(dlpack::dtype_code::Bfloat), 16, 1};
    static constexpr auto name = const_name("bfloat16");
};
}  // namespace nanobind::detail

template <typename T>
using Vector = nb::ndarray<const T, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

template <typename T>
void define_squared_distance(nb::module_& module) {
    module.def(
        "squared_distance",
        [](const Vector<T>& a, const Vector<T>& b, int threads) {
            if (a.size() != b.size()) throw std::invalid_argument("squared_distance: sizes differ");
            nb::gil_scoped_release release;
            return squared_distance(a.data(), b.data(), a.size(), threads);
        },
        "a"_a.noconvert(), "b"_a.noconvert(), "threads"_a);
}

// Never destroyed: tensors may outlive the module.
Pool& results() {
    static Pool& pool = *new Pool;
    return pool;
}

// A tensor of `size` bytes without a value, which goes back to the pool when nobody holds it any more.
nb::ndarray<nb::pytorch, std::uint8_t, nb::ndim<1>> memory(std::size_t size) {
    struct Held {
        Pool::Block block;
        ~Held() { results().give_back(block); }
    };
    Held* held = new Held{results().take(size)};
    const nb::capsule owner(held, [](void* held) noexcept { delete static_cast<Held*>(held); });
    return {held->block.memory, {size}, owner};
}

NB_MODULE(_native, module) {
    module.def("memory", memory, "size"_a);
    module.def("release_memory", [] { results().clear(); });
    define_squared_distance<float>(module);
    define_squared_distance<double>(module);
    define_squared_distance<BFloat16>(module);
    define_planes(module);
    define_conv(module);
    define_cross_entropy(module);
    define_steps(module);
    define_warp(module);
}

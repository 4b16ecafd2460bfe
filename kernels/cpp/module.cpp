// mtt_fast.kernels._native: the kernels as Python functions. Tensors come in by DLPack, so nothing links to torch.
#include "module.h"

#include "pool.h"

namespace nb = nanobind;
using namespace nb::literals;

// Never destroyed: tensors may outlive the module.
Pool& results() {
    static Pool& pool = *new Pool;
    return pool;
}

// Return an uninitialised tensor of `size` bytes, whose memory goes back to the pool when the tensor is freed.
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
    module.attr("sources") = SOURCES;
    module.def("memory", memory, "size"_a);
    module.def("release_memory", [] { results().clear(); });
    define_norm(module);
    define_bias(module);
    define_conv(module);
    define_classifier(module);
    define_flat(module);
    define_warp(module);
}

// The warp kernels as Python functions. Tensors are contiguous, (B, C, H, W); the result was allocated by the caller.
#include <algorithm>
#include <limits>

#include "module.h"
#include "parallel.h"
#include "scratch.h"
#include "simd.h"

namespace nb = nanobind;

namespace {

constexpr std::size_t kPixels = 1 << 13;  // pixels of four channels that are worth a thread

template <typename T>
using Kernel = void (*)(const Warp<T>&, std::size_t sample, const WarpScratch<T>&);

template <typename T>
void for_each_image(Kernel<T> kernel, const Input<T>& from, const Input<T>& numbers, const Array<T>& to, int threads) {
    expect(from.ndim() == 4);
    const WarpShape shape{from.shape(0), from.shape(1), from.shape(2), from.shape(3)};
    expect(numbers.size() * sizeof(T) == shape.batch * sizeof(WarpNumbers<T>));
    if (shape.group_size() > std::numeric_limits<std::int32_t>::max()) throw std::invalid_argument("warp: too large");
    const Warp<T> arguments{shape, from.data(), reinterpret_cast<const WarpNumbers<T>*>(numbers.data()),
                            data_of(to, from.size())};
    const std::size_t image = shape.groups() * shape.group_size(), width = shape.width;
    const std::size_t grain = 1 + kPixels / std::max<std::size_t>(1, shape.groups() * shape.height * width);
    nb::gil_scoped_release release;
    parallel_for(shape.batch, grain, threads, [&](std::size_t sample) {
        T* memory = scratch<T>(image + (2 * WarpShape::lanes + 2) * width);
        T* pixels = memory + image;
        T* rows = pixels + WarpShape::lanes * width;
        T* down = rows + WarpShape::lanes * width;
        kernel(arguments, sample, {memory, pixels, rows, scratch<std::int32_t>(width), down, down + width});
    });
}

template <typename T>
void define(nb::module_& module) {
    module.def("colour_warp_mask",
               [](const Input<T>& images, const Input<T>& parameters, const Array<T>& y, int threads) {
                   for_each_image(warp_unit<T>().forward, images, parameters, y, threads);
               });
    module.def("colour_warp_mask_transpose",
               [](const Input<T>& y_bar, const Input<T>& parameters, const Array<T>& x_bar, int threads) {
                   for_each_image(warp_unit<T>().transpose, y_bar, parameters, x_bar, threads);
               });
}

}  // namespace

void define_warp(nb::module_& module) {
    define<float>(module);
    define<double>(module);
}

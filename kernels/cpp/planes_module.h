// Shared by norm_module.cpp and bias_module.cpp. The tensors are channels-last, so (B, H, W, C) and contiguous in
// memory; those that hold results were allocated by the caller.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <stdexcept>

#include "parallel.h"
#include "planes.h"

constexpr std::size_t kPlaneOperations = 16;  // of a pixel, in and out

template <typename T>
using Array = nanobind::ndarray<T, nanobind::c_contig, nanobind::device::cpu>;
template <typename T>
using Input = Array<const T>;

template <typename T>
PlaneShape shape_of(const Input<T>& y) {
    if (y.ndim() != 4) throw std::invalid_argument("planes: expected (B, H, W, C)");
    return {y.shape(0), y.shape(1), y.shape(2), y.shape(3)};
}

// Python checks sizes; this check only prevents access to foreign memory.
template <typename T, typename... Arrays>
void expect_size(std::size_t size, const Arrays&... arrays) {
    if (((arrays.size() != size) || ...)) throw std::invalid_argument("planes: sizes differ");
}

template <typename T, typename Arguments, typename Kernel>
void for_each_group(const Arguments& arguments, std::size_t lanes, Kernel kernel, int threads) {
    const std::size_t groups = (arguments.shape.channels + lanes - 1) / lanes;
    const std::size_t grain = grain_of(kPlaneOperations * lanes * arguments.shape.height * arguments.shape.width);
    nanobind::gil_scoped_release release;
    parallel_for(arguments.shape.batch * groups, grain, threads,
                 [&](std::size_t block) { kernel(arguments, block / groups, block % groups); });
}

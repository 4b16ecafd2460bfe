// Shared by norm_module.cpp and bias_module.cpp. The tensors are channels-last, so (B, H, W, C) and contiguous in
// memory.
#pragma once

#include "module.h"
#include "parallel.h"
#include "planes.h"

constexpr std::size_t kPlaneOperations = 16;  // of a pixel, in and out

template <typename T>
PlaneShape shape_of(const Input<T>& y) {
    expect(y.ndim() == 4);
    return {y.shape(0), y.shape(1), y.shape(2), y.shape(3)};
}

// All of the tensors are there, or none is.
template <typename First, typename... Others>
void expect_together(const First& first, const Others&... others) {
    expect(((others.has_value() == first.has_value()) && ...));
}

template <typename Arguments, typename Kernel>
void for_each_group(const Arguments& arguments, std::size_t lanes, Kernel kernel, int threads) {
    const std::size_t groups = (arguments.shape.channels + lanes - 1) / lanes;
    const std::size_t grain = grain_of(kPlaneOperations * lanes * arguments.shape.height * arguments.shape.width);
    nanobind::gil_scoped_release release;
    parallel_for(arguments.shape.batch * groups, grain, threads,
                 [&](std::size_t block) { kernel(arguments, block / groups, block % groups); });
}

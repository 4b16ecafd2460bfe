// The shape of planes, for the kernels and for the module.
#pragma once

#include <cstddef>

struct PlaneShape {
    std::size_t batch, height, width, channels;
};

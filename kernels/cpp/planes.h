// The shape of planes, for the kernels and for the module.
#pragma once

#include <cstddef>

struct PlaneShape {
    std::size_t batch, height, width, channels;

    std::size_t size() const { return batch * height * width * channels; }
    std::size_t pooled_size() const { return batch * (height / 2) * (width / 2) * channels; }
    std::size_t planes() const { return batch * channels; }
};

// The functions that add the operations of a family to the module, and the tensors that these operations take. The
// caller allocates the tensors of results.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>

#include <cstddef>
#include <optional>
#include <stdexcept>

template <typename T>
using Array = nanobind::ndarray<T, nanobind::c_contig, nanobind::device::cpu>;
template <typename T>
using Input = Array<const T>;
template <typename T>
using Maybe = std::optional<Array<T>>;

// Python checks sizes; this check only prevents access to memory that is not ours.
inline void expect(bool condition) {
    if (!condition) throw std::invalid_argument("kernels: sizes do not fit each other, or a label is no class");
}

// The memory of a tensor of `size` elements.
template <typename T>
T* data_of(const Array<T>& array, std::size_t size) {
    expect(array.size() == size);
    return array.data();
}

// The same, or null where there is no tensor.
template <typename T>
T* data_of(const Maybe<T>& array, std::size_t size) {
    return array ? data_of(*array, size) : nullptr;
}

void define_bias(nanobind::module_& module);
void define_classifier(nanobind::module_& module);
void define_conv(nanobind::module_& module);
void define_flat(nanobind::module_& module);
void define_norm(nanobind::module_& module);
void define_warp(nanobind::module_& module);

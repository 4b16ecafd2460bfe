// Some files are compiled once for each vector unit, with UNIT defined as its name (CMakeLists.txt). In the namespace
// of this name each defines a function that returns a table of its kernels. The function of the same name here returns
// the table of the widest unit of the processor (simd.cpp).
#pragma once

#include <cstddef>

#include "bias.h"
#include "classifier.h"
#include "conv.h"
#include "flat.h"
#include "norm.h"
#include "warp.h"

template <typename Forward, typename Backward>
struct PlaneUnit {
    std::size_t channels;  // of one group
    void (*forward)(const Forward&, std::size_t sample, std::size_t group);
    void (*dual_forward)(const Forward&, std::size_t sample, std::size_t group);
    void (*backward)(const Backward&, std::size_t sample, std::size_t group);
    void (*dual_backward)(const Backward&, std::size_t sample, std::size_t group);
};

template <typename T>
using NormUnit = PlaneUnit<NormForward<T>, NormBackward<T>>;
template <typename T>
using BiasUnit = PlaneUnit<BiasForward<T>, BiasBackward<T>>;

template <typename T>
struct ConvUnit {
    std::size_t lanes;  // filters of one panel
    void (*winograd_forward)(const WinogradForward<T>&, std::size_t block, T* scratch);
    void (*winograd_dual_forward)(const WinogradForward<T>&, std::size_t block, T* scratch);
    void (*winograd_tangent_forward)(const WinogradForward<T>&, std::size_t block, T* scratch);
    void (*winograd_sum)(const WinogradSum<T>&, std::size_t part, T* scratch);
    void (*winograd_dual_sum)(const WinogradSum<T>&, std::size_t part, T* scratch);
    void (*patches_forward)(const Patches<T>&, std::size_t sample, T* scratch);
    void (*patches_weight_gradient)(const Patches<T>&, std::size_t sample, T* scratch);
    void (*patches_input_gradient)(const Patches<T>&, std::size_t sample, T* scratch);
};

template <typename T>
struct ClassifierUnit {
    void (*primal)(const CrossEntropy<T>&, std::size_t sample);
    void (*dual)(const CrossEntropy<T>&, std::size_t sample);
};

template <typename T>
struct FlatUnit {
    void (*sgd)(const SgdStep<T>&, std::size_t begin, std::size_t end);
    void (*adjoint)(const AdjointStep<T>&, std::size_t begin, std::size_t end);
};

template <typename T>
struct WarpUnit {
    void (*forward)(const Warp<T>&, std::size_t sample, const WarpScratch<T>&);
    void (*transpose)(const Warp<T>&, std::size_t sample, const WarpScratch<T>&);
};

template <typename T>
const NormUnit<T>& norm_unit();
template <typename T>
const BiasUnit<T>& bias_unit();
template <typename T>
const ConvUnit<T>& conv_unit();
template <typename T>
const ClassifierUnit<T>& classifier_unit();
template <typename T>
const FlatUnit<T>& flat_unit();
template <typename T>
const WarpUnit<T>& warp_unit();

// Some files are compiled once for each vector unit, with UNIT defined as its name (CMakeLists.txt). Each puts out a
// table of its functions; units.cpp takes the table of the widest unit that the processor has. So one binary is fast
// on a new machine and still starts on an old one.
#pragma once

#include <cstddef>

#include "conv.h"
#include "cross_entropy.h"
#include "planes.h"
#include "steps.h"
#include "warp.h"

template <typename T>
struct PlaneUnit {
    std::size_t channels;  // of one group
    void (*forward)(const PlaneForward<T>&, std::size_t sample, std::size_t group);
    void (*dual_forward)(const PlaneForward<T>&, std::size_t sample, std::size_t group);
    void (*backward)(const PlaneBackward<T>&, std::size_t sample, std::size_t group);
    void (*dual_backward)(const PlaneBackward<T>&, std::size_t sample, std::size_t group);
    void (*bias_forward)(const BiasForward<T>&, std::size_t sample, std::size_t group);
    void (*bias_dual_forward)(const BiasForward<T>&, std::size_t sample, std::size_t group);
    void (*bias_backward)(const BiasBackward<T>&, std::size_t sample, std::size_t group);
    void (*bias_dual_backward)(const BiasBackward<T>&, std::size_t sample, std::size_t group);
};

template <typename T>
const PlaneUnit<T>& plane_unit();

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
const ConvUnit<T>& conv_unit();

template <typename T>
struct CrossEntropyUnit {
    void (*primal)(const CrossEntropy<T>&, std::size_t sample);
    void (*dual)(const CrossEntropy<T>&, std::size_t sample);
};

template <typename T>
const CrossEntropyUnit<T>& cross_entropy_unit();

template <typename T>
struct StepUnit {
    void (*sgd)(const SgdStep<T>&, std::size_t begin, std::size_t end);
    void (*adjoint)(const AdjointStep<T>&, std::size_t begin, std::size_t end);
};

template <typename T>
const StepUnit<T>& step_unit();

template <typename T>
struct WarpUnit {
    void (*forward)(const Warp<T>&, std::size_t sample, const WarpScratch<T>&);
    void (*transpose)(const Warp<T>&, std::size_t sample, const WarpScratch<T>&);
};

template <typename T>
const WarpUnit<T>& warp_unit();

#define UNIT_JOIN(name, unit) name##_##unit
#define UNIT_EXPAND(name, unit) UNIT_JOIN(name, unit)
#define UNIT_NAME(name) UNIT_EXPAND(name, UNIT)

template <typename T>
PlaneUnit<T> plane_unit_generic();
template <typename T>
PlaneUnit<T> plane_unit_avx2();
template <typename T>
PlaneUnit<T> plane_unit_avx512();

template <typename T>
ConvUnit<T> conv_unit_generic();
template <typename T>
ConvUnit<T> conv_unit_avx2();
template <typename T>
ConvUnit<T> conv_unit_avx512();

template <typename T>
CrossEntropyUnit<T> cross_entropy_unit_generic();
template <typename T>
CrossEntropyUnit<T> cross_entropy_unit_avx2();
template <typename T>
CrossEntropyUnit<T> cross_entropy_unit_avx512();

template <typename T>
StepUnit<T> step_unit_generic();
template <typename T>
StepUnit<T> step_unit_avx2();
template <typename T>
StepUnit<T> step_unit_avx512();

template <typename T>
WarpUnit<T> warp_unit_generic();
template <typename T>
WarpUnit<T> warp_unit_avx2();
template <typename T>
WarpUnit<T> warp_unit_avx512();

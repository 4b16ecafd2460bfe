// Some files are compiled once for each vector unit, with UNIT defined as its name (CMakeLists.txt). Each exports a
// table of its functions, and simd.cpp selects the table of the widest unit of the processor at run time.
#pragma once

#include <cstddef>

#include "bias.h"
#include "classifier.h"
#include "conv.h"
#include "flat.h"
#include "norm.h"
#include "warp.h"

template <typename T>
struct NormUnit {
    std::size_t channels;  // of one group
    void (*forward)(const NormForward<T>&, std::size_t sample, std::size_t group);
    void (*dual_forward)(const NormForward<T>&, std::size_t sample, std::size_t group);
    void (*backward)(const NormBackward<T>&, std::size_t sample, std::size_t group);
    void (*dual_backward)(const NormBackward<T>&, std::size_t sample, std::size_t group);
};

template <typename T>
const NormUnit<T>& norm_unit();

template <typename T>
struct BiasUnit {
    std::size_t channels;  // of one group
    void (*forward)(const BiasForward<T>&, std::size_t sample, std::size_t group);
    void (*dual_forward)(const BiasForward<T>&, std::size_t sample, std::size_t group);
    void (*backward)(const BiasBackward<T>&, std::size_t sample, std::size_t group);
    void (*dual_backward)(const BiasBackward<T>&, std::size_t sample, std::size_t group);
};

template <typename T>
const BiasUnit<T>& bias_unit();

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
struct ClassifierUnit {
    void (*primal)(const CrossEntropy<T>&, std::size_t sample);
    void (*dual)(const CrossEntropy<T>&, std::size_t sample);
};

template <typename T>
const ClassifierUnit<T>& classifier_unit();

template <typename T>
struct FlatUnit {
    void (*sgd)(const SgdStep<T>&, std::size_t begin, std::size_t end);
    void (*adjoint)(const AdjointStep<T>&, std::size_t begin, std::size_t end);
};

template <typename T>
const FlatUnit<T>& flat_unit();

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
NormUnit<T> norm_unit_generic();
template <typename T>
NormUnit<T> norm_unit_avx2();
template <typename T>
NormUnit<T> norm_unit_avx512();

template <typename T>
BiasUnit<T> bias_unit_generic();
template <typename T>
BiasUnit<T> bias_unit_avx2();
template <typename T>
BiasUnit<T> bias_unit_avx512();

template <typename T>
ConvUnit<T> conv_unit_generic();
template <typename T>
ConvUnit<T> conv_unit_avx2();
template <typename T>
ConvUnit<T> conv_unit_avx512();

template <typename T>
ClassifierUnit<T> classifier_unit_generic();
template <typename T>
ClassifierUnit<T> classifier_unit_avx2();
template <typename T>
ClassifierUnit<T> classifier_unit_avx512();

template <typename T>
FlatUnit<T> flat_unit_generic();
template <typename T>
FlatUnit<T> flat_unit_avx2();
template <typename T>
FlatUnit<T> flat_unit_avx512();

template <typename T>
WarpUnit<T> warp_unit_generic();
template <typename T>
WarpUnit<T> warp_unit_avx2();
template <typename T>
WarpUnit<T> warp_unit_avx512();

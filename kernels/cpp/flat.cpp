// Compiled once for each vector unit; see simd.h.
#include "flat.h"

#include <algorithm>

#include "pack.h"
#include "simd.h"

namespace {

template <typename T>
void sgd(const SgdStep<T>& a, std::size_t begin, std::size_t end) {
    for (std::size_t i = begin; i < end; i += Pack<T>::lanes) {
        const std::size_t n = std::min(end - i, Pack<T>::lanes);
        const Pack<T> theta = load(a.theta + i, n);
        Pack<T> velocity = load(a.gradient + i, n) + theta * a.weight_decay;
        if (a.velocity) velocity += load(a.velocity + i, n) * a.momentum;
        if (a.velocity_out) store(a.velocity_out + i, velocity, n);
        store(a.out + i, theta - velocity * a.rate, n);
    }
}

template <typename T>
void adjoint(const AdjointStep<T>& a, std::size_t begin, std::size_t end) {
    for (std::size_t i = begin; i < end; i += Pack<T>::lanes) {
        const std::size_t n = std::min(end - i, Pack<T>::lanes);
        Pack<T> curvature = load(a.hessian_v + i, n);
        if (a.direction) curvature += load(a.direction + i, n) * a.weight_decay;
        Pack<T> result = load(a.adjoint + i, n) + curvature * a.scale;
        if (a.incoming) result += load(a.incoming + i, n);
        store(a.out + i, result, n);
    }
}

}  // namespace

namespace UNIT {

template <typename T>
FlatUnit<T> flat_unit() {
    return {sgd<T>, adjoint<T>};
}
template FlatUnit<float> flat_unit<float>();
template FlatUnit<double> flat_unit<double>();

}  // namespace UNIT

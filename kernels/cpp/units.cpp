#include "units.h"

namespace {

template <typename T>
PlaneUnit<T> widest_plane_unit() {
#ifdef WITH_X86_UNITS
    if (__builtin_cpu_supports("avx512f")) return plane_unit_avx512<T>();
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return plane_unit_avx2<T>();
#endif
    return plane_unit_generic<T>();
}

template <typename T>
ConvUnit<T> widest_conv_unit() {
#ifdef WITH_X86_UNITS
    if (__builtin_cpu_supports("avx512f")) return conv_unit_avx512<T>();
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return conv_unit_avx2<T>();
#endif
    return conv_unit_generic<T>();
}

}  // namespace

template <typename T>
const PlaneUnit<T>& plane_unit() {
    static const PlaneUnit<T> unit = widest_plane_unit<T>();
    return unit;
}
template const PlaneUnit<float>& plane_unit();
template const PlaneUnit<double>& plane_unit();

template <typename T>
const ConvUnit<T>& conv_unit() {
    static const ConvUnit<T> unit = widest_conv_unit<T>();
    return unit;
}
template const ConvUnit<float>& conv_unit();
template const ConvUnit<double>& conv_unit();

#include "simd.h"

#ifdef WITH_X86_UNITS
#define WIDEST(unit, T)                                                                    \
    __builtin_cpu_supports("avx512f")                                 ? unit##_avx512<T>() \
    : __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? unit##_avx2<T>()   \
                                                                      : unit##_generic<T>()
#else
#define WIDEST(unit, T) unit##_generic<T>()
#endif

// The table of the widest unit that the processor has, chosen once.
#define DEFINE(Unit, unit)                             \
    template <typename T>                              \
    const Unit<T>& unit() {                            \
        static const Unit<T> widest = WIDEST(unit, T); \
        return widest;                                 \
    }                                                  \
    template const Unit<float>& unit();                \
    template const Unit<double>& unit();

DEFINE(NormUnit, norm_unit)
DEFINE(BiasUnit, bias_unit)
DEFINE(ConvUnit, conv_unit)
DEFINE(ClassifierUnit, classifier_unit)
DEFINE(FlatUnit, flat_unit)
DEFINE(WarpUnit, warp_unit)

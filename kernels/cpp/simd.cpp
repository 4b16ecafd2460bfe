#include "simd.h"

#ifdef WITH_X86_UNITS
#define WIDEST(unit, T)                                                                   \
    __builtin_cpu_supports("avx512f")                                 ? avx512::unit<T>() \
    : __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? avx2::unit<T>()   \
                                                                      : generic::unit<T>()
#else
#define WIDEST(unit, T) generic::unit<T>()
#endif

#define DECLARE(vectors, Unit, unit) \
    namespace vectors {              \
    template <typename T>            \
    Unit<T> unit();                  \
    }

// The table of the widest unit that the processor has, chosen once.
#define DEFINE(Unit, unit)                             \
    DECLARE(generic, Unit, unit)                       \
    DECLARE(avx2, Unit, unit)                          \
    DECLARE(avx512, Unit, unit)                        \
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

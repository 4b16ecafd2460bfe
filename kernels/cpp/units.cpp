#include "units.h"

// The table of the widest unit that the processor has, chosen once.
#ifdef WITH_X86_UNITS
#define WIDEST(name)                                                                                 \
    (__builtin_cpu_supports("avx512f")                                  ? name##_avx512<T>()         \
     : __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? name##_avx2<T>()            \
                                                                        : name##_generic<T>())
#else
#define WIDEST(name) name##_generic<T>()
#endif

#define DEFINE_UNIT(Unit, name)                 \
    template <typename T>                       \
    const Unit<T>& name() {                     \
        static const Unit<T> unit = WIDEST(name); \
        return unit;                            \
    }                                           \
    template const Unit<float>& name();         \
    template const Unit<double>& name();

DEFINE_UNIT(PlaneUnit, plane_unit)
DEFINE_UNIT(ConvUnit, conv_unit)
DEFINE_UNIT(CrossEntropyUnit, cross_entropy_unit)
DEFINE_UNIT(StepUnit, step_unit)

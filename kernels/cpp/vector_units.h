// FOR_EACH_VECTOR_UNIT before a function compiles it once for each width of vectors; the loader takes the widest that the
// processor has. So one binary is fast on a new machine and still starts on an old one.
#pragma once

#include <cstdlib>  // defines __GLIBC__, whose loader can choose

#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__)
#define FOR_EACH_VECTOR_UNIT __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define FOR_EACH_VECTOR_UNIT
#endif

// Pack<T>: two vector registers of consecutive numbers, as wide as the instruction set of the translation unit.
// Only for files that are compiled once for each vector unit (CMakeLists.txt), so everything has internal linkage.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__AVX512F__)
#define VECTOR_BYTES 64
#elif defined(__AVX__)
#define VECTOR_BYTES 32
#else
#define VECTOR_BYTES 16
#endif
#define INLINE inline __attribute__((always_inline))
#define INLINE_LAMBDA __attribute__((always_inline))

namespace {

typedef float FloatVector __attribute__((vector_size(VECTOR_BYTES)));
typedef double DoubleVector __attribute__((vector_size(VECTOR_BYTES)));

template <typename T>
struct VectorOf;
template <>
struct VectorOf<float> {
    using Type = FloatVector;
};
template <>
struct VectorOf<double> {
    using Type = DoubleVector;
};
template <typename T>
using Vector = typename VectorOf<T>::Type;

template <typename T>
struct Pack {
    static constexpr std::size_t lanes = 2 * VECTOR_BYTES / sizeof(T);
    Vector<T> low, high;
};

template <typename T>
INLINE Pack<T> broadcast(T value) {
    const Vector<T> all = value - Vector<T>{};
    return {all, all};
}

template <typename T>
INLINE Vector<T> load_vector(const T* from) {
    Vector<T> vector;
    std::memcpy(&vector, from, sizeof vector);
    return vector;
}

// The first `count` lanes from memory, `rest` in the others.
template <typename T>
INLINE Pack<T> load(const T* from, std::size_t count, T rest = 0) {
    constexpr std::size_t half = Pack<T>::lanes / 2;
    if (count == Pack<T>::lanes) return {load_vector(from), load_vector(from + half)};
    T part[Pack<T>::lanes];
    for (T& lane : part) lane = rest;
    std::memcpy(part, from, count * sizeof(T));
    return {load_vector(part), load_vector(part + half)};
}

template <typename T>
INLINE void store(T* to, const Pack<T>& pack, std::size_t count) {
    constexpr std::size_t half = Pack<T>::lanes / 2;
    T part[Pack<T>::lanes];
    T* whole = count == Pack<T>::lanes ? to : part;
    std::memcpy(whole, &pack.low, sizeof pack.low);
    std::memcpy(whole + half, &pack.high, sizeof pack.high);
    if (whole == part) std::memcpy(to, part, count * sizeof(T));
}

template <typename T>
INLINE Pack<T> operator+(const Pack<T>& a, const Pack<T>& b) {
    return {a.low + b.low, a.high + b.high};
}
template <typename T>
INLINE Pack<T> operator-(const Pack<T>& a, const Pack<T>& b) {
    return {a.low - b.low, a.high - b.high};
}
template <typename T>
INLINE Pack<T> operator*(const Pack<T>& a, const Pack<T>& b) {
    return {a.low * b.low, a.high * b.high};
}
template <typename T>
INLINE Pack<T> operator*(const Pack<T>& a, T b) {
    return {a.low * b, a.high * b};
}
template <typename T>
INLINE Pack<T>& operator+=(Pack<T>& a, const Pack<T>& b) {
    return a = a + b;
}

// `value` where `condition` > 0, else 0.
template <typename T>
INLINE Pack<T> where_positive(const Pack<T>& condition, const Pack<T>& value) {
    const Vector<T> zero{};
    return {condition.low > zero ? value.low : zero, condition.high > zero ? value.high : zero};
}

// 0 where `condition` ≤ 0, else `value`, as a ReLU does: NaN stays NaN.
template <typename T>
INLINE Pack<T> rectified(const Pack<T>& condition, const Pack<T>& value) {
    const Vector<T> zero{};
    return {condition.low <= zero ? zero : value.low, condition.high <= zero ? zero : value.high};
}

// The larger of the two; `b` where one is NaN.
template <typename T>
INLINE Pack<T> larger(const Pack<T>& a, const Pack<T>& b) {
    return {a.low > b.low ? a.low : b.low, a.high > b.high ? a.high : b.high};
}

// 1 in one lane and 0 in the others; 0 in all if there is no such lane.
template <typename T>
INLINE Pack<T> one_hot(std::size_t lane) {
    T part[Pack<T>::lanes] = {};
    if (lane < Pack<T>::lanes) part[lane] = 1;
    return load(part, Pack<T>::lanes);
}

template <typename T>
INLINE T sum_of_lanes(const Pack<T>& pack) {
    T part[Pack<T>::lanes], sum = 0;
    store(part, pack, Pack<T>::lanes);
    for (const T lane : part) sum += lane;
    return sum;
}

template <typename T>
INLINE T largest_lane(const Pack<T>& pack) {
    T part[Pack<T>::lanes];
    store(part, pack, Pack<T>::lanes);
    T largest = part[0];
    for (const T lane : part) largest = lane > largest ? lane : largest;
    return largest;
}

// Constants of eˣ in T. The last bits of x + `rounder` are the integer nearest to x.
template <typename T>
struct Exponential;
template <>
struct Exponential<float> {
    typedef std::int32_t Bits __attribute__((vector_size(VECTOR_BYTES)));
    static constexpr int mantissa = 23, terms = 7;
    static constexpr std::int32_t one = 0x3F800000;
    static constexpr float rounder = 0x1.8p23f, least = -87.3f;
    static constexpr float ln2_high = 0x1.63p-1f, ln2_low = -0x1.bd0106p-13f;
};
template <>
struct Exponential<double> {
    typedef std::int64_t Bits __attribute__((vector_size(VECTOR_BYTES)));
    static constexpr int mantissa = 52, terms = 13;
    static constexpr std::int64_t one = 0x3FF0000000000000;
    static constexpr double rounder = 0x1.8p52, least = -708.3;
    static constexpr double ln2_high = 0x1.62e42feep-1, ln2_low = 0x1.a39ef35793c76p-33;
};

// eˣ for x ≤ 0, computed as 2ⁿ eʳ with |r| ≤ ln 2 / 2, and eʳ by its Taylor series to the precision of T. It is 0 where
// eˣ would be subnormal. NaN stays NaN.
template <typename T>
INLINE Vector<T> exp_of(Vector<T> x) {
    using E = Exponential<T>;
    const Vector<T> shifted = x * T(1.4426950408889634) + E::rounder, n = shifted - E::rounder;
    const Vector<T> r = x - n * E::ln2_high - n * E::ln2_low;
    Vector<T> series = Vector<T>{} + T(1);
    for (int term = E::terms; term > 0; --term) series = series * (r * (T(1) / T(term))) + T(1);
    const typename E::Bits power = (reinterpret_cast<typename E::Bits>(shifted) << E::mantissa) + E::one;
    return x < E::least ? Vector<T>{} : series * reinterpret_cast<Vector<T>>(power);
}
template <typename T>
INLINE Pack<T> exp_of(const Pack<T>& x) {
    return {exp_of<T>(x.low), exp_of<T>(x.high)};
}

}  // namespace

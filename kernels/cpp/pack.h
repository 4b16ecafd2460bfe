// Pack<T>: two vector registers of neighbouring channels, as wide as this translation unit's instruction set has them.
// Only for files that are compiled once for each vector unit (CMakeLists.txt): everything is internal to the file.
#pragma once

#include <cstddef>
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

// The first `count` lanes from memory, zeros behind them.
template <typename T>
INLINE Pack<T> load(const T* from, std::size_t count) {
    constexpr std::size_t half = Pack<T>::lanes / 2;
    if (count == Pack<T>::lanes) return {load_vector(from), load_vector(from + half)};
    T part[Pack<T>::lanes] = {};
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

}  // namespace

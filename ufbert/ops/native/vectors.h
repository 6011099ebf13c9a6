// Vectors of UFBERT_LANES floats and functions on them, for all kernels. Compiled once for each instruction set, whose name is
// UFBERT_ISA.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <vector>

#include "kernels.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#define INLINE static inline __attribute__((always_inline))
#define INLINE_MEMBER inline __attribute__((always_inline))
#define JOIN_(a, b) a##b
#define JOIN(a, b) JOIN_(a, b)

namespace ufbert {
namespace JOIN(isa_, UFBERT_ISA) {

constexpr int64_t kLanes = UFBERT_LANES;

typedef float Vector __attribute__((vector_size(4 * UFBERT_LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * UFBERT_LANES)));
typedef float UnalignedVector __attribute__((vector_size(4 * UFBERT_LANES), aligned(4), may_alias));
typedef uint16_t Halves __attribute__((vector_size(2 * UFBERT_LANES), aligned(2), may_alias));
typedef int8_t Bytes __attribute__((vector_size(UFBERT_LANES), aligned(1), may_alias));

// An element, and a vector, of stored weights as float32. bfloat16 is the upper half of a float32.
INLINE float scalar(const float* p) { return *p; }
INLINE float scalar(const uint16_t* p) {
  uint32_t bits = uint32_t(*p) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
INLINE float scalar(const int8_t* p) { return float(*p); }
INLINE Vector load(const float* p) { return *reinterpret_cast<const UnalignedVector*>(p); }
INLINE Vector load(const uint16_t* p) {
  typedef uint32_t Words __attribute__((vector_size(4 * UFBERT_LANES)));
  return (Vector)(__builtin_convertvector(*reinterpret_cast<const Halves*>(p), Words) << 16);
}
INLINE Vector load(const int8_t* p) {
#if defined(__AVX512F__)  // compilers turn the portable line into sixteen moves of one byte
  return (Vector)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#elif defined(__AVX2__)
  return (Vector)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
#else
  return __builtin_convertvector(__builtin_convertvector(*reinterpret_cast<const Bytes*>(p), Ints), Vector);
#endif
}
INLINE void store(float* p, Vector v) { *reinterpret_cast<UnalignedVector*>(p) = v; }
INLINE Vector fill(float value) { return value - Vector{}; }

INLINE float sum(Vector v) {
  typedef float Four __attribute__((vector_size(16)));
#if UFBERT_LANES == 16
  typedef float Eight __attribute__((vector_size(32)));
  const Eight h = __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7) + __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15);
  const Four q = __builtin_shufflevector(h, h, 0, 1, 2, 3) + __builtin_shufflevector(h, h, 4, 5, 6, 7);
#elif UFBERT_LANES == 8
  const Four q = __builtin_shufflevector(v, v, 0, 1, 2, 3) + __builtin_shufflevector(v, v, 4, 5, 6, 7);
#else
  const Four q = v;
#endif
  return (q[0] + q[2]) + (q[1] + q[3]);
}

// The order of the additions is fixed. So a row's answer is the same to the bit however many rows are computed together.
template <typename W>
INLINE float dot(const float* x, const W* w, int64_t d) {
  Vector a = {}, b = {}, c = {}, e = {};
  int64_t i = 0;
  for (; i + 4 * kLanes <= d; i += 4 * kLanes) {
    a += load(x + i) * load(w + i);
    b += load(x + i + kLanes) * load(w + i + kLanes);
    c += load(x + i + 2 * kLanes) * load(w + i + 2 * kLanes);
    e += load(x + i + 3 * kLanes) * load(w + i + 3 * kLanes);
  }
  for (; i + kLanes <= d; i += kLanes) a += load(x + i) * load(w + i);
  float total = sum((a + b) + (c + e));
  for (; i < d; ++i) total += x[i] * scalar(w + i);
  return total;
}

template <typename W>
INLINE void prefetch(const W* row, int64_t d) {
  const char* p = reinterpret_cast<const char*>(row);
  for (int64_t i = 0; i < d * int64_t(sizeof(W)); i += 64) __builtin_prefetch(p + i);
}

// p / r to two units of the last place. A division takes as long as ten products.
INLINE Vector quotient(Vector p, Vector r) {
#if defined(__AVX512F__)
  const Vector near = (Vector)_mm512_rcp14_ps((__m512)r);
  return p * (near * (fill(2.0f) - r * near));
#else
  return p / r;
#endif
}

// erf to 2e-7 of float32: the rational approximation of Eigen and XLA inside (-4, 4), one outside.
template <bool kExact = true>
INLINE Vector erf(Vector v) {
  const Vector four = fill(4.0f);
  const Vector x = v > four ? four : (v < -four ? -four : v);
  const Vector q = x * x;
  Vector p = fill(-2.72614225801306e-10f);
  p = p * q + fill(2.77068142495902e-08f);
  p = p * q + fill(-2.10102402082508e-06f);
  p = p * q + fill(-5.69250639462346e-05f);
  p = p * q + fill(-7.34990630326855e-04f);
  p = p * q + fill(-2.95459980854025e-03f);
  p = p * q + fill(-1.60960333262415e-02f);
  Vector r = fill(-1.45660718464996e-05f);
  r = r * q + fill(-2.13374055278905e-04f);
  r = r * q + fill(-1.68282697438203e-03f);
  r = r * q + fill(-7.37332916720468e-03f);
  r = r * q + fill(-1.42647390514189e-02f);
  const Vector inside = kExact ? x * p / r : quotient(x * p, r);
  return v >= four ? fill(1.0f) : (v <= -four ? fill(-1.0f) : inside);
}

// e to the v: 2^n times a polynomial in the remainder r = v - n ln 2, as in Cephes' expf. Below -87.3 the result is that of
// -87.3, 1.18e-38: the smallest number that does not count as zero.
INLINE Vector exp(Vector v) {
  const Vector high = fill(88.3762626647949f), low = fill(-87.3365402f), shift = fill(12582912.0f);  // 1.5 * 2^23: rounds
  v = v > high ? high : (v < low ? low : v);
  const Vector n = (v * fill(1.44269504088896341f) + shift) - shift;
  const Vector r = (v - n * fill(0.693359375f)) - n * fill(-2.12194440e-4f);  // ln 2 in two parts: n times the first is exact
  Vector p = fill(1.9875691500e-4f);
  p = p * r + fill(1.3981999507e-3f);
  p = p * r + fill(8.3334519073e-3f);
  p = p * r + fill(4.1665795894e-2f);
  p = p * r + fill(1.6666665459e-1f);
  p = p * r + fill(5.0000001201e-1f);
  p = p * r * r + r + fill(1.0f);
  return p * (Vector)((__builtin_convertvector(n, Ints) + 127) << 23);  // the bits of 2^n
}

constexpr float kRootHalf = 0.70710678118654752f, kRootTwoOverPi = 0.79788456080286536f, kCubic = 0.044715f;

// value[s] = activation(z[s]) for s < steps; both have room up to a full vector.
INLINE void activate(Activation activation, const float* z, float* value, int64_t steps) {
  for (int64_t s = 0; s < steps; s += kLanes) {
    const Vector v = load(z + s);
    Vector a = {};
    if (activation == kGelu) {
      a = fill(0.5f) * v * (fill(1.0f) + erf(v * fill(kRootHalf)));
    } else if (activation == kSymmetricGelu) {
      a = v * erf(v * fill(kRootHalf));
    } else if (activation == kRelu) {
      a = v > Vector{} ? v : (v == v ? Vector{} : v);  // NaN stays NaN
    } else {
      for (int64_t k = 0; k < kLanes; ++k) {
        const float u = v[k];
        a[k] = 0.5f * u * (1.0f + std::tanh(kRootTwoOverPi * (u + kCubic * u * u * u)));
      }
    }
    store(value + s, a);
  }
}

// activation(v), for the layers of an encoder. The tanh of GELU's approximation is written as a logistic function.
INLINE Vector activated(Activation activation, Vector v) {
  if (activation == kRelu) return v > Vector{} ? v : (v == v ? Vector{} : v);  // NaN stays NaN
  if (activation == kGelu) return fill(0.5f) * v * (fill(1.0f) + erf<false>(v * fill(kRootHalf)));
  if (activation == kSymmetricGelu) return v * erf<false>(v * fill(kRootHalf));
  const Vector u = fill(-2.0f * kRootTwoOverPi) * (v + fill(kCubic) * v * v * v);
  const Vector y = v / (fill(1.0f) + exp(u));
  return v == v ? y : v;
}

template <typename F>
void for_each(Pool& pool, int64_t count, F& task) {
  if (count == 1) return task(0);
  pool.run(count, [](void* self, int64_t i) { (*static_cast<F*>(self))(i); }, &task);
}

// The beginning of part i of [0, count) in `parts` parts.
INLINE int64_t edge(int64_t count, int64_t parts, int64_t i) { return count * i / parts; }

}  // namespace
}  // namespace ufbert

// Matrix products in tiles: a few rows by a panel of columns, whose sums stay in registers, for each type of weights.
#pragma once

#include "vectors.h"

namespace ufbert {
namespace JOIN(isa_, UFBERT_ISA) {

// A tile has up to kTall rows. Six rows by four vectors of AVX-512 are 24 sums of its 32 registers, six by two of AVX2 12 of 16;
// the others hold what is multiplied.
constexpr int kTall = 6, kWide = kLanes == 16 ? 4 : 2;
constexpr int64_t kPanel = kWide * kLanes;

// How numbers of a type are stored and multiplied: kDeep successive elements of a row by as many of each column at once.
// `Row` is the type of stored rows, `Weight` that of stored columns, and add() adds products to a vector of sums.
struct Floats {
  typedef float Row;
  typedef float Weight;
  typedef float Number;
  typedef Vector Sum;
  typedef Vector Part;
  static constexpr int64_t kDeep = 1;
  INLINE Part row(const Row* p) { return fill(*p); }
  INLINE Part column(const Weight* p) { return load(p); }
  INLINE void add(Sum& sum, Part x, Part w) { sum += x * w; }
};

#if defined(__AVX512BF16__)
// The instruction reads what is nearer to zero than 2^-126 as zero, makes such results zero and rounds to the nearest, whatever
// the thread's floating-point control says; with that control as pool.h sets it, the other instruction sets do the same.
struct Halfs {
  typedef uint16_t Row;
  typedef uint16_t Weight;
  typedef float Number;
  typedef Vector Sum;
  typedef __m512i Part;
  static constexpr int64_t kDeep = 2;
  INLINE Part row(const Row* p) {
    int32_t two;
    std::memcpy(&two, p, 4);
    return _mm512_set1_epi32(two);
  }
  INLINE Part column(const Weight* p) { return _mm512_loadu_si512(p); }
  INLINE void add(Sum& sum, Part x, Part w) {
    sum = (Vector)_mm512_dpbf16_ps((__m512)sum, (__m512bh)x, (__m512bh)w);
  }
};
#else
struct Halfs : Floats {
  typedef uint16_t Weight;
  INLINE Part column(const Weight* p) { return load(p); }
};
#endif

struct Bytes8 {
  typedef int8_t Weight;
  typedef int32_t Number;
  typedef Ints Sum;
#if defined(__AVX512VNNI__)
  typedef uint8_t Row;  // 128 (kAdded) more than the number, since the instruction takes one side without a sign
  typedef __m512i Part;
  static constexpr int64_t kDeep = 4, kAdded = 128;
  INLINE Part row(const Row* p) {
    int32_t four;
    std::memcpy(&four, p, 4);
    return _mm512_set1_epi32(four);
  }
  INLINE Part column(const Weight* p) { return _mm512_loadu_si512(p); }
  INLINE void add(Sum& sum, Part x, Part w) {
    sum = (Ints)_mm512_dpbusd_epi32((__m512i)sum, x, w);
  }
#elif defined(__AVX2__)
  typedef int16_t Row;
  static constexpr int64_t kDeep = 2, kAdded = 0;
#if defined(__AVX512BW__)
  typedef __m512i Part;
  INLINE Part column(const Weight* p) {
    return _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  INLINE void add(Sum& sum, Part x, Part w) { sum += (Ints)_mm512_madd_epi16(x, w); }
  INLINE Part all(int32_t two) { return _mm512_set1_epi32(two); }
#else
  typedef __m256i Part;
  INLINE Part column(const Weight* p) {
    return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  INLINE void add(Sum& sum, Part x, Part w) { sum += (Ints)_mm256_madd_epi16(x, w); }
  INLINE Part all(int32_t two) { return _mm256_set1_epi32(two); }
#endif
  INLINE Part row(const Row* p) {
    int32_t two;
    std::memcpy(&two, p, 4);
    return all(two);
  }
#else
  typedef int32_t Row;
  typedef Ints Part;
  static constexpr int64_t kDeep = 1, kAdded = 0;
  INLINE Part row(const Row* p) { return *p - Ints{}; }
  INLINE Part column(const Weight* p) {
    return __builtin_convertvector(*reinterpret_cast<const Bytes*>(p), Ints);
  }
  INLINE void add(Sum& sum, Part x, Part w) { sum += x * w; }
#endif
};

INLINE int64_t whole(int64_t count, int64_t of) { return (count + of - 1) / of * of; }

// Memory to prefetch into L2 on the way, `step` bytes further at each step of a product. All at once would wait for memory.
struct Ahead {
  const char* next;
  int64_t step;
};

// to[r * to_apart ..] = rows a[r * apart ..] times the columns of a panel, over `depth` elements (a multiple of kDeep, not 0).
// Not inlined: every vector register is needed here, and one sum that goes through memory instead doubles the time.
template <typename Kind, int R>
__attribute__((noinline)) void multiply(const typename Kind::Row* a, int64_t apart, const typename Kind::Weight* w, int64_t depth,
                     typename Kind::Number* to, int64_t to_apart, Ahead ahead) {
  typename Kind::Sum s[R][kWide];
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < kWide; ++v) s[r][v] = typename Kind::Sum{};
  int64_t i = 0;
  do {
    typename Kind::Part column[kWide];
    for (int v = 0; v < kWide; ++v) column[v] = Kind::column(w + v * kLanes * Kind::kDeep);
    for (int r = 0; r < R; ++r) {
      const typename Kind::Part x = Kind::row(a + r * apart + i);
      for (int v = 0; v < kWide; ++v) Kind::add(s[r][v], x, column[v]);
    }
    __builtin_prefetch(ahead.next, 0, 2);
    i += Kind::kDeep, w += kPanel * Kind::kDeep, ahead.next += ahead.step;
  } while (i < depth);
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < kWide; ++v) std::memcpy(to + r * to_apart + v * kLanes, &s[r][v], sizeof s[r][v]);
}

// The same with the number of rows known only now.
template <typename Kind>
INLINE void multiply(int64_t rows, const typename Kind::Row* a, int64_t apart, const typename Kind::Weight* w, int64_t depth,
                     typename Kind::Number* to, int64_t to_apart, Ahead ahead = {}) {
  if (!ahead.next) ahead = {reinterpret_cast<const char*>(w), 0};
  switch (rows) {
    case 1: return multiply<Kind, 1>(a, apart, w, depth, to, to_apart, ahead);
    case 2: return multiply<Kind, 2>(a, apart, w, depth, to, to_apart, ahead);
    case 3: return multiply<Kind, 3>(a, apart, w, depth, to, to_apart, ahead);
    case 4: return multiply<Kind, 4>(a, apart, w, depth, to, to_apart, ahead);
    case 5: return multiply<Kind, 5>(a, apart, w, depth, to, to_apart, ahead);
    default: return multiply<Kind, kTall>(a, apart, w, depth, to, to_apart, ahead);
  }
}

// The first `count` elements of a vector (none, if it is not positive); those beyond do not belong to the array.
INLINE void store_part(float* p, Vector v, int64_t count) {
  if (count >= kLanes) return store(p, v);
  if (count > 0) std::memcpy(p, &v, 4 * count);
}
INLINE Vector load_part(const float* p, int64_t count) {
  if (count >= kLanes) return load(p);
  Vector v = {};
  if (count > 0) std::memcpy(&v, p, 4 * count);
  return v;
}

}  // namespace
}  // namespace ufbert

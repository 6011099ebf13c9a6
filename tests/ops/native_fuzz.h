// What the fuzzers draw, and how they compare.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "kernels.h"

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

using namespace ufbert;

extern "C" const char* ufbert_isa();

constexpr double kEpsilon = 1.0 / (1 << 24);  // half a step of float32 at one
constexpr double kTiny = std::numeric_limits<float>::min();  // 2^-126: what is nearer to zero counts as zero and becomes zero
constexpr double kGradient = 1e-5;            // gradients, of the largest in their array

// ---- drawing ----

struct Random {
  uint64_t state;
  uint64_t next() {
    uint64_t v = state += 0x9e3779b97f4a7c15u;
    v = (v ^ (v >> 30)) * 0xbf58476d1ce4e5b9u;
    v = (v ^ (v >> 27)) * 0x94d049bb133111ebu;
    return v ^ (v >> 31);
  }
  int64_t in(int64_t low, int64_t high) { return low + int64_t(next() % uint64_t(high - low + 1)); }
  bool chance(int percent) { return in(1, 100) <= percent; }
  float normal() {  // of mean zero and variance one; three uniform numbers are near enough
    const uint64_t v = next(), mask = (1 << 21) - 1;
    return (float(v & mask) + float((v >> 21) & mask) + float((v >> 42) & mask)) * (2.0f / float(1 << 21)) - 3.0f;
  }
};

struct Free {
  void operator()(void* p) const { std::free(p); }
};

// An array that ends where its allocation ends, and begins a few elements after it. Outputs start as NaN.
template <typename T>
struct Array {
  std::unique_ptr<char, Free> memory;
  T* data;
  int64_t size;

  Array(Random& random, int64_t size) : size(size) {
    const int64_t offset = random.in(0, 3);
    memory.reset(static_cast<char*>(std::malloc((offset + size) * sizeof(T))));
    data = reinterpret_cast<T*>(memory.get()) + offset;
    std::memset(memory.get(), 0xff, (offset + size) * sizeof(T));
  }
  T& operator[](int64_t i) { return data[i]; }
  const T& operator[](int64_t i) const { return data[i]; }
};

// A few elements become zero, tiny, large, infinite or NaN. Large is small enough that no sum overflows float32.
void make_special(Random& random, Array<float>& a) {
  static const float values[] = {0.0f, -0.0f, 1e-40f, -1e-45f, 1.2e-38f, 1e3f, -1e3f, INFINITY, -INFINITY, NAN};
  for (int64_t left = random.in(0, 1 + a.size / 40); left > 0 && a.size; --left)
    a[random.in(0, a.size - 1)] = values[random.in(0, random.chance(50) ? 6 : 9)];
}

Array<float> draw(Random& random, int64_t size, float scale, bool special = false) {
  Array<float> a(random, size);
  for (int64_t i = 0; i < size; ++i) a[i] = scale * random.normal();
  if (special) make_special(random, a);
  return a;
}

// Rows of weights as a kernel gets them, and what they stand for without their scales.
struct Weights {
  Type type;
  Array<float> full;
  Array<uint16_t> half;
  Array<int8_t> byte;
  Array<float> scale;
  std::vector<double> value;

  Weights(Random& random, Type type, int64_t rows, int64_t d, int64_t scales, float size, bool special)
      : type(type),
        full(draw(random, type == kInt8 ? 0 : rows * d, size, special)),
        half(random, type == kBfloat16 ? rows * d : 0),
        byte(random, type == kInt8 ? rows * d : 0),
        scale(draw(random, type == kInt8 ? scales : 0, size / 127)),
        value(rows * d) {
    for (int64_t i = 0; i < rows * d; ++i) {
      if (type == kInt8) {
        value[i] = byte[i] = int8_t(random.in(-128, 127));
      } else if (type == kBfloat16) {
        uint32_t bits;
        std::memcpy(&bits, &full[i], 4);
        half[i] = uint16_t(bits >> 16);
        bits &= 0xffff0000u;
        std::memcpy(&full[i], &bits, 4);
      }
      if (type != kInt8) value[i] = full[i];
    }
  }
  const void* data() const {
    if (type == kFloat32) return full.data;
    if (type == kBfloat16) return half.data;
    return byte.data;
  }
  const float* scale_data() const { return type == kInt8 ? scale.data : nullptr; }
  double scale_of(int64_t i) const { return type == kInt8 ? scale[i] : 1.0; }
  // What a finite factor may lose when it is multiplied by a scale.
  double lost(double factor) const { return type == kInt8 && factor != 0 && std::isfinite(factor) ? kTiny : 0; }
};

int64_t draw_rows(Random& random) {
  const int64_t kind = random.in(1, 100);
  if (kind <= 45) return random.in(0, 20);
  if (kind <= 75) return random.in(0, 100);
  if (kind <= 88) return random.in(0, 600);
  if (kind <= 96) return random.in(376, 400);  // about where the kernels begin to group rows
  return random.in(384, 1500);
}

int64_t draw_width(Random& random) {
  const int64_t kind = random.in(1, 100);
  if (kind <= 30) return random.in(1, 20);
  if (kind <= 80) return random.in(1, 200);
  if (kind <= 94) return 16 * random.in(1, 12);
  return 768;
}

// Rows that all differ, or that are copies of a few; now and then one of zeros, whose logits are ties without a bias.
Array<float> draw_inputs(Random& random, int64_t b, int64_t d, bool special) {
  Array<float> x = draw(random, b * d, 1.0f, special);
  const int64_t kinds = random.in(1, 3);
  if (random.chance(10))
    for (int64_t i = kinds; i < b; ++i) std::copy_n(&x[random.in(0, kinds - 1) * d], d, &x[i * d]);
  if (b && random.chance(25)) std::fill_n(&x[random.in(0, b - 1) * d], d, 0.0f);
  return x;
}

// ---- what should come out ----

struct Mismatch {
  std::string what;
};

template <typename... T>
[[noreturn]] void mismatch(const char* format, T... values) {
  char text[400];
  std::snprintf(text, sizeof text, format, values...);
  throw Mismatch{text};
}

// The rule for every instruction set, thread and type: what is nearer to zero than 2^-126 counts as zero. Infinity times such
// a number is therefore no number, as it is times zero.
double flushed(double x) { return std::fabs(x) < kTiny ? 0 : x; }

// A sum of products in double: its terms' sizes, and how far their float32 factors may be off. It is open if it depends on
// rounding whether it is finite: a factor that may be zero, times infinity.
struct Sum {
  double value = 0, size = 0, slack = 0;
  bool open = false;

  void add(double factor, double off, double exact) {
    const double term = flushed(factor) * flushed(exact);
    value += term;
    size += std::fabs(term);
    if (off > 0) {
      slack += off * std::fabs(flushed(exact));
      if (std::isinf(exact) && std::fabs(factor) <= off) open = true;
    }
  }
  double rounding(double steps) const { return slack + (size > 0 ? steps * (kEpsilon * size + kTiny) : 0); }  // zeros are exact
};

// The dot product, which the kernels compute in at least sixteen parts but for a rest.
Sum dot(const float* x, const double* w, int64_t d) {
  Sum sum;
  for (int64_t i = 0; i < d; ++i) sum.add(x[i], 0, w[i]);
  return sum;
}
double dot_steps(int64_t d) { return 20 + double(d) / 8; }

double active(Activation activation, double z) {
  switch (activation) {
    case kRelu: return z > 0 ? z : (z == z ? 0 : z);
    case kSymmetricGelu: return z * std::erf(z * std::sqrt(0.5));
    case kGelu: return 0.5 * z * (1 + std::erf(z * std::sqrt(0.5)));
    default: return 0.5 * z * (1 + std::tanh(std::sqrt(2 / M_PI) * (z + 0.044715 * z * z * z)));
  }
}
// erf comes to 2e-7; half of a small number may count as zero.
double active_off(Activation activation, double z) {
  return activation == kRelu || z == 0 || !std::isfinite(z) ? 0 : 4e-7 * std::fabs(z) + kTiny;
}

double slope(Activation activation, double z) {
  const double bell = z * std::exp(-0.5 * z * z) / std::sqrt(2 * M_PI), error = std::erf(z * std::sqrt(0.5));
  if (activation == kRelu) return z > 0 ? 1 : (z == z ? 0 : z);
  if (activation == kSymmetricGelu) return error + 2 * bell;
  if (activation == kGelu) return 0.5 * (1 + error) + bell;
  const double c = std::sqrt(2 / M_PI), t = std::tanh(c * (z + 0.044715 * z * z * z));
  return 0.5 * (1 + t) + 0.5 * z * (1 - t * t) * c * (1 + 3 * 0.044715 * z * z);
}
double slope_off(Activation activation) { return activation == kRelu ? 0 : activation == kGeluTanh ? 2e-6 : 5e-7; }

// NaN where it should be, infinity with its sign, and finite numbers within `off`.
bool agrees(float found, double wanted, double off) {
  if (std::isnan(wanted)) return std::isnan(found);
  if (std::isinf(wanted)) return found == wanted;
  return std::isfinite(found) && std::fabs(found - wanted) <= off;
}

void expect_same(const char* what, const float* one, const float* other, int64_t size) {
  for (int64_t i = 0; i < size; ++i)
    if (std::memcmp(one + i, other + i, 4) && !(std::isnan(one[i]) && std::isnan(other[i])))
      mismatch("%s: element %lld is %.9g and %.9g", what, (long long)i, one[i], other[i]);
}

// A call from a thread that flushes and rounds otherwise than this one, and is left as it was.
template <typename F>
void elsewhere(F call) {
#if defined(__x86_64__)
  const unsigned here = _mm_getcsr(), there = here ^ 0xa040;  // both flushing bits, and rounding down
  _mm_setcsr(there);
  call();
  const unsigned then = _mm_getcsr();
  _mm_setcsr(here);
  if ((then ^ there) & ~0x3fu) mismatch("the caller's floating-point control was %x, is %x", there, then);
#else
  call();
#endif
}

// Whether the sums of row `row` are right.
void expect_row(const char* what, const float* found, const std::vector<Sum>& wanted, int64_t row, double steps) {
  for (size_t j = 0; j < wanted.size(); ++j)
    if (!wanted[j].open && !agrees(found[j], wanted[j].value, wanted[j].rounding(steps)))
      mismatch("%s[%lld, %d] is %.9g, should be %.9g within %.2g", what, (long long)row, int(j), found[j], wanted[j].value,
               wanted[j].rounding(steps));
}

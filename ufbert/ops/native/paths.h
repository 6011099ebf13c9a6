// Parts of the kernels of trees with neurons on their paths (trees.cpp) and in their leaves (leaves.cpp).
#pragma once

#include "vectors.h"

namespace ufbert {
namespace JOIN(isa_, UFBERT_ISA) {

constexpr int64_t kRowsAThread = 4;  // fewer are not worth waking a thread
constexpr int64_t kMaxSteps = 32;

// out[r] = base[r] (or zero) + sum over s of weight[r][s] * row[r][s], for R rows whose first `common` rows are the same.
template <int R, typename W>
INLINE void combine(float* const* out, const float* const* base, const float* const* weight, const W* const (*row)[kMaxSteps],
                    int64_t common, int64_t steps, int64_t d) {
  constexpr int kWide = kLanes == 16 ? 4 : 2;
  int64_t i = 0;
  for (; i + kWide * kLanes <= d; i += kWide * kLanes) {
    Vector y[R][kWide] = {};
    for (int r = 0; r < R; ++r)
      if (base[r])
        for (int k = 0; k < kWide; ++k) y[r][k] = load(base[r] + i + k * kLanes);
    for (int64_t s = 0; s < common; ++s) {
      Vector w[kWide];
      for (int k = 0; k < kWide; ++k) w[k] = load(row[0][s] + i + k * kLanes);
      for (int r = 0; r < R; ++r) {
        const Vector a = fill(weight[r][s]);
        for (int k = 0; k < kWide; ++k) y[r][k] += a * w[k];
      }
    }
    for (int64_t s = common; s < steps; ++s)
      for (int r = 0; r < R; ++r) {
        const Vector a = fill(weight[r][s]);
        for (int k = 0; k < kWide; ++k) y[r][k] += a * load(row[r][s] + i + k * kLanes);
      }
    for (int r = 0; r < R; ++r)
      for (int k = 0; k < kWide; ++k) store(out[r] + i + k * kLanes, y[r][k]);
  }
  for (; i < d; ++i)
    for (int r = 0; r < R; ++r) {
      float y = base[r] ? base[r][i] : 0.0f;
      for (int64_t s = 0; s < steps; ++s) y += weight[r][s] * scalar(row[r][s] + i);
      out[r][i] = y;
    }
}

INLINE int64_t steps_of(int64_t n) {
  int64_t steps = 0;
  while (n > 0) ++steps, n >>= 1;
  return steps;
}

// Order of rows by key, stable (a counting sort); start[k] is where key k begins.
INLINE void sort_rows(const int32_t* key, int64_t b, int64_t keys, std::vector<int32_t>& order, std::vector<int32_t>& start) {
  start.assign(keys + 1, 0);
  for (int64_t i = 0; i < b; ++i) ++start[key[i] + 1];
  for (int64_t k = 0; k < keys; ++k) start[k + 1] += start[k];
  std::vector<int32_t> next(start.begin(), start.end() - 1);
  order.resize(b);
  for (int64_t i = 0; i < b; ++i) order[next[key[i]]++] = int32_t(i);
}

}  // namespace
}  // namespace ufbert

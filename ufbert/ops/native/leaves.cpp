// The kernels of trees whose neurons are in their leaves. Sums run in the same order for any number of rows and threads: a row's
// answer does not depend on the batch it came in.

#include "paths.h"

namespace ufbert {
namespace JOIN(isa_, UFBERT_ISA) {

// ---- the original tree ----

template <typename W>
void leaf_forward_as(const LeafForward& f, Pool& pool) {
  const int64_t depth = steps_of(f.g - 1);
  const int64_t parts = std::max<int64_t>(1, std::min(4 * pool.threads, f.b / kRowsAThread));
  auto route = [&](int64_t p) {
    for (int64_t i = edge(f.b, parts, p); i < edge(f.b, parts, p + 1); ++i) {
      int64_t node = 0;
      for (int64_t s = 0; s < depth; ++s)
        node = 2 * node + 1 + (dot(f.x + i * f.d, f.node_w + node * f.d, f.d) + f.node_b[node] >= 0.0f);
      f.leaf[i] = int32_t(node - (f.g - 1));
    }
  };
  for_each(pool, parts, route);
  std::vector<int32_t> order, start;
  sort_rows(f.leaf, f.b, f.g, order, start);
  auto leaves = [&](int64_t p) {
    std::vector<float> hidden(f.w + 16), active(f.w + 16);
    for (int64_t i = edge(f.b, parts, p); i < edge(f.b, parts, p + 1); ++i) {
      const int64_t row = order[i], leaf = f.leaf[row];
      const W *w_in = static_cast<const W*>(f.w_in) + leaf * f.d * f.w, *w_out = static_cast<const W*>(f.w_out) + leaf * f.w * f.o;
      const float* x = f.x + row * f.d;
      std::fill(hidden.begin(), hidden.end(), 0.0f);
      if (f.w == 1) {  // one hidden unit: its weights lie side by side
        hidden[0] = dot(x, w_in, f.d);
      } else {
        for (int64_t c = 0; c < f.d; ++c) {
          int64_t j = 0;
          for (; j + kLanes <= f.w; j += kLanes) store(&hidden[j], load(&hidden[j]) + fill(x[c]) * load(w_in + c * f.w + j));
          for (; j < f.w; ++j) hidden[j] += x[c] * scalar(w_in + c * f.w + j);
        }
      }
      for (int64_t j = 0; j < f.w; ++j) {
        if (f.in_scale) hidden[j] *= f.in_scale[leaf * f.w + j];
        hidden[j] += f.b_in[leaf * f.w + j];
      }
      activate(f.activation, hidden.data(), active.data(), f.w);
      if (f.out_scale)
        for (int64_t j = 0; j < f.w; ++j) active[j] *= f.out_scale[leaf * f.w + j];
      float* y = f.y + row * f.o;
      const float* base = f.b_out + leaf * f.o;
      if (f.w == 0) std::copy(base, base + f.o, y);
      for (int64_t j = 0; j < f.w; j += kMaxSteps) {  // combine() adds at most kMaxSteps rows at once
        const W* some[1][kMaxSteps];
        const int64_t count = std::min<int64_t>(kMaxSteps, f.w - j);
        for (int64_t i = 0; i < count; ++i) some[0][i] = w_out + (j + i) * f.o;
        const float* weight = &active[j];
        combine<1>(&y, &base, &weight, some, 0, count, f.o);
        base = y;
      }
    }
  };
  for_each(pool, parts, leaves);
}

void leaf_forward(const LeafForward& f, Pool& pool) {
  if (f.type == kFloat32) return leaf_forward_as<float>(f, pool);
  if (f.type == kBfloat16) return leaf_forward_as<uint16_t>(f, pool);
  leaf_forward_as<int8_t>(f, pool);
}

// ---- routed trees ----

constexpr int64_t kTogether = 8;                  // rows that go down together: their sums do not wait for each other
constexpr int kSameLeaf = kLanes == 16 ? 4 : 2;   // rows of a leaf that load its weights together

// product[r] = x[r] . w for R rows, each in the order of dot().
template <int R, typename W>
INLINE void dots(const float* const* x, const W* w, int64_t d, float* product) {
  Vector part[R][4] = {};
  int64_t i = 0;
  for (; i + 4 * kLanes <= d; i += 4 * kLanes)
    for (int k = 0; k < 4; ++k) {
      const Vector v = load(w + i + k * kLanes);
      for (int r = 0; r < R; ++r) part[r][k] += load(x[r] + i + k * kLanes) * v;
    }
  for (; i + kLanes <= d; i += kLanes) {
    const Vector v = load(w + i);
    for (int r = 0; r < R; ++r) part[r][0] += load(x[r] + i) * v;
  }
  for (int r = 0; r < R; ++r) product[r] = sum((part[r][0] + part[r][1]) + (part[r][2] + part[r][3]));
  for (; i < d; ++i)
    for (int r = 0; r < R; ++r) product[r] += x[r][i] * scalar(w + i);
}

// Adds the leaf `leaf` (of all trees' leaves) of R rows to their outputs. `first` outputs are not there yet.
template <int R, typename W>
INLINE void add_leaf(const RoutedForward& f, int64_t leaf, const int64_t* row, const float* gate, bool first,
                     std::vector<float>& hidden, std::vector<float>& active) {
  const W *w_in = static_cast<const W*>(f.w_in) + leaf * f.w * f.d, *w_out = static_cast<const W*>(f.w_out) + leaf * f.w * f.d;
  const int64_t wide = (f.w + kLanes - 1) / kLanes * kLanes;
  const float *x[R], *base[R], *weight[R];
  float* y[R];
  for (int r = 0; r < R; ++r) x[r] = f.x + row[r] * f.d, y[r] = f.y + row[r] * f.d, base[r] = first ? nullptr : y[r];
  for (int64_t j = 0; j < f.w; ++j) {
    float product[R];
    dots<R>(x, w_in + j * f.d, f.d, product);
    const float scale = f.in_scale ? f.in_scale[leaf * f.w + j] : 1.0f, bias = f.b_in ? f.b_in[leaf * f.w + j] : 0.0f;
    for (int r = 0; r < R; ++r) hidden[r * wide + j] = product[r] * scale + bias;
  }
  for (int r = 0; r < R; ++r) {
    activate(f.activation, &hidden[r * wide], &active[r * wide], f.w);
    for (int64_t j = 0; j < f.w; ++j) active[r * wide + j] *= f.out_scale ? gate[r] * f.out_scale[leaf * f.w + j] : gate[r];
  }
  if (f.b_out)
    for (int r = 0; r < R; ++r) {
      for (int64_t c = 0; c < f.d; ++c) y[r][c] = gate[r] * f.b_out[leaf * f.d + c] + (first ? 0.0f : y[r][c]);
      base[r] = y[r];
    }
  for (int64_t j = 0; j < f.w; j += kMaxSteps) {  // combine() adds at most kMaxSteps rows at once
    const W* some[R][kMaxSteps];
    const int64_t count = std::min<int64_t>(kMaxSteps, f.w - j);
    for (int r = 0; r < R; ++r)
      for (int64_t i = 0; i < count; ++i) some[r][i] = w_out + (j + i) * f.d;
    for (int r = 0; r < R; ++r) weight[r] = &active[r * wide + j];
    combine<R>(y, base, weight, some, count, count, f.d);
    for (int r = 0; r < R; ++r) base[r] = y[r];
  }
}

// Finds the leaves of rows [from, to), all trees of a row side by side, and their gates: the mean of 2 sigmoid(|logit|).
INLINE void route(const RoutedForward& f, int64_t from, int64_t to, int32_t* leaf, float* gate) {
  const int64_t depth = steps_of(f.g - 1);
  for (int64_t k = 0; k < f.m; ++k) {
    const float *node_w = f.node_w + k * (f.g - 1) * f.d, *node_b = f.node_b + k * (f.g - 1);
    for (int64_t i = from; i < to; i += kTogether) {
      const int64_t count = std::min(kTogether, to - i);
      int64_t node[kTogether] = {};
      float certain[kTogether] = {};
      for (int64_t s = 0; s < depth; ++s)
        for (int64_t r = 0; r < count; ++r) {
          const float z = dot(f.x + (i + r) * f.d, node_w + node[r] * f.d, f.d) + node_b[node[r]];
          node[r] = 2 * node[r] + 1 + (z > 0.0f);
          if (f.gated) certain[r] += 2.0f / (1.0f + std::exp(-std::fabs(z)));
        }
      for (int64_t r = 0; r < count; ++r) {
        leaf[k * (to - from) + i - from + r] = int32_t(node[r] - (f.g - 1));
        gate[k * (to - from) + i - from + r] = f.gated && depth ? certain[r] / float(depth) : 1.0f;
      }
    }
  }
}

template <typename W>
void routed_forward_as(const RoutedForward& f, Pool& pool) {
  const int64_t parts = std::max<int64_t>(1, std::min(4 * pool.threads, f.b / kRowsAThread));
  auto part = [&](int64_t p) {
    const int64_t from = edge(f.b, parts, p), to = edge(f.b, parts, p + 1), rows = to - from;
    const int64_t wide = (f.w + kLanes - 1) / kLanes * kLanes;
    std::vector<int32_t> leaf(f.m * rows), order, start;
    std::vector<float> gate(f.m * rows), hidden(kSameLeaf * wide), active(kSameLeaf * wide);
    route(f, from, to, leaf.data(), gate.data());
    for (int64_t k = 0; k < f.m; ++k) {
      sort_rows(&leaf[k * rows], rows, f.g, order, start);
      for (int64_t own = 0; own < f.g; ++own) {
        int64_t at = start[own];
        while (at < start[own + 1]) {
          const int count = start[own + 1] - at >= kSameLeaf ? kSameLeaf : 1;
          int64_t row[kSameLeaf];
          float share[kSameLeaf];
          for (int r = 0; r < count; ++r) row[r] = from + order[at + r], share[r] = gate[k * rows + order[at + r]];
          if (count == 1) {
            add_leaf<1, W>(f, k * f.g + own, row, share, k == 0, hidden, active);
          } else {
            add_leaf<kSameLeaf, W>(f, k * f.g + own, row, share, k == 0, hidden, active);
          }
          at += count;
        }
      }
    }
  };
  for_each(pool, parts, part);
}

void routed_forward(const RoutedForward& f, Pool& pool) {
  if (f.type == kFloat32) return routed_forward_as<float>(f, pool);
  if (f.type == kBfloat16) return routed_forward_as<uint16_t>(f, pool);
  routed_forward_as<int8_t>(f, pool);
}

}  // namespace
}  // namespace ufbert

// The kernels of the tree layers.
//
// They are written with the compiler's vector types, so one source serves all instruction sets. Sums run in the same order for
// any number of rows and threads: a row's answer does not depend on the batch it came in.

#include "paths.h"

namespace ufbert {
namespace JOIN(isa_, UFBERT_ISA) {

// The derivative of the activation; 0.3989422804 is 1 / sqrt(2 pi), of the normal density.
INLINE float slope(Activation activation, float z) {
  switch (activation) {
    case kRelu:
      return z > 0.0f ? 1.0f : (z == z ? 0.0f : z);
    case kGeluTanh: {
      const float inner = kRootTwoOverPi * (z + kCubic * z * z * z), t = std::tanh(inner);
      return 0.5f * (1.0f + t) + 0.5f * z * (1.0f - t * t) * kRootTwoOverPi * (1.0f + 3.0f * kCubic * z * z);
    }
    case kSymmetricGelu:
      return std::erf(z * kRootHalf) + 2.0f * z * 0.3989422804f * std::exp(-0.5f * z * z);
    default:
      return 0.5f * (1.0f + std::erf(z * kRootHalf)) + z * 0.3989422804f * std::exp(-0.5f * z * z);
  }
}

// ---- forward of the uniform-node tree ----

constexpr int64_t kGroup = 16;         // rows that go down together: while one waits for memory, the others compute
constexpr int64_t kManyRows = 96;      // from here on rows are grouped by subtree
constexpr int64_t kTopLevels = 8;      // most levels above the subtrees: their nodes stay in L2
constexpr int64_t kRowsASubtree = 8;   // fewer levels if a subtree would get fewer rows
constexpr int64_t kRoute = 8;          // rows that go down the top levels together
constexpr int64_t kSmallTree = 127;    // nodes of a tree that stays in the cache as a whole
constexpr int kTile = 4;               // rows that load output weights together

// A row on its way down a tree: the nodes, and their logits.
struct Path {
  float z[kMaxSteps];
  int32_t node[kMaxSteps];
};

// One tree's weights.
template <typename In, typename Out>
struct Tree {
  const In* w_in;
  const Out* w_out;
  const float *in_scale, *out_scale, *bias;
  int64_t d, steps;

  Tree(const Forward& f, int64_t k)
      : w_in(static_cast<const In*>(f.w_in) + k * f.n * f.d),
        w_out(static_cast<const Out*>(f.w_out) + k * f.n * f.d),
        in_scale(f.in_scale ? f.in_scale + k * f.n : nullptr),
        out_scale(f.out_scale ? f.out_scale + k * f.n : nullptr),
        bias(f.bias + k * f.n),
        d(f.d),
        steps(steps_of(f.n)) {}

  inline __attribute__((always_inline)) float logit(const float* x, int64_t node) const {
    const float product = dot(x, w_in + node * d, d);
    return (in_scale ? product * in_scale[node] : product) + bias[node];
  }
};

// Rows go from level `from` to before level `to`, one level at a time for all; path[i].node[from] is set already.
template <bool kFetch, typename In, typename Out>
INLINE void descend(const Tree<In, Out>& t, const float* const* x, Path* path, int64_t rows, int64_t from, int64_t to) {
  for (int64_t s = from; s < to; ++s)
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t node = path[i].node[s];
      const float z = t.logit(x[i], node);
      path[i].z[s] = z;
      if (s + 1 < t.steps) {
        const int64_t next = 2 * node + 1 + (z > 0.0f);
        path[i].node[s + 1] = int32_t(next);
        if (kFetch && s + 1 < to) prefetch(t.w_in + next * t.d, t.d);
      }
      if (kFetch) prefetch(t.w_out + node * t.d, t.d);
    }
}

// The outputs of R rows that have reached the last level.
template <int R, typename In, typename Out>
INLINE void emit(const Forward& f, const Tree<In, Out>& t, int64_t k, const int32_t* row, const Path* path) {
  float value[R][kMaxSteps];
  const Out* w[R][kMaxSteps];
  float* y[R];
  const float *base[R], *weight[R];
  for (int r = 0; r < R; ++r) {
    activate(f.activation, path[r].z, value[r], t.steps);
    for (int64_t s = 0; s < t.steps; ++s) {
      const int64_t node = path[r].node[s];
      w[r][s] = t.w_out + node * t.d;
      if (t.out_scale) value[r][s] *= t.out_scale[node];
    }
    y[r] = f.y + row[r] * f.d;
    base[r] = k > 0 ? y[r] : (f.residual ? f.residual + row[r] * f.d : nullptr);
    weight[r] = value[r];
    const int64_t place = (row[r] * f.m + k) * t.steps;
    if (f.nodes) std::memcpy(f.nodes + place, path[r].node, 4 * t.steps);
    if (f.z) std::memcpy(f.z + place, path[r].z, 4 * t.steps);
  }
  // Paths part once and never meet again, so the nodes that all R rows share are the first ones.
  int64_t common = 0;
  auto shared = [&](int64_t s) {
    for (int r = 1; r < R; ++r)
      if (path[r].node[s] != path[0].node[s]) return false;
    return true;
  };
  while (common < t.steps && shared(common)) ++common;
  combine<R>(y, base, weight, w, common, t.steps, f.d);
}

// Rows row[0 .. rows), all of whose paths are set up to level `from`, through the rest of tree k.
template <typename In, typename Out>
INLINE void finish(const Forward& f, const Tree<In, Out>& t, int64_t k, const int32_t* row, Path* path, int64_t rows, int64_t from) {
  const float* x[kGroup];
  for (int64_t i = 0; i < rows; ++i) x[i] = f.x + row[i] * f.d;
  descend<true>(t, x, path, rows, from, t.steps);
  int64_t i = 0;
  for (; i + kTile <= rows; i += kTile) emit<kTile>(f, t, k, row + i, path + i);
  for (; i < rows; ++i) emit<1>(f, t, k, row + i, path + i);
}

// For few rows or small trees: each thread takes its share of the rows, in groups, through all trees.
template <typename In, typename Out>
void forward_few(const Forward& f, Pool& pool) {
  const int64_t parts = std::max<int64_t>(1, std::min(4 * pool.threads, f.b / kRowsAThread));
  auto part = [&](int64_t p) {
    Path path[kGroup];
    int32_t row[kGroup];
    const int64_t end = edge(f.b, parts, p + 1);
    for (int64_t k = 0; k < f.m; ++k) {
      const Tree<In, Out> t(f, k);
      for (int64_t first = edge(f.b, parts, p); first < end; first += kGroup) {
        const int64_t rows = std::min(kGroup, end - first);
        for (int64_t i = 0; i < rows; ++i) row[i] = int32_t(first + i), path[i].node[0] = 0;
        finish(f, t, k, row, path, rows, 0);
      }
    }
  };
  for_each(pool, parts, part);
}

// For many rows: they go down the top levels, are sorted by the subtree that they reach, and go on from there. So a subtree's
// weights are read once and stay in the cache while its rows use them.
template <typename In, typename Out>
void forward_many(const Forward& f, Pool& pool) {
  const int64_t steps = steps_of(f.n);
  int64_t top = 4;
  while (top < kTopLevels && top + 2 < steps && (f.b >> top) > kRowsASubtree) ++top;
  const int64_t subtrees = int64_t(1) << top, parts = std::min(4 * pool.threads, f.b / kRowsAThread);
  std::vector<Path> path(f.b);
  std::vector<int32_t> key(f.b), order, start;
  for (int64_t k = 0; k < f.m; ++k) {
    const Tree<In, Out> t(f, k);
    auto route = [&](int64_t p) {
      const float* x[kRoute];
      const int64_t end = edge(f.b, parts, p + 1);
      for (int64_t first = edge(f.b, parts, p); first < end; first += kRoute) {
        const int64_t rows = std::min<int64_t>(kRoute, end - first);
        for (int64_t i = 0; i < rows; ++i) {
          x[i] = f.x + (first + i) * f.d;
          path[first + i].node[0] = 0;
          if (first + kRoute + i < end) prefetch(x[i] + kRoute * f.d, f.d);
        }
        descend<false>(t, x, &path[first], rows, 0, top);
        for (int64_t i = 0; i < rows; ++i) key[first + i] = path[first + i].node[top] - int32_t(subtrees - 1);
      }
    };
    for_each(pool, parts, route);
    sort_rows(key.data(), f.b, subtrees, order, start);
    const int64_t pieces = pool.threads == 1 ? 1 : std::min<int64_t>(subtrees, 8 * pool.threads);
    auto piece = [&](int64_t p) {
      // A piece has whole subtrees, those that begin inside it, so that no two threads read the same one.
      const int64_t from = *std::lower_bound(start.begin(), start.end(), int32_t(edge(f.b, pieces, p)));
      const int64_t to = *std::lower_bound(start.begin(), start.end(), int32_t(edge(f.b, pieces, p + 1)));
      Path group[kGroup];
      for (int64_t first = from; first < to; first += kGroup) {
        const int64_t rows = std::min<int64_t>(kGroup, to - first);
        for (int64_t i = 0; i < rows; ++i) group[i] = path[order[first + i]];
        finish(f, t, k, &order[first], group, rows, top);
      }
    };
    for_each(pool, pieces, piece);
  }
}

template <typename In, typename Out>
void forward_as(const Forward& f, Pool& pool) {
  if (f.b < kManyRows || f.n <= kSmallTree)
    forward_few<In, Out>(f, pool);
  else
    forward_many<In, Out>(f, pool);
}

void forward(const Forward& f, Pool& pool) {
  if (f.m == 0) {
    for (int64_t i = 0; i < f.b * f.d; ++i) f.y[i] = f.residual ? f.residual[i] : 0.0f;
    return;
  }
  if (f.in_type == kFloat32 && f.out_type == kFloat32) return forward_as<float, float>(f, pool);
  if (f.in_type == kBfloat16 && f.out_type == kBfloat16) return forward_as<uint16_t, uint16_t>(f, pool);
  if (f.in_type == kInt8 && f.out_type == kInt8) return forward_as<int8_t, int8_t>(f, pool);
  if (f.in_type == kFloat32 && f.out_type == kBfloat16) return forward_as<float, uint16_t>(f, pool);
  if (f.in_type == kFloat32 && f.out_type == kInt8) return forward_as<float, int8_t>(f, pool);
}

// ---- backward ----

constexpr int64_t kTokens = 64;  // rows of x and g that stay in L2 while all their columns are summed
constexpr int kLevels = 6;       // levels whose sums are held in registers together

// Columns [first, last) of d_in and d_out for levels [level, level + L): one pass over the rows in the order of their leaves.
// A node's visitors are neighbours in that order, so its sum stays in a register from its first visitor to its last. change[i]
// is the first level at which row i visits another node than row i - 1: from there on, the sums are stored and begin anew.
template <int L>
void sum_columns(const Backward& g, const int32_t* order, const int32_t* node, const int8_t* change, const float* dz,
                 const float* value, float* d_in, float* d_out, int64_t steps, int64_t level, int64_t first, int64_t last) {
  for (int64_t begin = 0; begin < g.b; begin += kTokens) {
    const int64_t end = std::min(begin + kTokens, g.b);
    for (int64_t c = first; c < last; c += kLanes) {
      const bool whole = c + kLanes <= last;
      const int64_t width = whole ? kLanes : last - c;
      auto get = [&](const float* p) {
        if (whole) return load(p);
        Vector v = {};
        std::memcpy(&v, p, 4 * width);
        return v;
      };
      auto put = [&](float* p, Vector v) { whole ? store(p, v) : (void)std::memcpy(p, &v, 4 * width); };
      Vector in[L] = {}, out[L] = {};
      const int32_t* at = node + begin * steps + level;
      if (begin > 0)
        for (int l = 0; l < L; ++l)
          if (change[begin] > level + l) {  // the node's sum began in the block before
            in[l] = get(d_in + at[l] * g.d + c);
            out[l] = get(d_out + at[l] * g.d + c);
          }
      for (int64_t i = begin; i < end; ++i) {
        const int32_t* here = node + i * steps + level;
        if (i > begin && change[i] < level + L) {
          const int32_t* past = here - steps;
          for (int l = 0; l < L; ++l)
            if (change[i] <= level + l) {
              put(d_in + past[l] * g.d + c, in[l]);
              put(d_out + past[l] * g.d + c, out[l]);
              in[l] = out[l] = Vector{};
            }
        }
        const Vector xv = get(g.x + order[i] * g.d + c), gv = get(g.g + order[i] * g.d + c);
        const float *a = dz + i * steps + level, *v = value + i * steps + level;
        for (int l = 0; l < L; ++l) {
          in[l] += fill(a[l]) * xv;
          out[l] += fill(v[l]) * gv;
        }
      }
      const int32_t* past = node + (end - 1) * steps + level;
      for (int l = 0; l < L; ++l) {
        put(d_in + past[l] * g.d + c, in[l]);
        put(d_out + past[l] * g.d + c, out[l]);
      }
    }
  }
}

void backward(const Backward& g, Pool& pool) {
  const int64_t steps = steps_of(g.n), leaves = (g.n + 1) / 2, b = g.b, d = g.d;
  std::vector<int32_t> key(b), order, start, node(b * steps);
  std::vector<float> dz(b * steps + 16), value(b * steps + 16);
  std::vector<int8_t> change(b);
  if (g.m == 0) std::fill(g.dx, g.dx + b * d, 0.0f);
  for (int64_t k = 0; k < g.m; ++k) {
    const float *w_in = g.w_in + k * g.n * d, *w_out = g.w_out + k * g.n * d;
    float *d_in = g.d_in + k * g.n * d, *d_out = g.d_out + k * g.n * d, *d_bias = g.d_bias + k * g.n;
    for (int64_t i = 0; i < b; ++i) key[i] = g.nodes[(i * g.m + k) * steps + steps - 1] - int32_t(leaves - 1);
    sort_rows(key.data(), b, leaves, order, start);

    // dz and dx, row by row in the order of leaves, so that neighbours share their nodes.
    const int64_t parts = std::max<int64_t>(1, std::min(4 * pool.threads, b / 64));
    auto by_row = [&](int64_t p) {
      for (int64_t i = edge(b, parts, p); i < edge(b, parts, p + 1); ++i) {
        const int64_t row = order[i];
        const int32_t* path = g.nodes + (row * g.m + k) * steps;
        const float* z = g.z + (row * g.m + k) * steps;
        const float* rows[1][kMaxSteps];
        float padded[kMaxSteps + 16], active[kMaxSteps + 16];
        std::memcpy(padded, z, 4 * steps);
        std::memset(padded + steps, 0, 4 * kLanes);
        activate(g.activation, padded, active, steps);
        for (int64_t s = 0; s < steps; ++s) {
          node[i * steps + s] = path[s];
          value[i * steps + s] = active[s];
          dz[i * steps + s] = slope(g.activation, z[s]) * dot(g.g + row * d, w_out + path[s] * d, d);
          rows[0][s] = w_in + path[s] * d;
        }
        float* dx = g.dx + row * d;
        const float *base = k > 0 ? dx : nullptr, *weight = &dz[i * steps];
        combine<1>(&dx, &base, &weight, rows, 0, steps, d);
        if (i + 1 < edge(b, parts, p + 1)) prefetch(g.g + order[i + 1] * d, d);
      }
    };
    if (b > 0) for_each(pool, parts, by_row);

    // The level at which each row's path leaves that of the row before.
    std::memset(d_bias, 0, 4 * g.n);
    std::vector<uint8_t> visited(g.n, 0);
    for (int64_t i = 0; i < b; ++i) {
      int64_t s = 0;
      if (i > 0)
        while (s < steps && node[i * steps + s] == node[(i - 1) * steps + s]) ++s;
      change[i] = int8_t(s);
      for (int64_t l = 0; l < steps; ++l) {
        visited[node[i * steps + l]] = 1;
        d_bias[node[i * steps + l]] += dz[i * steps + l];
      }
    }

    // d_in and d_out, each thread its own columns, so that no two add to the same sum and the order of additions is fixed.
    const int64_t blocks = (d + kLanes - 1) / kLanes, pieces = std::min<int64_t>(blocks, 2 * pool.threads);
    auto by_column = [&](int64_t p) {
      const int64_t first = edge(blocks, pieces, p) * kLanes, last = std::min(d, edge(blocks, pieces, p + 1) * kLanes);
      for (int64_t v = 0; v < g.n; ++v)
        if (!visited[v]) {
          std::memset(d_in + v * d + first, 0, 4 * (last - first));
          std::memset(d_out + v * d + first, 0, 4 * (last - first));
        }
      for (int64_t level = 0; level < steps; level += kLevels) {
        auto sum = sum_columns<kLevels>;
        switch (std::min<int64_t>(kLevels, steps - level)) {
          case 1: sum = sum_columns<1>; break;
          case 2: sum = sum_columns<2>; break;
          case 3: sum = sum_columns<3>; break;
          case 4: sum = sum_columns<4>; break;
          case 5: sum = sum_columns<5>; break;
          default: break;
        }
        sum(g, order.data(), node.data(), change.data(), dz.data(), value.data(), d_in, d_out, steps, level, first, last);
      }
    };
    for_each(pool, pieces, by_column);
  }
}

}  // namespace
}  // namespace ufbert

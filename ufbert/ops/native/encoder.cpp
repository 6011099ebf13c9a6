// What an encoder computes apart from its trees and attention: linear layers from packed weights, LayerNorm. As everywhere here, a row's answer depends neither on the batch nor on the number of threads.

#include "tiles.h"

namespace ufbert {
namespace JOIN(isa_, UFBERT_ISA) {

// ---- linear layers ----

constexpr int64_t kDeepest = 256;      // elements of a float row between two visits to its sums: a panel of as many stays in L1
constexpr int64_t kBlock = 144 << 10;  // bytes of rows that stay in L2
constexpr int64_t kTasks = 8;          // pieces of work for each thread, because threads are not equally fast

template <typename Kind>
int64_t packed_elements(int64_t d, int64_t f) {
  return whole(f, kPanel) * whole(d, Kind::kDeep);
}

int64_t packed_size(int64_t d, int64_t f, Type type) {
  if (type == kFloat32) return 4 * packed_elements<Floats>(d, f);
  if (type == kBfloat16) return 2 * packed_elements<Halfs>(d, f);
  return packed_elements<Bytes8>(d, f) + 4 * whole(f, kPanel);  // and the sums of the columns
}

// The nearest bfloat16, ties to even.
INLINE uint16_t half(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if (!(bits & 0x7f800000)) return uint16_t(bits >> 16 & 0x8000);                  // counts as zero; keeps its sign
  if ((bits & 0x7fffffff) > 0x7f800000) return uint16_t(bits >> 16 | 0x40);        // not a number, and stays none
  return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);  // half of the last place, less a bit if that place is even
}

// Panel by panel; in it, kDeep elements of a column, then those of the next.
template <typename Kind, typename F>
void pack_as(const Pack& p, Pool& pool, F element) {
  auto* out = static_cast<typename Kind::Weight*>(p.packed);
  const int64_t depth = whole(p.d, Kind::kDeep);
  auto panel = [&](int64_t first) {
    auto* w = out + first * kPanel * depth;
    for (int64_t i = 0; i < depth; i += Kind::kDeep)
      for (int64_t c = first * kPanel; c < (first + 1) * kPanel; ++c)
        for (int64_t j = i; j < i + Kind::kDeep; ++j) *w++ = j < p.d && c < p.f ? element(j, c) : 0;
  };
  for_each(pool, whole(p.f, kPanel) / kPanel, panel);
}

// Bytes, and the sums of their columns.
template <typename F>
void pack_bytes(const Pack& p, Pool& pool, F element) {
  pack_as<Bytes8>(p, pool, element);
  auto* sums = reinterpret_cast<int32_t*>(static_cast<int8_t*>(p.packed) + packed_elements<Bytes8>(p.d, p.f));
  std::memset(sums, 0, 4 * whole(p.f, kPanel));
  for (int64_t i = 0; i < p.d; ++i)
    for (int64_t c = 0; c < p.f; ++c) sums[c] += element(i, c);
}

void pack(const Pack& p, Pool& pool) {
  if (p.type == kFloat32) return pack_as<Floats>(p, pool, [&](int64_t i, int64_t c) { return p.w[i * p.f + c]; });
  if (p.type == kBfloat16) return pack_as<Halfs>(p, pool, [&](int64_t i, int64_t c) { return half(p.w[i * p.f + c]); });
  if (p.rounded) return pack_bytes(p, pool, [&](int64_t i, int64_t c) { return p.rounded[i * p.f + c]; });
  std::vector<float> nothing(p.f, 0.0f);
  for (int64_t c = 0; c < p.f; ++c) p.scale[c] = 0.0f;
  for (int64_t i = 0; i < p.d; ++i)
    for (int64_t c = 0; c < p.f; ++c) {
      p.scale[c] = std::max(p.scale[c], std::fabs(p.w[i * p.f + c]));
      nothing[c] += p.w[i * p.f + c] * 0.0f;  // stays zero unless there is an infinity or NaN: then the column is NaN
    }
  for (int64_t c = 0; c < p.f; ++c) p.scale[c] = nothing[c] == 0.0f ? std::max(p.scale[c], 1e-35f) / 127.0f : NAN;
  pack_bytes(p, pool, [&](int64_t i, int64_t c) {
    return p.scale[c] == p.scale[c] ? int8_t(std::nearbyint(p.w[i * p.f + c] / p.scale[c])) : int8_t(0);
  });
}

// Pieces of the output: some rows by some panels. Panels are divided first, so that each weight is read by one thread.
struct Pieces {
  int64_t rows, columns, tiles, panels, b;
  Pieces(int64_t b, int64_t f, int64_t row_bytes, int64_t threads)
      : tiles(whole(b, kTall) / kTall), panels(whole(f, kPanel) / kPanel), b(b) {
    const int64_t block = std::max<int64_t>(1, kBlock / (kTall * row_bytes));
    rows = whole(tiles, block) / block;
    columns = std::min(panels, threads == 1 ? 1 : whole(kTasks * threads, rows) / rows);
  }
  int64_t row(int64_t r) const { return std::min(b, edge(tiles, rows, r) * kTall); }
  int64_t panel(int64_t c) const { return edge(panels, columns, c); }
};

// Part `tile` of `tiles` of `bytes` bytes, to be prefetched in `steps` steps of a product. So the next panel, which comes from
// memory, arrives while the tiles of this one are computed.
INLINE Ahead part_of(const void* p, int64_t bytes, int64_t tile, int64_t tiles, int64_t steps) {
  if (tiles < 4) return {};  // few rows wait for all of it anyway
  const int64_t first = edge(bytes, tiles, tile), size = edge(bytes, tiles, tile + 1) - first;
  return {static_cast<const char*>(p) + first, (size + steps - 1) / steps};
}

// What becomes of each vector of outputs: numbers at column `at` of a row and beyond.
struct Store {
  const Linear& l;
  INLINE_MEMBER void operator()(int64_t row, int64_t at, Vector v) const { store_part(l.y + row * l.f + at, v, l.f - at); }
};
struct StoreActivated {
  const Linear& l;
  Activation activation;
  INLINE_MEMBER void operator()(int64_t row, int64_t at, Vector v) const { Store{l}(row, at, activated(activation, v)); }
};

// Floats: sums over kDeepest elements at a time are added to y.
template <typename Kind, typename F>
void multiply_floats(const Linear& l, const typename Kind::Row* x, Pool& pool, F finish) {
  const auto* packed = static_cast<const typename Kind::Weight*>(l.packed);
  const int64_t depth = whole(l.d, Kind::kDeep);
  const Pieces pieces(l.b, l.f, std::min(depth, kDeepest) * sizeof(*x), pool.threads);
  auto piece = [&](int64_t i) {
    const int64_t r = i % pieces.rows, c = i / pieces.rows;
    const int64_t top = pieces.row(r), end = pieces.row(r + 1);
    for (int64_t k = 0; k < depth; k += kDeepest) {
      const int64_t deep = std::min(kDeepest, depth - k);
      for (int64_t panel = pieces.panel(c); panel < pieces.panel(c + 1); ++panel) {
        const auto* w = packed + panel * kPanel * depth + k * kPanel;
        const int64_t first = panel * kPanel;
        Vector bias[kWide] = {};
        for (int64_t v = 0; v < kWide && l.bias; ++v) bias[v] = load_part(l.bias + first + v * kLanes, l.f - first - v * kLanes);
        const bool last = panel + 1 == pieces.panel(c + 1);
        const auto* next = last ? packed + pieces.panel(c) * kPanel * depth + (k + deep) * kPanel : w + kPanel * depth;
        for (int64_t row = top; row < end; row += kTall) {
          const int64_t rows = std::min<int64_t>(kTall, end - row);
          const Ahead ahead = part_of(next, deep * kPanel * sizeof(*w), (row - top) / kTall, (end - top + kTall - 1) / kTall,
                                      deep / Kind::kDeep);
          Vector sum[kTall][kWide];
          multiply<Kind>(rows, x + row * depth + k, depth, w, deep, reinterpret_cast<float*>(sum), kPanel, ahead);
          for (int64_t r = 0; r < rows; ++r)
            for (int64_t v = 0; v < kWide; ++v) {
              const int64_t at = first + v * kLanes;
              float* y = l.y + (row + r) * l.f + at;
              const Vector so_far = sum[r][v] + (k > 0 ? load_part(y, l.f - at) : bias[v]);
              k + deep < depth ? store_part(y, so_far, l.f - at) : finish(row + r, at, so_far);
            }
        }
      }
    }
  };
  for_each(pool, pieces.rows * pieces.columns, piece);
}

// How numbers become int8: the nearest of step * n, n = low .. high, stored as n + added.
struct Steps {
  float step, low, high;
  int32_t added;

  explicit Steps(float largest)  // of a row; the floor keeps a row of zeros from a division by zero
      : step(std::max(largest, 1e-35f) / 127.0f), low(-127.0f), high(127.0f), added(int32_t(Bytes8::kAdded)) {}
  explicit Steps(const float* input)
      : step(input[0]), low(-input[1]), high(255.0f - input[1]), added(Bytes8::kAdded ? int32_t(input[1]) : 0) {}

  // Round kLanes numbers, and store the first `count`.
  INLINE_MEMBER void store(Vector v, Vector factor, Bytes8::Row* to, int64_t count) const {
#if defined(__AVX512VNNI__)  // compilers make of the portable lines three times as many instructions
    const __m512 most = _mm512_set1_ps(high), least = _mm512_set1_ps(low);
    const __m512 kept = _mm512_min_ps(_mm512_max_ps((__m512)(v * factor), least), most);
    const __m512i numbers = _mm512_add_epi32(_mm512_cvtps_epi32(kept), _mm512_set1_epi32(added));
    const __m128i bytes = _mm512_cvtepi32_epi8(numbers);
    count >= kLanes ? _mm_storeu_si128(reinterpret_cast<__m128i*>(to), bytes) : (void)std::memcpy(to, &bytes, count);
#else
    typedef Bytes8::Row Rows __attribute__((vector_size(sizeof(Bytes8::Row) * UFBERT_LANES), aligned(1), may_alias));
    const Vector shift = fill(12582912.0f);  // 1.5 * 2^23: adding and subtracting it rounds
    v *= factor;
    v = v > fill(low) ? v : fill(low);  // NaN, too, whose row has a step of NaN
    const Vector n = ((v > fill(high) ? fill(high) : v) + shift) - shift;
    const Rows rounded = __builtin_convertvector(__builtin_convertvector(n, Ints) + added, Rows);
    if (count >= kLanes)
      *reinterpret_cast<Rows*>(to) = rounded;
    else
      std::memcpy(to, &rounded, sizeof(Bytes8::Row) * count);
#endif
  }
};

// Rows in int8, each with the step that restores it, or NaN.
struct Rounded {
  int64_t depth;
  std::unique_ptr<Bytes8::Row[]> rows;
  std::unique_ptr<float[]> step;
  Rounded(int64_t b, int64_t d)
      : depth(whole(d, Bytes8::kDeep)), rows(new Bytes8::Row[b * depth]), step(new float[b]) {}
};

void round_row(const float* x, int64_t d, const float* input, Bytes8::Row* to, int64_t depth, float& step) {
  Vector most = {}, nothing = {};
  int64_t i = 0;
  for (; i + kLanes <= d; i += kLanes) {
    const Vector v = load(x + i), a = v < Vector{} ? -v : v;
    most = a > most ? a : most;
    nothing += v * Vector{};  // stays zero unless there is an infinity or NaN
  }
  float largest = 0.0f, last = sum(nothing);
  for (int64_t j = 0; j < kLanes; ++j) largest = std::max(largest, most[j]);
  for (; i < d; ++i) largest = std::max(largest, std::fabs(x[i])), last += x[i] * 0.0f;
  if (last != 0.0f) {
    std::fill(to, to + depth, Bytes8::Row(Bytes8::kAdded));
    step = NAN;
    return;
  }
  const Steps steps = input ? Steps(input) : Steps(largest);
  const Vector factor = fill(1.0f / steps.step);
  for (i = 0; i < depth; i += kLanes) steps.store(load_part(x + i, d - i), factor, to + i, depth - i);
  step = steps.step;
}

Rounded round_rows(const Linear& l, Pool& pool) {
  Rounded r(l.b, l.d);
  const int64_t parts = std::max<int64_t>(1, std::min(2 * pool.threads, l.b / 16));
  auto round = [&](int64_t p) {
    for (int64_t i = edge(l.b, parts, p); i < edge(l.b, parts, p + 1); ++i)
      round_row(l.x + i * l.d, l.d, l.input, &r.rows[i * r.depth], r.depth, r.step[i]);
  };
  for_each(pool, parts, round);
  return r;
}

template <typename F>
void multiply_bytes(const Linear& l, const Rounded& x, Pool& pool, F finish) {
  const auto* packed = static_cast<const int8_t*>(l.packed);
  const auto* sums = reinterpret_cast<const int32_t*>(packed + packed_elements<Bytes8>(l.d, l.f));
  const int64_t depth = x.depth;
  const int32_t zero = !Bytes8::kAdded ? 0 : l.input ? int32_t(l.input[1]) : int32_t(Bytes8::kAdded);
  const Pieces pieces(l.b, l.f, depth * sizeof(x.rows[0]), pool.threads);
  auto piece = [&](int64_t i) {
    const int64_t r = i % pieces.rows, c = i / pieces.rows;
    const int64_t top = pieces.row(r), end = pieces.row(r + 1);
    for (int64_t panel = pieces.panel(c); panel < pieces.panel(c + 1); ++panel) {
      const int64_t first = panel * kPanel;
      Ints added[kWide];
      Vector factor[kWide], bias[kWide] = {};
      for (int64_t v = 0; v < kWide; ++v) {
        const int64_t at = first + v * kLanes;
        // Rows hold `zero` too much in every element, which adds as often the sum of the column.
        std::memcpy(&added[v], sums + at, sizeof added[v]);  // padded to whole panels
        added[v] *= zero;
        factor[v] = load_part(l.scale + at, l.f - at);
        if (l.bias) bias[v] = load_part(l.bias + at, l.f - at);
      }
      for (int64_t row = top; row < end; row += kTall) {
        const int64_t rows = std::min<int64_t>(kTall, end - row);
        const Ahead ahead = part_of(packed + (panel + 1) * kPanel * depth, kPanel * depth, (row - top) / kTall,
                                    (end - top + kTall - 1) / kTall, depth / Bytes8::kDeep);
        Ints sum[kTall][kWide];
        multiply<Bytes8>(rows, &x.rows[row * depth], depth, packed + panel * kPanel * depth, depth, reinterpret_cast<int32_t*>(sum),
                         kPanel, ahead);
        for (int64_t r = 0; r < rows; ++r) {
          const Vector by = fill(x.step[row + r]);
          for (int64_t v = 0; v < kWide; ++v) {
            const Vector exact = __builtin_convertvector(sum[r][v] - added[v], Vector);
            finish(row + r, first + v * kLanes, exact * (factor[v] * by) + bias[v]);
          }
        }
      }
    }
  };
  for_each(pool, pieces.rows * pieces.columns, piece);
}

template <typename F>
void linear_as(const Linear& l, Pool& pool, F finish) {
  if (l.b == 0 || l.f == 0) return;
  if (l.d == 0) {
    for (int64_t i = 0; i < l.b; ++i)
      for (int64_t at = 0; at < l.f; at += kLanes) finish(i, at, l.bias ? load_part(l.bias + at, l.f - at) : Vector{});
    return;
  }
  if (l.type == kInt8) return multiply_bytes(l, round_rows(l, pool), pool, finish);
  if (l.type == kFloat32) return multiply_floats<Floats>(l, l.x, pool, finish);
#if defined(__AVX512BF16__)
  const int64_t depth = whole(l.d, Halfs::kDeep);
  std::vector<uint16_t> rounded(l.b * depth);
  const int64_t parts = std::max<int64_t>(1, std::min(2 * pool.threads, l.b / 16));
  auto round = [&](int64_t p) {
    for (int64_t i = edge(l.b, parts, p); i < edge(l.b, parts, p + 1); ++i)
      for (int64_t j = 0; j < l.d; ++j) rounded[i * depth + j] = half(l.x[i * l.d + j]);
  };
  for_each(pool, parts, round);
  multiply_floats<Halfs>(l, rounded.data(), pool, finish);
#else
  multiply_floats<Halfs>(l, l.x, pool, finish);
#endif
}

void linear(const Linear& l, Pool& pool) { linear_as(l, pool, Store{l}); }

// The outputs of a layer as the rows that the next one reads, whose steps are given.
struct StoreRounded {
  Activation activation;
  Rounded& to;
  Steps steps;
  Vector factor;
  INLINE_MEMBER void operator()(int64_t row, int64_t at, Vector v) const {
    if (at < to.depth) steps.store(activated(activation, v), factor, &to.rows[row * to.depth + at], to.depth - at);
  }
};

void feed_forward(const FeedForward& f, Pool& pool) {
  const Linear& in = f.in;
  bool direct = in.type == kInt8 && f.out.type == kInt8 && f.out.input && in.b > 0 && in.d > 0 && in.f > 0;
  // A bias or factor that is no number would be rounded to one.
  for (int64_t c = 0; direct && c < in.f; ++c) direct = std::isfinite(in.scale[c]) && !(in.bias && !std::isfinite(in.bias[c]));
  if (direct) {
    const Rounded x = round_rows(in, pool);
    Rounded hidden(in.b, in.f);
    for (int64_t i = 0; i < in.b; ++i) hidden.step[i] = std::isnan(x.step[i]) ? NAN : f.out.input[0];
    multiply_bytes(in, x, pool, StoreRounded{f.activation, hidden, Steps(f.out.input), fill(1.0f / f.out.input[0])});
    return multiply_bytes(f.out, hidden, pool, Store{f.out});
  }
  const std::unique_ptr<float[]> hidden(new float[in.b * in.f]);
  Linear first = in, second = f.out;
  first.y = hidden.get(), second.x = hidden.get();
  linear_as(first, pool, StoreActivated{first, f.activation});
  linear(second, pool);
}

// ---- LayerNorm ----

void norm(const Norm& m, Pool& pool) {
  const int64_t parts = std::max<int64_t>(1, std::min(2 * pool.threads, m.b / 32));
  auto part = [&](int64_t p) {
    for (int64_t row = edge(m.b, parts, p); row < edge(m.b, parts, p + 1); ++row) {
      const float* x = m.x + row * m.d;
      float* y = m.y + row * m.d;
      // `term` is given vectors, and as `last` the elements that do not fill two. Two sums, because additions wait for each other.
      auto total = [&](auto&& term, auto&& last) {
        Vector even = {}, odd = {};
        int64_t i = 0;
        for (; i + 2 * kLanes <= m.d; i += 2 * kLanes) even += term(load(x + i)), odd += term(load(x + i + kLanes));
        float value = sum(even + odd);
        for (; i < m.d; ++i) value += last(x[i]);
        return value;
      };
      const float mean = total([](Vector v) { return v; }, [](float v) { return v; }) / float(m.d);
      const Vector middle = fill(mean);
      const float variance = total([=](Vector v) { return (v - middle) * (v - middle); },
                                   [=](float v) { return (v - mean) * (v - mean); }) / float(m.d);
      const float factor = 1.0f / std::sqrt(variance + m.eps);
      int64_t i = 0;
      for (; i + kLanes <= m.d; i += kLanes) {
        const Vector v = (load(x + i) - middle) * (fill(factor) * load(m.scale + i));
        store(y + i, m.bias ? v + load(m.bias + i) : v);
      }
      for (; i < m.d; ++i) y[i] = (x[i] - mean) * (factor * m.scale[i]) + (m.bias ? m.bias[i] : 0.0f);
    }
  };
  if (m.b > 0) for_each(pool, parts, part);
}

void add(const Add& a, Pool& pool) {
  const int64_t parts = std::max<int64_t>(1, std::min(2 * pool.threads, a.size >> 17));
  auto part = [&](int64_t p) {
    int64_t i = edge(a.size, parts, p);
    const int64_t end = edge(a.size, parts, p + 1);
    for (; i + kLanes <= end; i += kLanes) store(a.y + i, load(a.left + i) + load(a.right + i));
    for (; i < end; ++i) a.y[i] = a.left[i] + a.right[i];
  };
  for_each(pool, parts, part);
}

bool supported() {
#if defined(__AVX512BF16__)
  if (!__builtin_cpu_supports("avx512vnni") || !__builtin_cpu_supports("avx512bf16")) return false;
#endif
#if defined(__AVX512F__)
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512dq");
#elif defined(__AVX2__)
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#else
  return true;
#endif
}

}  // namespace

#define TEXT_(a) #a
#define TEXT(a) TEXT_(a)
#ifndef UFBERT_TREES
#define UFBERT_TREES UFBERT_ISA
#endif
namespace JOIN(isa_, UFBERT_ISA) {
void attention(const Attention& a, Pool& pool);
}  // namespace
namespace JOIN(isa_, UFBERT_TREES) {
void forward(const Forward& f, Pool& pool);
void backward(const Backward& g, Pool& pool);
void leaf_forward(const LeafForward& f, Pool& pool);
void routed_forward(const RoutedForward& f, Pool& pool);
}  // namespace
namespace ours = JOIN(isa_, UFBERT_ISA);
namespace trees = JOIN(isa_, UFBERT_TREES);
const Kernels JOIN(kernels_, UFBERT_ISA) = {
    TEXT(UFBERT_ISA), ours::supported,   trees::forward,  trees::backward, trees::leaf_forward, trees::routed_forward,
    ours::attention,  ours::norm,        ours::add,       ours::packed_size, ours::pack,        ours::linear,
    ours::feed_forward};

}  // namespace ufbert

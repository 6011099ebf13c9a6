// Attention among the tokens of a document. As everywhere here, a row's answer depends neither on the batch nor on the number of
// threads.

#include "tiles.h"

namespace ufbert {
namespace JOIN(isa_, UFBERT_ISA) {

constexpr int64_t kQueries = 258;  // most queries of a head and document in a piece of work; a multiple of kTall

// Queries [from, to) of a row of tokens and a head, which attend to its tokens [first, first + n).
struct Look {
  int64_t row, head, from, to, first, n;
};

// How queries, keys, values and shares lie in memory to be multiplied. Keys and values are copied into panels, as packed weights
// are: keys in panels of tokens, values in panels of channels.
struct InFloats : Floats {
  static const float* queries(const float* from, int64_t, int64_t, int64_t, std::vector<float>&) { return from; }
  static int64_t apart(int64_t given, int64_t) { return given; }
  static void key(const float* from, int64_t k, float scale, int64_t c, float* panel) {
    for (int64_t i = 0; i < k; ++i) panel[i * kPanel + c] = from ? from[i] * scale : 0.0f;
  }
  // Tokens j and, with kDeep 2, j + 1; a row that is not there is null.
  static void values(const float* const* from, int64_t channels, float* to) {
    for (int64_t v = 0; v < kPanel; v += kLanes) store(to + v, load_part(from[0] + v, channels - v));
  }
  static const float* shares(const float* odds, int64_t, std::vector<float>&) { return odds; }
};

#if defined(__AVX512BF16__)
struct InHalfs : Halfs {
  static __m256i round(Vector v) { return (__m256i)_mm512_cvtneps_pbh((__m512)v); }
  static void round_all(const float* from, int64_t count, uint16_t* to, int64_t room) {
    for (int64_t i = 0; i < room; i += kLanes) {
      const __m256i halves = round(load_part(from + i, count - i));
      std::memcpy(to + i, &halves, 2 * std::min(kLanes, room - i));
    }
  }
  static const uint16_t* queries(const float* from, int64_t rows, int64_t apart, int64_t k, std::vector<uint16_t>& room) {
    const int64_t deep = whole(k, kDeep);
    room.resize(kTall * deep);
    for (int64_t r = 0; r < rows; ++r) round_all(from + r * apart, k, &room[r * deep], deep);
    return room.data();
  }
  static int64_t apart(int64_t, int64_t k) { return whole(k, kDeep); }
  static void key(const float* from, int64_t k, float scale, int64_t c, uint16_t* panel) {
    for (int64_t i = 0; i < k; i += kLanes) {
      const __m256i halves = from ? round(load_part(from + i, k - i) * fill(scale)) : _mm256_setzero_si256();
      uint32_t pairs[kLanes / 2];
      std::memcpy(pairs, &halves, sizeof pairs);
      for (int64_t p = 0; p < std::min(kLanes, whole(k - i, kDeep)) / 2; ++p)
        std::memcpy(panel + (i / 2 + p) * kPanel * 2 + c * 2, &pairs[p], 4);
    }
  }
  static void values(const float* const* from, int64_t channels, uint16_t* to) {
    for (int64_t v = 0; v < kPanel; v += kLanes) {
      const __m512i even = _mm512_cvtepu16_epi32(round(load_part(from[0] + v, channels - v)));
      const __m512i odd = from[1] ? _mm512_cvtepu16_epi32(round(load_part(from[1] + v, channels - v))) : _mm512_setzero_si512();
      _mm512_storeu_si512(to + 2 * v, _mm512_or_si512(even, _mm512_slli_epi32(odd, 16)));
    }
  }
  static const uint16_t* shares(const float* odds, int64_t size, std::vector<uint16_t>& room) {
    room.resize(size);
    round_all(odds, size, room.data(), size);
    return room.data();
  }
};
#endif

template <typename Kind>
void look(const Attention& a, const Look& l) {
  typedef typename Kind::Weight Weight;
  const int64_t d = a.h * a.k, apart = 3 * d, n = l.n;
  const float* queries = a.qkv + l.row * a.t * apart + l.head * a.k;
  float* y = a.y + l.row * a.t * d + l.head * a.k;
  const int64_t seen = whole(n, kPanel), wide = whole(a.k, kPanel), deep = whole(a.k, Kind::kDeep), even = whole(n, Kind::kDeep);
  std::vector<Weight> keys(seen * deep), values(even * wide);
  std::vector<float> odds(kTall * seen);
  std::vector<typename Kind::Row> room, share_room;
  for (int64_t j = 0; j < seen; ++j)
    Kind::key(j < n ? queries + d + (l.first + j) * apart : nullptr, a.k, a.scale, j % kPanel, &keys[j / kPanel * kPanel * deep]);
  for (int64_t c = 0; c < wide; c += kPanel)
    for (int64_t j = 0; j < n; j += Kind::kDeep) {
      const float* first = queries + 2 * d + (l.first + j) * apart + c;
      const float* const rows[2] = {first, j + 1 < n ? first + apart : nullptr};
      Kind::values(rows, a.k - c, &values[c * even + j * kPanel]);
    }
  for (int64_t q = l.from; q < l.to; q += kTall) {
    const int64_t rows = std::min<int64_t>(kTall, l.to - q);
    const auto* asked = Kind::queries(queries + q * apart, rows, apart, a.k, room);
    for (int64_t j = 0; j < seen; j += kPanel)
      multiply<Kind>(rows, asked, Kind::apart(apart, a.k), &keys[j * deep], deep, &odds[j], seen);
    Vector total[kTall];
    for (int64_t r = 0; r < rows; ++r) {
      float* z = &odds[r * seen];
      std::fill(z + n, z + seen, z[0]);  // so that what pads a panel is not the maximum
      Vector most = load(z);
      for (int64_t j = kLanes; j < seen; j += kLanes) {
        const Vector v = load(z + j);
        most = v > most ? v : most;
      }
      float largest = most[0];
      for (int64_t j = 1; j < kLanes; ++j) largest = std::max(largest, most[j]);
      std::fill(z + n, z + seen, -INFINITY);  // exp makes 1e-38 of it: too little for the sum, and no product reads it
      Vector sums = {};
      for (int64_t j = 0; j < seen; j += kLanes) {
        const Vector odd = exp(load(z + j) - fill(largest));
        store(z + j, odd);
        sums += odd;
      }
      total[r] = fill(1.0f / sum(sums));
    }
    const auto* shares = Kind::shares(odds.data(), rows * seen, share_room);
    for (int64_t c = 0; c < a.k; c += kPanel) {
      Vector mixed[kTall][kWide];
      multiply<Kind>(rows, shares, seen, &values[c * even], even, reinterpret_cast<float*>(mixed), kPanel);
      for (int64_t r = 0; r < rows; ++r)
        for (int v = 0; v < kWide; ++v)
          store_part(y + (q + r) * d + c + v * kLanes, mixed[r][v] * total[r], a.k - c - v * kLanes);
    }
  }
}

void attention(const Attention& a, Pool& pool) {
  std::vector<Look> work;
  auto add_work = [&](int64_t row, int64_t from, int64_t to, int64_t first, int64_t n) {
    const int64_t parts = (to - from + kQueries - 1) / kQueries;
    for (int64_t head = 0; head < a.h; ++head)
      for (int64_t p = 0; p < parts; ++p)
        work.push_back({row, head, from + edge(to - from, parts, p), from + edge(to - from, parts, p + 1), first, n});
  };
  for (int64_t row = 0; row < a.b; ++row) {
    const int32_t* segment = a.segment ? a.segment + row * a.t : nullptr;
    int64_t real = a.t;  // the end of the last document
    while (segment && real > 0 && !segment[real - 1]) --real;
    for (int64_t from = 0, to; from < a.t; from = to) {
      for (to = from + 1; segment && to < a.t && segment[to] == segment[from];) ++to;
      if (!segment) to = a.t;
      if (!segment || segment[from]) {
        add_work(row, from, to, from, to - from);
      } else if (a.padding_sees && real > 0) {
        add_work(row, from, to, 0, real);
      } else {
        std::memset(a.y + (row * a.t + from) * a.h * a.k, 0, 4 * (to - from) * a.h * a.k);
      }
    }
  }
  auto piece = [&](int64_t i) {
#if defined(__AVX512BF16__)
    if (a.narrow) return look<InHalfs>(a, work[i]);
#endif
    look<InFloats>(a, work[i]);
  };
  if (!work.empty() && a.k > 0) for_each(pool, int64_t(work.size()), piece);
}

}  // namespace
}  // namespace ufbert

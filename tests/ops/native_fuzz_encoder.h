// Random calls of the kernels for linear layers, attention and LayerNorm.
#pragma once

#include "native_fuzz.h"

extern "C" int64_t ufbert_packed_size(int64_t d, int64_t f, int32_t type);
extern "C" int ufbert_pack(int64_t d, int64_t f, const float* w, void* packed, float* scale, int32_t type, int64_t threads);
extern "C" int ufbert_linear(const Linear*, int64_t threads);
extern "C" int ufbert_feed_forward(const FeedForward*, int64_t threads);
extern "C" int ufbert_attention(const Attention*, int64_t threads);
extern "C" int ufbert_norm(const Norm*, int64_t threads);
extern "C" int ufbert_add(const Add*, int64_t threads);

double to_half(float x) {  // the nearest bfloat16, ties to even; what counts as zero is not rounded up from there
  if (!std::isfinite(x)) return x;
  if (flushed(x) == 0) return 0;
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  bits = (bits + 0x7fff + (bits >> 16 & 1)) & 0xffff0000u;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

// What a number counts in steps of `scale`, and how much that may be off: near the middle of two steps, by one of them.
double in_steps(float x, float scale, double& off) {
  const double exact = double(x) / scale, steps = std::nearbyint(exact);
  off = std::fabs(std::fabs(exact - std::trunc(exact)) - 0.5) < 1e-4 ? scale : 0;
  return steps * scale;
}

struct Layer {
  int64_t b, d, f;
  Type type;
  Array<float> x, w, bias, y;
  Array<uint8_t> packed;
  Array<float> scale;
  bool biased;

  Layer(Random& random, int64_t b, int64_t d, int64_t f, Type type, bool special)
      : b(b), d(d), f(f), type(type), x(draw_inputs(random, b, d, special)),
        w(draw(random, d * f, 1.0f / std::sqrt(float(d)), special && random.chance(40))),
        bias(draw(random, f, 0.3f, special && random.chance(40))), y(random, b * f),
        packed(random, ufbert_packed_size(d, f, type) + 3), scale(random, type == kInt8 ? f : 0), biased(random.chance(50)) {
    if (ufbert_pack(d, f, w.data, at(), scale.data, type, random.in(1, 4))) mismatch("there are no kernels");
  }
  // Aligned to the element, and up to the allocation's end.
  void* at() const {
    const int64_t size = type == kFloat32 ? 4 : type == kBfloat16 ? 2 : 4;  // int8 weights end in sums of four bytes
    const auto start = reinterpret_cast<uintptr_t>(packed.data);
    return packed.data + (size - start % size) % size;
  }
  void run(const float* rows, int64_t count, float* to, int64_t threads) const {
    const Linear l{count, d, f, rows, at(), type == kInt8 ? scale.data : nullptr, biased ? bias.data : nullptr, nullptr, to, type};
    if (ufbert_linear(&l, threads)) mismatch("there are no kernels");
  }

  void expect() const {
    const bool half_rows = type == kBfloat16 && !std::strcmp(ufbert_isa(), "avx512bf16");
    std::vector<float> column(f, 0.0f);
    for (int64_t i = 0; i < d * f; ++i) column[i % f] = std::isfinite(w[i]) ? std::max(column[i % f], std::fabs(w[i])) : NAN;
    for (int64_t i = 0; i < d * f; ++i)
      if (!std::isfinite(w[i])) column[i % f] = NAN;
    for (int64_t row = 0; row < b; ++row) {
      std::vector<Sum> wanted(f);
      float largest = 0.0f;
      bool finite = true;
      for (int64_t i = 0; i < d; ++i) largest = std::max(largest, std::fabs(x[row * d + i])), finite &= std::isfinite(x[row * d + i]);
      const float step = std::max(largest, 1e-35f) / 127.0f;
      for (int64_t i = 0; i < d; ++i) {
        const float value = x[row * d + i];
        double factor = value, off = 0;
        if (type == kInt8) factor = finite ? in_steps(value, step, off) : NAN;
        if (half_rows) factor = to_half(value);
        for (int64_t j = 0; j < f; ++j) {
          double weight = w[i * f + j], weight_off = 0;
          if (type == kBfloat16) weight = to_half(w[i * f + j]);
          if (type == kInt8) {
            const float by = std::max(column[j], 1e-35f) / 127.0f;
            weight = std::isnan(column[j]) ? NAN : in_steps(w[i * f + j], by, weight_off);
          }
          wanted[j].add(factor, off, weight);
          wanted[j].slack += weight_off * (std::fabs(factor) + off);
        }
      }
      for (int64_t j = 0; biased && j < f; ++j) wanted[j].add(1, 0, bias[j]);
      expect_row("linear", &y[row * f], wanted, row, double(d) + 8);
    }
  }
};

void fuzz_linear(Random& random, Layer& l) {
  const int64_t threads = random.in(1, 4);
  l.run(l.x.data, l.b, l.y.data, threads);
  l.expect();
  Array<float> again(random, l.b * l.f);
  elsewhere([&] { l.run(l.x.data, l.b, again.data, threads % 4 + 1); });
  expect_same("linear, threads", l.y.data, again.data, l.b * l.f);
  for (int64_t i = 0; l.b && i < 3; ++i) {
    const int64_t first = random.in(0, l.b - 1), count = std::min<int64_t>(l.b - first, random.in(1, 8));
    Array<float> rows(random, count * l.d), alone(random, count * l.f);
    std::copy_n(&l.x[first * l.d], count * l.d, rows.data);
    l.run(rows.data, count, alone.data, random.in(1, 4));
    expect_same("linear, rows alone and in the batch", &l.y[first * l.f], alone.data, count * l.f);
  }
}

// Two layers as one call: the same on other threads, and for rows alone. With steps that are given, or without.
void fuzz_feed_forward(Random& random, const Layer& in, const Layer& out) {
  Array<float> steps(random, 2), next(random, 2);
  steps[0] = 0.02f, steps[1] = float(random.in(0, 255)), next[0] = 0.01f, next[1] = float(random.in(0, 255));
  const bool given = in.type == kInt8 && random.chance(60);
  const Activation activation = Activation(random.in(0, 3));
  auto run = [&](const float* rows, int64_t count, float* to, int64_t threads) {
    const FeedForward f{{count, in.d, in.f, rows, in.at(), in.type == kInt8 ? in.scale.data : nullptr,
                         in.biased ? in.bias.data : nullptr, given ? steps.data : nullptr, nullptr, in.type},
                        {count, out.d, out.f, nullptr, out.at(), out.type == kInt8 ? out.scale.data : nullptr,
                         out.biased ? out.bias.data : nullptr, given ? next.data : nullptr, to, out.type},
                        activation};
    if (ufbert_feed_forward(&f, threads)) mismatch("there are no kernels");
  };
  Array<float> y(random, in.b * out.f), again(random, in.b * out.f);
  const int64_t threads = random.in(1, 4);
  run(in.x.data, in.b, y.data, threads);
  elsewhere([&] { run(in.x.data, in.b, again.data, threads % 4 + 1); });
  expect_same("feedforward, threads", y.data, again.data, in.b * out.f);
  if (!in.b) return;
  const int64_t first = random.in(0, in.b - 1), count = std::min<int64_t>(in.b - first, random.in(1, 8));
  Array<float> rows(random, count * in.d), alone(random, count * out.f);
  std::copy_n(&in.x[first * in.d], count * in.d, rows.data);
  run(rows.data, count, alone.data, random.in(1, 4));
  expect_same("feedforward, rows alone and in the batch", &y[first * out.f], alone.data, count * out.f);
}

void fuzz_attention(Random& random, int64_t b, int64_t t, int64_t h, int64_t k, bool special) {
  const int64_t size = b * t * h * k;
  const bool special_values = special && random.chance(50);
  const Array<float> q = draw(random, size, float(random.in(1, 3)), special && !special_values), key = draw(random, size, 1.0f);
  const Array<float> value = draw(random, size, 1.0f, special_values);
  Array<float> qkv(random, 3 * size);
  for (int64_t i = 0; i < b * t; ++i)
    for (int64_t part = 0; part < 3; ++part)
      std::copy_n((part == 0 ? q : part == 1 ? key : value).data + i * h * k, h * k, &qkv[(3 * i + part) * h * k]);
  Array<int32_t> segment(random, b * t);
  const bool documents = random.chance(75), sees = random.chance(50);
  for (int64_t row = 0; row < b; ++row) {
    int32_t document = 1;
    const int64_t end = random.chance(40) ? t : random.in(0, t);
    for (int64_t i = 0; i < t; ++i) segment[row * t + i] = i >= end ? 0 : (document += i > 0 && random.chance(8));
  }
  Array<float> y(random, size), again(random, size);
  Attention a{b, t, h, k, qkv.data, documents ? segment.data : nullptr, y.data, 1 / std::sqrt(float(k)), sees, false};
  const int64_t threads = random.in(1, 4);
  if (ufbert_attention(&a, threads)) mismatch("there are no kernels");
  a.y = again.data;
  elsewhere([&] { ufbert_attention(&a, threads % 4 + 1); });
  expect_same("attention, threads", y.data, again.data, size);
  for (int64_t place = 0; place < b * t * h; ++place) {
    const int64_t head = place % h, i = place / h % t, row = place / h / t;
    std::vector<int64_t> seen;
    for (int64_t j = 0; j < t; ++j) {
      const int32_t mine = documents ? segment[row * t + i] : 1, other = documents ? segment[row * t + j] : 1;
      if (other && (mine == other || (!mine && sees))) seen.push_back(j);
    }
    const float* found = &y[place * k];
    if (seen.empty()) {
      for (int64_t c = 0; c < k; ++c)
        if (found[c] != 0) mismatch("attention: padding has %.9g", found[c]);
      continue;
    }
    std::vector<double> logit;
    double most = -INFINITY, off = 0, total = 0;
    bool none = false;
    for (int64_t j : seen) {
      Sum sum;
      for (int64_t c = 0; c < k; ++c) sum.add(q[place * k + c], 0, key[((row * t + j) * h + head) * k + c]);
      logit.push_back(sum.value * a.scale);
      none |= std::isnan(sum.value) || sum.value == INFINITY;
      most = std::max(most, logit.back());
      if (std::isfinite(sum.value)) off = std::max(off, sum.rounding(double(k) + 4) * a.scale);
    }
    none |= most == -INFINITY;
    off = 2 * off + 4e-7 * (1 + std::fabs(none ? 0 : most));
    for (double& z : logit) total += z = std::exp(std::max(z - most, -87.3365402));  // never zero: see exp() in vectors.h
    for (int64_t c = 0; c < k; ++c) {
      Sum sum;
      double largest = 0;
      for (size_t s = 0; s < seen.size(); ++s) {
        const double v = value[((row * t + seen[s]) * h + head) * k + c];
        sum.add(logit[s], 0, v);
        if (std::isfinite(v)) largest = std::max(largest, std::fabs(v));
      }
      const double wanted = none ? NAN : sum.value / total, rounding = sum.rounding(double(seen.size()) + 8) / total;
      if (!agrees(found[c], wanted, 2 * std::expm1(2 * off) * largest + rounding + kTiny))
        mismatch("attention[%lld, %lld, %lld, %lld] is %.9g, should be %.9g", (long long)row, (long long)i, (long long)head,
                 (long long)c, found[c], wanted);
    }
  }
}

void fuzz_norm(Random& random, int64_t b, int64_t d, bool special) {
  Array<float> x = draw_inputs(random, b, d, special), y(random, b * d), again(random, b * d);
  const float middle = random.chance(30) ? 10.0f : 0.0f;
  for (int64_t i = 0; i < b * d; ++i) x[i] += middle;
  const Array<float> scale = draw(random, d, 1.0f), bias = draw(random, d, 1.0f);
  const bool biased = random.chance(50);
  Norm m{b, d, x.data, scale.data, biased ? bias.data : nullptr, y.data, 1e-5f};
  const int64_t threads = random.in(1, 4);
  if (ufbert_norm(&m, threads)) mismatch("there are no kernels");
  m.y = again.data;
  elsewhere([&] { ufbert_norm(&m, threads % 4 + 1); });
  expect_same("norm, threads", y.data, again.data, b * d);
  for (int64_t row = 0; row < b; ++row) {
    double mean = 0, variance = 0, largest = 0;
    for (int64_t i = 0; i < d; ++i) mean += x[row * d + i] / double(d), largest = std::max(largest, std::fabs(double(x[row * d + i])));
    for (int64_t i = 0; i < d; ++i) variance += (x[row * d + i] - mean) * (x[row * d + i] - mean) / double(d);
    const double deviation = std::sqrt(variance + double(m.eps)), steps = 8 + double(d) / 8;
    const double shifted = steps * kEpsilon * largest;  // the mean's rounding
    const double share = steps * kEpsilon + 2 * shifted / deviation;  // that of the deviation, over itself
    for (int64_t i = 0; i < d; ++i) {
      const double normed = (x[row * d + i] - mean) / deviation, wanted = normed * scale[i] + (biased ? bias[i] : 0.0f);
      const double off = std::fabs(scale[i]) * (2 * shifted / deviation + 2 * share * std::fabs(normed)) + 4 * kEpsilon * (1 + std::fabs(wanted));
      if (!agrees(y[row * d + i], wanted, off))
        mismatch("norm[%lld, %lld] is %.9g, should be %.9g within %.2g", (long long)row, (long long)i, y[row * d + i], wanted, off);
    }
  }
}

void fuzz_add(Random& random, int64_t size, bool special) {
  const Array<float> one = draw(random, size, 1.0f, special), other = draw(random, size, 1.0f, special);
  Array<float> y(random, size), again(random, size);
  Add a{size, one.data, other.data, y.data};
  const int64_t threads = random.in(1, 4);
  if (ufbert_add(&a, threads)) mismatch("there are no kernels");
  a.y = again.data;
  elsewhere([&] { ufbert_add(&a, threads % 4 + 1); });
  expect_same("add, threads", y.data, again.data, size);
  for (int64_t i = 0; i < size; ++i) {
    const float wanted = float(flushed(flushed(one[i]) + flushed(other[i])));
    if (!agrees(y[i], wanted, 0)) mismatch("add[%lld] is %.9g, should be %.9g", (long long)i, y[i], wanted);
  }
}

void encoder_call(Random& random, bool special, char* described, size_t room) {
  static const char* const types[] = {"float32", "bfloat16", "int8"};
  const int64_t kind = random.in(1, 10);
  if (kind <= 6) {
    const Type type = Type(random.in(0, 2));
    int64_t b = std::min<int64_t>(draw_rows(random), 300), d = draw_width(random), f = draw_width(random);
    while (b * d * f > 3000000) b > 20 ? b /= 2 : f = (f + 1) / 2;
    std::snprintf(described, room, "linear b=%lld d=%lld f=%lld %s special=%d", (long long)b, (long long)d, (long long)f, types[type], special);
    Layer l(random, b, d, f, type, special);
    fuzz_linear(random, l);
    if (random.chance(30)) fuzz_feed_forward(random, l, Layer(random, 0, f, random.in(0, 40), type, special));
  } else if (kind <= 9) {
    int64_t b = random.in(0, 3), t = random.chance(80) ? random.in(1, 40) : random.in(1, 220), h = random.in(1, 3), k = random.chance(70) ? random.in(1, 24) : random.in(1, 80);
    while (b * t * t * h * k > 3000000) t = (t + 1) / 2;
    std::snprintf(described, room, "attention b=%lld t=%lld h=%lld k=%lld special=%d", (long long)b, (long long)t, (long long)h, (long long)k, special);
    fuzz_attention(random, b, t, h, k, special);
  } else if (random.chance(20)) {
    const int64_t size = random.chance(80) ? random.in(0, 300) : random.in(0, 600000);
    std::snprintf(described, room, "add size=%lld special=%d", (long long)size, special);
    fuzz_add(random, size, special);
  } else {
    const int64_t b = std::min<int64_t>(draw_rows(random), 300), d = draw_width(random);
    std::snprintf(described, room, "norm b=%lld d=%lld special=%d", (long long)b, (long long)d, special);
    fuzz_norm(random, b, d, special);
  }
}

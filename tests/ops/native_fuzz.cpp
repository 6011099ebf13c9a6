// Random calls of the native kernels, checked against loops in double that were written from kernels.h alone.
//
//     native_fuzz --calls 100000 --seed 1
//
// tests/ops/test_native.py builds it, with the sanitizers or against the library that Python loads, and native_fuzz_all.py lets
// it run for long on one instruction set after the other. It goes through all the instruction sets of this processor, or keeps
// to the one that UFBERT_ISA names. Every call has its own seed: a mismatch says with which --seed and --first it comes back. Arrays are as long as they must be and no longer, and aligned to their elements
// only, so that the address sanitizer sees any access beside them.

#include "native_fuzz.h"
#include "native_fuzz_encoder.h"

extern "C" int ufbert_forward(const Forward*, int64_t threads);
extern "C" int ufbert_backward(const Backward*, int64_t threads);
extern "C" int ufbert_leaf_forward(const LeafForward*, int64_t threads);
extern "C" int ufbert_routed_forward(const RoutedForward*, int64_t threads);

// ---- the uniform-node tree ----

struct Tree {
  int64_t b, m, depth, d, n, steps;
  Activation activation;
  bool special;
  Array<float> x;
  Weights w_in, w_out;
  Array<float> bias, y, z;
  Array<int32_t> nodes;

  Tree(Random& random, int64_t b, int64_t m, int64_t depth, int64_t d, Type in, Type out, bool special)
      : b(b), m(m), depth(depth), d(d), n((int64_t(2) << depth) - 1), steps(depth + 1),
        activation(Activation(random.in(0, 3))),
        special(special),
        x(draw_inputs(random, b, d, special)),
        w_in(random, in, m * n, d, m * n, float(random.chance(20) ? 4 : 1) / std::sqrt(float(d)), special && random.chance(40)),
        w_out(random, out, m * n, d, m * n, 1.0f / std::sqrt(float(steps)), special && random.chance(40)),
        bias(draw(random, m * n, random.chance(25) ? 0.0f : 0.3f, special && random.chance(40))),
        y(random, b * d), z(random, b * m * steps), nodes(random, b * m * steps) {}

  Forward call(const float* residual, float* to, bool saving) const {
    Forward f{};
    f.b = b, f.m = m, f.n = n, f.d = d;
    f.x = x.data, f.w_in = w_in.data(), f.in_scale = w_in.scale_data(), f.bias = bias.data;
    f.w_out = w_out.data(), f.out_scale = w_out.scale_data(), f.residual = residual, f.y = to;
    if (saving) f.nodes = nodes.data, f.z = z.data;
    f.in_type = w_in.type, f.out_type = w_out.type, f.activation = activation;
    return f;
  }

  // Whether each row went down its trees by the right logits: the saved path.
  void expect_paths() const {
    for (int64_t place = 0; place < b * m; ++place) {
      const int64_t row = place / m, tree = place % m;
      int64_t node = 0;
      for (int64_t s = 0; s < steps; ++s) {
        const float found = z[place * steps + s];
        if (nodes[place * steps + s] != node)
          mismatch("row %lld, tree %lld, step %lld: node %d, should be %lld", (long long)row, (long long)tree, (long long)s,
                   nodes[place * steps + s], (long long)node);
        const int64_t at = tree * n + node;
        Sum sum = dot(x.data + row * d, &w_in.value[at * d], d);
        sum.value *= w_in.scale_of(at), sum.size *= std::fabs(w_in.scale_of(at));
        sum.add(1, 0, bias[at]);
        if (!agrees(found, sum.value, sum.rounding(dot_steps(d))))
          mismatch("row %lld, tree %lld, step %lld: z is %.9g, should be %.9g", (long long)row, (long long)tree, (long long)s,
                   found, sum.value);
        node = 2 * node + 1 + (found > 0);
      }
    }
  }

  // Whether y is right, given the saved path.
  void expect_outputs(const float* residual) const {
    for (int64_t row = 0; row < b; ++row) {
      std::vector<Sum> wanted(d);
      for (int64_t j = 0; residual && j < d; ++j) wanted[j].add(1, 0, residual[row * d + j]);
      for (int64_t place = row * m * steps; place < (row + 1) * m * steps; ++place) {
        const int64_t at = place / steps % m * n + nodes[place];
        const double value = active(activation, z[place]), off = active_off(activation, z[place]);
        const double scale = w_out.scale_of(at), lost = w_out.lost(value);
        for (int64_t j = 0; j < d; ++j) wanted[j].add(value * scale, off * std::fabs(scale) + lost, w_out.value[at * d + j]);
      }
      expect_row("y", &y[row * d], wanted, row, double(m * steps + 4));
    }
  }
};

void run(const Forward& f, int64_t threads) {
  if (ufbert_forward(&f, threads)) mismatch("there are no kernels");
}

void fuzz_forward(Random& random, Tree& t) {
  Array<float> residual = draw(random, t.b * t.d, 1.0f, t.special);
  const bool with = random.chance(50);
  const float* base = with ? residual.data : nullptr;
  const int64_t threads = random.in(1, 4);
  run(t.call(base, t.y.data, true), threads);
  t.expect_paths();
  t.expect_outputs(base);
  Array<float> again(random, t.b * t.d);
  if (with) std::copy_n(residual.data, t.b * t.d, again.data);
  elsewhere([&] { run(t.call(with ? again.data : nullptr, again.data, false), threads % 4 + 1); });
  expect_same("path saved or not, threads, residual in place", t.y.data, again.data, t.b * t.d);
  for (int64_t i = 0; t.b && i < 3; ++i) {
    const int64_t first = random.in(0, t.b - 1);
    Forward f = t.call(with ? residual.data + first * t.d : nullptr, again.data, false);
    f.b = std::min<int64_t>(t.b - first, random.chance(70) ? 1 : random.in(1, 20));
    Array<float> x(random, f.b * t.d);
    f.x = std::copy_n(&t.x[first * t.d], f.b * t.d, x.data) - f.b * t.d;
    run(f, random.in(1, 4));
    expect_same("rows alone and in the batch", &t.y[first * t.d], again.data, f.b * t.d);
  }
}

// One gradient, the largest of its array known. A sum of many terms that cancel cannot be nearer than its terms' rounding, so
// what float32 may lose on them is granted where it is more than kGradient of the largest.
void expect_gradient(const char* what, const Array<float>& found, const std::vector<Sum>& wanted, int64_t d) {
  double largest = 0;
  for (const Sum& sum : wanted)
    if (std::isfinite(sum.value)) largest = std::max(largest, std::fabs(sum.value));
  for (int64_t i = 0; i < found.size; ++i) {
    const double off = std::max(kGradient * largest, wanted[i].rounding(32));
    if (!wanted[i].open && !agrees(found[i], wanted[i].value, off))
      mismatch("%s[%lld, %lld] is %.9g, should be %.9g within %.2g", what, (long long)(i / d), (long long)(i % d), found[i],
               wanted[i].value, off);
  }
}

struct Gradients {
  Array<float> dx, d_in, d_bias, d_out;
  Gradients(Random& random, const Tree& t)
      : dx(random, t.b * t.d), d_in(random, t.m * t.n * t.d), d_bias(random, t.m * t.n), d_out(random, t.m * t.n * t.d) {}
  void compute(const Tree& t, const Array<float>& g, int64_t threads) {
    Backward call{t.b, t.m, t.n, t.d, t.x.data, t.w_in.full.data, t.w_out.full.data, g.data, t.nodes.data, t.z.data,
                  dx.data, d_in.data, d_bias.data, d_out.data, t.activation};
    if (ufbert_backward(&call, threads)) mismatch("there are no kernels");
  }
};

void fuzz_backward(Random& random, Tree& t) {
  run(t.call(nullptr, t.y.data, true), 1);
  const Array<float> g = draw(random, t.b * t.d, 1.0f, t.special && random.chance(40));
  Gradients found(random, t), again(random, t);
  const int64_t threads = random.in(1, 4);
  found.compute(t, g, threads);
  elsewhere([&] { again.compute(t, g, threads % 4 + 1); });
  expect_same("dx, threads", found.dx.data, again.dx.data, found.dx.size);
  expect_same("d_in, threads", found.d_in.data, again.d_in.data, found.d_in.size);
  expect_same("d_bias, threads", found.d_bias.data, again.d_bias.data, found.d_bias.size);
  expect_same("d_out, threads", found.d_out.data, again.d_out.data, found.d_out.size);

  const int64_t d = t.d;
  std::vector<Sum> dx(t.b * d), d_in(t.m * t.n * d), d_bias(t.m * t.n), d_out(t.m * t.n * d);
  std::vector<char> visited(t.m * t.n, 0);
  for (int64_t place = 0; place < t.b * t.m * t.steps; ++place) {
    const int64_t row = place / (t.m * t.steps), at = place / t.steps % t.m * t.n + t.nodes[place];
    const double z = t.z[place], steep = slope(t.activation, z), steep_off = std::isfinite(z) ? slope_off(t.activation) : 0;
    const Sum back = dot(&g[row * d], &t.w_out.value[at * d], d);
    Sum dz;
    dz.add(steep, steep_off, back.value);
    const double dz_off = dz.rounding(1) + std::fabs(steep) * back.rounding(dot_steps(d));
    const double value = active(t.activation, z), off = active_off(t.activation, z);
    visited[at] = 1;
    d_bias[at].add(dz.value, dz_off, 1);
    d_bias[at].open |= dz.open;
    for (int64_t j = 0; j < d; ++j) {
      dx[row * d + j].add(dz.value, dz_off, t.w_in.value[at * d + j]);
      d_in[at * d + j].add(dz.value, dz_off, t.x[row * d + j]);
      d_out[at * d + j].add(value, off, g[row * d + j]);
      dx[row * d + j].open |= dz.open, d_in[at * d + j].open |= dz.open;
    }
  }
  expect_gradient("dx", found.dx, dx, d);
  expect_gradient("d_in", found.d_in, d_in, d);
  expect_gradient("d_bias", found.d_bias, d_bias, t.n);
  expect_gradient("d_out", found.d_out, d_out, d);
  for (int64_t i = 0; i < t.m * t.n * d; ++i)
    if (!visited[i / d] && (found.d_in[i] != 0 || found.d_out[i] != 0 || found.d_bias[i / d] != 0))
      mismatch("the gradient of node %lld, which no row visited, is not zero", (long long)(i / d));
}

// ---- the original tree ----

struct LeafTree {
  int64_t b, g, d, w, o;
  Activation activation;
  Array<float> x, node_w, node_b;
  Weights w_in, w_out;
  Array<float> b_in, b_out, y;
  Array<int32_t> leaf;

  LeafTree(Random& random, int64_t b, int64_t depth, int64_t d, int64_t w, int64_t o, Type type, bool special)
      : b(b), g(int64_t(1) << depth), d(d), w(w), o(o), activation(Activation(random.in(0, 3))),
        x(draw_inputs(random, b, d, special)),
        node_w(draw(random, (g - 1) * d, 1.0f / std::sqrt(float(d)), special && random.chance(40))),
        node_b(draw(random, g - 1, random.chance(25) ? 0.0f : 0.3f, special && random.chance(40))),
        w_in(random, type, g * d, w, g * w, 1.0f / std::sqrt(float(d)), special && random.chance(40)),
        w_out(random, type, g * w, o, g * w, 1.0f / std::sqrt(float(w)), special && random.chance(40)),
        b_in(draw(random, g * w, 0.3f, special && random.chance(40))),
        b_out(draw(random, g * o, 0.3f, special && random.chance(40))),
        y(random, b * o), leaf(random, b) {}

  void run(const float* rows, int64_t count, float* to, int32_t* leaves, int64_t threads) const {
    const LeafForward f{count, g, d, w, o, rows, node_w.data, node_b.data, w_in.data(), w_in.scale_data(), b_in.data,
                        w_out.data(), w_out.scale_data(), b_out.data, to, leaves, w_in.type, activation};
    if (ufbert_leaf_forward(&f, threads)) mismatch("there are no kernels");
  }

  void expect_leaf(int64_t row) const {
    if (leaf[row] < 0 || leaf[row] >= g) mismatch("row %lld: leaf %d", (long long)row, leaf[row]);
    for (int64_t below = leaf[row] + g; below > 1; below /= 2) {  // counted from one, so that the parent is half of it
      const int64_t node = below / 2 - 1;
      Sum sum = dot(&x[row * d], std::vector<double>(&node_w[node * d], &node_w[node * d] + d).data(), d);
      sum.add(1, 0, node_b[node]);
      if ((below % 2 == 1) != (sum.value >= 0) && !(std::fabs(sum.value) < sum.rounding(dot_steps(d))))
        mismatch("row %lld turned %s at node %lld, where z is %.9g", (long long)row, below % 2 ? "right" : "left",
                 (long long)node, sum.value);
    }
  }

  void expect_output(int64_t row) const {
    std::vector<Sum> wanted(o);
    for (int64_t j = 0; j < o; ++j) wanted[j].add(1, 0, b_out[leaf[row] * o + j]);
    for (int64_t h = leaf[row] * w; h < (leaf[row] + 1) * w; ++h) {
      Sum hidden;
      for (int64_t c = 0; c < d; ++c) hidden.add(x[row * d + c], 0, w_in.value[(leaf[row] * d + c) * w + h % w]);
      hidden.value *= w_in.scale_of(h), hidden.size *= std::fabs(w_in.scale_of(h));
      hidden.add(1, 0, b_in[h]);
      const double z = hidden.value, steepest = 1.2;
      const double off = active_off(activation, z) + (std::isfinite(z) ? steepest * hidden.rounding(double(d) + 20) : 0);
      const double value = active(activation, z), scale = w_out.scale_of(h), lost = w_out.lost(value);
      for (int64_t j = 0; j < o; ++j) wanted[j].add(value * scale, off * std::fabs(scale) + lost, w_out.value[h * o + j]);
    }
    expect_row("y", &y[row * o], wanted, row, double(w + 4));
  }
};

void fuzz_leaf(Random& random, LeafTree& t) {
  const int64_t threads = random.in(1, 4);
  t.run(t.x.data, t.b, t.y.data, t.leaf.data, threads);
  for (int64_t row = 0; row < t.b; ++row) {
    t.expect_leaf(row);
    t.expect_output(row);
  }
  Array<float> again(random, t.b * t.o);
  Array<int32_t> leaf(random, t.b);
  elsewhere([&] { t.run(t.x.data, t.b, again.data, leaf.data, threads % 4 + 1); });
  expect_same("threads", t.y.data, again.data, t.b * t.o);
  for (int64_t i = 0; t.b && i < 3; ++i) {
    const int64_t row = random.in(0, t.b - 1);
    t.run(&t.x[row * t.d], 1, again.data, leaf.data, 1);
    if (leaf[0] != t.leaf[row]) mismatch("row %lld alone has leaf %d, in the batch %d", (long long)row, leaf[0], t.leaf[row]);
    expect_same("a row alone and in the batch", &t.y[row * t.o], again.data, t.o);
  }
}

// ---- routed trees ----

struct RoutedTrees {
  int64_t b, m, g, w, d;
  Activation activation;
  bool gated, biased;
  Array<float> x, node_w, node_b, b_in, b_out;
  Weights w_in, w_out;
  Array<float> y;

  RoutedTrees(Random& random, int64_t b, int64_t m, int64_t depth, int64_t w, int64_t d, Type type)
      : b(b), m(m), g(int64_t(1) << depth), w(w), d(d), activation(Activation(random.in(0, 3))), gated(random.chance(50)),
        biased(random.chance(50)), x(draw_inputs(random, b, d, false)),
        node_w(draw(random, m * (g - 1) * d, 1.0f / std::sqrt(float(d)))),
        node_b(draw(random, m * (g - 1), random.chance(25) ? 0.0f : 0.3f)),
        b_in(draw(random, m * g * w, 0.5f)), b_out(draw(random, m * g * d, 0.5f)),
        w_in(random, type, m * g * w, d, m * g * w, 1.0f / std::sqrt(float(d)), false),
        w_out(random, type, m * g * w, d, m * g * w, 1.0f / std::sqrt(float(w)), false),
        y(random, b * d) {}

  void run(const float* rows, int64_t count, float* to, int64_t threads) const {
    const RoutedForward f{count, m, g, w, d, rows, node_w.data, node_b.data, w_in.data(), w_in.scale_data(),
                          biased ? b_in.data : nullptr, w_out.data(), w_out.scale_data(), biased ? b_out.data : nullptr,
                          to, w_in.type, activation, gated};
    if (ufbert_routed_forward(&f, threads)) mismatch("there are no kernels");
  }

  // Nothing is said of a row with a decision so near that rounding may turn it.
  void expect_output(int64_t row) const {
    std::vector<Sum> wanted(d);
    for (int64_t tree = 0; tree < m; ++tree) {
      int64_t node = 0, decisions = 0;
      double certain = 0, gate_off = 0;
      while (node < g - 1) {
        const int64_t at = tree * (g - 1) + node;
        Sum z = dot(&x[row * d], std::vector<double>(&node_w[at * d], &node_w[at * d] + d).data(), d);
        z.add(1, 0, node_b[at]);
        if (std::fabs(z.value) <= z.rounding(dot_steps(d)) + kTiny) return;
        certain += 2.0 / (1.0 + std::exp(-std::fabs(z.value))), gate_off += z.rounding(dot_steps(d)) + 8 * kEpsilon;
        node = 2 * node + 1 + (z.value > 0), ++decisions;
      }
      const double gate = gated && decisions ? certain / double(decisions) : 1.0;
      const int64_t leaf = tree * g + node - (g - 1);
      for (int64_t c = 0; c < d && biased; ++c) wanted[c].add(gate, gated ? gate_off : 0, b_out[leaf * d + c]);
      for (int64_t j = 0; j < w; ++j) {
        const int64_t h = (tree * g + node - (g - 1)) * w + j;
        Sum hidden = dot(&x[row * d], &w_in.value[h * d], d);
        hidden.value *= w_in.scale_of(h), hidden.size *= std::fabs(w_in.scale_of(h));
        if (biased) hidden.add(1, 0, b_in[h]);
        const double z = hidden.value, steepest = 1.2, value = active(activation, z), scale = w_out.scale_of(h);
        const double off = active_off(activation, z) + steepest * hidden.rounding(double(d) + 20);
        const double all_off = (off * gate + std::fabs(value) * (gated ? gate_off : 0)) * std::fabs(scale) + w_out.lost(value);
        for (int64_t c = 0; c < d; ++c) wanted[c].add(value * gate * scale, all_off, w_out.value[h * d + c]);
      }
    }
    expect_row("y", &y[row * d], wanted, row, double(m * (w + 7)));
  }
};

void fuzz_routed(Random& random, RoutedTrees& t) {
  const int64_t threads = random.in(1, 4);
  t.run(t.x.data, t.b, t.y.data, threads);
  for (int64_t row = 0; row < t.b; ++row) t.expect_output(row);
  Array<float> again(random, t.b * t.d);
  elsewhere([&] { t.run(t.x.data, t.b, again.data, threads % 4 + 1); });
  expect_same("threads", t.y.data, again.data, t.b * t.d);
  for (int64_t i = 0; t.b && i < 3; ++i) {
    const int64_t row = random.in(0, t.b - 1);
    t.run(&t.x[row * t.d], 1, again.data, 1);
    expect_same("a row alone and in the batch", &t.y[row * t.d], again.data, t.d);
  }
}

// ---- calls ----

// The call under way.
char described[400];
long long seed = 1, number = 0;

void say_where() {
  std::printf("--seed %lld --first %lld (%s, %s)\n", seed, number, ufbert_isa(), described);
  std::fflush(stdout);
}

// The sanitizers' (null without them): what to call before they end the process.
extern "C" __attribute__((weak)) void __sanitizer_set_death_callback(void (*)());

void one_call(Random& random) {
  static const char* const types[] = {"float32", "bfloat16", "int8"};
  const int64_t kind = random.in(1, 100);
  const bool special = random.chance(25);
  if (random.chance(30)) return encoder_call(random, special, described, sizeof described);
  int64_t b = draw_rows(random), d = draw_width(random), depth = random.chance(2) ? 12 : random.in(0, 8);
  if (kind <= 15) {
    const Type type = Type(random.in(0, 2));
    int64_t w = random.chance(30) ? 1 : random.in(1, 40), o = random.in(1, 70);
    while (depth > 0 && (d * w + w * o) << depth > 100000) --depth;
    while (b * w * (d + o) > 500000) b /= 2;
    LeafTree t(random, b, depth, d, w, o, type, special);
    std::snprintf(described, sizeof described, "leaf_forward b=%lld depth=%lld d=%lld w=%lld o=%lld %s activation=%d special=%d",
                  (long long)b, (long long)depth, (long long)d, (long long)w, (long long)o, types[type], t.activation, special);
    fuzz_leaf(random, t);
  } else if (kind <= 30) {
    const Type type = Type(random.in(0, 2));
    const int64_t m = random.chance(50) ? 1 : random.in(2, 4), w = random.chance(20) ? 1 : random.in(1, 40);
    while (depth > 0 && (m * w * d) << depth > 100000) --depth;
    while (b * m * w * d > 500000) b > 1 ? b /= 2 : d = (d + 1) / 2;
    RoutedTrees t(random, b, m, depth, w, d, type);
    std::snprintf(described, sizeof described, "routed_forward b=%lld m=%lld depth=%lld w=%lld d=%lld %s activation=%d gated=%d",
                  (long long)b, (long long)m, (long long)depth, (long long)w, (long long)d, types[type], t.activation, t.gated);
    fuzz_routed(random, t);
  } else {
    const bool back = kind <= 50;
    const int64_t m = random.chance(50) ? 1 : random.in(2, 4), room = random.chance(2) ? 4000000 : 60000;
    Type out = back ? kFloat32 : Type(random.in(0, 2)), in = random.chance(50) ? out : kFloat32;
    while (d > 1 && (m * d << depth) > room && random.chance(50)) d /= 2;
    while (depth > 0 && (m * d << depth) > room) --depth;
    while (b > 400 && b * m * (depth + 1) * d > 1000000) d = (d + 1) / 2, b = random.chance(50) ? b : std::max<int64_t>(400, b / 2);
    while (b * m * (depth + 1) * d > 1000000) d == 768 ? b /= 2 : d = (d + 1) / 2;
    Tree t(random, b, m, depth, d, in, out, special);
    std::snprintf(described, sizeof described, "%s b=%lld m=%lld depth=%lld d=%lld in=%s out=%s activation=%d special=%d",
                  back ? "backward" : "forward", (long long)b, (long long)m, (long long)depth, (long long)d, types[in],
                  types[out], t.activation, special);
    back ? fuzz_backward(random, t) : fuzz_forward(random, t);
  }
}

int main(int count, char** words) {
  long long calls = 2000, first = 0, mismatches = 0;
  for (int i = 1; i + 1 < count; i += 2) {
    const std::string name = words[i];
    (name == "--calls" ? calls : name == "--seed" ? seed : first) = std::atoll(words[i + 1]);
  }
  if (__sanitizer_set_death_callback) __sanitizer_set_death_callback(say_where);
  std::vector<std::string> sets;
  if (std::getenv("UFBERT_ISA")) {
    sets.push_back(std::getenv("UFBERT_ISA"));
  } else {
    for (const char* name : {"avx512bf16", "avx512", "avx2", "plain"}) {
      setenv("UFBERT_ISA", name, 1);
      if (*ufbert_isa()) sets.push_back(name);
    }
  }
  for (number = first; number < first + calls; ++number) {
    setenv("UFBERT_ISA", sets[number % sets.size()].c_str(), 1);
    Random random{uint64_t(seed) * 0x2545f4914f6cdd1du + uint64_t(number)};
    random.state = random.next();
    try {
      one_call(random);
    } catch (const Mismatch& found) {
      if (++mismatches > 10) continue;  // they are counted, but ten are enough to read
      std::printf("mismatch: %s\n", found.what.c_str());
      say_where();
    }
  }
  std::printf("%lld calls, %lld mismatches (seed %lld, %zu instruction sets)\n", calls, mismatches, seed, sets.size());
  return mismatches > 0;
}

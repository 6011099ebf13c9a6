// The kernels as XLA custom calls (jax.ffi), and as plain C functions for tests without XLA.

#include <cmath>
#include <cstdlib>
#include <cstring>

#include "pool.h"

#ifndef UFBERT_WITHOUT_XLA
#include "xla/ffi/api/ffi.h"
#endif

namespace ufbert {

// The kernels to use: the best that this processor supports, or those that UFBERT_ISA names; null if it does not support those.
static const Kernels* chosen() {
  static const Kernels* const all[] = {
#if defined(__x86_64__)
      &kernels_avx512bf16, &kernels_avx512, &kernels_avx2,
#endif
      &kernels_plain};
  const char* name = std::getenv("UFBERT_ISA");
  for (const Kernels* kernels : all)
    if (name && *name ? !std::strcmp(name, kernels->name) : kernels->supported()) return kernels->supported() ? kernels : nullptr;
  return nullptr;
}

enum Outcome : int { kDone = 0, kNoKernels = 1, kNoMemory = 2 };

// Calls a kernel of this processor. Nothing is thrown beyond here: XLA and C know no exceptions.
template <typename Call>
Outcome compute(void (*Kernels::*kernel)(const Call&, Pool&), const Call& call, int64_t threads) {
  const Kernels* kernels = chosen();
  if (!kernels) return kNoKernels;
  try {
    SharedPool pool(threads);
    (kernels->*kernel)(call, pool);
    return kDone;
  } catch (const std::exception&) {  // kernels throw only for lack of memory, or a vector longer than any may be
    return kNoMemory;
  }
}

}  // namespace ufbert

using namespace ufbert;

// These two return "" or -1 if this processor lacks the instruction set that UFBERT_ISA names; all others return an Outcome.
extern "C" const char* ufbert_isa() {
  const Kernels* kernels = chosen();
  return kernels ? kernels->name : "";
}
extern "C" int64_t ufbert_packed_size(int64_t d, int64_t f, int32_t type) {  // in bytes
  const Kernels* kernels = chosen();
  return kernels ? kernels->packed_size(d, f, Type(type)) : -1;
}
extern "C" int ufbert_pack(int64_t d, int64_t f, const float* w, void* packed, float* scale, int32_t type, int64_t threads) {
  return compute(&Kernels::pack, Pack{d, f, w, nullptr, packed, scale, Type(type)}, threads);
}
extern "C" int ufbert_pack_rounded(int64_t d, int64_t f, const int8_t* rounded, void* packed, int64_t threads) {
  return compute(&Kernels::pack, Pack{d, f, nullptr, rounded, packed, nullptr, kInt8}, threads);
}
#define C_FUNCTION(kernel, Call) \
  extern "C" int ufbert_##kernel(const Call* call, int64_t threads) { return compute(&Kernels::kernel, *call, threads); }
C_FUNCTION(forward, Forward)
C_FUNCTION(backward, Backward)
C_FUNCTION(leaf_forward, LeafForward)
C_FUNCTION(routed_forward, RoutedForward)
C_FUNCTION(attention, Attention)
C_FUNCTION(norm, Norm)
C_FUNCTION(add, Add)
C_FUNCTION(linear, Linear)
C_FUNCTION(feed_forward, FeedForward)

#ifndef UFBERT_WITHOUT_XLA

namespace ffi = xla::ffi;

namespace {

using F32 = ffi::Buffer<ffi::F32>;
using S32 = ffi::Buffer<ffi::S32>;

// An array without elements stands for one that is left out.
float* data_or_null(const F32& buffer) { return buffer.element_count() ? buffer.typed_data() : nullptr; }

int64_t size_of(Type type) { return type == kFloat32 ? 4 : type == kBfloat16 ? 2 : 1; }

bool read_type(const ffi::AnyBuffer& buffer, Type& type) {
  switch (buffer.element_type()) {
    case ffi::F32: type = kFloat32; return true;
    case ffi::BF16: type = kBfloat16; return true;
    case ffi::S8: type = kInt8; return true;
    default: return false;
  }
}

ffi::Error no_kernels() {
  return ffi::Error(ffi::ErrorCode::kFailedPrecondition, "this processor lacks the instruction set that UFBERT_ISA names");
}
ffi::Error wrong(const char* what) { return ffi::Error::InvalidArgument(what); }

template <typename Call>
ffi::Error run(void (*Kernels::*kernel)(const Call&, Pool&), const Call& call, int64_t threads) {
  const Outcome outcome = compute(kernel, call, threads);
  if (outcome == kNoKernels) return no_kernels();
  if (outcome == kNoMemory)
    return ffi::Error(ffi::ErrorCode::kResourceExhausted, "there is not enough memory for the kernels' intermediate results");
  return ffi::Error::Success();
}

template <typename B>
bool has(const B& buffer, int64_t count) {
  return int64_t(buffer.element_count()) == count;
}
bool full_tree(int64_t n) { return n > 0 && !(n & (n + 1)); }
bool known(int32_t activation) { return activation >= kGelu && activation <= kSymmetricGelu; }
// True if every path begins at the root and goes on to a child: the parent of node v is (v - 1) / 2, or, counted from 1, v / 2.
bool are_paths(const int32_t* node, int64_t count, int64_t steps) {
  for (const int32_t* end = node + count * steps; node < end; node += steps) {
    bool right = node[0] == 0;
    for (int64_t s = 1; s < steps; ++s) right &= (int64_t(node[s]) + 1) >> 1 == int64_t(node[s - 1]) + 1;
    if (!right) return false;
  }
  return true;
}
constexpr char kNodes[] = "a tree has 2^(D+1) - 1 nodes";
constexpr char kUnfit[] = "the weights' shapes do not fit each other";
constexpr char kUnfitRows[] = "the rows' shapes do not fit each other and the weights";
constexpr char kUnknown[] = "there is no such activation";

ffi::Error run_forward(F32 x, ffi::AnyBuffer w_in, F32 in_scale, F32 bias, ffi::AnyBuffer w_out,
                       F32 out_scale, F32 residual, ffi::Result<F32> y, S32* nodes, F32* z, int64_t layer, int64_t layers,
                       int32_t activation, int64_t threads) {
  Forward f{};
  const auto shape = w_in.dimensions();
  if (shape.size() != 3 || x.dimensions().size() != 2) return wrong("rows are (b, d), weights (m, n, d)");
  if (layers < 1 || layer < 0 || layer >= layers || shape[0] % layers) return wrong("there is no such layer in the weights");
  f.b = x.dimensions()[0], f.m = shape[0] / layers, f.n = shape[1], f.d = shape[2];
  const int64_t trees = shape[0] * f.n;
  if (!read_type(w_in, f.in_type) || !read_type(w_out, f.out_type)) return wrong("weights are float32, bfloat16 or int8");
  if (f.in_type != f.out_type && f.in_type != kFloat32) return wrong("input weights have the type of the others, or float32");
  if (!full_tree(f.n)) return wrong(kNodes);
  if (!has(w_out, trees * f.d) || !has(bias, trees) || !has(in_scale, f.in_type == kInt8 ? trees : 0) ||
      !has(out_scale, f.out_type == kInt8 ? trees : 0))
    return wrong(kUnfit);
  int64_t steps = 0;
  while (f.n >> steps) ++steps;
  if (x.dimensions()[1] != f.d || !(has(residual, 0) || has(residual, f.b * f.d)) || !has(*y, f.b * f.d) ||
      (nodes && !(has(*nodes, f.b * f.m * steps) && has(*z, f.b * f.m * steps))))
    return wrong(kUnfitRows);
  if (!known(activation)) return wrong(kUnknown);
  const int64_t first = layer * f.m * f.n;  // nodes before this layer's
  f.x = x.typed_data(), f.bias = bias.typed_data() + first;
  f.w_in = static_cast<const char*>(w_in.untyped_data()) + first * f.d * size_of(f.in_type);
  f.w_out = static_cast<const char*>(w_out.untyped_data()) + first * f.d * size_of(f.out_type);
  f.in_scale = data_or_null(in_scale), f.out_scale = data_or_null(out_scale);
  if (f.in_scale) f.in_scale += first;
  if (f.out_scale) f.out_scale += first;
  f.residual = data_or_null(residual);
  f.y = y->typed_data();
  if (nodes) f.nodes = nodes->typed_data(), f.z = z->typed_data();
  f.activation = Activation(activation);
  return run(&Kernels::forward, f, threads);
}

ffi::Error forward(F32 x, ffi::AnyBuffer w_in, F32 in_scale, F32 bias, ffi::AnyBuffer w_out, F32 out_scale,
                   F32 residual, ffi::Result<F32> y, int64_t layer, int64_t layers, int32_t activation, int64_t threads) {
  return run_forward(x, w_in, in_scale, bias, w_out, out_scale, residual, y, nullptr, nullptr, layer, layers, activation,
                     threads);
}

ffi::Error forward_saving(F32 x, ffi::AnyBuffer w_in, F32 in_scale, F32 bias, ffi::AnyBuffer w_out,
                          F32 out_scale, F32 residual, ffi::Result<F32> y, ffi::Result<S32> nodes, ffi::Result<F32> z,
                          int32_t activation, int64_t threads) {
  return run_forward(x, w_in, in_scale, bias, w_out, out_scale, residual, y, &*nodes, &*z, 0, 1, activation, threads);
}

ffi::Error backward(F32 x, F32 w_in, F32 w_out, S32 nodes, F32 z, F32 g, ffi::Result<F32> dx,
                    ffi::Result<F32> d_in, ffi::Result<F32> d_bias, ffi::Result<F32> d_out, int32_t activation, int64_t threads) {
  const auto shape = w_in.dimensions();
  if (shape.size() != 3 || x.dimensions().size() != 2) return wrong("rows are (b, d), weights (m, n, d)");
  Backward gradient{};
  gradient.b = x.dimensions()[0], gradient.m = shape[0], gradient.n = shape[1], gradient.d = shape[2];
  const int64_t rows = gradient.b * gradient.d, trees = gradient.m * gradient.n;
  if (!full_tree(gradient.n)) return wrong(kNodes);
  if (!has(w_out, trees * gradient.d) || !has(*d_in, trees * gradient.d) || !has(*d_out, trees * gradient.d) ||
      !has(*d_bias, trees))
    return wrong(kUnfit);
  int64_t path = gradient.b * gradient.m, steps = 0;
  while (gradient.n >> steps) ++steps;
  if (x.dimensions()[1] != gradient.d || !has(g, rows) || !has(*dx, rows) || !has(nodes, path * steps) || !has(z, path * steps))
    return wrong(kUnfitRows);
  if (!known(activation)) return wrong(kUnknown);
  if (!are_paths(nodes.typed_data(), path, steps)) return wrong("the nodes are not paths from the root to a leaf");
  gradient.x = x.typed_data(), gradient.w_in = w_in.typed_data(), gradient.w_out = w_out.typed_data();
  gradient.g = g.typed_data(), gradient.nodes = nodes.typed_data(), gradient.z = z.typed_data();
  gradient.dx = dx->typed_data(), gradient.d_in = d_in->typed_data();
  gradient.d_bias = d_bias->typed_data(), gradient.d_out = d_out->typed_data();
  gradient.activation = Activation(activation);
  return run(&Kernels::backward, gradient, threads);
}

ffi::Error leaf_forward(F32 x, F32 node_w, F32 node_b, ffi::AnyBuffer w_in, F32 in_scale, F32 b_in,
                        ffi::AnyBuffer w_out, F32 out_scale, F32 b_out, ffi::Result<F32> y, ffi::Result<S32> leaf,
                        int32_t activation, int64_t threads) {
  LeafForward f{};
  const auto in = w_in.dimensions(), out = w_out.dimensions();
  if (in.size() != 3 || out.size() != 3 || x.dimensions().size() != 2)
    return wrong("rows are (b, d), leaves (g, d, w) and (g, w, o)");
  f.b = x.dimensions()[0], f.g = in[0], f.d = in[1], f.w = in[2], f.o = out[2];
  if (!read_type(w_in, f.type) || w_out.element_type() != w_in.element_type()) return wrong("leaves are of one type");
  if (f.g < 1 || (f.g & (f.g - 1)) || !has(node_b, f.g - 1)) return wrong("a tree has 2^D leaves and 2^D - 1 nodes");
  const int64_t scales = f.type == kInt8 ? f.g * f.w : 0;
  if (!has(node_w, (f.g - 1) * f.d) || out[0] != f.g || out[1] != f.w || !has(b_in, f.g * f.w) || !has(b_out, f.g * f.o) ||
      !has(in_scale, scales) || !has(out_scale, scales))
    return wrong(kUnfit);
  if (x.dimensions()[1] != f.d || !has(*y, f.b * f.o) || !has(*leaf, f.b)) return wrong(kUnfitRows);
  if (!known(activation)) return wrong(kUnknown);
  f.x = x.typed_data(), f.node_w = node_w.typed_data(), f.node_b = node_b.typed_data();
  f.w_in = w_in.untyped_data(), f.w_out = w_out.untyped_data(), f.b_in = b_in.typed_data(), f.b_out = b_out.typed_data();
  f.in_scale = data_or_null(in_scale), f.out_scale = data_or_null(out_scale);
  f.y = y->typed_data(), f.leaf = leaf->typed_data();
  f.activation = Activation(activation);
  return run(&Kernels::leaf_forward, f, threads);
}

ffi::Error routed_forward(F32 x, F32 node_w, F32 node_b, ffi::AnyBuffer w_in, F32 in_scale, F32 b_in, ffi::AnyBuffer w_out,
                          F32 out_scale, F32 b_out, ffi::Result<F32> y, bool gated, int32_t activation, int64_t threads) {
  RoutedForward f{};
  const auto in = w_in.dimensions(), out = w_out.dimensions();
  if (in.size() != 4 || x.dimensions().size() != 2) return wrong("rows are (b, d), leaves (m, g, w, d)");
  f.b = x.dimensions()[0], f.m = in[0], f.g = in[1], f.w = in[2], f.d = in[3];
  if (!read_type(w_in, f.type) || w_out.element_type() != w_in.element_type()) return wrong("leaves are of one type");
  const bool is_full = f.g >= 1 && !(f.g & (f.g - 1));
  if (!is_full || !has(node_b, f.m * (f.g - 1))) return wrong("a tree has 2^D leaves and 2^D - 1 nodes");
  const int64_t scales = f.type == kInt8 ? f.m * f.g * f.w : 0;
  if (!has(node_w, f.m * (f.g - 1) * f.d) || !std::equal(in.begin(), in.end(), out.begin(), out.end()) || !has(in_scale, scales) ||
      !has(out_scale, scales) || f.m < 1 || f.w < 1)
    return wrong(kUnfit);
  f.b_in = data_or_null(b_in), f.b_out = data_or_null(b_out);
  if ((f.b_in && !has(b_in, f.m * f.g * f.w)) || (f.b_out && !has(b_out, f.m * f.g * f.d))) return wrong(kUnfit);
  if (x.dimensions()[1] != f.d || !has(*y, f.b * f.d)) return wrong(kUnfitRows);
  if (!known(activation)) return wrong(kUnknown);
  f.x = x.typed_data(), f.node_w = node_w.typed_data(), f.node_b = node_b.typed_data();
  f.w_in = w_in.untyped_data(), f.w_out = w_out.untyped_data();
  f.in_scale = data_or_null(in_scale), f.out_scale = data_or_null(out_scale);
  f.y = y->typed_data(), f.gated = gated, f.activation = Activation(activation);
  return run(&Kernels::routed_forward, f, threads);
}

ffi::Error attention(F32 qkv, S32 segment, ffi::Result<F32> y, bool padding_sees, bool narrow, int64_t threads) {
  const auto shape = qkv.dimensions();
  if (shape.size() != 5 || shape[2] != 3) return wrong("queries, keys and values are (b, t, 3, h, k)");
  Attention a{};
  a.b = shape[0], a.t = shape[1], a.h = shape[3], a.k = shape[4];
  if (!has(*y, a.b * a.t * a.h * a.k) || !(has(segment, 0) || has(segment, a.b * a.t))) return wrong(kUnfitRows);
  a.qkv = qkv.typed_data();
  a.segment = segment.element_count() ? segment.typed_data() : nullptr;
  a.y = y->typed_data(), a.scale = 1.0f / std::sqrt(float(a.k)), a.padding_sees = padding_sees, a.narrow = narrow;
  return run(&Kernels::attention, a, threads);
}

ffi::Error norm(F32 x, F32 scale, F32 bias, ffi::Result<F32> y, float eps, int64_t threads) {
  const auto shape = x.dimensions();
  if (shape.size() != 2) return wrong("rows are (b, d)");
  const Norm m{shape[0], shape[1], x.typed_data(), scale.typed_data(), data_or_null(bias), y->typed_data(), eps};
  if (!has(scale, m.d) || !(has(bias, 0) || has(bias, m.d)) || !has(*y, m.b * m.d)) return wrong(kUnfitRows);
  return run(&Kernels::norm, m, threads);
}

ffi::Error add(F32 left, F32 right, ffi::Result<F32> y, int64_t threads) {
  const Add a{int64_t(left.element_count()), left.typed_data(), right.typed_data(), y->typed_data()};
  if (!has(right, a.size) || !has(*y, a.size)) return wrong(kUnfitRows);
  return run(&Kernels::add, a, threads);
}

// Reads the weights of a layer from d to f numbers. Returns what does not fit, or null.
const char* read_layer(ffi::AnyBuffer packed, F32 scale, F32 bias, F32 input, const Kernels& kernels, Linear& l) {
  if (!read_type(packed, l.type)) return "weights are float32, bfloat16 or int8";
  if (int64_t(packed.size_bytes()) != kernels.packed_size(l.d, l.f, l.type) || !has(scale, l.type == kInt8 ? l.f : 0))
    return "these weights were not packed for rows of this width by kernels like these";
  if (!(has(bias, 0) || has(bias, l.f))) return kUnfitRows;
  if (!(has(input, 0) || (l.type == kInt8 && has(input, 2)))) return "rows are rounded by a step and a zero, with int8 weights";
  l.packed = packed.untyped_data(), l.scale = data_or_null(scale);
  l.bias = data_or_null(bias), l.input = data_or_null(input);
  return nullptr;
}

ffi::Error linear(F32 x, ffi::AnyBuffer packed, F32 scale, F32 bias, F32 input, ffi::Result<F32> y, int64_t threads) {
  Linear l{};
  if (x.dimensions().size() != 2 || y->dimensions().size() != 2) return wrong("rows are (b, d) and (b, f)");
  const Kernels* kernels = chosen();
  if (!kernels) return no_kernels();
  l.b = x.dimensions()[0], l.d = x.dimensions()[1], l.f = y->dimensions()[1];
  if (const char* why = read_layer(packed, scale, bias, input, *kernels, l)) return wrong(why);
  if (y->dimensions()[0] != l.b) return wrong(kUnfitRows);
  l.x = x.typed_data(), l.y = y->typed_data();
  return run(&Kernels::linear, l, threads);
}

ffi::Error feed_forward(F32 x, ffi::AnyBuffer in, F32 in_scale, F32 in_bias, F32 in_input, ffi::AnyBuffer out, F32 out_scale,
                        F32 out_bias, F32 out_input, ffi::Result<F32> y, int64_t width, int32_t activation, int64_t threads) {
  FeedForward f{};
  if (x.dimensions().size() != 2 || y->dimensions().size() != 2 || width < 0) return wrong("rows are (b, d) and (b, o)");
  if (x.dimensions()[0] != y->dimensions()[0]) return wrong(kUnfitRows);
  if (!known(activation)) return wrong(kUnknown);
  const Kernels* kernels = chosen();
  if (!kernels) return no_kernels();
  f.in.b = f.out.b = x.dimensions()[0], f.in.d = x.dimensions()[1], f.in.f = f.out.d = width, f.out.f = y->dimensions()[1];
  if (const char* why = read_layer(in, in_scale, in_bias, in_input, *kernels, f.in)) return wrong(why);
  if (const char* why = read_layer(out, out_scale, out_bias, out_input, *kernels, f.out)) return wrong(why);
  f.in.x = x.typed_data(), f.out.y = y->typed_data(), f.activation = Activation(activation);
  return run(&Kernels::feed_forward, f, threads);
}

}  // namespace

#define ROWS_AND_TREES()                                                                                              \
  ffi::Ffi::Bind().Arg<F32>().Arg<ffi::AnyBuffer>().Arg<F32>().Arg<F32>().Arg<ffi::AnyBuffer>() \
      .Arg<F32>().Arg<F32>()

XLA_FFI_DEFINE_HANDLER_SYMBOL(ufbert_xla_forward, forward,
                              ROWS_AND_TREES().Ret<F32>().Attr<int64_t>("layer").Attr<int64_t>("layers")
                                  .Attr<int32_t>("activation").Attr<int64_t>("threads"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(
    ufbert_xla_forward_saving, forward_saving,
    ROWS_AND_TREES().Ret<F32>().Ret<S32>().Ret<F32>().Attr<int32_t>("activation").Attr<int64_t>("threads"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(ufbert_xla_backward, backward,
                              ffi::Ffi::Bind().Arg<F32>().Arg<F32>().Arg<F32>().Arg<S32>().Arg<F32>()
                                  .Arg<F32>().Ret<F32>().Ret<F32>().Ret<F32>().Ret<F32>()
                                  .Attr<int32_t>("activation").Attr<int64_t>("threads"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(ufbert_xla_leaf_forward, leaf_forward,
                              ffi::Ffi::Bind().Arg<F32>().Arg<F32>().Arg<F32>().Arg<ffi::AnyBuffer>()
                                  .Arg<F32>().Arg<F32>().Arg<ffi::AnyBuffer>().Arg<F32>().Arg<F32>().Ret<F32>().Ret<S32>()
                                  .Attr<int32_t>("activation").Attr<int64_t>("threads"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(ufbert_xla_routed_forward, routed_forward,
                              ffi::Ffi::Bind().Arg<F32>().Arg<F32>().Arg<F32>().Arg<ffi::AnyBuffer>().Arg<F32>()
                                  .Arg<F32>().Arg<ffi::AnyBuffer>().Arg<F32>().Arg<F32>().Ret<F32>()
                                  .Attr<bool>("gated").Attr<int32_t>("activation").Attr<int64_t>("threads"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(ufbert_xla_attention, attention,
                              ffi::Ffi::Bind().Arg<F32>().Arg<S32>().Ret<F32>().Attr<bool>("padding_sees")
                                  .Attr<bool>("narrow").Attr<int64_t>("threads"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(ufbert_xla_norm, norm,
                              ffi::Ffi::Bind().Arg<F32>().Arg<F32>().Arg<F32>().Ret<F32>()
                                  .Attr<float>("eps").Attr<int64_t>("threads"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(ufbert_xla_add, add,
                              ffi::Ffi::Bind().Arg<F32>().Arg<F32>().Ret<F32>().Attr<int64_t>("threads"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(ufbert_xla_linear, linear,
                              ffi::Ffi::Bind().Arg<F32>().Arg<ffi::AnyBuffer>().Arg<F32>().Arg<F32>().Arg<F32>().Ret<F32>()
                                  .Attr<int64_t>("threads"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(ufbert_xla_feed_forward, feed_forward,
                              ffi::Ffi::Bind().Arg<F32>().Arg<ffi::AnyBuffer>().Arg<F32>().Arg<F32>().Arg<F32>()
                                  .Arg<ffi::AnyBuffer>().Arg<F32>().Arg<F32>().Arg<F32>().Ret<F32>()
                                  .Attr<int64_t>("width").Attr<int32_t>("activation").Attr<int64_t>("threads"));

#endif

// Arguments and results of the kernels: the tree layers of ufbert/ops, and the rest of an encoder.
//
// Letters as everywhere: b rows, d their width, m parallel trees, n nodes a tree, s = depth + 1 nodes on a path, t tokens,
// h heads, k their width, f a layer's outputs. Arrays are contiguous, last index fastest, and aligned to their element type.
// A null pointer leaves an optional array out.
//
// A number nearer to zero than 2^-126 counts as zero wherever it is read, and a result as small becomes zero, on every thread and
// with every instruction set (pool.h). Infinity times such a number is therefore no number, as infinity times zero is.
#pragma once

#include <cstdint>

namespace ufbert {

enum Activation : int32_t { kGelu = 0, kGeluTanh = 1, kRelu = 2, kSymmetricGelu = 3 };
enum Type : int32_t { kFloat32 = 0, kBfloat16 = 1, kInt8 = 2 };

// Runs task(i) for i = 0 .. count - 1, in parallel if it can, and returns when all are done.
struct Pool {
  virtual ~Pool() = default;
  virtual void run(int64_t count, void (*task)(void* self, int64_t i), void* self) = 0;
  int64_t threads = 1;
};

// y = residual + sum over trees of sum over the path of activation(z) * w_out[node], z = w_in[node] . x + bias[node].
struct Forward {
  int64_t b, m, n, d;
  const float* x;          // b d
  const void* w_in;        // m n d of in_type; an int8 row counts as row * in_scale
  const float* in_scale;   // m n, with int8
  const float* bias;       // m n
  const void* w_out;       // m n d of out_type
  const float* out_scale;  // m n, with int8
  const float* residual;   // b d, optional
  float* y;                // b d; may be the residual itself
  int32_t* nodes;          // b m s, optional: the path
  float* z;                // b m s, optional: its logits
  Type in_type, out_type;
  Activation activation;
};

// Gradients of sum(g * y) of a float32 layer without its residual, from the path that the forward pass took.
struct Backward {
  int64_t b, m, n, d;
  const float *x, *w_in, *w_out, *g;  // b d, m n d, m n d, b d
  const int32_t* nodes;               // b m s
  const float* z;                     // b m s
  float *dx, *d_in, *d_bias, *d_out;  // b d, m n d, m n, m n d; zero for nodes that no row visited
  Activation activation;
};

// The original tree: leaf of x, then y = activation(x w_in[leaf] + b_in[leaf]) w_out[leaf] + b_out[leaf].
struct LeafForward {
  int64_t b, g, d, w, o;   // g leaves, g - 1 nodes
  const float* x;          // b d
  const float* node_w;     // g-1 d
  const float* node_b;     // g-1
  const void* w_in;        // g d w of type; an int8 column counts as column * in_scale
  const float* in_scale;   // g w, with int8
  const float* b_in;       // g w
  const void* w_out;       // g w o of type
  const float* out_scale;  // g w, with int8
  const float* b_out;      // g o
  float* y;                // b o
  int32_t* leaf;           // b
  Type type;
  Activation activation;
};

// Trees that end in leaves of w neurons: y = the sum over trees of gate * (activation(w_in[leaf] x + b_in[leaf]) w_out[leaf] +
// b_out[leaf]). A row turns right where its logit is above 0. The gate is the mean of 2 sigmoid(|logit|) over the decisions, or 1.
struct RoutedForward {
  int64_t b, m, g, w, d;   // m trees of g leaves and g - 1 nodes
  const float* x;          // b d
  const float* node_w;     // m g-1 d
  const float* node_b;     // m g-1
  const void* w_in;        // m g w d of type; an int8 row counts as row * in_scale
  const float* in_scale;   // m g w, with int8
  const float* b_in;       // m g w, or null
  const void* w_out;       // m g w d of type
  const float* out_scale;  // m g w, with int8
  const float* b_out;      // m g d, or null
  float* y;                // b d
  Type type;
  Activation activation;
  bool gated;
};

// softmax(scale q key^T) value among the tokens of a document. The documents of a row lie one after the other; `segment` numbers
// them from 1. The output of padding, 0, is zero; with `padding_sees` it attends to all of the row up to its last document.
struct Attention {
  int64_t b, t, h, k;
  const float* qkv;        // b t 3 h k: queries, keys, values
  const int32_t* segment;  // b t, optional: a row is one document
  float* y;                // b t h k
  float scale;
  bool padding_sees;
  bool narrow;             // products of bfloat16, where the processor multiplies such numbers
};

// y = (x - mean) / sqrt(variance + eps) * scale + bias, row by row.
struct Norm {
  int64_t b, d;
  const float *x, *scale, *bias;  // b d, d, d; bias optional
  float* y;                       // b d
  float eps;
};

// y = left + right. XLA would divide so short a sum among threads of its own, which then compete with ours.
struct Add {
  int64_t size;
  const float *left, *right;
  float* y;
};

// Weights (d, f) of a linear layer in the order in which `linear` reads them; int8 columns are rounded to 255 even steps, unless
// they are `rounded` already, with factors that the caller keeps.
struct Pack {
  int64_t d, f;
  const float* w;         // d f; not read with `rounded`
  const int8_t* rounded;  // d f, optional, with int8
  void* packed;           // packed_size(d, f, type) bytes
  float* scale;           // f, with int8: the factor of each column; not written with `rounded`
  Type type;
};

// y = x w + bias, from packed weights. With int8, rows are rounded, too: to step * (n - zero), n = 0 .. 255, where the caller
// fixes the two, and else each to 255 even steps of its own. With bfloat16 they are where the processor multiplies such numbers.
struct Linear {
  int64_t b, d, f;
  const float* x;       // b d
  const void* packed;   // of type
  const float* scale;   // f, with int8
  const float* bias;    // f, optional
  const float* input;   // step and zero, optional, with int8
  float* y;             // b f
  Type type;
};

// y = activation(x w + bias) w + bias, by the weights of `in` and `out`. Between the two, nothing is written but what `out` reads.
struct FeedForward {
  Linear in, out;       // in.y and out.x are not used
  Activation activation;
};

// One set of kernels for each instruction set.
struct Kernels {
  const char* name;
  bool (*supported)();
  void (*forward)(const Forward&, Pool&);
  void (*backward)(const Backward&, Pool&);
  void (*leaf_forward)(const LeafForward&, Pool&);
  void (*routed_forward)(const RoutedForward&, Pool&);
  void (*attention)(const Attention&, Pool&);
  void (*norm)(const Norm&, Pool&);
  void (*add)(const Add&, Pool&);
  int64_t (*packed_size)(int64_t d, int64_t f, Type);
  void (*pack)(const Pack&, Pool&);
  void (*linear)(const Linear&, Pool&);
  void (*feed_forward)(const FeedForward&, Pool&);
};

extern const Kernels kernels_plain;
#if defined(__x86_64__)
extern const Kernels kernels_avx2, kernels_avx512, kernels_avx512bf16;
#endif

}  // namespace ufbert

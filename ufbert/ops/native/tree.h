// The tree layers of ufbert/ops/fff.py and leaf_fff.py on a CPU: what the kernels take and return.
//
// Letters as everywhere: b rows, d their width, m parallel trees, n nodes a tree, s = depth + 1 nodes on a path. Arrays are
// contiguous, last index fastest, and aligned to their element type. A null pointer leaves an optional array out.
#pragma once

#include <cstdint>

namespace ufbert {

enum Activation : int32_t { kGelu = 0, kGeluTanh = 1, kRelu = 2, kSymmetricGelu = 3 };
enum Type : int32_t { kFloat32 = 0, kBfloat16 = 1, kInt8 = 2 };

// Runs task(i) for i = 0 .. count - 1, at once where it can, and returns when all are done.
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
  float *dx, *d_in, *d_bias, *d_out;  // b d, m n d, m n, m n d; rows that nobody visited become zero
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

// One set of kernels for each instruction set.
struct Kernels {
  const char* name;
  bool (*supported)();
  void (*forward)(const Forward&, Pool&);
  void (*backward)(const Backward&, Pool&);
  void (*leaf_forward)(const LeafForward&, Pool&);
};

extern const Kernels kernels_plain;
#if defined(__x86_64__)
extern const Kernels kernels_avx2, kernels_avx512;
#endif

}  // namespace ufbert

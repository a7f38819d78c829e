// What is asked of a kernel: plain data, the same for every backend.
//
// Sizes are capitals (N C H W: input, K R S: filters, P Q: output), strides are in elements, and a memory format is nothing but a
// stride pattern. This header is included by objects compiled for one ISA only, so it holds data and no function.
#pragma once

#include <cstdint>

namespace fastconv {

// How operands are stored. bf16 and f16 are computed in f32.
enum class Dtype : int32_t { f32, f64, bf16, f16 };

enum class Activation : int32_t { none, relu, relu6, silu, hardswish, gelu, gelu_tanh, sigmoid };

struct Stride4 {
  int64_t n, c, h, w;
};

// Filters are w[g][k][c][r][s] with k < K/groups and c < C/groups. The group has a stride of its own so that the input gradient
// can read the same memory with k and c swapped.
struct WeightStride {
  int64_t g, k, c, r, s;
};

// Applied to the accumulators before they are stored: y = activation(sum + bias[k] + residual). The residual has y's strides.
struct Epilogue {
  bool bias, residual;
  Activation activation;
};

// The memory of one call. Which tensors are read and which is written depends on the op, see Conv2dProblem. `packed` may hold
// the filters in the kernel's own order, see Kernel::pack; w is read where it does not.
struct Conv2dArgs {
  void *x, *w, *bias, *residual, *y;
  const void* packed = nullptr;
};

// One convolution, and its two gradients: the same numbers describe all three.
//
//   fwd    y[n,k,p,q]  = epilogue( sum_{c,r,s} x[n, c, p*stride_h + r*dilation_h - pad_top, ...] * w[k,c,r,s] )
//   dgrad  x[n,c,h,w]  = sum_{k,p,q,r,s} y[n,k,p,q] * w[k,c,r,s]      where (p,r) meets h and (q,s) meets w
//   wgrad  w[k,c,r,s]  = sum_{n,p,q} x[...] * y[n,k,p,q],   and bias[k] = sum_{n,p,q} y[n,k,p,q] when epilogue.bias
//
// In dgrad and wgrad, x, w and y point at the gradient (or the tensor) of that shape. P and Q are given, so the bottom and right
// padding are whatever makes them so: four-sided padding costs no field. Negative padding crops.
struct Conv2dProblem {
  using Args = Conv2dArgs;
  Dtype dtype;
  int64_t N, C, H, W;
  int64_t K, R, S;
  int64_t P, Q;
  int64_t groups;
  int64_t stride_h, stride_w;
  int64_t pad_top, pad_left;
  int64_t dilation_h, dilation_w;
  Stride4 x;
  WeightStride w;
  Stride4 y;
  Epilogue epilogue;
  bool frozen;  // the filters stay what they are, so that bringing them into an order costs nothing that counts
};

struct Pool2dArgs {
  void *x, *y;
  int64_t* indices;
};

// One pooling, forward or backward. The window of output row p is
//   adaptive:   floor(p*H/P) .. ceil((p+1)*H/P)
//   otherwise:  p*stride_h - pad_top + r*dilation_h  for r < R
//
//   max_fwd   y = max over the window, indices[n,c,p,q] = its flat position h*W + w (indices have the strides of y)
//   max_bwd   x = 0, then x[n,c,indices] += y in the order of p, q
//   avg_fwd   y = sum / divisor
//   avg_bwd   x[n,c,h,w] = sum over the windows that cover (h,w) of y / divisor
//
// The divisor is divisor_override if that is not 0; else the window clipped to the padded input (count_include_pad) or to the
// input itself.
struct Pool2dProblem {
  using Args = Pool2dArgs;
  Dtype dtype;
  int64_t N, C, H, W;
  int64_t P, Q;
  int64_t R, S;
  int64_t stride_h, stride_w;
  int64_t pad_top, pad_bottom, pad_left, pad_right;
  int64_t dilation_h, dilation_w;
  int64_t divisor_override;
  bool count_include_pad;
  bool adaptive;
  Stride4 x, y;
};

// What is added to scores: bytes, 0 for -inf; numbers stored as the operands are; numbers of the precision that they are computed
// in, which a mask of f32 beside operands of bf16 is.
enum class MaskKind : int32_t { none, boolean, additive, wide };

// Strides of (batch, head, position, feature); of a mask: (batch, head, query, key), 0 where it is broadcast.
struct SdpaStride {
  int64_t b, h, l, d;
};

// Which keys there are: query i sees the keys i + low .. i + high that exist. Everything is low = -Lq, high = Lkv; causal is
// high = 0 counted from the upper left corner and high = Lkv - Lq from the lower right; a window bounds both.
struct Band {
  int64_t low, high;
};

// One number for each distance of a key from its query, which scores get whatever the softcap made of them: element
// j - i + Lq - 1 of Lq + Lkv - 1 with these strides, b and h 0 where it is broadcast. Relative positions, ALiBi.
struct RelativeBias {
  bool given;
  int64_t b, h, distance;
};

// Attention weights are kept with probability 1 - p; which ones follows from the key and from (b, h, i, j), see
// blocks/dropout.h.
struct Dropout {
  double p;
  int64_t key;
};

// out, dout, dq, dk, dv: forward writes out and (where given) lse, backward reads them. lse (B, Hq, Lq), dlse likewise and dmask
// (B, Hq, Lq, Lkv) are contiguous and of the precision that is computed in; lse, dlse, mask and dmask may be absent.
// So may bias, sink (B, Hq) and dbias (B, Hq, Lq + Lkv - 1), of that precision too and the last two contiguous.
struct SdpaArgs {
  void *q, *k, *v, *mask, *out, *lse;
  void *dout, *dlse, *dq, *dk, *dv, *dmask;
  void *bias, *sink, *dbias;
};

// Scaled dot product attention of Hq query heads, Hq/Hkv of which share a head of keys and values:
//
//   s[i,j]  = softcap( scale * sum_d q[i,d] * k[j,d] ) + mask[i,j] + bias[j-i]     where j lies in the band of i, else -inf
//   out[i]  = sum_j exp(s[i,j] - lse[i]) * v[j],   lse[i] = log( exp(sink) + sum_j exp(s[i,j]) )
//
// with softcap(x) = softcap * tanh(x / softcap), or x where softcap is 0. A query that sees no key has out = 0, lse = -inf and no
// gradient. D features of queries and keys, Dv of values.
struct SdpaProblem {
  using Args = SdpaArgs;
  Dtype dtype;
  int64_t B, Hq, Hkv, Lq, Lkv, D, Dv;
  double scale, softcap;
  MaskKind mask_kind;
  RelativeBias bias;
  Band band;
  Dropout dropout;
  SdpaStride q, k, v, out, mask;
  SdpaStride dout, dq, dk, dv;
};

// What is absent is null. Forward reads x, residual, gamma, beta and writes y, sum where there is a residual, and mean and rstd
// (N numbers each) where a backward pass will want them; backward reads x, mean, rstd, gamma, dy, dsum and writes those of dx,
// dgamma, dbeta that are there. mean and rstd are of the precision that is computed in.
struct NormArgs {
  void *x, *residual, *gamma, *beta, *sum, *y, *mean, *rstd;
  void *dy, *dsum, *dx, *dgamma, *dbeta;
};

// Layer normalisation of N rows of C numbers, one after the other in memory:
//
//   fwd   s = x + residual,  y[c] = (s[c] - mean) * rstd * gamma[c] + beta[c],   sum = s
//         mean = average(s),  rstd = 1 / sqrt(average((s - mean)^2) + eps)
//   bwd   x is what was normalised. With h = (x - mean) * rstd and g = dy * gamma,
//         dx = rstd * (g - average(g) - h * average(g * h)) + dsum
//         dgamma[c] = sum over the rows of dy[c] * h[c],  dbeta[c] = sum over the rows of dy[c]
struct NormProblem {
  using Args = NormArgs;
  Dtype dtype;
  int64_t N, C;
  double eps;
};

// What is absent is null. Forward reads x, residual, gamma, beta and writes y; backward reads x, residual, gamma, beta, dy and
// writes those of dx, dresidual, dgamma, dbeta that are there. gamma, beta, mean, variance and their gradients are C numbers;
// mean and variance are written by a forward pass in training and read by every other.
struct BatchNormArgs {
  void *x, *residual, *gamma, *beta, *mean, *variance, *y;
  void *dy, *dx, *dresidual, *dgamma, *dbeta;
};

// Batch normalisation of C channels of N samples at P positions, x[n][p][c] where channels are last and x[n][c][p] otherwise:
//
//   fwd   y = activation(z),  z = (x - mean[c]) * rstd[c] * gamma[c] + beta[c] + residual,  rstd = 1 / sqrt(variance + eps)
//         training: mean and variance (of the numbers themselves, divided by N*P) are those of the channel in this batch
//   bwd   with h = (x - mean) * rstd and g = dy * activation'(z), sums and averages over a channel,
//         dx = rstd * gamma * (g - average(g) - h * average(g * h)) in training, rstd * gamma * g otherwise
//         dresidual = g,  dgamma = sum(g * h),  dbeta = sum(g)
struct BatchNormProblem {
  using Args = BatchNormArgs;
  Dtype dtype;
  int64_t N, C, P;
  bool channels_last, training, residual;
  Activation activation;
  double eps;
};

// What is absent is null; all are contiguous. Forward reads gates (L, B, G*H), w (G*H, H), bias (G*H), h (B, H), LSTM's c (B, H)
// and writes y (L, B, H), LSTM's last c, which may be the first one's memory, and where a backward pass will want it kept
// (L, B, K*H): LSTM's i, f, g, o, c, GRU's r, z, n and the product that r scales. Backward reads w, h, c, y, kept, dy and LSTM's
// dc_last and writes dgates, GRU's dproduct (L, B, 3*H), dh and LSTM's dc.
struct RecurrentArgs {
  void *gates, *w, *bias, *h, *c, *y, *c_last, *kept;
  void *dy, *dc_last, *dgates, *dproduct, *dh, *dc;
};

// One layer of a recurrent network in one direction: L steps of B sequences with H hidden units. The inputs' products come as
// gates, of which a unit has G = 4 (LSTM) or 3 (GRU), gate by gate as torch orders them. With p = w * h + bias:
//
//   LSTM  i, f, o = sigmoid(gates + p),  g = tanh(gates + p),  c' = f*c + i*g,  h' = o*tanh(c')
//   GRU   r, z = sigmoid(gates + p),  n = tanh(gates + r*p),  h' = n + z*(h - n)
//
// and y holds every h'. In the gradients, dy is that of every h', dgates of the gates and dproduct of p, where they differ.
struct RecurrentProblem {
  using Args = RecurrentArgs;
  Dtype dtype;
  int64_t L, B, H;
  bool reverse;  // the last step comes first
};

}  // namespace fastconv

// What a call writes: which operands, and how many bytes.
#pragma once

#include <array>
#include <string_view>

#include "core/dtype_size.h"
#include "core/problem.h"

namespace fastconv {

// `operand` counts the pointers of the problem's Args. Results as small as a row or a filter are left out.
struct Written {
  int operand = 0;
  int64_t bytes = 0;
};
using AllWritten = std::array<Written, 3>;

inline AllWritten written(std::string_view op, const Conv2dProblem& p) {
  const int64_t size = size_of(p.dtype);
  if (op == "conv2d_fwd") return {{{4, p.N * p.K * p.P * p.Q * size}}};
  if (op == "conv2d_dgrad") return {{{0, p.N * p.C * p.H * p.W * size}}};
  return {{{1, p.K * (p.C / p.groups) * p.R * p.S * size}}};
}

inline AllWritten written(std::string_view op, const Pool2dProblem& p) {
  const int64_t size = size_of(p.dtype), out = p.N * p.C * p.P * p.Q;
  if (op == "max_pool2d_fwd") return {{{1, out * size}, {2, out * int64_t(sizeof(int64_t))}}};
  if (op == "avg_pool2d_fwd") return {{{1, out * size}}};
  return {{{0, p.N * p.C * p.H * p.W * size}}};
}

inline AllWritten written(std::string_view op, const SdpaProblem& p) {
  const int64_t size = size_of(p.dtype);
  if (op == "sdpa_fwd") return {{{4, p.B * p.Hq * p.Lq * p.Dv * size}}};
  const int64_t keys = p.B * p.Hkv * p.Lkv;
  return {{{8, p.B * p.Hq * p.Lq * p.D * size}, {9, keys * p.D * size}, {10, keys * p.Dv * size}}};
}

inline AllWritten written(std::string_view op, const NormProblem& p) {
  const int64_t bytes = p.N * p.C * size_of(p.dtype);
  if (op == "layer_norm_fwd") return {{{4, bytes}, {5, bytes}}};
  return {{{10, bytes}}};
}

inline AllWritten written(std::string_view op, const BatchNormProblem& p) {
  const int64_t bytes = p.N * p.C * p.P * size_of(p.dtype);
  if (op == "batch_norm_fwd") return {{{6, bytes}}};
  return {{{8, bytes}, {9, bytes}}};
}

inline AllWritten written(std::string_view op, const RecurrentProblem& p) {
  const int64_t bytes = p.L * p.B * p.H * size_of(p.dtype);
  if (op == "lstm_fwd") return {{{5, bytes}, {7, 5 * bytes}}};
  if (op == "gru_fwd") return {{{5, bytes}, {7, 4 * bytes}}};
  if (op == "lstm_bwd") return {{{10, 4 * bytes}}};
  return {{{10, 3 * bytes}, {11, 3 * bytes}}};
}

}  // namespace fastconv

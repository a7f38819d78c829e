// The measured ceiling that every "percent of peak" in this project divides by.
#pragma once

namespace fastconv {

// GFLOP/s of independent fused multiply-adds on registers, over all threads, best of the windows that fit into `seconds`. `isa`
// is a row's target name, dtype is f32 or f64, or bf16 for avx512_bf16: products of pairs. Throws std::invalid_argument where
// that cannot run here.
double fma_peak(const char* isa, const char* dtype, int threads, double seconds);

}  // namespace fastconv

// What each wrapper of csrc/cuda/blocks/{copy,mma}.h does to a warp's operands: for tests/test_cuda_twins.py, which has this
// compiled by the host compiler, on the emulator, and where there is a GPU by nvcc, and compares the bits.
#include "cuda/blocks/copy.h"
#include "cuda/blocks/mma.h"

namespace fastconv::sm80 {
namespace {

// Words that each lane takes and gives; its first four are aligned to 16 bytes.
constexpr int kIn = 12, kOut = 12;

struct Rows {
  alignas(128) unsigned char bytes[kWarp * 16];
};

// In: a row of 16 bytes of each lane, 8 of a matrix. Every fifth is not there, and comes as zeros. Out: both fragments.
__global__ void matrices(const uint32_t* in, uint32_t* out) {
  Rows& shared = shared_memory<Rows>();
  const int lane = int(threadIdx.x);
  unsigned char* const row = shared.bytes + 16 * lane;
  copy_async(row, in + lane * kIn, lane % 5 != 0);
  close_copies();
  close_copies();  // an empty group
  wait_for_copies<1>();
  __syncthreads();
  uint32_t r[4];
  load_matrices(r, row);
  for (int i = 0; i < 4; ++i) out[lane * kOut + i] = r[i];
  load_matrices_transposed(r, row);
  for (int i = 0; i < 4; ++i) out[lane * kOut + 4 + i] = r[i];
}

// In: A, B and C of each lane. Out: C, and A as it was multiplied.
template <class T>
__global__ void products(const uint32_t* in, uint32_t* out) {
  const int lane = int(threadIdx.x);
  uint32_t a[4], b[2];
  float c[4];
  for (int i = 0; i < 4; ++i) a[i] = in[lane * kIn + i];
  for (int i = 0; i < 2; ++i) b[i] = in[lane * kIn + 4 + i];
  memcpy(c, in + lane * kIn + 6, sizeof c);
  for (uint32_t& word : a) round_operand<T>(word);
  for (uint32_t& word : b) round_operand<T>(word);
  multiply_add<T>(c, a, b);
  for (int i = 0; i < 4; ++i) out[lane * kOut + i] = word_of(c[i]), out[lane * kOut + 4 + i] = a[i];
}

// In: two floats. Out: the pair of each kind of halves, and the first float rounded to tf32.
__global__ void words(const uint32_t* in, uint32_t* out) {
  const int lane = int(threadIdx.x);
  float x[2];
  memcpy(x, in + lane * kIn, sizeof x);
  out[lane * kOut] = pair_of<__half>(x[0], x[1]);
  out[lane * kOut + 1] = pair_of<__nv_bfloat16>(x[0], x[1]);
  out[lane * kOut + 2] = word_of(x[0]);
  round_operand<float>(out[lane * kOut + 2]);
}

using Twin = void (*)(const uint32_t*, uint32_t*);
const Twin kTwins[] = {matrices, products<__half>, products<__nv_bfloat16>, products<float>, words};

}  // namespace
}  // namespace fastconv::sm80

// Runs twin `which` on one warp; memory is the host's. nullptr, or what went wrong.
extern "C" const char* twins_run(int which, const uint32_t* in, uint32_t* out) {
  using namespace fastconv::sm80;
  static std::string error;
  try {
    const uint32_t* from = in;
    uint32_t* to = out;
#ifndef FASTCONV_EMULATED
    constexpr size_t kBytesIn = kWarp * kIn * 4, kBytesOut = kWarp * kOut * 4;
    uint32_t* memory = nullptr;
    check_cuda(cudaMalloc(&memory, kBytesIn + kBytesOut), "cudaMalloc");
    to = memory + kWarp * kIn;
    from = memory;
    check_cuda(cudaMemcpy(memory, in, kBytesIn, cudaMemcpyHostToDevice), "cudaMemcpy");
    check_cuda(cudaMemset(to, 0, kBytesOut), "cudaMemset");
#endif
    launch({nullptr, nullptr, 0, nullptr}, kTwins[which], 1, kWarp, sizeof(Rows), from, to);
#ifndef FASTCONV_EMULATED
    check_cuda(cudaMemcpy(out, to, kBytesOut, cudaMemcpyDeviceToHost), "cudaMemcpy");
    check_cuda(cudaFree(memory), "cudaFree");
#endif
  } catch (const std::exception& e) {
    error = e.what();
    return error.c_str();
  }
  return nullptr;
}

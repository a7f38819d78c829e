// The part of DLPack's binary interface that reads a tensor, version 1 (https://dmlc.github.io/dlpack/latest/c_api.html): field
// order and sizes are fixed for as long as the major version stays. A tensor class offers it as `__dlpack_c_exchange_api__`.
#pragma once

#include <cstdint>

namespace fastconv::dlpack {

constexpr uint32_t kMajor = 1;
constexpr const char* kCapsuleName = "dlpack_exchange_api";
constexpr int32_t kCpu = 1;
constexpr uint8_t kInt = 0, kFloat = 2, kBfloat = 4;

struct Device {
  int32_t type, id;
};

struct DataType {
  uint8_t code, bits;
  uint16_t lanes;
};

// Lent by the tensor: good while the tensor is alive and nobody resizes it.
struct Tensor {
  void* data;
  Device device;
  int32_t ndim;
  DataType dtype;
  int64_t* shape;
  int64_t* strides;  // in elements
  uint64_t byte_offset;
};

struct ExchangeApi {
  struct {
    uint32_t major, minor;
  } version;
  ExchangeApi* older;  // what else the library offers, for those who know an older major version only
  void* allocate;
  void* managed_from_object;
  void* managed_to_object;
  int (*tensor_from_object)(void* object, Tensor* out);  // 0, or -1 with a Python exception set; may be null
  void* current_stream;
};

static_assert(sizeof(void*) != 8 || (sizeof(Tensor) == 48 && sizeof(ExchangeApi) == 56));

}  // namespace fastconv::dlpack

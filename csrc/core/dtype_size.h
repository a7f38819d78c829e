// Bytes of one stored number.
#pragma once

#include <cstdint>

#include "core/problem.h"

namespace fastconv {

inline int64_t size_of(Dtype dtype) { return dtype == Dtype::f64 ? 8 : dtype == Dtype::f32 ? 4 : 2; }

}  // namespace fastconv

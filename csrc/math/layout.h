// Which scale does element i use? One pair (rows, inner): element i of the dense memory uses row (i / inner) % rows.
#pragma once
#include <cstdint>

#if defined(__CUDACC__)
#define QK_HD __host__ __device__ __forceinline__
#else
#define QK_HD inline __attribute__((always_inline))
#endif

namespace qk {

struct Layout {
  int64_t rows, inner;
};

}  // namespace qk

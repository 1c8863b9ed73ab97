// What the kernels of every instruction set share.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <new>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "column_conv.h"

namespace spp {

// Memory that stays with its thread from call to call, and grows when more is asked for.
class Buffer {
 public:
  template <typename T>
  T* get(size_t count) {
    const size_t floats = (count * sizeof(T) + sizeof(float) - 1) / sizeof(float);
#ifdef SPP_EXACT_BUFFERS  // so that a sanitizer sees where a buffer ends
    if (floats != size_ && floats > 0) {
#else
    if (floats > size_) {
#endif
      memory_ = aligned_floats(floats);
      size_ = floats;
    }
    return reinterpret_cast<T*>(memory_.get());
  }

 private:
  AlignedFloats memory_;
  size_t size_ = 0;
};

// Runs the parts of a job that may run out of memory. An exception that leaves an OpenMP region ends
// the process: it is kept until all threads are done.
class Attempt {
 public:
  template <typename Part>
  void run(const Part& part) {
    try {
      part();
    } catch (const std::bad_alloc&) {
      failed_.store(true);
    }
  }

  void finish() const {
    if (failed_.load()) throw std::bad_alloc();
  }

 private:
  std::atomic<bool> failed_{false};
};

inline int thread_index() {
#ifdef _OPENMP
  return omp_get_thread_num();
#else
  return 0;
#endif
}

inline int thread_count() {
#ifdef _OPENMP
  return omp_get_num_threads();
#else
  return 1;
#endif
}

// Layers in a row, the output of one being the input of the next, all of one batch at once; a linear
// layer may be the last one, else that is null.
class Sequence {
 public:
  virtual ~Sequence() = default;
  virtual void forward(const void* input, const void* residual, const Linear* linear,
                       void* output) const = 0;
};

// One set of kernels per instruction set.
struct Kernels {
  void (*forward)(const Pass&);
  void (*forward_winograd)(const Pass&);
  Sequence* (*make_sequence)(const Plan* const*, const Way* const*, int);
  void (*linear_batch)(const Linear&, const float* x, int64_t batch, int threads, float* out);
  void (*backward)(const Backward&);
};

extern const Kernels kBaseKernels;
#ifdef SPP_X86
extern const Kernels kAvx2Kernels, kAvx512Kernels;
#if defined(__clang__) || __GNUC__ >= 11
#define SPP_HAS_BFLOAT16
void forward_bfloat16(const Pass& pass);  // with AVX-512's products of bfloat16
#endif
#endif

}  // namespace spp

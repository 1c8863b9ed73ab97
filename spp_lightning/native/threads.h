// Threads: the partition of work among them, and what happens when one of them fails.
#pragma once

#include <atomic>
#include <cstdint>
#include <new>

#ifdef _OPENMP
#include <omp.h>
#endif

namespace spp {

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

// One thread's part of the work: of n items, [begin(n), end(n)).
struct Partition {
  int index, count;
  int begin(int n) const { return static_cast<int>(static_cast<int64_t>(n) * index / count); }
  int end(int n) const { return static_cast<int>(static_cast<int64_t>(n) * (index + 1) / count); }
};

// An exception that leaves an OpenMP region ends the process. This keeps the fact that memory ran out
// until all threads have left the region.
class OutOfMemory {
 public:
  template <typename Part>
  void guard(const Part& part) {
    try {
      part();
    } catch (const std::bad_alloc&) {
      happened_.store(true);
    }
  }

  void rethrow() const {
    if (happened_.load()) throw std::bad_alloc();
  }

 private:
  std::atomic<bool> happened_{false};
};

}  // namespace spp

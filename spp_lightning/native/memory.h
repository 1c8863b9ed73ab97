// Memory aligned to cache lines, and buffers that stay with their thread.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdlib>
#include <memory>
#include <new>

namespace spp {

struct AlignedFree {
  void operator()(void* p) const { std::free(p); }
};
using AlignedFloats = std::unique_ptr<float[], AlignedFree>;

inline AlignedFloats aligned_floats(size_t count) {
  void* memory = nullptr;
  if (posix_memalign(&memory, 64, std::max<size_t>(1, count) * sizeof(float)) != 0)
    throw std::bad_alloc();
  return AlignedFloats(static_cast<float*>(memory));
}

// For vectors whose numbers begin at a cache line.
template <typename T>
struct AlignedAllocator {
  using value_type = T;
  static constexpr std::align_val_t kAlignment{64};

  AlignedAllocator() = default;
  template <typename Other>
  AlignedAllocator(const AlignedAllocator<Other>&) {}

  T* allocate(size_t count) { return static_cast<T*>(::operator new(count * sizeof(T), kAlignment)); }
  void deallocate(T* memory, size_t) { ::operator delete(memory, kAlignment); }
  bool operator==(const AlignedAllocator&) const { return true; }
  bool operator!=(const AlignedAllocator&) const { return false; }
};

#ifdef SPP_EXACT_BUFFERS
constexpr bool kExact = true;  // so that a sanitizer sees where a buffer ends
#else
constexpr bool kExact = false;
#endif

// Memory that stays with its thread from call to call, and grows when more is asked for.
class Buffer {
 public:
  template <typename T>
  T* get(size_t count) {
    const size_t floats = (count * sizeof(T) + sizeof(float) - 1) / sizeof(float);
    if (floats > size_ || (kExact && floats != size_ && floats > 0)) {
      memory_ = aligned_floats(floats);
      size_ = floats;
    }
    return reinterpret_cast<T*>(memory_.get());
  }

 private:
  AlignedFloats memory_;
  size_t size_ = 0;
};

}  // namespace spp

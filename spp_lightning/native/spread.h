// How the threads go through a batch and share an image, and the one barrier choreography of all forward kernels.
//
// Most images have a thread each. The last ones, as many as the batch has more than a multiple of the
// threads, are computed by all threads together. An image takes some phases: before a phase of a shared
// image starts, all threads have finished the phase before it.
#pragma once

#include "isa.h"
#include "standard.h"

namespace spp {
namespace SPP_ISA {

// How many parts to split the filters into, so that all threads have as much to do.
inline int filter_parts(int tiles, int filter_tiles, int threads) {
  int best = 1;
  int64_t least = INT64_MAX;
  for (int parts = 1; parts <= std::min(threads, filter_tiles); ++parts) {
    const int64_t items = (static_cast<int64_t>(tiles) * parts + threads - 1) / threads;
    const int64_t cost = items * (1 + (filter_tiles + parts - 1) / parts);  // 1: to pack the panel
    if (cost < least) least = cost, best = parts;
  }
  return best;
}

// Phases [begin, end): kReadPhase copies source planes, those from 0 on are the kernel's.
constexpr int kReadPhase = -1;
struct Phases {
  int begin, end;
};

// Calls run(phase, image, scratch, partition) for all phases of all images. `shared` makes the scratch of images that
// all threads compute, `own` that of a thread; a thread that is done calls `finish`.
template <typename Shared, typename Own, typename Run, typename Finish>
void spread_images(int64_t batch, int threads, Phases phases, const Shared& shared, const Own& own, const Run& run,
                   const Finish& finish) {
  threads = std::max(1, threads);
  const int64_t alone = batch / threads * threads;  // images with a thread each
  decltype(shared()) together{};
  if (threads > 1) together = shared();
  OutOfMemory memory;
  std::atomic<int64_t> next{0};  // a thread that is held up takes fewer images
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    const Partition all{thread_index(), thread_count()};
    const int64_t single = all.count == threads ? alone : 0;
    memory.guard([&] {
      if (single == 0) return;
      const auto scratch = own();
      int64_t image;
      while ((image = next.fetch_add(1)) < single)
        for (int phase = phases.begin; phase < phases.end; ++phase) run(phase, image, scratch, Partition{0, 1});
    });
    for (int64_t image = single; image < batch; ++image)
      for (int phase = phases.begin; phase < phases.end; ++phase) {
        if (all.count > 1 && (image > single || phase > phases.begin)) {
#pragma omp barrier
        }
        memory.guard([&] { run(phase, image, together, all); });
      }
    finish();
  }
  memory.rethrow();
}

}  // namespace SPP_ISA
}  // namespace spp

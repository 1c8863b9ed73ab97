// How the threads go through a batch, and the one barrier choreography of all forward kernels.
//
// Most images have a thread each. The last ones, as many as the batch has more than a multiple of the
// threads, are computed by all threads together. An image takes some phases: before a phase of a shared
// image starts, all threads have finished the phase before it.
#pragma once

#include "source_planes.h"

namespace spp {
namespace SPP_ISA {

// What the phases of an image hand on to each other.
struct Scratch {
  float* sources;   // copies of the input's channels
  float* planes;    // what lies between the convolution and the output
  float* residual;  // of bfloat16, widened
  float* result;    // which is narrowed to bfloat16
};

// One thread's part of an image.
struct ImagePart {
  int64_t image;
  Scratch scratch;
  Partition threads;
};

// Phases [begin, end): kReadPhase copies source planes, those from 0 on are the kernel's.
constexpr int kReadPhase = -1;
struct Phases {
  int begin, end;
};

struct ScratchBuffers {
  Buffer sources, planes, residual, result;

  Scratch get(const ForwardPass& pass, const Shapes& s, size_t plane_floats) {
    const size_t filters = pass.plan->geometry.filters, count = pass.plan->sources.size();
    const size_t of_sources = s.copied ? count * static_cast<size_t>(s.source_plane) + kTile : 0;
    const size_t of_residual = pass.bfloat16 && pass.residual ? filters * s.conv_plane : 0;
    return {sources.get<float>(of_sources), planes.get<float>(plane_floats),
            residual.get<float>(of_residual),
            result.get<float>(pass.bfloat16 ? filters * s.output_plane : 0)};
  }
};

// Calls run(phase, part) for all phases of all images. `plane_floats` are what `scratch.planes` holds.
template <typename Run>
void for_each_image(const ForwardPass& pass, const Shapes& s, size_t plane_floats, Phases phases,
                    const Run& run) {
  thread_local ScratchBuffers shared_buffers;
  Scratch shared{};
  const int64_t threads = std::max<int64_t>(1, pass.threads);
  const int64_t alone = pass.batch / threads * threads;  // images with a thread each
  if (threads > 1) shared = shared_buffers.get(pass, s, plane_floats);
  OutOfMemory memory;
  std::atomic<int64_t> next{0};  // a thread that is held up takes fewer images
#pragma omp parallel num_threads(static_cast<int>(threads)) if (threads > 1)
  {
    const Partition all{thread_index(), thread_count()};
    const int64_t single = all.count == threads ? alone : 0;
    memory.guard([&] {
      if (single == 0) return;
      thread_local ScratchBuffers own_buffers;
      ImagePart part{0, own_buffers.get(pass, s, plane_floats), {0, 1}};
      while ((part.image = next.fetch_add(1)) < single)
        for (int phase = phases.begin; phase < phases.end; ++phase) run(phase, part);
    });
    for (int64_t image = single; image < pass.batch; ++image)
      for (int phase = phases.begin; phase < phases.end; ++phase) {
        if (all.count > 1 && (image > single || phase > phases.begin)) {
#pragma omp barrier
        }
        memory.guard([&] { run(phase, ImagePart{image, shared, all}); });
      }
    finish_stores();
  }
  memory.rethrow();
}

// kReadPhase: a thread's part of the source planes, and of a residual of bfloat16.
inline void read_phase(const ForwardPass& pass, const Shapes& s, const ImagePart& part) {
  const Geometry& g = pass.plan->geometry;
  const int64_t at = part.image * g.channels * s.input_plane;
  const auto copy = [&](const auto* input) {
    copy_sources(*pass.plan, pass, s, input + at, part.threads, part.scratch.sources);
  };
  if (pass.bfloat16) copy(static_cast<const uint16_t*>(pass.input));
  else copy(static_cast<const float*>(pass.input));
  if (!pass.bfloat16 || pass.residual == nullptr) return;
  const int64_t begin = part.threads.begin(g.filters) * s.conv_plane;
  const int64_t end = part.threads.end(g.filters) * s.conv_plane;
  copy_row(part.scratch.residual + begin,
           static_cast<const uint16_t*>(pass.residual) + part.image * g.filters * s.conv_plane + begin,
           end - begin);
}

// Where the kernels read an image from: the source planes, or the image itself.
inline const float* input_of(const ForwardPass& pass, const Shapes& s, const ImagePart& part) {
  if (s.copied) return part.scratch.sources;
  return static_cast<const float*>(pass.input) +
         part.image * pass.plan->geometry.channels * s.input_plane;
}

inline const float* residual_of(const ForwardPass& pass, const Shapes& s, const ImagePart& part) {
  if (pass.residual == nullptr) return nullptr;
  if (pass.bfloat16) return part.scratch.residual;
  return static_cast<const float*>(pass.residual) +
         part.image * pass.plan->geometry.filters * s.conv_plane;
}

// Where the kernels write an image to: the output, or what is narrowed to it.
inline float* output_of(const ForwardPass& pass, const Shapes& s, const ImagePart& part) {
  if (pass.bfloat16) return part.scratch.result;
  return static_cast<float*>(pass.output) +
         part.image * pass.plan->geometry.filters * s.output_plane;
}

#ifdef SPP_EXACT_BUFFERS
constexpr int64_t kNonTemporalBytes = 1 << 10;  // so that small outputs are, too
#else
constexpr int64_t kNonTemporalBytes = 4 << 20;  // of an output that leaves the cache before it is read
#endif

// Whether whole vectors of the planes that the convolution makes of an image are written by non-temporal stores:
// if they are part of a large output, and all planes begin at an aligned address.
inline bool is_non_temporal(const ForwardPass& pass, const Shapes& s, const float* planes) {
  const int64_t bytes = pass.batch * pass.plan->geometry.filters * s.conv_plane * sizeof(float);
  const bool is_output = pass.plan->epilogue.empty() && !pass.bfloat16;
  return kAvoidsStoreMisses && is_output && bytes >= kNonTemporalBytes &&
         s.conv_plane % kLanes == 0 && reinterpret_cast<uintptr_t>(planes) % sizeof(Vector) == 0;
}

// Narrows a thread's part of the result to bfloat16.
inline void narrow_result(const ForwardPass& pass, const Shapes& s, const ImagePart& part) {
  const int filters = pass.plan->geometry.filters;
  const int64_t begin = part.threads.begin(filters) * s.output_plane;
  const int64_t count = part.threads.end(filters) * s.output_plane - begin;
  narrow_row(static_cast<uint16_t*>(pass.output) + part.image * filters * s.output_plane + begin,
             part.scratch.result + begin, count);
}

}  // namespace SPP_ISA
}  // namespace spp

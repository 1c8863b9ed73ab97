// What the forward kernels of floats do with each image of a batch, as spread.h hands them out.
#pragma once

#include "source_planes.h"
#include "spread.h"

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
  const auto shared = [&] { return shared_buffers.get(pass, s, plane_floats); };
  const auto own = [&] {
    thread_local ScratchBuffers own_buffers;
    return own_buffers.get(pass, s, plane_floats);
  };
  const auto run_part = [&](int phase, int64_t image, const Scratch& scratch, const Partition& threads) {
    run(phase, ImagePart{image, scratch, threads});
  };
  spread_images(pass.batch, pass.threads, phases, shared, own, run_part, finish_stores);
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
  return kStoresNonTemporal && is_output && bytes >= kNonTemporalBytes &&
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

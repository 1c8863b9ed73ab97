// Sizes of the planes of a pass.
#pragma once

#include "isa.h"
#include "standard.h"

namespace spp {
namespace SPP_ISA {

struct Shapes {
  bool copied;        // whether the kernels read source planes, which are copies of the input's
  int height, width;  // of a source plane
  int64_t source_plane, input_plane, conv_plane, output_plane;
  int out_height, out_width;
};

// Of the convolution alone.
inline Shapes shapes_of(const KeptColumns& layer, const KernelConfig& config) {
  Shapes s{};
  s.height = config.conv_height + layer.margin[0];
  s.width = config.conv_width + layer.margin[1];
  s.source_plane = static_cast<int64_t>(s.height) * s.width;
  s.input_plane = static_cast<int64_t>(config.height) * config.width;
  s.conv_plane = static_cast<int64_t>(config.conv_height) * config.conv_width;
  s.out_height = config.conv_height;
  s.out_width = config.conv_width;
  s.output_plane = s.conv_plane;
  return s;
}

// With the epilogue operations, or of the convolution alone.
inline Shapes shapes_of(const Plan& plan, const KernelConfig& config, bool with_epilogue) {
  Shapes s = shapes_of(plan, config);
  if (with_epilogue)
    for (const EpilogueOp& op : plan.epilogue) size_after(op, s.out_height, s.out_width);
  s.output_plane = static_cast<int64_t>(s.out_height) * s.out_width;
  return s;
}

// The pixel of a column under output (0, 0), in source planes one behind the other.
inline int64_t offset_in_sources(const Column& c, const Shapes& s) {
  return c.source * s.source_plane + static_cast<int64_t>(c.row) * s.width + c.col;
}

// The columns [begin, end) of a source plane that lie inside the image.
struct Inside {
  int begin, end;
  Inside(const Geometry& g, const SourcePlane& source, int width, const Shapes& s) {
    const int step = g.stride[1], first = source.phase[1] - g.padding[1];
    begin = std::min(s.width, first >= 0 ? 0 : (-first + step - 1) / step);
    end = std::max(begin, std::min(s.width, (width - first + step - 1) / step));
  }
};

}  // namespace SPP_ISA
}  // namespace spp

// All kernels of one instruction set.
#pragma once

#include "backward.h"
#include "chain.h"
#include "concat_kernel.h"
#include "depthwise_kernel.h"
#include "gate_kernel.h"
#include "norm_kernel.h"
#include "pixel_kernel.h"
#include "pool_kernel.h"
#include "winograd_kernel.h"

namespace spp {
namespace SPP_ISA {

constexpr Kernels kAllKernels = {forward_pixels, forward_depthwise, forward_winograd, make_chain, linear_batch, backward,
                                  gate, norm_parts, concat_parts, add, plane_means, pool_planes};

}  // namespace SPP_ISA
}  // namespace spp

// The kernels for any processor; the compiler maps the vectors to what there is.
#include "common.h"
#include "winograd.h"

#define SPP_ISA base
#define SPP_LANES 4
#include "kernels.inc"
const spp::Kernels spp::kBaseKernels = {base::forward, base::forward_winograd,
    base::make_sequence, base::linear_batch, base::backward};

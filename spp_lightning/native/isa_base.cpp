// The kernels for any processor; the compiler maps the vectors to what there is.
#define SPP_ISA base
#define SPP_LANES 4
#include "all_kernels.h"

const spp::Kernels spp::kBaseKernels = base::kAllKernels;

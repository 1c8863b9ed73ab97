// The pixel-vectorised kernel as it is compiled for AMX, with loops in the place of its instructions and vectors of any
// processor: for tests.
#include "kernels.h"
#include "standard.h"

#define SPP_ISA amx_bf16_emulated
#define SPP_LANES 4
#define SPP_BFLOAT16
#define SPP_PIXEL_TILES
#include "pixel_kernel.h"

const spp::PairKernel spp::kAmxPairsEmulated = {"amx_emulated", true, amx_bf16_emulated::forward_pixels};

// The int8 kernel for any processor; on x86-64 with the instructions of SSE2.
#include "int8_kernels.h"
#include "standard.h"

#define SPP_ISA int8_base
#define SPP_LANES 4
#include "int8_kernel.h"

const spp::Int8Kernel spp::kInt8Base = int8_base::int8_kernel("base");

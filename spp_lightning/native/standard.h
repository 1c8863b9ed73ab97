// The standard library's and our own headers that are shared by all instruction sets. Whoever sets a target
// by a pragma includes them before it: an inline function of theirs that was compiled with AVX may be the
// one that the linker keeps for all files.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <utility>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "kernels.h"
#include "threads.h"
#include "winograd_weights.h"

// How the functions of the C interface end: what they throw becomes a status, and the thread's last error.
#pragma once

#include <exception>
#include <new>
#include <string>

#include "checks.h"
#include "interface.h"

namespace spp {

// What was wrong in this thread's last call that failed.
inline std::string& last_error() {
  thread_local std::string error;
  return error;
}

// Runs a function; what it throws becomes a status and the thread's last error.
template <typename Function>
Status guarded(const Function& run, const char* no_memory = "There is no memory left to compute a convolution.") {
  const auto fail = [](Status status, const char* message) {
    last_error() = message;
    return status;
  };
  try {
    run();
    return Status::kOk;
  } catch (const std::bad_alloc&) {
    return fail(Status::kOutOfMemory, no_memory);
  } catch (const BadArgument& error) {
    return fail(Status::kBadArgument, error.what());
  } catch (const Unsupported& error) {
    return fail(Status::kUnsupported, error.what());
  } catch (const std::exception& error) {
    return fail(Status::kInternal, error.what());
  }
}

template <typename Struct>
const Struct& deref(const Struct* pointer) {
  check(pointer != nullptr, "A structure must not be null.");
  return *pointer;
}

}  // namespace spp

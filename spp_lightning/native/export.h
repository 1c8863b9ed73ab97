// How the functions are marked that Python calls.
#pragma once

#if defined(_WIN32)
#define SPP_EXPORT extern "C" __declspec(dllexport)
#else
#define SPP_EXPORT extern "C" __attribute__((visibility("default")))
#endif

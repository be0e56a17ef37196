// The real driver header, with default visibility: the library is compiled with hidden visibility
// and exports exactly the driver calls that it defines (plus the control functions of emulator.h).
#pragma once

#pragma GCC visibility push(default)
#include <cuda.h>
#pragma GCC visibility pop

// For a definition whose plain name cuda.h does not declare (older and per-thread variants).
#define EMULATOR_EXPORT extern "C" __attribute__((visibility("default")))

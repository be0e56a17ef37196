// What a CUDA backend was asked to be, held against what the device can do.
#pragma once

#include "backend/cuda_backend.hpp"
#include "backend/cuda_context.hpp"

namespace kvspan::cuda {

// The options with nothing left open. Throws InvalidArgument, which says what is allowed.
CudaOptions checked(const Context& context, CudaOptions options);

}  // namespace kvspan::cuda

// A strided view of memory that is owned by somebody else, on its way out through DLPack. Whoever
// takes it shares the ownership: the memory lives until the last tensor over it is gone, and the
// deleter needs neither the GIL nor a living interpreter.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "backend/backend.hpp"
#include "bindings/dlpack.hpp"
#include "core/ids.hpp"

namespace kvspan {

dlpack::Device dlpack_device(const Traits& traits);

struct TensorView {
  std::shared_ptr<const void> owner;
  Address data;
  dlpack::DataType dtype;
  dlpack::Device device;
  std::vector<std::int64_t> shape;
  std::vector<std::int64_t> strides;  // in elements
};

}  // namespace kvspan

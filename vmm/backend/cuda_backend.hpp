// The CUDA backend: a frame is one physical allocation of the driver's virtual memory management,
// mapped whole. See backend.hpp for the contract and vmm/DESIGN.md for what of the driver's
// behaviour this relies on.
#pragma once

#include <memory>
#include <vector>

#include "backend/backend.hpp"

namespace kvspan {

struct CudaOptions {
  int ordinal = 0;  // of the device
  // Power of two, a multiple of the driver's granularity; 0: what the driver recommends.
  Bytes page_size{2ull << 20};
  Bytes capacity{};             // the most memory that frames may take, a multiple of the page size
  SizeClass largest_class{};    // the largest frames that will be created
  std::vector<int> peers{};     // other devices that may read and write the frames
  bool is_shareable = false;    // frames may be exported to other processes
  Bytes reserve{256ull << 20};  // of the device's memory, left to others
  // A context fails somewhat above half a million live mappings (seen with one driver).
  std::uint64_t max_mappings = 500'000;
};

// Throws InvalidArgument (no such device or peer, page size, capacity), DriverError (no driver, one
// that is too old or lacks an entry point).
std::unique_ptr<Backend> make_cuda_backend(const CudaOptions& options);

}  // namespace kvspan

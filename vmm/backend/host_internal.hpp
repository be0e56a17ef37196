// What tests need of the host backend and nobody else.
#pragma once

#include <memory>
#include <string>

#include "backend/host_backend.hpp"

namespace kvspan {

// As make_host_backend, with `root` before /proc and /sys wherever the size of the machine's memory
// is looked up.
std::unique_ptr<Backend> make_host_backend(const HostOptions& options, const std::string& root);

}  // namespace kvspan

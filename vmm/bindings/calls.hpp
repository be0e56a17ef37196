#pragma once

#include <pybind11/pybind11.h>

#include "backend/calls.hpp"

namespace kvspan {

// name -> (calls, handles)
pybind11::dict calls_dict(const CallCounters& counters);

}  // namespace kvspan

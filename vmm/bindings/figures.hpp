#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/typing.h>

#include "backend/calls.hpp"

namespace kvspan {

// Figures by name, as the Python side turns them into its dataclasses.
using Figures = pybind11::typing::Dict<pybind11::str, pybind11::object>;

// name -> (calls, handles)
Figures calls_dict(const CallCounters& counters);

}  // namespace kvspan

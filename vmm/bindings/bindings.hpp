// The pieces of the extension module `kvspan._native`. Binding functions convert, drop the GIL and
// call; the policy is in the layers below, the names that users see are in python/kvspan.
#pragma once

#include <pybind11/pybind11.h>

namespace kvspan {

void register_errors();
void bind_tensor_view(pybind11::module_& m);
void bind_pool(pybind11::module_& m);
void bind_frame_pool(pybind11::module_& m);
void bind_cache(pybind11::module_& m);

}  // namespace kvspan

#include "bindings/bindings.hpp"

PYBIND11_MODULE(_native, m) {
  m.doc() = "The native part of kvspan; use the kvspan package.";
  kvspan::register_errors();
  kvspan::bind_tensor_view(m);
  kvspan::bind_pool(m);
  kvspan::bind_frame_pool(m);
  kvspan::bind_cache(m);
}

// A level is the kernel as compiled for a family of processors.
#pragma once

#include "kernel/work.hpp"

namespace kvspan::flash {

struct Kernel {
  void (*attend)(const Piece&);
  void (*finish)(const Join&);
};

struct Level {
  const char* name;
  int lanes;
  Kernel (*kernel)(Element stored, int block_rows);

  // The least head_dim: one chunk.
  [[gnu::always_inline]] int least_head_dim() const { return 2 * lanes; }
};

}  // namespace kvspan::flash

// Stream capture: while a thread records a CUDA graph, the driver refuses calls that it cannot
// record, by default (the global mode, which torch.cuda.graph uses too) from every thread of the
// process, and the capture is spoilt. Creating, mapping and asking events are such calls, and the
// background makes them at any time. So
// - kvspan's calls are made in the relaxed mode (Current, cuda_context.hpp): they are no part of
//   anybody's graph, and what they do is done when they are made;
// - nothing is queued on a stream that is being captured: a graph that replayed a fence, a copy of
//   a tail or lengths of long ago would be wrong in silence.
#pragma once

#include "backend/cuda_driver.hpp"

namespace kvspan::cuda {

// Throws InvalidArgument when the stream is being captured, DriverError when nobody can tell.
void require_no_capture(const Driver& api, CUstream stream);

}  // namespace kvspan::cuda

// Threads for one call.
//
// torch computes on the threads of an OpenMP runtime, which go on spinning for a while when their
// work is done. Threads of our own, or of a second runtime, would meet them there: so the work is
// given to that very runtime, found at run time through torch's library, whose thread pool then
// serves both. Nothing is linked to. Where torch or GNU's entry point (LLVM's and Intel's runtimes
// have it, too) is not there, threads are started for the call.
#pragma once

namespace kvspan::flash {

// Calls work(0) ... work(n - 1) on n_threads threads, the calling one among them. `work` must not
// throw.
void run_parallel(int n, int n_threads, void (*work)(void* context, int i), void* context);

}  // namespace kvspan::flash

// Fences are events. Each gets a number; once an event is known to have been passed it is used
// again for another fence, and its old number stands for a fence that was passed.
//
// Most fences are never asked for again, so recording reaps: as many events live as fences that the
// device has not come to yet, and a few more.
//
// Threads: everything may be called from any thread, with the context current.
#pragma once

#include <deque>
#include <mutex>
#include <vector>

#include "backend/backend.hpp"
#include "backend/cuda_context.hpp"

namespace kvspan::cuda {

class Fences {
 public:
  explicit Fences(const Context& context) : context_(context), api_(context.api()) {}
  Fences(const Fences&) = delete;
  Fences& operator=(const Fences&) = delete;
  ~Fences();

  // These throw InvalidArgument for a stream that is being captured, and DriverError.
  Fence record(CUstream stream);
  void order_after(CUstream stream, Fence fence);
  // False also when the driver cannot tell, which is reported: better to wait for ever than to
  // reuse too early.
  bool is_passed(Fence fence) noexcept;
  void wait(Fence fence);

 private:
  struct Recorded {
    std::uint64_t id = 0;
    CUevent event = nullptr;
    std::uint32_t n_waiting = 0;  // somebody is inside a wait: not to be used again yet
  };

  CUevent idle_event();
  Recorded* find(std::uint64_t id) noexcept;
  void reap() noexcept;

  const Context& context_;
  const Driver& api_;
  std::mutex mutex_;  // guards what follows
  std::uint64_t last_id_ = 0;
  std::deque<Recorded> recorded_;  // by id
  std::size_t reap_at_ = 0;        // where the next look begins
  std::vector<CUevent> idle_;
};

}  // namespace kvspan::cuda

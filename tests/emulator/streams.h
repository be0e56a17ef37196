// Streams, events and the operations on them. Operations are deferred: each stream that has work
// has a worker thread that executes it in order, so that a client that forgot to order or to wait
// shows it. Their times are virtual and fixed when they are submitted: start = the latest of the
// stream's end, the submitting lane's clock and the ends of what they wait for.
//
// With time=virtual there are no workers: operations execute when some lane's clock has reached
// their start, in the order of their start, and are finished for a lane when its clock has reached
// their end. Everything is deterministic then.
//
// Guarded by State::mutex; bytes move without it (real time), through aliases that the operation
// keeps alive.
#pragma once

#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "cuda_api.h"
#include "memory.h"

namespace emulator {

struct State;
struct Stream;

using Lock = std::unique_lock<std::mutex>;

struct Access {
  Address at = 0;
  std::size_t n = 0;
  bool write = false;
  bool device = true;  // false: host memory, no rights to check
};

struct Operation {
  enum class Kind { kMark, kCopy, kFill, kRead, kWrite, kHost };
  enum class Progress { kQueued, kRunning, kDone };

  Kind kind = Kind::kMark;
  const char* name = "";
  std::vector<Access> accesses;  // checked at the start, must hold until the end
  // A copy or fill: accesses[0] is the destination, accesses[1] the source.
  std::shared_ptr<std::vector<std::byte>> staged;  // source taken at the call (pageable memory)
  std::uint32_t value = 0;                         // fills: the pattern, of `width` bytes
  std::size_t width = 1;
  Address exact = 0;  // kernels: the range without the rounding to tiles
  std::size_t exact_n = 0;
  CUhostFn host_function = nullptr;
  void* host_data = nullptr;
  double duration_us = 0;

  std::uint64_t number = 0;
  Stream* stream = nullptr;
  double start_us = 0;
  double end_us = 0;
  std::vector<std::shared_ptr<Operation>> after;
  Progress progress = Progress::kQueued;
  bool demanded = false;  // runs although streams are held: somebody waits for it
  bool faulted = false;
  unsigned long long queries = 0;
  std::uint64_t checksum = 0;
};
using OperationPtr = std::shared_ptr<Operation>;

struct Context {
  int device = 0;
  unsigned references = 0;
  unsigned flags = 0;
};

struct Stream : std::enable_shared_from_this<Stream> {
  Context* context = nullptr;
  unsigned flags = 0;
  int priority = 0;
  std::uint64_t id = 0;
  bool legacy = false;
  bool destroyed = false;
  std::deque<OperationPtr> queue;
  OperationPtr last;
  double end_us = 0;
  CUresult error = CUDA_SUCCESS;  // of an operation; the next synchronising call returns it
  std::thread worker;
  bool worker_ended = false;
};
using StreamPtr = std::shared_ptr<Stream>;

struct Event {
  Context* context = nullptr;
  unsigned flags = 0;
  OperationPtr recorded;
};

class Streams {
 public:
  explicit Streams(State& state) : state_(state) {}

  CUstream create(Context* context, unsigned flags, int priority);
  // The stream that a handle names in `context`, default streams included; nullptr: none.
  Stream* find(CUstream handle, Context* context);
  bool was_destroyed(CUstream handle) const { return destroyed_.contains(handle); }
  void destroy(CUstream handle);
  void destroy_of(Context* context);  // all of a context, after its work

  CUevent create_event(Context* context, unsigned flags);
  Event* find(CUevent handle);
  bool was_destroyed(CUevent handle) const { return destroyed_events_.contains(handle); }
  void destroy(CUevent handle);

  void submit(Stream* stream, const OperationPtr& operation);
  // Real time: until it is done. Moves the lane's clock to its end in any case.
  void wait(Lock& lock, const OperationPtr& operation);
  // Waits for a stream, or for all streams of a context; the error of a faulted operation.
  CUresult wait(Lock& lock, Stream* stream);
  CUresult wait(Lock& lock, Context* context);
  bool finished(const OperationPtr& operation);  // as the calling lane sees it
  void count_query(const OperationPtr& operation);

  // An unfinished operation that uses some of [at, at + n), or nullptr. Marks it as faulted when
  // `fault` is set: what it works on goes away.
  Operation* unfinished_use(Address at, std::size_t n, bool fault);

  void hold(bool on);
  void catch_up(Lock& lock);  // time=virtual: executes what the lane's clock has reached
  void forget_errors();
  void shut_down(Lock& lock);  // ends all workers; queued work is dropped
  bool idle();                 // no work is pending
  std::size_t pending();
  std::size_t created_streams(const Context* of = nullptr) const;
  std::size_t created_events(const Context* of = nullptr) const;

  std::map<std::uint64_t, OperationPtr> tokens;  // results of read kernels

 private:
  bool runnable(const Operation& operation) const;
  void demand(const OperationPtr& operation);
  void work(Stream* stream);
  void execute(Lock& lock, const OperationPtr& operation, bool unlocked);
  void retire(const OperationPtr& operation);
  void join_ended();

  State& state_;
  bool held_ = false;
  bool stopping_ = false;
  std::uint64_t next_number_ = 1;
  std::uint64_t next_stream_ = 1;
  std::map<CUstream, StreamPtr> streams_;  // created ones
  std::map<Context*, StreamPtr> legacy_;
  std::map<std::pair<Context*, std::thread::id>, StreamPtr> per_thread_;
  std::vector<StreamPtr> leaving_;  // destroyed, the worker has not been joined
  std::map<CUevent, std::unique_ptr<Event>> events_;
  std::set<CUstream> destroyed_;  // handles are never used again
  std::set<CUevent> destroyed_events_;
  std::map<std::uint64_t, OperationPtr> unfinished_;    // by number
  std::set<std::pair<double, std::uint64_t>> waiting_;  // time=virtual: by start
  std::map<std::uint64_t, OperationPtr> by_number_;     // time=virtual: those of waiting_
};

std::uint64_t checksum(std::uint64_t seed, const std::byte* data, std::size_t n);
constexpr std::uint64_t kChecksumSeed = 0xcbf29ce484222325ULL;

}  // namespace emulator

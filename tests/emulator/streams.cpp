#include "streams.h"

#include <algorithm>
#include <cstring>

#include "report.h"
#include "state.h"

namespace emulator {
namespace {

// Opaque handles that are never used again, so that a stale one is recognised.
template <typename Pointer>
Pointer make_handle(std::uint64_t number, std::uint64_t family) {
  return reinterpret_cast<Pointer>((family << 40) + number * 16);
}
constexpr std::uint64_t kStreamFamily = 0x57;
constexpr std::uint64_t kEventFamily = 0xe7;
constexpr std::size_t kMostFinished = 4096;  // time=virtual: finished ones kept for slower lanes

void fill(std::byte* to, std::size_t n, std::size_t phase, std::uint32_t value, std::size_t width) {
  std::byte pattern[4];
  std::memcpy(pattern, &value, 4);
  if (width == 1) {
    std::memset(to, std::to_integer<int>(pattern[0]), n);
    return;
  }
  for (std::size_t i = 0; i < n; ++i) to[i] = pattern[(phase + i) % width];
}

// Copies between two lists of pieces of the same total length.
void copy(std::vector<Piece>& to, std::vector<Piece>& from) {
  std::size_t i = 0, j = 0, i_at = 0, j_at = 0;
  while (i < to.size() && j < from.size()) {
    const std::size_t n = std::min(to[i].n - i_at, from[j].n - j_at);
    if (to[i].data != nullptr && from[j].data != nullptr)
      std::memmove(to[i].data + i_at, from[j].data + j_at, n);
    i_at += n;
    j_at += n;
    if (i_at == to[i].n) ++i, i_at = 0;
    if (j_at == from[j].n) ++j, j_at = 0;
  }
}

}  // namespace

std::uint64_t checksum(std::uint64_t seed, const std::byte* data, std::size_t n) {
  for (std::size_t i = 0; i < n; ++i)
    seed = (seed ^ std::to_integer<std::uint64_t>(data[i])) * 0x100000001b3ULL;
  return seed;
}

CUstream Streams::create(Context* context, unsigned flags, int priority) {
  auto stream = std::make_shared<Stream>();
  stream->context = context;
  stream->flags = flags;
  stream->priority = priority;
  stream->id = next_stream_++;
  const auto handle = make_handle<CUstream>(stream->id, kStreamFamily);
  streams_.emplace(handle, std::move(stream));
  join_ended();
  return handle;
}

Stream* Streams::find(CUstream handle, Context* context) {
  if (handle == nullptr || handle == CU_STREAM_LEGACY) {
    auto& stream = legacy_[context];
    if (stream == nullptr) {
      stream = std::make_shared<Stream>();
      stream->context = context;
      stream->legacy = true;
      stream->id = next_stream_++;
    }
    return stream.get();
  }
  if (handle == CU_STREAM_PER_THREAD) {
    auto& stream = per_thread_[{context, std::this_thread::get_id()}];
    if (stream == nullptr) {
      stream = std::make_shared<Stream>();
      stream->context = context;
      stream->id = next_stream_++;
    }
    return stream.get();
  }
  const auto at = streams_.find(handle);
  return at == streams_.end() ? nullptr : at->second.get();
}

// A worker that has left its loop needs no lock any more: joining it under the lock cannot hang.
void Streams::join_ended() {
  std::erase_if(leaving_, [](const StreamPtr& stream) {
    if (stream->worker.joinable() && !stream->worker_ended) return false;
    if (stream->worker.joinable()) stream->worker.join();
    return stream.use_count() == 1 &&
           (stream->last == nullptr || stream->last->progress == Operation::Progress::kDone);
  });
}

void Streams::destroy(CUstream handle) {
  const auto at = streams_.find(handle);
  destroyed_.insert(handle);
  at->second->destroyed = true;  // cuStreamDestroy: the work still queued is done first
  leaving_.push_back(std::move(at->second));
  streams_.erase(at);
  state_.changed.notify_all();
}

void Streams::destroy_of(Context* context) {
  for (auto at = streams_.begin(); at != streams_.end();) {
    const auto next = std::next(at);
    if (at->second->context == context) destroy(at->first);
    at = next;
  }
  for (auto at = per_thread_.begin(); at != per_thread_.end();) {
    if (at->first.first != context) {
      ++at;
      continue;
    }
    at->second->destroyed = true;
    leaving_.push_back(std::move(at->second));
    at = per_thread_.erase(at);
  }
  if (const auto at = legacy_.find(context); at != legacy_.end()) {
    at->second->destroyed = true;
    leaving_.push_back(std::move(at->second));
    legacy_.erase(at);
  }
  std::erase_if(events_, [&](const auto& entry) {
    if (entry.second->context != context) return false;
    destroyed_events_.insert(entry.first);
    return true;
  });
  state_.changed.notify_all();
}

CUevent Streams::create_event(Context* context, unsigned flags) {
  auto event = std::make_unique<Event>();
  event->context = context;
  event->flags = flags;
  const auto handle = make_handle<CUevent>(next_number_++, kEventFamily);
  events_.emplace(handle, std::move(event));
  return handle;
}

Event* Streams::find(CUevent handle) {
  const auto at = events_.find(handle);
  return at == events_.end() ? nullptr : at->second.get();
}

bool Streams::runnable(const Operation& operation) const {
  if (held_ && !operation.demanded) return false;
  return std::all_of(operation.after.begin(), operation.after.end(), [](const auto& before) {
    return before->progress == Operation::Progress::kDone;
  });
}

void Streams::submit(Stream* stream, const OperationPtr& operation) {
  Operation& op = *operation;
  op.number = next_number_++;
  op.stream = stream;
  if (state_.capture.stream == stream || state_.capture.is_implied_by(*stream)) {
    state_.report.violation(std::string(op.name) + ": queued on a stream that is being captured");
  }
  // cuda.h, "Stream synchronization behavior": the legacy stream waits for all blocking streams of
  // its context and they wait for it.
  if (stream->legacy) {
    const auto follow = [&](const auto& entry) {
      Stream& other = *entry.second;
      const bool blocking = (other.flags & CU_STREAM_NON_BLOCKING) == 0;
      if (other.context == stream->context && blocking && other.last != nullptr)
        op.after.push_back(other.last);
    };
    std::for_each(streams_.begin(), streams_.end(), follow);
    std::for_each(per_thread_.begin(), per_thread_.end(), follow);
  } else if ((stream->flags & CU_STREAM_NON_BLOCKING) == 0) {
    const auto legacy = legacy_.find(stream->context);
    if (legacy != legacy_.end() && legacy->second->last != nullptr)
      op.after.push_back(legacy->second->last);
  }
  op.start_us = std::max(state_.clock.lane().now_us, stream->end_us);
  for (const auto& before : op.after) op.start_us = std::max(op.start_us, before->end_us);
  op.end_us = op.start_us + op.duration_us;
  stream->end_us = op.end_us;
  std::erase_if(op.after,
                [](const auto& before) { return before->progress == Operation::Progress::kDone; });
  stream->last = operation;
  unfinished_.emplace(op.number, operation);
  if (state_.options.virtual_time) {
    waiting_.emplace(op.start_us, op.number);
    by_number_.emplace(op.number, operation);
    return;
  }
  stream->queue.push_back(operation);
  if (!stream->worker.joinable()) stream->worker = std::thread([this, stream] { work(stream); });
  state_.changed.notify_all();
}

void Streams::work(Stream* stream) {
  Lock lock(state_.mutex);
  for (;;) {
    state_.changed.wait(lock, [&] {
      if (stopping_) return true;
      if (stream->queue.empty()) return stream->destroyed;
      return runnable(*stream->queue.front());
    });
    if (stopping_ || stream->queue.empty()) break;
    const OperationPtr operation = stream->queue.front();
    execute(lock, operation, true);
    stream->queue.pop_front();
    state_.changed.notify_all();
  }
  stream->worker_ended = true;
}

void Streams::execute(Lock& lock, const OperationPtr& operation, bool unlocked) {
  Operation& op = *operation;
  op.progress = Operation::Progress::kRunning;
  std::vector<std::vector<Piece>> pieces(op.accesses.size());
  std::string why;
  for (std::size_t i = 0; i < op.accesses.size() && !op.faulted; ++i) {
    const Access& access = op.accesses[i];
    if (!access.device) {
      pieces[i].push_back({nullptr, reinterpret_cast<std::byte*>(access.at), access.n});
    } else if (!state_.memory.resolve(
                   access.at, access.n,
                   {op.stream->context->device, op.kind == Operation::Kind::kCopy}, access.write,
                   &pieces[i], &why)) {
      state_.report.violation(text("%s %s [0x%llx, 0x%llx) on device %d: %s", op.name,
                                   access.write ? "writes" : "reads",
                                   static_cast<unsigned long long>(access.at),
                                   static_cast<unsigned long long>(access.at + access.n),
                                   op.stream->context->device, why.c_str()));
      op.faulted = true;
    }
  }
  if (op.staged != nullptr) pieces.push_back({{nullptr, op.staged->data(), op.staged->size()}});
  if (!op.faulted) {
    const bool host = op.kind == Operation::Kind::kHost;
    if (unlocked || host) lock.unlock();
    switch (op.kind) {
      case Operation::Kind::kMark:
        break;
      case Operation::Kind::kCopy:
        copy(pieces[0], pieces[1]);
        break;
      case Operation::Kind::kFill: {
        std::size_t at = 0;
        for (const auto& piece : pieces[0]) {
          if (piece.data != nullptr) fill(piece.data, piece.n, at, op.value, op.width);
          at += piece.n;
        }
        break;
      }
      case Operation::Kind::kRead:
      case Operation::Kind::kWrite: {
        // The pieces cover whole tiles; the bytes that count are those of the exact range.
        Address at = op.accesses[0].at;
        std::uint64_t sum = kChecksumSeed;
        for (const auto& piece : pieces[0]) {
          const Address from = std::max(at, op.exact);
          const Address to = std::min(at + piece.n, op.exact + op.exact_n);
          if (from < to && piece.data != nullptr) {
            std::byte* data = piece.data + (from - at);
            if (op.kind == Operation::Kind::kRead) {
              sum = checksum(sum, data, to - from);
            } else {
              fill(data, to - from, 0, op.value, 1);
            }
          }
          at += piece.n;
        }
        op.checksum = sum;
        break;
      }
      case Operation::Kind::kHost:
        in_host_function() = true;
        op.host_function(op.host_data);
        in_host_function() = false;
        break;
    }
    if (unlocked || host) lock.lock();
  }
  pieces.clear();
  retire(operation);
}

void Streams::retire(const OperationPtr& operation) {
  Operation& op = *operation;
  op.progress = Operation::Progress::kDone;
  op.after.clear();
  op.staged.reset();
  if (op.faulted) op.stream->error = CUDA_ERROR_ILLEGAL_ADDRESS;
  if (!state_.options.virtual_time) {
    unfinished_.erase(op.number);
    return;
  }
  // A lane whose clock is behind still finds the operation unfinished.
  const double past = state_.clock.earliest();
  while (!unfinished_.empty()) {
    const Operation& oldest = *unfinished_.begin()->second;
    const bool done = oldest.progress == Operation::Progress::kDone;
    if (!done || (oldest.end_us > past && unfinished_.size() <= kMostFinished)) break;
    unfinished_.erase(unfinished_.begin());
  }
}

void Streams::catch_up(Lock& lock) {
  if (!state_.options.virtual_time || in_host_function()) return;
  const double now = state_.clock.lane().now_us;
  while (!waiting_.empty() && waiting_.begin()->first <= now) {
    const auto at = by_number_.find(waiting_.begin()->second);
    const OperationPtr operation = at->second;
    by_number_.erase(at);
    waiting_.erase(waiting_.begin());
    execute(lock, operation, false);
  }
}

void Streams::demand(const OperationPtr& operation) {
  // Whatever runs before it: earlier work of its stream, and what that waits for.
  std::vector<OperationPtr> wanted{operation};
  while (!wanted.empty()) {
    const OperationPtr op = wanted.back();
    wanted.pop_back();
    if (op->demanded || op->progress == Operation::Progress::kDone) continue;
    for (const auto& earlier : op->stream->queue) {
      if (earlier->number > op->number) break;
      if (earlier->demanded) continue;
      earlier->demanded = true;
      wanted.insert(wanted.end(), earlier->after.begin(), earlier->after.end());
    }
    op->demanded = true;
  }
  state_.changed.notify_all();
}

void Streams::wait(Lock& lock, const OperationPtr& operation) {
  if (operation == nullptr) return;
  if (state_.options.virtual_time) {
    state_.clock.wait_until(operation->end_us);
    catch_up(lock);
    return;
  }
  if (operation->progress != Operation::Progress::kDone) {
    demand(operation);
    state_.changed.wait(
        lock, [&] { return stopping_ || operation->progress == Operation::Progress::kDone; });
  }
  state_.clock.wait_until(operation->end_us);
}

CUresult Streams::wait(Lock& lock, Stream* stream) {
  const StreamPtr alive = stream->shared_from_this();
  wait(lock, OperationPtr(stream->last));
  // The legacy stream stands for the blocking streams, too: synchronising it awaits them.
  if (stream->legacy) {
    std::vector<OperationPtr> others;
    for (const auto& [handle, other] : streams_) {
      if (other->context == stream->context && (other->flags & CU_STREAM_NON_BLOCKING) == 0)
        others.push_back(other->last);
    }
    for (const auto& other : others) wait(lock, other);
  }
  return std::exchange(stream->error, CUDA_SUCCESS);
}

CUresult Streams::wait(Lock& lock, Context* context) {
  std::vector<StreamPtr> all;
  const auto collect = [&](const StreamPtr& stream) {
    if (stream->context == context && stream->last != nullptr) all.push_back(stream);
  };
  for (const auto& entry : streams_) collect(entry.second);
  for (const auto& entry : per_thread_) collect(entry.second);
  for (const auto& entry : legacy_) collect(entry.second);
  for (const auto& stream : leaving_) collect(stream);
  CUresult result = CUDA_SUCCESS;
  for (const auto& stream : all) {
    wait(lock, OperationPtr(stream->last));
    const CUresult error = std::exchange(stream->error, CUDA_SUCCESS);
    if (error != CUDA_SUCCESS) result = error;
  }
  return result;
}

bool Streams::finished(const OperationPtr& operation) {
  if (operation == nullptr) return true;
  if (!state_.options.virtual_time) return operation->progress == Operation::Progress::kDone;
  return operation->end_us <= state_.clock.lane().now_us;
}

void Streams::count_query(const OperationPtr& operation) {
  if (!held_ || state_.options.patience == 0) return;
  if (++operation->queries >= state_.options.patience) demand(operation);
}

Operation* Streams::unfinished_use(Address at, std::size_t n, bool fault) {
  for (const auto& [number, operation] : unfinished_) {
    if (finished(operation) || operation->faulted) continue;
    for (const auto& access : operation->accesses) {
      if (access.at >= at + n || at >= access.at + access.n) continue;
      if (fault && operation->progress == Operation::Progress::kQueued) operation->faulted = true;
      return operation.get();
    }
  }
  return nullptr;
}

void Streams::hold(bool on) {
  held_ = on;
  state_.changed.notify_all();
}

void Streams::destroy(CUevent handle) {
  destroyed_events_.insert(handle);
  events_.erase(handle);
}

void Streams::forget_errors() {
  for (const auto& entry : streams_) entry.second->error = CUDA_SUCCESS;
  for (const auto& entry : per_thread_) entry.second->error = CUDA_SUCCESS;
  for (const auto& entry : legacy_) entry.second->error = CUDA_SUCCESS;
}

void Streams::shut_down(Lock& lock) {
  stopping_ = true;
  state_.changed.notify_all();
  std::vector<StreamPtr> all(leaving_);
  for (const auto& entry : streams_) all.push_back(entry.second);
  for (const auto& entry : per_thread_) all.push_back(entry.second);
  for (const auto& entry : legacy_) all.push_back(entry.second);
  lock.unlock();
  for (const auto& stream : all) {
    if (stream->worker.joinable()) stream->worker.join();
  }
  lock.lock();
  for (const auto& stream : all) {
    stream->queue.clear();
    stream->last.reset();
  }
  streams_.clear();
  per_thread_.clear();
  legacy_.clear();
  leaving_.clear();
  events_.clear();
  unfinished_.clear();
  waiting_.clear();
  by_number_.clear();
  tokens.clear();
  stopping_ = false;
}

bool Streams::idle() { return pending() == 0; }

std::size_t Streams::pending() {
  return static_cast<std::size_t>(
      std::count_if(unfinished_.begin(), unfinished_.end(),
                    [&](const auto& entry) { return !finished(entry.second); }));
}

std::size_t Streams::created_streams(const Context* of) const {
  return static_cast<std::size_t>(std::count_if(
      streams_.begin(), streams_.end(),
      [&](const auto& entry) { return of == nullptr || entry.second->context == of; }));
}

std::size_t Streams::created_events(const Context* of) const {
  return static_cast<std::size_t>(std::count_if(
      events_.begin(), events_.end(),
      [&](const auto& entry) { return of == nullptr || entry.second->context == of; }));
}

}  // namespace emulator

// The control functions of emulator.h, and what happens when the process ends.
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <stdexcept>

#include "call.h"
#include "emulator.h"

using namespace emulator;

namespace {

using Guard = std::lock_guard<std::mutex>;

constexpr int kExitStatus = 86;

int kernel(const char* name, void* handle, unsigned long long ptr, std::size_t size,
           std::size_t tile, double duration_us, Operation::Kind kind, unsigned char value,
           unsigned long long* token) {
  return enter("cuLaunchKernel", Call::kContext, {number(handle), ptr, size, tile},
               [&](Call& call) -> CUresult {
                 Stream* stream = call.s.streams.find(static_cast<CUstream>(handle), call.context);
                 if (stream == nullptr)
                   return call.violation(CUDA_ERROR_INVALID_HANDLE, "not a live stream");
                 if (stream->context != call.context)
                   return call.violation(CUDA_ERROR_INVALID_HANDLE,
                                         "the stream is of another context");
                 if (size == 0) return call.misuse(CUDA_ERROR_INVALID_VALUE, "nothing to access");
                 call.charge(0);
                 auto operation = std::make_shared<Operation>();
                 operation->kind = kind;
                 operation->name = name;
                 operation->value = value;
                 operation->exact = ptr;
                 operation->exact_n = size;
                 operation->duration_us = duration_us;
                 const std::size_t step = std::max<std::size_t>(tile, 1);
                 const Address first = ptr / step * step;
                 const Address last = (ptr + size + step - 1) / step * step;
                 operation->accesses = {{first, last - first, false, true}};
                 if (kind == Operation::Kind::kWrite)
                   operation->accesses.push_back({ptr, size, true, true});
                 call.s.streams.submit(stream, operation);
                 if (token != nullptr) {
                   *token = operation->number;
                   call.s.streams.tokens[operation->number] = operation;
                 }
                 return CUDA_SUCCESS;
               });
}

// After every exit handler and static destructor of the client: what is left now is leaked.
__attribute__((destructor)) void finish() {
  State& s = state();
  if (s.forked) return;
  std::unique_lock lock(s.mutex);
  if (s.calls.total() == 0) return;
  s.streams.catch_up(lock);
  s.report_leaks("at exit", nullptr);
  s.streams.shut_down(lock);
  if (!s.options.log_path.empty()) {
    if (std::FILE* file = std::fopen(s.options.log_path.c_str(), "w"); file != nullptr) {
      std::fputs(s.calls.log().c_str(), file);
      std::fclose(file);
    } else {
      std::perror("kvspan emulator: the call log cannot be written");
    }
  }
  const std::size_t n = s.report.unexpected().size();
  if (n == 0) return;
  std::fprintf(stderr, "kvspan emulator: %zu violation%s, exit status %d\n", n, n == 1 ? "" : "s",
               kExitStatus);
  std::fflush(nullptr);
  ::_exit(kExitStatus);
}

// Options are read when the library is loaded: a wrong one must not wait for the first call.
__attribute__((constructor)) void start() { state(); }

}  // namespace

int kvspan_emulator_reset(const char* options) {
  State& s = state();
  std::unique_lock lock(s.mutex);
  const auto refuse = [&](int why, const std::string& what) {
    s.last_error = what;
    std::fprintf(stderr, "kvspan emulator: reset: %s\n", what.c_str());
    return why;
  };
  if (!s.ledger_empty()) return refuse(1, "the ledger is not empty");
  Options chosen;
  try {
    const char* environment = std::getenv("KVSPAN_EMULATOR");
    const char* from = options != nullptr ? options : environment;
    if (from != nullptr) chosen = Options::parse(from);
  } catch (const std::invalid_argument& error) {
    return refuse(2, error.what());
  }
  s.streams.shut_down(lock);
  s.reset(std::move(chosen));
  return 0;
}

const char* kvspan_emulator_last_error(void) {
  thread_local std::string copy;
  const Guard guard(state().mutex);
  copy = state().last_error;
  return copy.c_str();
}

unsigned long long kvspan_emulator_violations(void) {
  const Guard guard(state().mutex);
  return state().report.unexpected().size();
}

unsigned long long kvspan_emulator_expected_violations(void) {
  const Guard guard(state().mutex);
  return state().report.expected();
}

const char* kvspan_emulator_violation(unsigned long long i) {
  thread_local std::string copy;
  const Guard guard(state().mutex);
  const auto& all = state().report.unexpected();
  if (i >= all.size()) return nullptr;
  copy = all[i];
  return copy.c_str();
}

void kvspan_emulator_expect(const char* substring) {
  const Guard guard(state().mutex);
  state().report.expect(substring);
}

void kvspan_emulator_clear_violations(void) {
  const Guard guard(state().mutex);
  state().report.clear();
  state().streams.forget_errors();
}

void kvspan_emulator_ledger(kvspan_emulator_ledger_t* out) {
  State& s = state();
  const Guard guard(s.mutex);
  *out = {};
  out->reservations = s.memory.reservations.size();
  out->handles = s.memory.handles.size();
  for (const auto& [id, handle] : s.memory.handles) out->handle_references += handle.references;
  out->mappings = s.memory.mappings.size();
  out->streams = s.streams.created_streams();
  out->events = s.streams.created_events();
  out->pinned_allocations = s.memory.pinned.size();
  out->device_allocations = s.memory.allocations.size();
  for (const auto& context : s.contexts) out->contexts += context.references > 0;
  out->pending_operations = s.streams.pending();
  for (const std::size_t used : s.memory.used_bytes) out->device_bytes += used;
}

void kvspan_emulator_fail(const char* names, unsigned long long n, int result,
                          unsigned long long times) {
  const Guard guard(state().mutex);
  state().calls.fail(names, n, static_cast<CUresult>(result), times);
}

unsigned long long kvspan_emulator_injected(void) {
  const Guard guard(state().mutex);
  return state().calls.injected();
}

unsigned long long kvspan_emulator_failed_calls(void) {
  const Guard guard(state().mutex);
  return state().calls.failed();
}

unsigned long long kvspan_emulator_calls(const char* name) {
  const Guard guard(state().mutex);
  return state().calls.count(name).calls;
}

unsigned long long kvspan_emulator_handles(const char* name) {
  const Guard guard(state().mutex);
  return state().calls.count(name).handles;
}

unsigned long long kvspan_emulator_total_calls(void) {
  const Guard guard(state().mutex);
  return state().calls.total();
}

size_t kvspan_emulator_log(char* out, size_t n) {
  const Guard guard(state().mutex);
  const std::string log = state().calls.log();
  if (out != nullptr && n > 0) {
    const std::size_t used = std::min(n - 1, log.size());
    std::memcpy(out, log.data(), used);
    out[used] = '\0';
  }
  return log.size() + 1;
}

void kvspan_emulator_hold_streams(int hold) {
  const Guard guard(state().mutex);
  state().streams.hold(hold != 0);
}

int kvspan_emulator_read_kernel(void* stream, unsigned long long ptr, size_t size, size_t tile,
                                double duration_us, unsigned long long* token) {
  return kernel("read kernel", stream, ptr, size, tile, duration_us, Operation::Kind::kRead, 0,
                token);
}

int kvspan_emulator_write_kernel(void* stream, unsigned long long ptr, size_t size, size_t tile,
                                 double duration_us, unsigned char value) {
  return kernel("write kernel", stream, ptr, size, tile, duration_us, Operation::Kind::kWrite,
                value, nullptr);
}

int kvspan_emulator_begin_capture(void* handle, int mode) {
  return enter(
      "cuStreamBeginCapture", Call::kContext, {number(handle)}, [&](Call& call) -> CUresult {
        const Stream* stream = call.s.streams.find(static_cast<CUstream>(handle), call.context);
        if (stream == nullptr || stream->legacy || mode < 0 || mode > 2) {
          return call.misuse(CUDA_ERROR_INVALID_VALUE,
                             "no stream that can be captured, or no mode");
        }
        call.s.capture = {stream, static_cast<CUstreamCaptureMode>(mode),
                          std::this_thread::get_id()};
        return CUDA_SUCCESS;
      });
}

void kvspan_emulator_end_capture(void) {
  const Guard guard(state().mutex);
  state().capture = {};
}

int kvspan_emulator_kernel_result(unsigned long long token, unsigned long long* sum) {
  State& s = state();
  std::unique_lock lock(s.mutex);
  s.streams.catch_up(lock);
  const auto at = s.streams.tokens.find(token);
  if (at == s.streams.tokens.end()) return CUDA_ERROR_INVALID_VALUE;
  if (!s.streams.finished(at->second)) return CUDA_ERROR_NOT_READY;
  const bool faulted = at->second->faulted;
  if (sum != nullptr) *sum = at->second->checksum;
  s.streams.tokens.erase(at);
  return faulted ? CUDA_ERROR_ILLEGAL_ADDRESS : CUDA_SUCCESS;
}

unsigned long long kvspan_emulator_checksum(const void* data, size_t size) {
  return checksum(kChecksumSeed, static_cast<const std::byte*>(data), size);
}

namespace {

template <typename Move>
int move_bytes(unsigned long long ptr, std::size_t n, Move&& move) {
  State& s = state();
  const Guard guard(s.mutex);
  std::vector<Piece> pieces;
  std::string why;
  if (s.options.memory_free || !s.memory.resolve(ptr, n, {-1}, false, &pieces, &why)) return 1;
  std::size_t done = 0;
  for (const auto& piece : pieces) {
    move(piece.data, done, piece.n);
    done += piece.n;
  }
  return 0;
}

}  // namespace

int kvspan_emulator_peek(unsigned long long ptr, void* out, size_t n) {
  return move_bytes(ptr, n, [&](const std::byte* data, std::size_t at, std::size_t length) {
    std::memcpy(static_cast<std::byte*>(out) + at, data, length);
  });
}

int kvspan_emulator_poke(unsigned long long ptr, const void* in, size_t n) {
  return move_bytes(ptr, n, [&](std::byte* data, std::size_t at, std::size_t length) {
    std::memcpy(data, static_cast<const std::byte*>(in) + at, length);
  });
}

void kvspan_emulator_set_lane(int lane) {
  const Guard guard(state().mutex);
  state().clock.choose_lane(lane);
}

double kvspan_emulator_clock(void) {
  const Guard guard(state().mutex);
  return state().clock.lane().now_us;
}

void kvspan_emulator_advance(double us) {
  std::unique_lock lock(state().mutex);
  state().clock.lane().now_us += us;
  state().streams.catch_up(lock);
}

void kvspan_emulator_set_clock(double us) {
  std::unique_lock lock(state().mutex);
  state().clock.lane().now_us = us;
  state().streams.catch_up(lock);
}

double kvspan_emulator_lock_wait(void) {
  const Guard guard(state().mutex);
  return state().clock.lane().lock_wait_us;
}

double kvspan_emulator_call_time(void) {
  const Guard guard(state().mutex);
  return state().clock.lane().call_time_us;
}

double kvspan_emulator_sync_wait(void) {
  const Guard guard(state().mutex);
  return state().clock.lane().sync_wait_us;
}

double kvspan_emulator_stream_end(void* handle) {
  State& s = state();
  const Guard guard(s.mutex);
  Stream* stream = s.streams.find(static_cast<CUstream>(handle), current_context());
  return stream == nullptr ? 0 : stream->end_us;
}

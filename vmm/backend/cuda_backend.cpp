#include "backend/cuda_backend.hpp"

#include <algorithm>

#include "backend/cuda_capture.hpp"
#include "backend/cuda_context.hpp"
#include "backend/cuda_fences.hpp"
#include "backend/cuda_frames.hpp"
#include "backend/cuda_mirror.hpp"
#include "backend/cuda_options.hpp"
#include "backend/cuda_space.hpp"
#include "backend/host_fork.hpp"
#include "core/errors.hpp"
#include "core/sizes.hpp"

namespace kvspan {

namespace {

using namespace cuda;

// Above this a frame is no cheaper by the byte: calls cost per handle, and 128 MiB spread one well.
constexpr Bytes kPreferredFrame = kMiB * 128;

CUdeviceptr pointer(Address at) { return static_cast<CUdeviceptr>(at.value); }
CUstream stream_of(Stream stream) { return reinterpret_cast<CUstream>(stream.handle); }

std::vector<int> devices_of(const CudaOptions& o) {
  std::vector<int> devices{o.ordinal};
  devices.insert(devices.end(), o.peers.begin(), o.peers.end());
  return devices;
}

SizeClass preferred_class(const CudaOptions& o) {
  SizeClass c{};
  while (c < o.largest_class && size_of(pages_of(c), o.page_size) < kPreferredFrame) ++c.value;
  return c;
}

class OwnStream {
 public:
  explicit OwnStream(const Context& context) : context_(context) {
    const Driver& api = context.api();
    check(api, api.cuStreamCreate(&stream_, CU_STREAM_NON_BLOCKING), "cuStreamCreate",
          "cannot make a stream for background work");
  }
  OwnStream(const OwnStream&) = delete;
  OwnStream& operator=(const OwnStream&) = delete;
  ~OwnStream() {
    const Current current(context_, std::nothrow);
    context_.report_unless(context_.api().cuStreamDestroy(stream_));
  }
  Stream get() const noexcept { return {reinterpret_cast<std::uintptr_t>(stream_)}; }

 private:
  const Context& context_;
  CUstream stream_ = nullptr;
};

// Shared with mirrors, which may outlive the backend. In a child of fork(2) it is leaked: the
// driver must not be called there. Members go in the reverse order of what they need.
struct State {
  // The context is current.
  State(std::shared_ptr<const Context> c, const CudaOptions& o)
      : context(std::move(c)),
        fences(*context),
        own_stream(*context),
        mirrors(*context, fences),
        space(*context, o.page_size, devices_of(o), o.max_mappings),
        frames(*context, o) {}

  const std::shared_ptr<const Context> context;
  Fences fences;
  OwnStream own_stream;
  MirrorMemory mirrors;
  Space space;
  Frames frames;
};

class CudaBackend final : public Backend {
 public:
  CudaBackend(std::uint64_t generation, std::shared_ptr<const Context> context,
              const CudaOptions& o);
  ~CudaBackend() override;

  const Traits& traits() const noexcept override { return traits_; }
  MemoryInfo memory_info() const override;
  HugePages huge_pages() const override;
  bool usable() const noexcept override { return generation_ == host_fork::generation(); }
  bool is_passed(Fence fence) const noexcept override;
  Stream own_stream() const noexcept override { return state_->own_stream.get(); }
  void finish() noexcept override;
  std::unique_ptr<Mirror> make_mirror(Bytes size) override;

 private:
  VirtualRange do_reserve(Bytes size, Unmapped unmapped) override;
  void do_free(VirtualRange range) noexcept override;
  void do_create(FrameRun run) override;
  void do_release(FrameRun run) noexcept override;
  ExportedFrame do_export_frame(FrameId frame) override;
  void do_import_frame(FrameId frame, const ExportedFrame& exported) override;
  void do_map(Address at, FrameRun run, Access access) override;
  void do_set_access(VirtualRange range, Access access) override;
  void do_unmap(VirtualRange range, std::uint32_t handles) override;
  void do_copy(Address to, Address from, Bytes size, Stream stream) override;
  void do_fill(Address at, std::uint8_t value, Bytes size, Stream stream) override;
  Fence do_record_fence(Stream stream) override;
  void do_wait(Fence fence) override;
  void do_order_after(Stream stream, Fence fence) override;
  std::uint64_t failures_elsewhere() const noexcept override { return context().failures(); }

  const Context& context() const noexcept { return *state_->context; }
  const Driver& api() const noexcept { return context().api(); }
  // Every call that throws begins with this.
  [[nodiscard]] Current enter() const;

  const std::uint64_t generation_;
  const CudaOptions options_;
  const Traits traits_;
  std::shared_ptr<State> state_;
};

CudaBackend::CudaBackend(std::uint64_t generation, std::shared_ptr<const Context> context,
                         const CudaOptions& o)
    : generation_(generation),
      options_(o),
      traits_{.device = "cuda:" + std::to_string(o.ordinal),
              .kind = DeviceKind::cuda,
              .ordinal = o.ordinal,
              .page_size = o.page_size,
              .preferred_class = preferred_class(o),
              .zero_on_unmapped = false,
              .creates_zeros = false,
              .calls_per_frame = true},
      state_(std::make_shared<State>(std::move(context), o)) {}

CudaBackend::~CudaBackend() {
  if (!usable()) {
    static_cast<void>(new std::shared_ptr<State>(std::move(state_)));
    return;
  }
  // Now, and not when the last mirror goes.
  const Current current(context(), std::nothrow);
  state_->frames.release_all();
}

Current CudaBackend::enter() const {
  if (!usable()) {
    throw ReleasedError(
        "this process is a fork(2) child, which cannot use its parent's GPU memory: make a new "
        "pool in a process that was started with exec (multiprocessing's \"spawn\")");
  }
  return Current(context());
}

MemoryInfo CudaBackend::memory_info() const {
  const Current current = enter();
  return memory_of(context(), options_.reserve);
}

HugePages CudaBackend::huge_pages() const { return {state_->frames.created(), Bytes(0), {}}; }

VirtualRange CudaBackend::do_reserve(Bytes size, Unmapped unmapped) {
  const Current current = enter();
  if (unmapped == Unmapped::zero) {
    throw InvalidArgument(
        "a GPU has no memory that reads as zeros where nothing is mapped: use unmapped=\"fault\"");
  }
  if (size == Bytes(0) || size.value % traits_.page_size.value != 0) {
    throw InvalidArgument("a reservation is a positive multiple of the page size (" +
                          to_string(traits_.page_size) + "), not " + to_string(size));
  }
  // To the largest frame that fits, so that the driver may use the largest pages it has.
  Bytes alignment = traits_.page_size;
  const Bytes largest = size_of(pages_of(options_.largest_class), traits_.page_size);
  while (alignment < largest && alignment * 2 <= size) alignment = alignment * 2;
  return state_->space.reserve(size, alignment);
}

void CudaBackend::do_free(VirtualRange range) noexcept {
  if (!usable()) return;
  const Current current(context(), std::nothrow);
  state_->space.free(range);
}

void CudaBackend::do_create(FrameRun run) {
  const Current current = enter();
  state_->frames.create(run);
}

void CudaBackend::do_release(FrameRun run) noexcept {
  if (!usable()) return;
  const Current current(context(), std::nothrow);
  try {
    state_->frames.release(run);
  } catch (const Error&) {
    report_failure();
  }
}

ExportedFrame CudaBackend::do_export_frame(FrameId frame) {
  const Current current = enter();
  return state_->frames.export_frame(frame);
}

void CudaBackend::do_import_frame(FrameId frame, const ExportedFrame& exported) {
  const Current current = enter();
  state_->frames.import_frame(frame, exported);
}

void CudaBackend::do_map(Address at, FrameRun run, Access access) {
  const Current current = enter();
  const auto handles = state_->frames.handles(run);
  const Bytes size = state_->frames.frame_size(run);
  state_->space.require_reserved({at, size * run.count});
  state_->space.map(at, size, handles, access);
}

void CudaBackend::do_set_access(VirtualRange range, Access access) {
  const Current current = enter();
  state_->space.require_reserved(range);
  state_->space.set_access(range, access);
}

void CudaBackend::do_unmap(VirtualRange range, std::uint32_t handles) {
  const Current current = enter();
  state_->space.require_reserved(range);
  state_->space.unmap(range, handles);
}

void CudaBackend::do_copy(Address to, Address from, Bytes size, Stream stream) {
  const Current current = enter();
  require_no_capture(api(), stream_of(stream));
  check(api(), api().cuMemcpyDtoDAsync(pointer(to), pointer(from), size.value, stream_of(stream)),
        "cuMemcpyDtoDAsync", "cannot copy " + to_string(size));
}

void CudaBackend::do_fill(Address at, std::uint8_t value, Bytes size, Stream stream) {
  const Current current = enter();
  require_no_capture(api(), stream_of(stream));
  check(api(), api().cuMemsetD8Async(pointer(at), value, size.value, stream_of(stream)),
        "cuMemsetD8Async", "cannot fill " + to_string(size));
}

Fence CudaBackend::do_record_fence(Stream stream) {
  const Current current = enter();
  return state_->fences.record(stream_of(stream));
}

bool CudaBackend::is_passed(Fence fence) const noexcept {
  if (fence.id == 0 || !usable()) return true;
  const Current current(context(), std::nothrow);
  return state_->fences.is_passed(fence);
}

void CudaBackend::do_wait(Fence fence) {
  const Current current = enter();
  state_->fences.wait(fence);
}

void CudaBackend::do_order_after(Stream stream, Fence fence) {
  const Current current = enter();
  state_->fences.order_after(stream_of(stream), fence);
}

void CudaBackend::finish() noexcept {
  if (!usable()) return;
  const Current current(context(), std::nothrow);
  context().report_unless(api().cuCtxSynchronize());
}

std::unique_ptr<Mirror> CudaBackend::make_mirror(Bytes size) {
  const Current current = enter();
  return std::make_unique<CudaMirror>(state_, context(), state_->fences, state_->mirrors, size,
                                      own_stream());
}

}  // namespace

std::unique_ptr<Backend> make_cuda_backend(const CudaOptions& options) {
  const std::uint64_t generation = host_fork::watch();
  const auto context = std::make_shared<const Context>(options.ordinal);
  const Current current(*context);
  return std::make_unique<CudaBackend>(generation, context, checked(*context, options));
}

}  // namespace kvspan

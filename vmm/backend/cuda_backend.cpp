#include "backend/cuda_backend.hpp"

#include <algorithm>
#include <map>
#include <mutex>

#include "backend/cuda_context.hpp"
#include "backend/cuda_fences.hpp"
#include "backend/cuda_mirror.hpp"
#include "backend/host_fork.hpp"
#include "core/errors.hpp"
#include "core/sizes.hpp"

namespace kvspan {

namespace {

using namespace cuda;

constexpr Bytes kLargestPage = kMiB * 64;

CUdeviceptr pointer(Address at) { return static_cast<CUdeviceptr>(at.value); }
CUstream stream_of(Stream stream) { return reinterpret_cast<CUstream>(stream.handle); }

CUmemAccess_flags flags_of(Access access) {
  switch (access) {
    case Access::none:
      return CU_MEM_ACCESS_FLAGS_PROT_NONE;
    case Access::read:
      return CU_MEM_ACCESS_FLAGS_PROT_READ;
    case Access::read_write:
      return CU_MEM_ACCESS_FLAGS_PROT_READWRITE;
  }
  return CU_MEM_ACCESS_FLAGS_PROT_NONE;
}

CUmemAllocationProp properties_of(const CudaOptions& o) {
  CUmemAllocationProp properties{};
  properties.type = CU_MEM_ALLOCATION_TYPE_PINNED;
  properties.location = {.type = CU_MEM_LOCATION_TYPE_DEVICE, .id = o.ordinal};
  properties.requestedHandleTypes =
      o.is_shareable ? CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR : CU_MEM_HANDLE_TYPE_NONE;
  return properties;
}

void check_options(const Context& context, const CudaOptions& o) {
  const Driver& api = context.api();
  std::size_t granularity = 0;
  const CUmemAllocationProp properties = properties_of(o);
  check(api,
        api.cuMemGetAllocationGranularity(&granularity, &properties,
                                          CU_MEM_ALLOC_GRANULARITY_MINIMUM),
        "cuMemGetAllocationGranularity", "cannot ask for the granularity");
  if (!is_power_of_two(o.page_size) || o.page_size.value % granularity != 0 ||
      o.page_size > kLargestPage) {
    throw InvalidArgument("page_size on cuda:" + std::to_string(o.ordinal) +
                          " is a power of two from " + to_string(Bytes(granularity)) + " to " +
                          to_string(kLargestPage) + ", not " + to_string(o.page_size));
  }
  if (o.capacity == Bytes(0) || o.capacity.value % o.page_size.value != 0) {
    throw InvalidArgument("capacity is a positive multiple of the page size (" +
                          to_string(o.page_size) + "), not " + to_string(o.capacity));
  }
  if (o.largest_class.value > FrameId::kMaxClass) {
    throw InvalidArgument("largest_class is at most " + std::to_string(FrameId::kMaxClass) +
                          ", not " + std::to_string(o.largest_class.value));
  }
  int count = 0;
  check(api, api.cuDeviceGetCount(&count), "cuDeviceGetCount", "cannot count the devices");
  for (const int peer : o.peers) {
    int can_access = 0;
    if (peer >= 0 && peer < count && peer != o.ordinal) {
      CUdevice device = 0;
      check(api, api.cuDeviceGet(&device, peer), "cuDeviceGet", "cannot get a peer");
      check(api, api.cuDeviceCanAccessPeer(&can_access, device, context.device()),
            "cuDeviceCanAccessPeer", "cannot ask a peer");
    }
    if (can_access == 0) {
      throw InvalidArgument("cuda:" + std::to_string(peer) +
                            " cannot be a peer of cuda:" + std::to_string(o.ordinal) +
                            ": a peer is another device that can access its memory");
    }
  }
}

class CudaBackend final : public Backend {
 public:
  explicit CudaBackend(const CudaOptions& options);
  ~CudaBackend() override;

  const Traits& traits() const noexcept override { return traits_; }
  MemoryInfo memory_info() const override;
  HugePages huge_pages() const override;
  bool usable() const noexcept override { return generation_ == host_fork::generation(); }
  bool is_passed(Fence fence) const noexcept override;
  Stream own_stream() const noexcept override {
    return {reinterpret_cast<std::uintptr_t>(state_->own_stream)};
  }
  void finish() noexcept override;
  std::unique_ptr<Mirror> make_mirror(Bytes size) override;

 private:
  // In a child of fork(2) all of this is leaked: the driver must not be called there.
  struct State {
    explicit State(const CudaOptions& options);
    ~State();

    Context context;
    Fences fences;
    CUstream own_stream = nullptr;
    // One handle a frame, by class; 0: absent. An entry belongs to who creates or releases it.
    std::vector<std::unique_ptr<CUmemGenericAllocationHandle[]>> handles;
    std::atomic<std::uint64_t> created{0};  // bytes; relaxed, only summed

    std::mutex mutex;                              // guards what follows
    std::map<std::uintptr_t, Bytes> reservations;  // by base
  };

  VirtualRange do_reserve(Bytes size, Unmapped unmapped) override;
  void do_free(VirtualRange range) noexcept override;
  void do_create(FrameRun run) override;
  void do_release(FrameRun run) noexcept override;
  void do_map(Address at, FrameRun run, Access access) override;
  void do_set_access(VirtualRange range, Access access) override;
  void do_unmap(VirtualRange range, std::uint32_t handles) override;
  void do_copy(Address to, Address from, Bytes size, Stream stream) override;
  void do_fill(Address at, std::uint8_t value, Bytes size, Stream stream) override;
  Fence do_record_fence(Stream stream) override;
  void do_wait(Fence fence) override;
  void do_order_after(Stream stream, Fence fence) override;

  void require_usable() const;
  void require_reserved(VirtualRange range) const;
  void require_run(FrameRun run) const;
  Bytes frame_bytes(FrameRun run) const {
    return size_of(pages_of(run.first.size_class()), traits_.page_size);
  }
  CUmemGenericAllocationHandle& handle_of(FrameId frame) const {
    return state_->handles[frame.size_class().value][frame.index()];
  }
  void create_handles(FrameRun run, Bytes size, std::uint32_t& done);
  void zero(FrameRun run, Bytes size);
  void release_handles(FrameRun run) noexcept;
  void map_frames(Address at, FrameRun run, Access access);
  void grant(VirtualRange range, Access access);

  const std::uint64_t generation_;
  const CudaOptions options_;
  const Traits traits_;
  std::shared_ptr<State> state_;  // shared with mirrors
};

CudaBackend::State::State(const CudaOptions& o) : context(o.ordinal), fences(context.api()) {
  check_options(context, o);
  const std::uint64_t pages = o.capacity.value / o.page_size.value;
  for (unsigned c = 0; c <= o.largest_class.value; ++c) {
    handles.push_back(std::make_unique<CUmemGenericAllocationHandle[]>(pages >> c));
  }
  const Current current(context);
  check(context.api(), context.api().cuStreamCreate(&own_stream, CU_STREAM_NON_BLOCKING),
        "cuStreamCreate", "cannot make a stream for background work");
}

CudaBackend::State::~State() {
  const Current current(context);
  const Driver& api = context.api();
  for (const auto& [base, size] : reservations) {
    api.cuMemAddressFree(static_cast<CUdeviceptr>(base), size.value);
  }
  if (own_stream != nullptr) api.cuStreamDestroy(own_stream);
}

CudaBackend::CudaBackend(const CudaOptions& o)
    : generation_(host_fork::watch()),
      options_(o),
      traits_{.device = "cuda:" + std::to_string(o.ordinal),
              .kind = DeviceKind::cuda,
              .ordinal = o.ordinal,
              .page_size = o.page_size,
              .preferred_class = o.largest_class,
              .zero_on_unmapped = false,
              .calls_per_frame = true},
      state_(std::make_shared<State>(o)) {}

CudaBackend::~CudaBackend() {
  if (!usable()) {
    static_cast<void>(new std::shared_ptr<State>(std::move(state_)));
    return;
  }
  // What is left of frames: fresh ones ahead of use, as a rule.
  const Current current(state_->context);
  for (std::size_t c = 0; c < state_->handles.size(); ++c) {
    const std::uint64_t n = options_.capacity.value / traits_.page_size.value >> c;
    for (std::uint32_t i = 0; i < n; ++i) {
      const FrameId frame(SizeClass(static_cast<std::uint8_t>(c)), i);
      if (handle_of(frame) != 0) release_handles({frame, 1});
    }
  }
}

void CudaBackend::require_usable() const {
  if (!usable()) {
    throw ReleasedError(
        "this process is a fork(2) child, which cannot use the parent's GPU memory");
  }
}

void CudaBackend::require_run(FrameRun run) const {
  const std::size_t c = run.first.size_class().value;
  const std::uint64_t pages = options_.capacity.value / traits_.page_size.value;
  if (run.count == 0 || c >= state_->handles.size() ||
      std::uint64_t{run.first.index()} + run.count > pages >> c) {
    throw InvalidArgument("frames " + std::to_string(run.first.value) + " and the " +
                          std::to_string(run.count) + " after it are not of this pool");
  }
}

void CudaBackend::require_reserved(VirtualRange range) const {
  const std::scoped_lock lock(state_->mutex);
  auto it = state_->reservations.upper_bound(range.base.value);
  const bool is_inside = it != state_->reservations.begin() &&
                         range.end().value <= (--it)->first + it->second.value &&
                         range.base.value % traits_.page_size.value == 0;
  if (!is_inside) {
    throw InvalidArgument("the range of " + to_string(range.size) +
                          " lies in no reservation, or not at a page");
  }
}

MemoryInfo CudaBackend::memory_info() const {
  require_usable();
  const Current current(state_->context);
  const Driver& api = state_->context.api();
  std::size_t free = 0, total = 0;
  check(api, api.cuMemGetInfo(&free, &total), "cuMemGetInfo", "cannot ask for the memory");
  const Bytes available(free - std::min<std::uint64_t>(free, options_.reserve.value));
  return {Bytes(total), available};
}

HugePages CudaBackend::huge_pages() const {
  return {Bytes(state_->created.load(std::memory_order_relaxed)), Bytes(0), {}};
}

VirtualRange CudaBackend::do_reserve(Bytes size, Unmapped unmapped) {
  require_usable();
  if (unmapped == Unmapped::zero) {
    throw InvalidArgument(
        "a GPU has no memory that reads as zeros where nothing is mapped: use unmapped=\"fault\"");
  }
  if (size == Bytes(0) || size.value % traits_.page_size.value != 0) {
    throw InvalidArgument("a reservation is a positive multiple of the page size, not " +
                          to_string(size));
  }
  const Current current(state_->context);
  const Driver& api = state_->context.api();
  CUdeviceptr base = 0;
  const CUresult result = api.cuMemAddressReserve(&base, size.value, traits_.page_size.value, 0, 0);
  if (result == CUDA_ERROR_OUT_OF_MEMORY) {
    throw CapacityError("the driver has no address space left for " + to_string(size) +
                        ": lower max_seqs or max_seq_len");
  }
  check(api, result, "cuMemAddressReserve", "cannot reserve " + to_string(size));
  const std::scoped_lock lock(state_->mutex);
  try {
    state_->reservations.emplace(base, size);
  } catch (...) {
    api.cuMemAddressFree(base, size.value);
    throw;
  }
  return {Address(static_cast<std::uintptr_t>(base)), size};
}

void CudaBackend::do_free(VirtualRange range) noexcept {
  if (!usable()) return;
  const Current current(state_->context);
  {
    const std::scoped_lock lock(state_->mutex);
    state_->reservations.erase(range.base.value);
  }
  if (state_->context.api().cuMemAddressFree(pointer(range.base), range.size.value) !=
      CUDA_SUCCESS) {
    report_failure();
  }
}

void CudaBackend::do_create(FrameRun run) {
  require_usable();
  require_run(run);
  const Bytes size = frame_bytes(run);
  const Current current(state_->context);
  std::uint32_t done = 0;
  try {
    create_handles(run, size, done);
    zero(run, size);
  } catch (...) {
    for (std::uint32_t i = 0; i < done; ++i) release_handles({run.first.next(i), 1});
    throw;
  }
  state_->created.fetch_add(size.value * run.count, std::memory_order_relaxed);
}

void CudaBackend::create_handles(FrameRun run, Bytes size, std::uint32_t& done) {
  const Driver& api = state_->context.api();
  const CUmemAllocationProp properties = properties_of(options_);
  const Bytes asked = size * run.count;
  const auto refuse = [&](Bytes free) {
    throw OutOfMemory(asked, free, Bytes(0),
                      traits_.device + " has no more, " + to_string(options_.reserve) +
                          " of which are kept for others (`reserve`): release sequences, trim the "
                          "pool, or leave it more of the device");
  };
  if (const Bytes free = memory_info().available; free < asked) refuse(free);
  for (; done < run.count; ++done) {
    CUmemGenericAllocationHandle handle = 0;
    const CUresult result = api.cuMemCreate(&handle, size.value, &properties, 0);
    if (result == CUDA_ERROR_OUT_OF_MEMORY) refuse(memory_info().available);
    check(api, result, "cuMemCreate", "cannot create a frame of " + to_string(size));
    handle_of(run.first.next(done)) = handle;
  }
}

void CudaBackend::zero(FrameRun run, Bytes size) {
  // The driver's documentation says nothing of what new memory holds, and it may be another
  // process's. Creating is done ahead of time, so that a mapping more is not waited for.
  const Bytes all = size * run.count;
  const Driver& api = state_->context.api();
  CUdeviceptr base = 0;
  check(api, api.cuMemAddressReserve(&base, all.value, traits_.page_size.value, 0, 0),
        "cuMemAddressReserve", "cannot reserve a range to zero frames in");
  const VirtualRange window{Address(static_cast<std::uintptr_t>(base)), all};
  const auto close = [&]() noexcept {
    if (api.cuMemAddressFree(base, all.value) != CUDA_SUCCESS) report_failure();
  };
  try {
    map_frames(window.base, run, Access::read_write);
  } catch (...) {
    close();
    throw;
  }
  CUresult result = api.cuMemsetD8Async(base, 0, all.value, state_->own_stream);
  const char* call = "cuMemsetD8Async";
  try {
    if (result == CUDA_SUCCESS) state_->fences.wait(state_->fences.record(state_->own_stream));
  } catch (const DriverError&) {
    // Not known to be done, and unmapping under it would fault the device.
    result = CUDA_ERROR_UNKNOWN;
    call = "cuEventRecord";
    api.cuStreamSynchronize(state_->own_stream);
  }
  if (api.cuMemUnmap(base, all.value) != CUDA_SUCCESS) report_failure();
  close();
  check(api, result, call, "cannot zero new frames");
}

void CudaBackend::release_handles(FrameRun run) noexcept {
  for (std::uint32_t i = 0; i < run.count; ++i) {
    CUmemGenericAllocationHandle& handle = handle_of(run.first.next(i));
    if (state_->context.api().cuMemRelease(handle) != CUDA_SUCCESS) report_failure();
    handle = 0;
  }
}

void CudaBackend::do_release(FrameRun run) noexcept {
  if (!usable()) return;
  const Current current(state_->context);
  release_handles(run);
  state_->created.fetch_sub(frame_bytes(run).value * run.count, std::memory_order_relaxed);
}

void CudaBackend::do_map(Address at, FrameRun run, Access access) {
  require_usable();
  require_run(run);
  require_reserved({at, frame_bytes(run) * run.count});
  if (mappings() + run.count > options_.max_mappings) {
    throw CapacityError(
        "cannot map " + std::to_string(run.count) + " frames: " + std::to_string(mappings()) +
        " are mapped, and a CUDA context takes about " + std::to_string(options_.max_mappings) +
        "; use larger pages or frames, or fewer sequences at a time");
  }
  const Current current(state_->context);
  map_frames(at, run, access);
}

void CudaBackend::map_frames(Address at, FrameRun run, Access access) {
  const Driver& api = state_->context.api();
  const Bytes size = frame_bytes(run);
  std::uint32_t done = 0;
  try {
    for (; done < run.count; ++done) {
      check(api,
            api.cuMemMap(pointer(at + size * done), size.value, 0, handle_of(run.first.next(done)),
                         0),
            "cuMemMap", "cannot map a frame of " + to_string(size));
    }
    if (access != Access::none) grant({at, size * run.count}, access);
  } catch (...) {
    if (done > 0 && api.cuMemUnmap(pointer(at), size.value * done) != CUDA_SUCCESS) {
      report_failure();
    }
    throw;
  }
}

void CudaBackend::grant(VirtualRange range, Access access) {
  const Driver& api = state_->context.api();
  std::vector<CUmemAccessDesc> grants;
  const auto add = [&](int ordinal) {
    grants.push_back({.location = {.type = CU_MEM_LOCATION_TYPE_DEVICE, .id = ordinal},
                      .flags = flags_of(access)});
  };
  add(options_.ordinal);
  for (const int peer : options_.peers) add(peer);
  const CUresult result =
      api.cuMemSetAccess(pointer(range.base), range.size.value, grants.data(), grants.size());
  if (result == CUDA_ERROR_OUT_OF_MEMORY) {
    throw CapacityError("the driver grants no access to " + to_string(range.size) + ": with " +
                        std::to_string(mappings()) +
                        " frames mapped its page tables are full; use larger pages or frames, or "
                        "fewer sequences at a time");
  }
  check(api, result, "cuMemSetAccess", "cannot grant access to " + to_string(range.size));
}

void CudaBackend::do_set_access(VirtualRange range, Access access) {
  require_usable();
  require_reserved(range);
  const Current current(state_->context);
  grant(range, access);
}

void CudaBackend::do_unmap(VirtualRange range, std::uint32_t) {
  require_usable();
  require_reserved(range);
  const Current current(state_->context);
  const Driver& api = state_->context.api();
  check(api, api.cuMemUnmap(pointer(range.base), range.size.value), "cuMemUnmap",
        "cannot unmap " + to_string(range.size));
}

void CudaBackend::do_copy(Address to, Address from, Bytes size, Stream stream) {
  require_usable();
  const Current current(state_->context);
  const Driver& api = state_->context.api();
  check(api, api.cuMemcpyDtoDAsync(pointer(to), pointer(from), size.value, stream_of(stream)),
        "cuMemcpyDtoDAsync", "cannot copy " + to_string(size));
}

void CudaBackend::do_fill(Address at, std::uint8_t value, Bytes size, Stream stream) {
  require_usable();
  const Current current(state_->context);
  const Driver& api = state_->context.api();
  check(api, api.cuMemsetD8Async(pointer(at), value, size.value, stream_of(stream)),
        "cuMemsetD8Async", "cannot fill " + to_string(size));
}

Fence CudaBackend::do_record_fence(Stream stream) {
  require_usable();
  const Current current(state_->context);
  return state_->fences.record(stream_of(stream));
}

bool CudaBackend::is_passed(Fence fence) const noexcept {
  if (fence.id == 0) return true;
  const Current current(state_->context);
  return state_->fences.is_passed(fence);
}

void CudaBackend::do_wait(Fence fence) {
  require_usable();
  const Current current(state_->context);
  state_->fences.wait(fence);
}

void CudaBackend::do_order_after(Stream stream, Fence fence) {
  require_usable();
  const Current current(state_->context);
  state_->fences.order_after(stream_of(stream), fence);
}

void CudaBackend::finish() noexcept {
  const Current current(state_->context);
  if (state_->context.api().cuCtxSynchronize() != CUDA_SUCCESS) report_failure();
}

std::unique_ptr<Mirror> CudaBackend::make_mirror(Bytes size) {
  require_usable();
  return std::make_unique<CudaMirror>(state_, state_->context, state_->fences, size);
}

}  // namespace

std::unique_ptr<Backend> make_cuda_backend(const CudaOptions& options) {
  return std::make_unique<CudaBackend>(options);
}

}  // namespace kvspan

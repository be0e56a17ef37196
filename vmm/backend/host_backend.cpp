#include "backend/host_backend.hpp"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/vfs.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstring>
#include <map>
#include <mutex>
#include <vector>

#include "backend/host_fork.hpp"
#include "backend/host_frame_file.hpp"
#include "backend/host_imports.hpp"
#include "backend/host_internal.hpp"
#include "backend/host_mappings.hpp"
#include "core/errors.hpp"
#include "core/sizes.hpp"

namespace kvspan {

namespace {

constexpr Bytes kLeastPage = kKiB * 64;
constexpr Bytes kLargestPage = kMiB * 64;
constexpr Bytes kReservationAlignment = kMiB * 2;
constexpr Bytes kLongMapping = kMiB * 64;

void check(const HostOptions& o) {
  const Bytes os_page(static_cast<std::uint64_t>(sysconf(_SC_PAGESIZE)));
  if (!is_power_of_two(o.page_size) || o.page_size < kLeastPage || o.page_size > kLargestPage ||
      o.page_size.value % os_page.value != 0) {
    throw InvalidArgument("page_size is a power of two from " + to_string(kLeastPage) + " to " +
                          to_string(kLargestPage) + " and a multiple of the system's " +
                          to_string(os_page) + ", not " + to_string(o.page_size));
  }
  if (o.capacity == Bytes(0) || o.capacity.value % o.page_size.value != 0) {
    throw InvalidArgument("capacity is a positive multiple of the page size (" +
                          to_string(o.page_size) + "), not " + to_string(o.capacity));
  }
  if (o.largest_class.value > FrameId::kMaxClass) {
    throw InvalidArgument("largest_class is at most " + std::to_string(FrameId::kMaxClass) +
                          ", not " + std::to_string(o.largest_class.value));
  }
}

int protection_of(Access access) {
  switch (access) {
    case Access::none:
      return PROT_NONE;
    case Access::read:
      return PROT_READ;
    case Access::read_write:
      return PROT_READ | PROT_WRITE;
  }
  return PROT_NONE;
}

struct Extent {
  Bytes offset, size;  // in the memfd
};

// Host and device are one, and their order is the calling thread's.
class HostMirror final : public Mirror {
 public:
  explicit HostMirror(Bytes size)
      : bytes_(std::make_unique<std::uint64_t[]>(div_up(size.value, 8))) {}

  void* host() noexcept override { return bytes_.get(); }
  Address device() const noexcept override {
    return Address(reinterpret_cast<std::uintptr_t>(bytes_.get()));
  }
  void publish(Stream) override {}

 private:
  const std::unique_ptr<std::uint64_t[]> bytes_;
};

class HostBackend final : public Backend {
 public:
  HostBackend(const HostOptions& options, const std::string& root);
  ~HostBackend() override;

  const Traits& traits() const noexcept override { return traits_; }
  MemoryInfo memory_info() const override;
  HugePages huge_pages() const override;
  bool usable() const noexcept override { return generation_ == host_fork::generation(); }
  bool is_passed(Fence) const noexcept override { return true; }
  void finish() noexcept override {}
  std::unique_ptr<Mirror> make_mirror(Bytes size) override {
    return std::make_unique<HostMirror>(size);
  }

 private:
  // Everything that another thread of the parent may have been changing while a child was made. In
  // the child it is leaked: destroying it would meet locks that are held for ever and half-changed
  // containers, and would punch holes into memory that is the parent's.
  struct State {
    State(const HostOptions& options, const std::string& root);

    const std::unique_ptr<FrameFile> file;
    HostImports imports;
    SpareMappings spare;
    std::atomic<std::uint64_t> huge{0}, small{0};  // bytes of frames; relaxed, only summed
    // Per class and frame, whether it was created (not: imported). An entry belongs to who creates,
    // releases or exports the frame.
    std::vector<std::unique_ptr<bool[]>> present;
    // Per class and frame, how many of its bytes are huge. A frame's entry belongs to who creates
    // or releases it. Empty when there are no huge pages to be had.
    std::vector<std::unique_ptr<std::uint64_t[]>> huge_bytes;

    mutable std::mutex mutex;                            // guards what follows
    std::map<std::uintptr_t, Reservation> reservations;  // by base
    std::string refusal;
  };

  VirtualRange do_reserve(Bytes size, Unmapped unmapped) override;
  void do_free(VirtualRange range) noexcept override;
  void do_create(FrameRun run) override;
  void do_release(FrameRun run) noexcept override;
  ExportedFrame do_export_frame(FrameId frame) override;
  void do_import_frame(FrameId frame, const ExportedFrame& exported) override;
  void do_map(Address at, FrameRun run, Access access) override;
  void do_set_access(VirtualRange range, Access access) override;
  void do_unmap(VirtualRange range, std::uint32_t) override;
  void do_copy(Address to, Address from, Bytes size, Stream) override;
  void do_fill(Address at, std::uint8_t value, Bytes size, Stream) override;
  Fence do_record_fence(Stream) override;
  void do_wait(Fence) override;
  void do_order_after(Stream, Fence) override {}

  void require_usable() const;
  bool is_run(FrameRun run) const noexcept;
  Extent extent_of(FrameRun run) const;
  bool* presence_of(FrameRun run) const noexcept {
    return &state_->present[run.first.size_class().value][run.first.index()];
  }
  template <class F>
  void for_each_piece(FrameRun run, F f) const;
  void release_own(FrameRun run) noexcept;
  Unmapped policy_of(VirtualRange range) const;
  void set_refusal(const std::string& why);
  void note_huge(FrameRun run, Bytes huge) noexcept;
  Bytes huge_bytes_of(FrameRun run) const noexcept;

  const std::uint64_t generation_;
  const Bytes capacity_;
  const SizeClass largest_class_;
  Traits traits_;
  std::unique_ptr<State> state_;
};

// Frames of each class have a part of the file as large as the capacity, so that frames with
// adjacent ids are adjacent in it. What has no memory behind it costs nothing.
HostBackend::State::State(const HostOptions& o, const std::string& root)
    : file(make_frame_file(o, o.capacity * (std::uint64_t{o.largest_class.value} + 1), root)) {
  const std::uint64_t pages = o.capacity.value / o.page_size.value;
  for (unsigned c = 0; c <= o.largest_class.value; ++c) {
    present.push_back(std::make_unique<bool[]>(pages >> c));
  }
  if (!file->may_be_huge()) return;
  for (unsigned c = 0; c <= o.largest_class.value; ++c) {
    huge_bytes.push_back(std::make_unique<std::uint64_t[]>(pages >> c));
  }
}

HostBackend::HostBackend(const HostOptions& o, const std::string& root)
    : generation_(host_fork::generation()),
      capacity_(o.capacity),
      largest_class_(o.largest_class),
      traits_{.device = "cpu",
              .kind = DeviceKind::cpu,
              .ordinal = 0,
              .page_size = o.page_size,
              .preferred_class = SizeClass(0),
              .zero_on_unmapped = true},
      state_(std::make_unique<State>(o, root)) {}

HostBackend::~HostBackend() {
  if (!usable()) static_cast<void>(state_.release());
}

void HostBackend::require_usable() const {
  if (!usable()) {
    throw ReleasedError(
        "this pool belongs to the process that forked this one and cannot be used here; make a new "
        "one in this process");
  }
}

MemoryInfo HostBackend::memory_info() const {
  require_usable();
  return state_->file->info();
}

HugePages HostBackend::huge_pages() const {
  require_usable();
  const Bytes huge(state_->huge.load(std::memory_order_relaxed));
  const Bytes small(state_->small.load(std::memory_order_relaxed));
  const Bytes hugetlb = state_->file->is_hugetlb() ? huge : Bytes(0);
  if (small == Bytes(0)) return {huge, small, "", hugetlb};
  std::scoped_lock lock(state_->mutex);
  return {huge, small, state_->refusal, hugetlb};
}

bool HostBackend::is_run(FrameRun run) const noexcept {
  const SizeClass c = run.first.size_class();
  if (run.first.is_none() || c > largest_class_ || run.count == 0) return false;
  const std::uint64_t frames = (capacity_.value / traits_.page_size.value) >> c.value;
  return std::uint64_t{run.first.index()} + run.count <= frames;
}

Extent HostBackend::extent_of(FrameRun run) const {
  const SizeClass c = run.first.size_class();
  const Bytes frame = size_of(pages_of(c), traits_.page_size);
  return {capacity_ * c.value + frame * run.first.index(), frame * run.count};
}

// Calls f(run, descriptor, offset, is_imported) for the pieces of a run that lie in one piece in
// one file, in order: one piece as a rule.
template <class F>
void HostBackend::for_each_piece(FrameRun run, F f) const {
  FrameRun own{run.first, run.count};
  if (state_->imports.any()) {
    own.count = 0;
    for (std::uint32_t i = 0; i < run.count; ++i) {
      const FrameId frame = run.first.next(i);
      const auto import = state_->imports.find(frame);
      if (!import) {
        ++own.count;
        continue;
      }
      if (own.count > 0) f(own, state_->file->fd(), extent_of(own).offset, false);
      f(FrameRun{frame, 1}, import->fd, import->offset, true);
      own = {frame.next(), 0};
    }
  }
  if (own.count > 0) f(own, state_->file->fd(), extent_of(own).offset, false);
}

Unmapped HostBackend::policy_of(VirtualRange range) const {
  std::scoped_lock lock(state_->mutex);
  auto next = state_->reservations.upper_bound(range.base.value);
  if (next == state_->reservations.begin() || range.end() > (--next)->second.range().end()) {
    throw InvalidArgument("the range is not part of a reservation of this pool's");
  }
  return next->second.unmapped();
}

void HostBackend::set_refusal(const std::string& why) {
  std::scoped_lock lock(state_->mutex);
  state_->refusal = why;
}

// Writes down that the first `huge` bytes of a run that was just created are huge pages.
void HostBackend::note_huge(FrameRun run, Bytes huge) noexcept {
  const Bytes frame = extent_of({run.first, 1}).size;
  state_->huge.fetch_add(huge.value, std::memory_order_relaxed);
  state_->small.fetch_add((frame * run.count - huge).value, std::memory_order_relaxed);
  if (state_->huge_bytes.empty()) return;
  auto* const of_frame = &state_->huge_bytes[run.first.size_class().value][run.first.index()];
  for (std::uint32_t i = 0; i < run.count; ++i) {
    of_frame[i] = std::min(frame, huge).value;
    huge -= std::min(frame, huge);
  }
}

Bytes HostBackend::huge_bytes_of(FrameRun run) const noexcept {
  Bytes huge{};
  if (state_->huge_bytes.empty()) return huge;
  const auto* of_frame = &state_->huge_bytes[run.first.size_class().value][run.first.index()];
  for (std::uint32_t i = 0; i < run.count; ++i) huge += Bytes(of_frame[i]);
  return huge;
}

VirtualRange HostBackend::do_reserve(Bytes size, Unmapped unmapped) {
  require_usable();
  if (size == Bytes(0) || size.value % traits_.page_size.value != 0) {
    throw InvalidArgument("a reservation is a positive multiple of the page size (" +
                          to_string(traits_.page_size) + "), not " + to_string(size));
  }
  const Bytes alignment = std::max(traits_.page_size, kReservationAlignment);
  // The kernel gives a base, and the map wants it as a key: so a node is made outside of the map.
  std::map<std::uintptr_t, Reservation> made;
  made.emplace(std::piecewise_construct, std::forward_as_tuple(0),
               std::forward_as_tuple(size, alignment, unmapped));
  auto node = made.extract(made.begin());
  const VirtualRange range = node.mapped().range();
  node.key() = range.base.value;
  std::scoped_lock lock(state_->mutex);
  state_->reservations.insert(std::move(node));
  return range;
}

void HostBackend::do_free(VirtualRange range) noexcept {
  if (!usable()) return;
  std::map<std::uintptr_t, Reservation>::node_type node;  // unmapped after the lock is gone
  std::scoped_lock lock(state_->mutex);
  const auto it = state_->reservations.find(range.base.value);
  if (it == state_->reservations.end() || it->second.range().size != range.size) {
    report_failure();
    return;
  }
  node = state_->reservations.extract(it);
}

void HostBackend::do_create(FrameRun run) {
  require_usable();
  if (!is_run(run)) throw InvalidArgument("create: no such frames in this pool");
  const Extent extent = extent_of(run);
  HugeAllocation huge;
  try {
    huge = state_->file->allocate(extent.offset, extent.size);
  } catch (...) {
    if (!state_->file->punch(extent.offset, extent.size)) report_failure();
    throw;
  }
  if (huge.size < extent.size) set_refusal(huge.refusal);
  note_huge(run, huge.size);
  std::fill_n(presence_of(run), run.count, true);
}

void HostBackend::do_release(FrameRun run) noexcept {
  if (!usable()) return;
  if (!is_run(run)) {
    report_failure();
    return;
  }
  for_each_piece(run, [&](FrameRun piece, int, Bytes, bool is_imported) {
    if (is_imported) {
      state_->imports.remove(piece.first);
    } else {
      release_own(piece);
    }
  });
}

void HostBackend::release_own(FrameRun run) noexcept {
  std::fill_n(presence_of(run), run.count, false);
  const Extent extent = extent_of(run);
  if (!state_->file->punch(extent.offset, extent.size)) {
    report_failure();  // the frames keep their memory, and the figures say so
    return;
  }
  const Bytes huge = huge_bytes_of(run);
  state_->huge.fetch_sub(huge.value, std::memory_order_relaxed);
  state_->small.fetch_sub((extent.size - huge).value, std::memory_order_relaxed);
}

ExportedFrame HostBackend::do_export_frame(FrameId frame) {
  require_usable();
  if (!is_run({frame, 1})) throw InvalidArgument("export_frame: no such frame in this pool");
  Extent extent = extent_of({frame, 1});
  int fd = state_->file->fd();
  if (const auto import = state_->imports.find(frame)) {
    fd = import->fd;
    extent.offset = import->offset;
  } else if (!*presence_of({frame, 1})) {
    throw InvalidArgument("export_frame: the frame is not there");
  }
  const int copy = fcntl(fd, F_DUPFD_CLOEXEC, 3);
  if (copy < 0) throw system_error("fcntl", errno, "cannot make a descriptor of a frame");
  return {copy, extent.offset, extent.size};
}

void HostBackend::do_import_frame(FrameId frame, const ExportedFrame& exported) {
  require_usable();
  if (!is_run({frame, 1})) throw InvalidArgument("import_frame: no such frame in this pool");
  const Extent extent = extent_of({frame, 1});
  if (exported.size != extent.size || exported.offset.value % traits_.page_size.value != 0) {
    throw InvalidArgument("a frame of " + to_string(extent.size) + " cannot be imported from " +
                          to_string(exported.size) + " at offset " + to_string(exported.offset) +
                          ": both pools need the same page_size, and frames of one class");
  }
  struct statfs status{};
  const bool is_known = fstatfs(exported.fd, &status) == 0;
  if (is_known && traits_.page_size.value % static_cast<std::uint64_t>(status.f_bsize) != 0) {
    throw InvalidArgument("the frame lies in huge pages of " +
                          to_string(Bytes(static_cast<std::uint64_t>(status.f_bsize))) +
                          ", which cannot be mapped in pages of " + to_string(traits_.page_size));
  }
  if (*presence_of({frame, 1})) {
    throw InvalidArgument("a frame that is present already cannot be imported");
  }
  state_->imports.add(frame, exported);
}

void HostBackend::do_map(Address at, FrameRun run, Access access) {
  require_usable();
  if (!is_run(run)) throw InvalidArgument("map: no such frames in this pool");
  const Extent extent = extent_of(run);
  const VirtualRange range{at, extent.size};
  const Unmapped policy = policy_of(range);
  if (!state_->spare.hold()) throw_mapping_error("mmap", errno, extent.size);

  Address next = at;
  int error_number = 0;
  for_each_piece(run, [&](FrameRun piece, int fd, Bytes offset, bool is_imported) {
    if (error_number != 0) return;
    const Bytes size = extent_of(piece).size;
    // Populated, so that no kernel that reads or writes these pages meets a fault; but not what is
    // long and in huge pages, where a fault is a fiftieth of what reading the page takes.
    const bool is_quick = size >= kLongMapping && !is_imported && huge_bytes_of(piece) == size;
    if (mmap(pointer(next), size.value, protection_of(access),
             MAP_SHARED | MAP_FIXED | (is_quick ? 0 : MAP_POPULATE), fd,
             static_cast<off_t>(offset.value)) == MAP_FAILED) {
      error_number = errno;
    } else {
      next = next + size;
    }
  });
  if (error_number == 0) return;
  if ((next != at || has_hole(range)) && !restore_unmapped(range, policy)) report_failure();
  throw_mapping_error("mmap", error_number, extent.size);
}

void HostBackend::do_set_access(VirtualRange range, Access access) {
  require_usable();
  static_cast<void>(policy_of(range));
  if (mprotect(pointer(range.base), range.size.value, protection_of(access)) != 0) {
    throw_mapping_error("mprotect", errno, range.size);
  }
}

void HostBackend::do_unmap(VirtualRange range, std::uint32_t) {
  require_usable();
  const Unmapped policy = policy_of(range);
  if (restore_unmapped(range, policy)) return;
  int error_number = errno;
  if (error_number == ENOMEM && state_->spare.give_up()) {
    if (restore_unmapped(range, policy)) return;
    error_number = errno;
  }
  if (has_hole(range) && restore_unmapped(range, policy)) return;
  throw_mapping_error("mmap", error_number, range.size);
}

void HostBackend::do_copy(Address to, Address from, Bytes size, Stream) {
  require_usable();
  std::memcpy(pointer(to), pointer(from), size.value);
}

void HostBackend::do_fill(Address at, std::uint8_t value, Bytes size, Stream) {
  require_usable();
  std::memset(pointer(at), value, size.value);
}

// The host's work is done when the call that does it returns: every fence is passed from the start.
Fence HostBackend::do_record_fence(Stream) { return Fence{}; }

void HostBackend::do_wait(Fence) {}

}  // namespace

std::unique_ptr<Backend> make_host_backend(const HostOptions& options, const std::string& root) {
  check(options);
  return std::make_unique<HostBackend>(options, root);
}

std::unique_ptr<Backend> make_host_backend(const HostOptions& options) {
  return make_host_backend(options, "");
}

}  // namespace kvspan

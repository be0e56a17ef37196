// The backend contract: everything that differs between a GPU and a host, and nothing else.
//
// A backend reserves virtual ranges, creates frames (physical allocations, named by the frame
// pool's ids) and maps frames into ranges. It keeps no policy: who gets which frame, when pages go
// and what a sequence is are decided above, in one code for every device.
//
//   reservation   free address space --reserve--> reserved --free--> free address space
//   frame         absent --create, import_frame--> present --release--> absent
//   page          unbacked --map--> backed --unmap--> unbacked
//
// Failure: a function that throws has changed nothing. What it throws: `OutOfMemory` when physical
// memory is short, `CapacityError` when another limit of the machine is (mappings, address space,
// file size) and names the setting, `DriverError` for any other refusal. `noexcept` functions
// report what went wrong in `failures()` and leak rather than abort.
//
// Threads: every function may be called from any thread at any time; calls on the same frame, or
// on overlapping ranges, must not overlap in time (the layers above see to that).
//
// Calls are counted here, once for all backends: the public functions count and call the private
// ones, which a backend implements.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <string_view>

#include "backend/calls.hpp"
#include "core/ids.hpp"

namespace kvspan {

struct VirtualRange {
  Address base;
  Bytes size;

  constexpr Address end() const { return base + size; }
};

// `count` frames of one size class with adjacent ids.
struct FrameRun {
  FrameId first;
  std::uint32_t count = 0;

  constexpr Pages pages() const { return Pages(pages_of(first.size_class()).value * count); }
};

enum class Access : std::uint8_t { none, read, read_write };

// What a kernel finds where a reservation has no page: a trap, or zeros that it may read.
enum class Unmapped : std::uint8_t { fault, zero };

// A stream of the device's, as its driver knows it. The host has only stream 0: the calling thread.
struct Stream {
  std::uintptr_t handle = 0;
};

// A point in a stream's work. The default fence is one that has been passed.
struct Fence {
  std::uint64_t id = 0;
};

enum class DeviceKind : std::uint8_t { cpu, cuda };

// What a backend is like; constant through its life.
struct Traits {
  std::string device;  // "cpu", "cuda:0"
  DeviceKind kind;
  std::int32_t ordinal;  // among the devices of its kind
  Bytes page_size;       // what every size and address below is a multiple of
  SizeClass
      preferred_class;  // the largest frames worth making: where a call costs per handle, large
  bool zero_on_unmapped = false;  // whether `Unmapped::zero` can be had
  bool creates_zeros = true;      // whether new frames read as zeros; else as anything
  // Whether the driver takes one call for each frame, and one more to grant access to a range.
  bool calls_per_frame = false;
};

struct MemoryInfo {
  Bytes total;      // of the device, as far as this process may use it
  Bytes available;  // now, the reserve that is kept for others taken off
};

// How frames came out: huge pages are worth having (one TLB entry, cheap unmapping) but never owed.
struct HugePages {
  Bytes huge;           // physical memory of frames that lies in huge pages
  Bytes small;          // and that does not
  std::string refusal;  // why the last frame that is not huge is not; empty when all are
  Bytes hugetlb{};      // of `huge`, in pages that the administrator of a host has set aside
};

// A frame as another process can have it: the descriptor keeps its memory, and whoever has got one
// closes it. It is closed at exec, and passed on by inheritance, SCM_RIGHTS or pidfd_getfd(2).
struct ExportedFrame {
  int fd = -1;
  Bytes offset;  // of the frame in what the descriptor stands for
  Bytes size;
};

// A small array that the host fills and kernels read, at an address that never changes. It may
// outlive its backend.
class Mirror {
 public:
  Mirror() = default;
  Mirror(const Mirror&) = delete;
  Mirror& operator=(const Mirror&) = delete;
  virtual ~Mirror() = default;

  virtual void* host() noexcept = 0;            // what to fill
  virtual Address device() const noexcept = 0;  // where kernels find it
  // Lets work that is queued on the stream from now on see what the host has filled in so far; the
  // host may go on writing at once. The stream must outlive the mirror. Throws DriverError.
  virtual void publish(Stream stream) = 0;
};

class Backend {
 public:
  Backend() = default;
  Backend(const Backend&) = delete;
  Backend& operator=(const Backend&) = delete;
  virtual ~Backend() = default;

  virtual const Traits& traits() const noexcept = 0;
  virtual MemoryInfo memory_info() const = 0;
  virtual HugePages huge_pages() const = 0;

  // False in a child of fork(2), where every reservation is inaccessible and nothing may be called
  // but the destructor. One load; safe to ask on every call of the API.
  virtual bool usable() const noexcept = 0;

  // Reserves address space, aligned to the page size. `size` is a multiple of the page size, > 0.
  // Throws InvalidArgument when the device cannot do `unmapped`.
  VirtualRange reserve(Bytes size, Unmapped unmapped);

  // Gives a reservation back. Nothing may be mapped in it.
  void free(VirtualRange range) noexcept;

  // Gives frames their physical memory, all of it now: a later touch cannot fail. It holds zeros if
  // Traits::creates_zeros says so, else anything.
  // All frames of the run or none.
  void create(FrameRun run);

  // Takes the physical memory away. No frame of the run may be mapped.
  void release(FrameRun run) noexcept;

  // Lets other backends, of this process or another, have the frame as well. It must stay present
  // here until all of them have released it. Throws InvalidArgument when frames cannot be exported.
  ExportedFrame export_frame(FrameId frame);

  // Gives an absent frame the memory of somebody else's frame of the same size, with the bytes that
  // are in it. The descriptor stays the caller's. Releasing such a frame only lets go of it, and
  // its memory is none of this backend's figures. Throws InvalidArgument when it cannot be that.
  void import_frame(FrameId frame, const ExportedFrame& exported);

  // Maps the frames of `run` one behind the other at `at` and grants `access`. The pages there are
  // unbacked. One call however many frames, if the device can.
  void map(Address at, FrameRun run, Access access);

  // Changes the access to a range that consists of whole mapped frames.
  void set_access(VirtualRange range, Access access);

  // Makes a range of whole mapped frames (`handles` of them) unbacked again. The work that reads it
  // must be done: the caller has waited for its fence.
  void unmap(VirtualRange range, std::uint32_t handles);

  // Copies between mapped ranges that do not overlap, ordered after the stream's earlier work.
  void copy(Address to, Address from, Bytes size, Stream stream);

  // Sets mapped bytes to `value`, ordered likewise.
  void fill(Address at, std::uint8_t value, Bytes size, Stream stream);

  // A fence behind all work that the stream has now. This and whatever else takes a stream throws
  // InvalidArgument for one that is being captured into a graph.
  Fence record_fence(Stream stream);
  // Whether the fence has been passed; never blocks.
  virtual bool is_passed(Fence fence) const noexcept = 0;
  // Blocks until it has been.
  void wait(Fence fence);
  // Holds back what is queued on the stream from now on until the fence has been passed; the
  // calling thread goes on.
  void order_after(Stream stream, Fence fence);
  // A stream of the backend's own, for work that no caller orders.
  virtual Stream own_stream() const noexcept { return {}; }
  // Blocks until the device has done all work of this process. For closing, and for where the
  // driver gives no fence.
  virtual void finish() noexcept = 0;

  // A mirror of `size` bytes, zeroed. Throws OutOfMemory.
  virtual std::unique_ptr<Mirror> make_mirror(Bytes size) = 0;

  const CallCounters& calls() const noexcept { return calls_; }
  // Adds what a call that concerns so many frames is to the driver: one mmap for all of them, or a
  // cuMemMap for each and a cuMemSetAccess.
  void count(CallCounters& counters, Call call, std::uint64_t frames) const noexcept;
  // Frames that are mapped now, each as often as it is mapped.
  std::uint64_t mappings() const noexcept { return mappings_.load(std::memory_order_relaxed); }

  // How often a noexcept function failed, and what the last one reported.
  std::uint64_t failure_count() const noexcept {
    return failures_.load(std::memory_order_relaxed) + failures_elsewhere();
  }

 protected:
  void report_failure() noexcept { failures_.fetch_add(1, std::memory_order_relaxed); }

 private:
  virtual VirtualRange do_reserve(Bytes size, Unmapped unmapped) = 0;
  virtual void do_free(VirtualRange range) noexcept = 0;
  virtual void do_create(FrameRun run) = 0;
  virtual void do_release(FrameRun run) noexcept = 0;
  virtual ExportedFrame do_export_frame(FrameId frame) = 0;
  virtual void do_import_frame(FrameId frame, const ExportedFrame& exported) = 0;
  virtual void do_map(Address at, FrameRun run, Access access) = 0;
  virtual void do_set_access(VirtualRange range, Access access) = 0;
  virtual void do_unmap(VirtualRange range, std::uint32_t handles) = 0;
  virtual void do_copy(Address to, Address from, Bytes size, Stream stream) = 0;
  virtual void do_fill(Address at, std::uint8_t value, Bytes size, Stream stream) = 0;
  virtual Fence do_record_fence(Stream stream) = 0;
  virtual void do_wait(Fence fence) = 0;
  virtual void do_order_after(Stream stream, Fence fence) = 0;
  // What parts of the backend that may outlive it have counted.
  virtual std::uint64_t failures_elsewhere() const noexcept { return 0; }

  CallCounters calls_;
  std::atomic<std::uint64_t> mappings_{0};  // relaxed: only read as a figure
  std::atomic<std::uint64_t> failures_{0};
};

}  // namespace kvspan

#include "backend/backend.hpp"

namespace kvspan {

void Backend::count(CallCounters& counters, Call call, std::uint64_t frames) const noexcept {
  const bool is_per_frame = call == Call::create || call == Call::release || call == Call::map;
  const bool is_split = traits().calls_per_frame && is_per_frame;
  counters.add(call, frames, is_split ? frames : 1);
  if (is_split && call == Call::map) counters.add(Call::set_access, frames);
}

VirtualRange Backend::reserve(Bytes size, Unmapped unmapped) {
  calls_.add(Call::reserve, 1);
  return do_reserve(size, unmapped);
}

void Backend::free(VirtualRange range) noexcept {
  calls_.add(Call::free, 1);
  do_free(range);
}

void Backend::create(FrameRun run) {
  count(calls_, Call::create, run.count);
  do_create(run);
}

void Backend::release(FrameRun run) noexcept {
  count(calls_, Call::release, run.count);
  do_release(run);
}

ExportedFrame Backend::export_frame(FrameId frame) {
  calls_.add(Call::export_frame, 1);
  return do_export_frame(frame);
}

void Backend::import_frame(FrameId frame, const ExportedFrame& exported) {
  calls_.add(Call::import_frame, 1);
  do_import_frame(frame, exported);
}

void Backend::map(Address at, FrameRun run, Access access) {
  count(calls_, Call::map, run.count);
  do_map(at, run, access);
  mappings_.fetch_add(run.count, std::memory_order_relaxed);
}

void Backend::set_access(VirtualRange range, Access access) {
  calls_.add(Call::set_access, 1);
  do_set_access(range, access);
}

void Backend::unmap(VirtualRange range, std::uint32_t handles) {
  calls_.add(Call::unmap, handles);
  do_unmap(range, handles);
  mappings_.fetch_sub(handles, std::memory_order_relaxed);
}

void Backend::copy(Address to, Address from, Bytes size, Stream stream) {
  calls_.add(Call::copy, 1);
  do_copy(to, from, size, stream);
}

void Backend::fill(Address at, std::uint8_t value, Bytes size, Stream stream) {
  calls_.add(Call::fill, 1);
  do_fill(at, value, size, stream);
}

Fence Backend::record_fence(Stream stream) {
  calls_.add(Call::record_fence, 1);
  return do_record_fence(stream);
}

void Backend::wait(Fence fence) {
  calls_.add(Call::wait_fence, 1);
  do_wait(fence);
}

void Backend::order_after(Stream stream, Fence fence) {
  calls_.add(Call::order_after, 1);
  do_order_after(stream, fence);
}

}  // namespace kvspan

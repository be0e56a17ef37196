#include "backend/contract.hpp"

#include <unistd.h>

#include <atomic>
#include <string>
#include <thread>
#include <vector>

#include "backend/exec_self.hpp"
#include "core/errors.hpp"
#include "core/sizes.hpp"

namespace kvspan::test {

namespace {

FrameId frame(unsigned size_class, std::uint32_t index) {
  return {SizeClass(static_cast<std::uint8_t>(size_class)), index};
}

Bytes last(Bytes size) { return size - Bytes(1); }

void traits_hold(const ContractSubject& s) {
  const auto b = s.make_with(4);
  BOOST_TEST(b->traits().page_size.value == s.page_size.value);
  BOOST_TEST(!b->traits().device.empty());
  BOOST_TEST(b->usable());
  const MemoryInfo memory = b->memory_info();
  BOOST_TEST(memory.total.value > 0u);
  BOOST_TEST(memory.available.value <= memory.total.value);
}

void reservations_are_aligned_and_apart(const ContractSubject& s) {
  const auto b = s.make_with(4);
  std::vector<VirtualRange> ranges;
  for (std::uint32_t pages : {1u, 7u, 4096u, 3u}) {
    ranges.push_back(b->reserve(s.page_size * pages, Unmapped::fault));
    BOOST_TEST(ranges.back().base.value % s.page_size.value == 0u);
    BOOST_TEST(ranges.back().size.value == (s.page_size * pages).value);
  }
  for (std::size_t i = 0; i < ranges.size(); ++i) {
    for (std::size_t j = 0; j < i; ++j) {
      BOOST_TEST((ranges[i].end() <= ranges[j].base || ranges[j].end() <= ranges[i].base));
    }
  }
  for (const VirtualRange range : ranges) b->free(range);
  BOOST_TEST(b->failure_count() == 0u);
}

void zero_policy_is_kept_or_refused(const ContractSubject& s) {
  const auto b = s.make_with(2);
  if (!b->traits().zero_on_unmapped) {
    BOOST_CHECK_THROW(b->reserve(s.page_size, Unmapped::zero), InvalidArgument);
    return;
  }
  const VirtualRange range = b->reserve(s.page_size * 3, Unmapped::zero);
  b->create({frame(0, 0), 1});
  b->map(range.base + s.page_size, {frame(0, 0), 1}, Access::read_write);
  b->fill(range.base + s.page_size, 0xab, s.page_size, {});
  b->wait(b->record_fence({}));
  BOOST_TEST(s.peek(*b, range.base) == 0);
  BOOST_TEST(s.peek(*b, range.base + s.page_size) == 0xab);
  BOOST_TEST(s.peek(*b, range.base + s.page_size * 2) == 0);
  b->unmap({range.base + s.page_size, s.page_size}, 1);
  BOOST_TEST(s.peek(*b, range.base + s.page_size) == 0);
  b->release({frame(0, 0), 1});
  b->free(range);
}

void frames_are_created_zeroed(const ContractSubject& s) {
  const auto b = s.make_with(8);
  if (!b->traits().creates_zeros) return;
  const VirtualRange range = b->reserve(s.page_size * 8, Unmapped::fault);
  const FrameRun run{frame(0, 1), 3};
  const Bytes size = s.page_size * 3;
  for (int round = 0; round < 2; ++round) {
    b->create(run);
    b->map(range.base, run, Access::read_write);
    for (Bytes at{}; at < size; at += Bytes(s.page_size.value / 8)) {
      BOOST_TEST(s.peek(*b, range.base + at) == 0);
    }
    BOOST_TEST(s.peek(*b, range.base + last(size)) == 0);
    b->fill(range.base, 0xee, size, {});
    b->wait(b->record_fence({}));
    b->unmap({range.base, size}, 3);
    b->release(run);
  }
  b->free(range);
  BOOST_TEST(b->failure_count() == 0u);
}

void bytes_stay_with_the_frame(const ContractSubject& s) {
  const auto b = s.make_with(4);
  const VirtualRange range = b->reserve(s.page_size * 4, Unmapped::fault);
  const FrameRun run{frame(0, 2), 1};
  b->create(run);
  b->map(range.base, run, Access::read_write);
  b->fill(range.base, 0x11, s.page_size, {});
  b->wait(b->record_fence({}));
  b->unmap({range.base, s.page_size}, 1);
  b->map(range.base + s.page_size * 3, run, Access::read);
  BOOST_TEST(s.peek(*b, range.base + s.page_size * 3) == 0x11);
  BOOST_TEST(s.peek(*b, range.base + last(s.page_size * 4)) == 0x11);
  b->unmap({range.base + s.page_size * 3, s.page_size}, 1);
  b->release(run);
  b->free(range);
}

void one_frame_under_two_pages_is_shared(const ContractSubject& s) {
  const auto b = s.make_with(2);
  const VirtualRange one = b->reserve(s.page_size, Unmapped::fault);
  const VirtualRange two = b->reserve(s.page_size * 2, Unmapped::fault);
  const FrameRun run{frame(0, 0), 1};
  b->create(run);
  b->map(one.base, run, Access::read_write);
  b->map(two.base + s.page_size, run, Access::read);
  b->fill(one.base, 0x5c, s.page_size, {});
  b->wait(b->record_fence({}));
  BOOST_TEST(s.peek(*b, two.base + last(s.page_size * 2)) == 0x5c);
  b->unmap(one, 1);
  BOOST_TEST(s.peek(*b, two.base + s.page_size) == 0x5c);
  b->unmap({two.base + s.page_size, s.page_size}, 1);
  b->release(run);
  b->free(one);
  b->free(two);
}

void runs_lie_in_order_and_unmap_by_frame(const ContractSubject& s) {
  const auto b = s.make_with(8);
  const VirtualRange range = b->reserve(s.page_size * 8, Unmapped::fault);
  const FrameRun run{frame(0, 2), 4};
  b->create(run);
  for (std::uint32_t i = 0; i < 4; ++i) {  // written one by one, elsewhere
    const Address at = range.base + s.page_size * 7;
    b->map(at, {run.first.next(i), 1}, Access::read_write);
    b->fill(at, static_cast<std::uint8_t>(i + 1), s.page_size, {});
    b->wait(b->record_fence({}));
    b->unmap({at, s.page_size}, 1);
  }
  b->map(range.base + s.page_size, run, Access::read_write);
  const auto at_page = [&](std::uint32_t page) { return range.base + s.page_size * page; };
  for (std::uint32_t i = 0; i < 4; ++i) {
    BOOST_TEST(s.peek(*b, at_page(1 + i)) == i + 1);
    BOOST_TEST(s.peek(*b, at_page(1 + i) + last(s.page_size)) == i + 1);
  }
  b->unmap({at_page(2), s.page_size * 2}, 2);
  BOOST_TEST(s.peek(*b, at_page(1)) == 1);
  BOOST_TEST(s.peek(*b, at_page(4)) == 4);
  b->map(at_page(2), {run.first.next(2), 1}, Access::read_write);  // another one in the gap
  BOOST_TEST(s.peek(*b, at_page(2)) == 3);
  b->unmap({at_page(1), s.page_size * 2}, 2);
  b->unmap({at_page(4), s.page_size}, 1);
  b->release(run);
  b->free(range);
  BOOST_TEST(b->failure_count() == 0u);
}

void classes_do_not_overlap(const ContractSubject& s) {
  const auto b = s.make_with(16);
  const VirtualRange range = b->reserve(s.page_size * 16, Unmapped::fault);
  // The first and last frames of each class, where a wrong offset would meet a neighbour's bytes.
  const std::vector<FrameId> frames = {frame(0, 0), frame(0, 15), frame(1, 0),
                                       frame(1, 7), frame(2, 0),  frame(2, 3)};
  std::uint8_t value = 1;
  for (const FrameId f : frames) {
    b->create({f, 1});
    b->map(range.base, {f, 1}, Access::read_write);
    const Bytes size = size_of(pages_of(f.size_class()), s.page_size);
    b->fill(range.base, value++, size, {});
    b->wait(b->record_fence({}));
    b->unmap({range.base, size}, 1);
  }
  value = 1;
  for (const FrameId f : frames) {
    const Bytes size = size_of(pages_of(f.size_class()), s.page_size);
    b->map(range.base, {f, 1}, Access::read);
    for (Bytes at{}; at < size; at += s.page_size) {
      BOOST_TEST(s.peek(*b, range.base + at) == value);
      BOOST_TEST(s.peek(*b, range.base + at + last(s.page_size)) == value);
    }
    b->unmap({range.base, size}, 1);
    b->release({f, 1});
    ++value;
  }
  b->free(range);
}

void copy_and_fill_keep_to_their_bytes(const ContractSubject& s) {
  const auto b = s.make_with(2);
  const VirtualRange range = b->reserve(s.page_size * 2, Unmapped::fault);
  const FrameRun run{frame(0, 0), 2};
  b->create(run);
  b->map(range.base, run, Access::read_write);
  const Address to = range.base + s.page_size;
  b->fill(range.base, 1, s.page_size, {});
  b->fill(range.base + Bytes(100), 2, Bytes(50), {});
  b->copy(to + Bytes(10), range.base + Bytes(99), Bytes(52), {});
  b->wait(b->record_fence({}));
  BOOST_TEST(s.peek(*b, range.base + Bytes(99)) == 1);
  BOOST_TEST(s.peek(*b, range.base + Bytes(100)) == 2);
  BOOST_TEST(s.peek(*b, range.base + Bytes(149)) == 2);
  BOOST_TEST(s.peek(*b, range.base + Bytes(150)) == 1);
  BOOST_TEST(s.peek(*b, to + Bytes(9)) == 0);
  BOOST_TEST(s.peek(*b, to + Bytes(10)) == 1);
  BOOST_TEST(s.peek(*b, to + Bytes(11)) == 2);
  BOOST_TEST(s.peek(*b, to + Bytes(60)) == 2);
  BOOST_TEST(s.peek(*b, to + Bytes(61)) == 1);
  BOOST_TEST(s.peek(*b, to + Bytes(62)) == 0);
  b->unmap(range, 2);
  b->release(run);
  b->free(range);
}

void access_can_be_changed(const ContractSubject& s) {
  const auto b = s.make_with(2);
  const VirtualRange range = b->reserve(s.page_size * 2, Unmapped::fault);
  const FrameRun run{frame(0, 0), 2};
  b->create(run);
  b->map(range.base, run, Access::none);
  b->set_access(range, Access::read_write);
  b->fill(range.base, 9, range.size, {});
  b->wait(b->record_fence({}));
  b->set_access({range.base + s.page_size, s.page_size}, Access::read);
  BOOST_TEST(s.peek(*b, range.base + last(range.size)) == 9);
  b->fill(range.base, 8, s.page_size, {});
  b->wait(b->record_fence({}));
  BOOST_TEST(s.peek(*b, range.base + last(s.page_size)) == 8);
  b->unmap(range, 2);
  b->release(run);
  b->free(range);
}

void fences_are_passed_after_a_wait(const ContractSubject& s) {
  const auto b = s.make_with(1);
  BOOST_TEST(b->is_passed(Fence{}));
  const Fence first = b->record_fence({});
  const Fence second = b->record_fence({});
  b->wait(second);
  BOOST_TEST(b->is_passed(second));
  BOOST_TEST(b->is_passed(first));  // it is earlier in the same stream
  b->wait(first);
}

void calls_and_memory_are_counted(const ContractSubject& s) {
  const auto b = s.make_with(8);
  const auto created = [&] {
    const HugePages h = b->huge_pages();
    return (h.huge + h.small).value;
  };
  const VirtualRange range = b->reserve(s.page_size * 8, Unmapped::fault);
  BOOST_TEST(created() == 0u);
  b->create({frame(0, 0), 3});
  b->create({frame(2, 1), 1});
  BOOST_TEST(created() == (s.page_size * 7).value);
  b->map(range.base, {frame(0, 0), 3}, Access::read_write);
  b->map(range.base + s.page_size * 4, {frame(2, 1), 1}, Access::read_write);
  b->unmap({range.base, s.page_size * 3}, 3);
  b->unmap({range.base + s.page_size * 4, s.page_size * 4}, 1);
  b->release({frame(0, 1), 2});
  BOOST_TEST(created() == (s.page_size * 5).value);
  b->release({frame(0, 0), 1});
  b->release({frame(2, 1), 1});
  BOOST_TEST(created() == 0u);
  b->free(range);

  const auto count = [&](Call call) {
    const CallCount c = b->calls().of(call);
    return std::pair(c.calls, c.handles);
  };
  using P = std::pair<std::uint64_t, std::uint64_t>;
  // Some drivers take a call for each frame, and one more to grant access to what was mapped.
  const bool each = b->traits().calls_per_frame;
  BOOST_TEST((count(Call::reserve) == P(1, 1)));
  BOOST_TEST((count(Call::create) == P(each ? 4 : 2, 4)));
  BOOST_TEST((count(Call::map) == P(each ? 4 : 2, 4)));
  BOOST_TEST((count(Call::set_access) == (each ? P(2, 4) : P(0, 0))));
  BOOST_TEST((count(Call::unmap) == P(2, 4)));
  BOOST_TEST((count(Call::release) == P(each ? 4 : 3, 4)));
  BOOST_TEST((count(Call::free) == P(1, 1)));
  BOOST_TEST((count(Call::copy) == P(0, 0)));
}

void nonsense_is_refused_and_changes_nothing(const ContractSubject& s) {
  const auto b = s.make_with(4);
  const VirtualRange range = b->reserve(s.page_size * 4, Unmapped::fault);
  b->create({frame(0, 0), 1});
  b->map(range.base, {frame(0, 0), 1}, Access::read_write);
  b->fill(range.base, 3, s.page_size, {});
  b->wait(b->record_fence({}));
  BOOST_CHECK_THROW(b->reserve(Bytes(0), Unmapped::fault), Error);
  // Frames that the pool does not have, and places that are no reservation.
  BOOST_CHECK_THROW(b->create({frame(0, 3), 2}), Error);
  BOOST_CHECK_THROW(b->create({frame(15, 0), 1}), Error);
  BOOST_CHECK_THROW(b->map(range.base + s.page_size, {frame(0, 4), 1}, Access::read), Error);
  BOOST_CHECK_THROW(b->map(range.end(), {frame(0, 0), 1}, Access::read), Error);
  BOOST_CHECK_THROW(b->unmap({range.end(), s.page_size}, 1), Error);
  BOOST_TEST(s.peek(*b, range.base) == 3);
  const HugePages h = b->huge_pages();
  BOOST_TEST((h.huge + h.small).value == s.page_size.value);
  b->unmap({range.base, s.page_size}, 1);
  b->release({frame(0, 0), 1});
  b->free(range);
}

// A request's life, by several threads side by side, each with frames and pages of its own.
void threads_do_not_disturb_each_other(const ContractSubject& s) {
  constexpr std::uint32_t kThreads = 4;
  constexpr int kRounds = 20;
  const auto b = s.make_with(kThreads * 2);
  const VirtualRange shared = b->reserve(s.page_size * (kThreads * 2), Unmapped::fault);
  std::atomic<int> wrong{0};
  std::vector<std::thread> threads;
  for (std::uint32_t t = 0; t < kThreads; ++t) {
    threads.emplace_back([&, t] {
      try {
        const FrameRun run{frame(0, 2 * t), 2};
        const Address at = shared.base + s.page_size * (2 * t);
        for (int round = 0; round < kRounds; ++round) {
          const auto value = static_cast<std::uint8_t>(1 + t + 16 * (round % 8));
          const VirtualRange own = b->reserve(s.page_size * 2, Unmapped::fault);
          b->create(run);
          b->map(at, run, Access::read_write);
          b->map(own.base, run, Access::read);
          b->fill(at, value, s.page_size * 2, {});
          b->wait(b->record_fence({}));
          if (s.peek(*b, own.base) != value) ++wrong;
          if (s.peek(*b, own.base + last(s.page_size * 2)) != value) ++wrong;
          b->unmap({at, s.page_size * 2}, 2);
          b->unmap(own, 2);
          b->release(run);
          b->free(own);
        }
      } catch (const Error&) {
        ++wrong;
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  BOOST_TEST(wrong == 0);
  b->free(shared);
  BOOST_TEST(b->failure_count() == 0u);
  const HugePages h = b->huge_pages();
  BOOST_TEST((h.huge + h.small).value == 0u);
}

Bytes created(const Backend& b) {
  const HugePages h = b.huge_pages();
  return h.huge + h.small;
}

void a_frame_is_shared_by_two_backends(const ContractSubject& s) {
  const auto ours = s.make_with(8), theirs = s.make_with(8);
  const FrameId exported = frame(1, 1), imported = frame(1, 2);
  const Bytes size = s.page_size * 2;
  const VirtualRange our_range = ours->reserve(size, Unmapped::fault);
  const VirtualRange their_range = theirs->reserve(size, Unmapped::fault);
  ours->create({exported, 1});
  ours->map(our_range.base, {exported, 1}, Access::read_write);
  ours->fill(our_range.base, 0x21, size, {});
  ours->wait(ours->record_fence({}));
  for (int round = 0; round < 2; ++round) {
    const ExportedFrame e = ours->export_frame(exported);
    BOOST_TEST(e.size.value == size.value);
    theirs->import_frame(imported, e);
    BOOST_TEST(close(e.fd) == 0);  // importing has kept what it needs
    BOOST_TEST(created(*theirs).value == 0u);
    theirs->map(their_range.base, {imported, 1}, Access::read_write);
    BOOST_TEST(s.peek(*theirs, their_range.base) == 0x21 + round);
    BOOST_TEST(s.peek(*theirs, their_range.base + last(size)) == 0x21 + round);
    theirs->fill(their_range.base, static_cast<std::uint8_t>(0x22 + round), size, {});
    theirs->wait(theirs->record_fence({}));
    BOOST_TEST(s.peek(*ours, our_range.base + last(size)) == 0x22 + round);
    theirs->unmap(their_range, 1);
    theirs->release({imported, 1});
  }
  BOOST_TEST(s.peek(*ours, our_range.base) == 0x23);  // they only let go
  BOOST_TEST(created(*ours).value == size.value);
  theirs->create({imported, 1});  // the name stands for a frame of its own again
  theirs->map(their_range.base, {imported, 1}, Access::read_write);
  BOOST_TEST(s.peek(*theirs, their_range.base) == 0);
  BOOST_TEST(created(*theirs).value == size.value);
  theirs->unmap(their_range, 1);
  theirs->release({imported, 1});
  ours->unmap(our_range, 1);
  ours->release({exported, 1});
  ours->free(our_range);
  theirs->free(their_range);
  BOOST_TEST(ours->calls().of(Call::export_frame).calls == 2u);
  BOOST_TEST(theirs->calls().of(Call::import_frame).calls == 2u);
  BOOST_TEST(ours->failure_count() + theirs->failure_count() == 0u);
}

void imported_frames_lie_in_runs_with_others(const ContractSubject& s) {
  const auto b = s.make_with(16);
  const VirtualRange range = b->reserve(s.page_size * 16, Unmapped::fault);
  const auto at_page = [&](std::uint32_t page) { return range.base + s.page_size * page; };
  // A run of own, imported, imported, own: the imports are frames 12 and 10 of the same pool.
  b->create({frame(0, 10), 3});
  b->create({frame(0, 2), 1});
  b->create({frame(0, 5), 1});
  for (const std::uint32_t pair : {0u, 1u}) {
    const ExportedFrame e = b->export_frame(frame(0, 12 - 2 * pair));
    b->import_frame(frame(0, 3 + pair), e);
    close(e.fd);
  }
  const FrameRun run{frame(0, 2), 4};
  b->map(range.base, run, Access::read_write);
  for (std::uint32_t i = 0; i < 4; ++i) {
    b->fill(at_page(i), static_cast<std::uint8_t>(i + 1), s.page_size, {});
  }
  b->map(at_page(8), {frame(0, 10), 3}, Access::read);
  b->wait(b->record_fence({}));
  BOOST_TEST(s.peek(*b, at_page(8)) == 3);  // frame 10 is the second import
  BOOST_TEST(s.peek(*b, at_page(9)) == 0);
  BOOST_TEST(s.peek(*b, at_page(10)) == 2);
  b->unmap({range.base, s.page_size * 4}, 4);
  b->release(run);
  BOOST_TEST(s.peek(*b, at_page(8)) == 3);
  BOOST_TEST(s.peek(*b, at_page(10) + last(s.page_size)) == 2);
  BOOST_TEST(created(*b).value == (s.page_size * 3).value);
  b->unmap({at_page(8), s.page_size * 3}, 3);
  b->release({frame(0, 10), 3});
  b->free(range);
  BOOST_TEST(b->failure_count() == 0u);
}

void imports_that_cannot_be_change_nothing(const ContractSubject& s) {
  const auto b = s.make_with(8);
  BOOST_CHECK_THROW(b->export_frame(frame(0, 0)), InvalidArgument);  // it is not there
  BOOST_CHECK_THROW(b->export_frame(frame(15, 0)), InvalidArgument);
  b->create({frame(0, 0), 1});
  const ExportedFrame e = b->export_frame(frame(0, 0));
  BOOST_CHECK_THROW(b->import_frame(frame(0, 0), e), InvalidArgument);  // it is there
  BOOST_CHECK_THROW(b->import_frame(frame(1, 1), e), InvalidArgument);  // of another size
  BOOST_CHECK_THROW(b->import_frame(frame(0, 8), e), InvalidArgument);
  BOOST_CHECK_THROW(b->import_frame(frame(0, 1), {-1, e.offset, e.size}), Error);
  BOOST_CHECK_THROW(b->import_frame(frame(0, 1), {e.fd, e.offset + Bytes(1), e.size}), Error);
  BOOST_CHECK_THROW(b->import_frame(frame(0, 1), {e.fd, s.page_size * 4096, e.size}), Error);
  b->import_frame(frame(0, 1), e);
  BOOST_CHECK_THROW(b->import_frame(frame(0, 1), e), InvalidArgument);  // there by import
  b->release({frame(0, 1), 1});
  b->create({frame(0, 1), 1});
  b->release({frame(0, 0), 2});
  close(e.fd);
  BOOST_TEST(created(*b).value == 0u);
  BOOST_TEST(b->failure_count() == 0u);
}

std::vector<ContractSubject>& subjects() {
  static std::vector<ContractSubject> all;
  return all;
}

void a_frame_is_shared_by_two_processes(const ContractSubject& s) {
  const auto b = s.make_with(4);
  const VirtualRange range = b->reserve(s.page_size, Unmapped::fault);
  const FrameRun run{frame(0, 3), 1};
  b->create(run);
  b->map(range.base, run, Access::read_write);
  b->fill(range.base, 0x31, s.page_size, {});
  b->wait(b->record_fence({}));
  const ExportedFrame e = b->export_frame(run.first);
  std::size_t index = 0;
  while (subjects()[index].name != s.name) ++index;
  BOOST_TEST(run_in_new_process("the_other_process",
                                {std::to_string(index), std::to_string(e.offset.value)},
                                e.fd) == 0);
  close(e.fd);
  BOOST_TEST(s.peek(*b, range.base) == 0x32);
  BOOST_TEST(s.peek(*b, range.base + last(s.page_size)) == 0x32);
  b->unmap(range, 1);
  b->release(run);
  b->free(range);
}

#define KVSPAN_CONTRACT_TEST(name) \
  ContractTest { #name, name }
constexpr ContractTest kTests[] = {
    KVSPAN_CONTRACT_TEST(traits_hold),
    KVSPAN_CONTRACT_TEST(reservations_are_aligned_and_apart),
    KVSPAN_CONTRACT_TEST(zero_policy_is_kept_or_refused),
    KVSPAN_CONTRACT_TEST(frames_are_created_zeroed),
    KVSPAN_CONTRACT_TEST(bytes_stay_with_the_frame),
    KVSPAN_CONTRACT_TEST(one_frame_under_two_pages_is_shared),
    KVSPAN_CONTRACT_TEST(runs_lie_in_order_and_unmap_by_frame),
    KVSPAN_CONTRACT_TEST(classes_do_not_overlap),
    KVSPAN_CONTRACT_TEST(copy_and_fill_keep_to_their_bytes),
    KVSPAN_CONTRACT_TEST(access_can_be_changed),
    KVSPAN_CONTRACT_TEST(fences_are_passed_after_a_wait),
    KVSPAN_CONTRACT_TEST(calls_and_memory_are_counted),
    KVSPAN_CONTRACT_TEST(nonsense_is_refused_and_changes_nothing),
    KVSPAN_CONTRACT_TEST(threads_do_not_disturb_each_other),
    KVSPAN_CONTRACT_TEST(a_frame_is_shared_by_two_backends),
    KVSPAN_CONTRACT_TEST(imported_frames_lie_in_runs_with_others),
    KVSPAN_CONTRACT_TEST(imports_that_cannot_be_change_nothing),
    KVSPAN_CONTRACT_TEST(a_frame_is_shared_by_two_processes),
};
#undef KVSPAN_CONTRACT_TEST

}  // namespace

BOOST_AUTO_TEST_CASE(the_other_process, *boost::unit_test::disabled()) {
  const std::vector<std::string> arguments = process_arguments();
  BOOST_REQUIRE(arguments.size() == 2u);
  const ContractSubject& s = subjects().at(std::stoul(arguments[0]));
  const auto b = s.make_with(4);
  const VirtualRange range = b->reserve(s.page_size, Unmapped::fault);
  const FrameRun run{frame(0, 0), 1};
  b->import_frame(run.first, {kInheritedFd, Bytes(std::stoull(arguments[1])), s.page_size});
  close(kInheritedFd);
  b->map(range.base, run, Access::read_write);
  BOOST_TEST(s.peek(*b, range.base) == 0x31);
  BOOST_TEST(s.peek(*b, range.base + last(s.page_size)) == 0x31);
  b->fill(range.base, 0x32, s.page_size, {});
  b->wait(b->record_fence({}));
  b->unmap(range, 1);
  b->release(run);
  b->free(range);
}

bool add_contract(const ContractSubject& subject) {
  namespace ut = boost::unit_test;
  ut::test_suite* const suite =
      new ut::test_suite("contract/" + subject.name, __FILE__, std::size_t{__LINE__});
  suite->add_precondition(subject.precondition);
  subjects().push_back(subject);
  for (const ContractTest& test : kTests) {
    const auto body = [subject, test] {
      test.run(subject);
      subject.after();
    };
    suite->add(ut::make_test_case(body, test.name, __FILE__, std::size_t{__LINE__}));
  }
  ut::framework::master_test_suite().add(suite);
  return true;
}

}  // namespace kvspan::test

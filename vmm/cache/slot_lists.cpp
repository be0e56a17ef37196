#include "cache/slot_lists.hpp"

namespace kvspan {

void SlotLists::put(SlotId slot, int list) noexcept {
  if (link(slot.value).list == list) return;
  remove(slot);
  Head& at = head(list);
  link(slot.value) = {list, at.last, kNone};
  (at.last == kNone ? at.first : link(at.last).after) = slot.value;
  at.last = slot.value;
  filled_[static_cast<std::size_t>(list) / 64] |= std::uint64_t{1} << (list % 64);
}

void SlotLists::remove(SlotId slot) noexcept {
  Link& here = link(slot.value);
  if (here.list == kNone) return;
  Head& from = head(here.list);
  (here.before == kNone ? from.first : link(here.before).after) = here.after;
  (here.after == kNone ? from.last : link(here.after).before) = here.before;
  if (from.first == kNone) {
    filled_[static_cast<std::size_t>(here.list) / 64] &= ~(std::uint64_t{1} << (here.list % 64));
  }
  here = {};
}

int SlotLists::next_up(int list) const noexcept {
  for (int word = list / 64; word <= (kLists - 1) / 64; ++word) {
    const std::uint64_t below = word == list / 64 ? (std::uint64_t{1} << (list % 64)) - 1 : 0;
    const std::uint64_t bits = filled_[static_cast<std::size_t>(word)] & ~below;
    if (bits == 0) continue;
    const int found = word * 64 + std::countr_zero(bits);
    return found < kLists ? found : -1;
  }
  return -1;
}

int SlotLists::next_down(int list) const noexcept {
  for (int word = list / 64; list >= 0 && word >= 0; --word) {
    const std::uint64_t above = word == list / 64 ? ~std::uint64_t{0} << (list % 64) << 1 : 0;
    const std::uint64_t bits = filled_[static_cast<std::size_t>(word)] & ~above;
    if (bits != 0) return word * 64 + 63 - std::countl_zero(bits);
  }
  return -1;
}

}  // namespace kvspan

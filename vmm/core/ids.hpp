// Distinct types for everything that is counted or named, so that a page index can never be passed
// where a token count is meant. `Id` names a thing (it compares, it does not add); `Quantity`
// counts or measures one (it adds and subtracts). Both are the size of their representation.
#pragma once

#include <compare>
#include <cstddef>
#include <cstdint>
#include <functional>

namespace kvspan {

template <class Tag, class Rep>
struct Id {
  Rep value{};

  constexpr Id() = default;
  constexpr explicit Id(Rep v) : value(v) {}
  constexpr auto operator<=>(const Id&) const = default;
};

template <class Tag, class Rep>
struct Quantity {
  Rep value{};

  constexpr Quantity() = default;
  constexpr explicit Quantity(Rep v) : value(v) {}
  constexpr auto operator<=>(const Quantity&) const = default;

  constexpr Quantity& operator+=(Quantity o) {
    value += o.value;
    return *this;
  }
  constexpr Quantity& operator-=(Quantity o) {
    value -= o.value;
    return *this;
  }
  constexpr Quantity& operator++() {
    ++value;
    return *this;
  }
  friend constexpr Quantity operator+(Quantity a, Quantity b) { return a += b; }
  friend constexpr Quantity operator-(Quantity a, Quantity b) { return a -= b; }
  friend constexpr Quantity operator*(Quantity a, Rep n) {
    return Quantity(static_cast<Rep>(a.value * n));
  }
};

// A size or an offset in bytes.
using Bytes = Quantity<struct BytesTag, std::uint64_t>;
// A number of pages, or (counted from the start of a span) the index of one.
using Pages = Quantity<struct PagesTag, std::uint32_t>;
// A number of tokens, or (counted from the start of a sequence) the position of one.
using Tokens = Quantity<struct TokensTag, std::int64_t>;
// A sequence's place in the batch dimension of a cache.
using SlotId = Id<struct SlotTag, std::int32_t>;

// A node of the host's memory (NUMA), as the kernel numbers them.
using NumaNode = Id<struct NumaNodeTag, std::uint32_t>;

// An address on the device (on the host: in this process).
using Address = Id<struct AddressTag, std::uintptr_t>;

constexpr Address operator+(Address a, Bytes n) { return Address(a.value + n.value); }
constexpr Bytes operator-(Address a, Address b) { return Bytes(a.value - b.value); }

// A frame of class c is 2^c pages.
using SizeClass = Id<struct SizeClassTag, std::uint8_t>;

constexpr Pages pages_of(SizeClass c) { return Pages(std::uint32_t{1} << c.value); }

// Names one frame of a pool: its size class in the top 4 bits, its index in that class below.
struct FrameId {
  static constexpr unsigned kIndexBits = 28;
  static constexpr std::uint32_t kMaxIndex = (std::uint32_t{1} << kIndexBits) - 2;
  static constexpr std::uint8_t kMaxClass = 15;

  std::uint32_t value = 0xffffffffu;  // the default names no frame

  constexpr FrameId() = default;
  constexpr FrameId(SizeClass c, std::uint32_t index)
      : value((std::uint32_t{c.value} << kIndexBits) | index) {}

  constexpr auto operator<=>(const FrameId&) const = default;
  constexpr bool is_none() const { return value == 0xffffffffu; }
  constexpr SizeClass size_class() const {
    return SizeClass(static_cast<std::uint8_t>(value >> kIndexBits));
  }
  constexpr std::uint32_t index() const { return value & ((std::uint32_t{1} << kIndexBits) - 1); }
  // The frame `n` places further on in the same class.
  constexpr FrameId next(std::uint32_t n = 1) const { return FrameId(size_class(), index() + n); }
};

static_assert(sizeof(FrameId) == 4);
static_assert(sizeof(Bytes) == 8 && sizeof(Pages) == 4);

}  // namespace kvspan

template <>
struct std::hash<kvspan::FrameId> {
  std::size_t operator()(const kvspan::FrameId& f) const noexcept {
    return std::hash<std::uint32_t>{}(f.value);
  }
};

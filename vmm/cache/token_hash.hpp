// A hash of 128 bits over a chain of tokens: what a chunk's tokens make of the hash of all before.
//
// It finds chunks, it does not prove them: the index compares the tokens as well. Two lanes of
// multiplications of 64 by 64 bits, folded, as in wyhash (public domain, github.com/wangyi-fudan/
// wyhash).
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string_view>

namespace kvspan {

struct TokenHash {
  std::uint64_t low = 0, high = 0;

  bool operator==(const TokenHash&) const = default;

  struct Hasher {
    std::size_t operator()(const TokenHash& h) const noexcept { return h.low; }
  };

  // The start of a chain: of a caller's salt.
  static TokenHash of(std::string_view salt) {
    TokenHash hash{0x9e3779b97f4a7c15u, 0xbf58476d1ce4e5b9u};
    for (const char c : salt) hash.add(static_cast<unsigned char>(c));
    return hash;
  }

  TokenHash then(std::span<const std::int32_t> tokens) const {
    TokenHash hash = *this;
    for (const std::int32_t token : tokens) hash.add(static_cast<std::uint32_t>(token));
    hash.add(tokens.size());
    return hash;
  }

 private:
  static std::uint64_t fold(std::uint64_t a, std::uint64_t b) {
    __extension__ using Wide = unsigned __int128;
    const Wide product = Wide{a} * b;
    return static_cast<std::uint64_t>(product) ^ static_cast<std::uint64_t>(product >> 64);
  }
  void add(std::uint64_t x) {
    low = fold(low ^ x ^ 0xa0761d6478bd642fu, high ^ 0xe7037ed1a0b428dbu);
    high = fold(high ^ (x + 0x8ebc6af09c88c6e3u), low ^ 0x589965cc75374cc3u);
  }
};

}  // namespace kvspan

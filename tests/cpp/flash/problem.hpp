// A problem of two KV heads with three query heads each, whose memory ends where its numbers do:
// under AddressSanitizer a read behind them is an error. All values are 1, so all outputs are.
#pragma once

#include <cstdint>
#include <cstring>
#include <vector>

#include "kernel/problem.hpp"

namespace kvspan::flash {

struct Decode {
  static constexpr int kKvHeads = 2, kHeads = 6;

  std::vector<std::int32_t> lengths;
  std::vector<char> queries, out, keys, values;
  std::vector<float> lse;
  Problem problem{};

  Decode(Element element, std::vector<std::int32_t> given, int n_positions, int head_dim = 64)
      : lengths(std::move(given)) {
    const std::ptrdiff_t number = size_of(element);
    const auto batch = static_cast<std::ptrdiff_t>(lengths.size());
    const std::ptrdiff_t head = head_dim * number;
    queries = ones(element, batch * kHeads * head_dim);
    out.resize(queries.size());
    keys = ones(element, batch * n_positions * kKvHeads * head_dim);
    values = keys;
    lse.resize(static_cast<std::size_t>(batch * kHeads));
    problem.batch = static_cast<int>(batch);
    problem.query_length = 1;
    problem.n_heads = kHeads;
    problem.n_kv_heads = kKvHeads;
    problem.head_dim = head_dim;
    problem.query_element = problem.key_element = element;
    problem.queries = {queries.data(), kHeads * head, kHeads * head, head};
    problem.out = {out.data(), kHeads * head, kHeads * head, head};
    problem.lse = lse.data();
    problem.keys = {keys.data(), n_positions * kKvHeads * head, kKvHeads * head, head, nullptr, 0};
    problem.values = problem.keys;
    problem.values.data = values.data();
    problem.lengths = lengths.data();
    problem.n_slots = batch;
    problem.n_positions = n_positions;
    problem.scale = 0.125f;
    problem.window_left = problem.window_right = -1;
  }
  Decode(const Decode&) = delete;
  Decode& operator=(const Decode&) = delete;

  static std::vector<char> ones(Element element, std::ptrdiff_t n) {
    const float one = 1.0f;
    const std::uint16_t half = 0x3c00, brain = 0x3f80;
    const auto* const bytes = element == Element::float32   ? reinterpret_cast<const char*>(&one)
                              : element == Element::float16 ? reinterpret_cast<const char*>(&half)
                                                            : reinterpret_cast<const char*>(&brain);
    std::vector<char> all;
    for (std::ptrdiff_t i = 0; i < n; ++i) all.insert(all.end(), bytes, bytes + size_of(element));
    return all;
  }
};

}  // namespace kvspan::flash

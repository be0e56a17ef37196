// An item's end: its parts, one or several or none, joined, divided by the sum of the weights and
// written out.
#pragma once

#include "kernel/begin.hpp"
#include "kernel/scratch.hpp"

namespace kvspan::flash::KVSPAN_LEVEL {

template <class Product, int kBlockRows>
static void finish(const Join& join) {
  constexpr int kTokens = Block<kBlockRows>::kTokens;
  constexpr int kChunk = 2 * kLanes;
  const Problem& p = *join.problem;
  const Layout& layout = *join.layout;
  const Item& item = *join.item;
  const int group = p.group(), n_rows = p.query_rows();

  const int kv_head = item.head_begin + join.head;
  const auto part = [&](int i) {
    return Part(layout,
                const_cast<float*>(i == 0 ? join.first : join.others + (i - 1) * join.stride));
  };

  for (int block = 0; block < layout.n_blocks; ++block) {
    const int i = join.head * layout.n_blocks + block;
    Floats largest = splat(kLowest), weight = {};
    for (int n = 0; n < join.n_parts; ++n) largest = max(part(n).largest[i], largest);
    for (int n = 0; n < join.n_parts; ++n) {
      weight += part(n).weight[i] * exp2(part(n).largest[i] - largest);
    }
    weight = sum_of_group<kTokens>(weight);

    for (int j = 0; j < kBlockRows; ++j) {
      const int row = block * kBlockRows + j;
      if (row >= n_rows) break;
      const std::ptrdiff_t query = row / group, head = kv_head * group + row % group;
      const float total = weight[j * kTokens], top = largest[j * kTokens];
      const float v_scale =
          p.values.scales != nullptr ? p.values.scales[kv_head * p.values.scale_stride] : 1.0f;
      const float factor = total == 0 ? 0.0f : v_scale / total;
      if (p.lse != nullptr) {
        p.lse[(item.row * std::ptrdiff_t{p.n_heads} + head) * p.query_length + query] =
            total == 0 ? kMinusInfinity : kLn2 * top + __builtin_logf(total);
      }
      char* const out = p.out.data + item.row * p.out.batch_stride + query * p.out.position_stride +
                        head * p.out.head_stride;
      for (int chunk = 0; chunk < layout.n_chunks; ++chunk) {
        Pair sum = {};
        for (int n = 0; n < join.n_parts; ++n) {
          const Part of = part(n);
          const Pair* sums = reinterpret_cast<const Pair*>(of.sums) +
                             (i * layout.n_chunks + chunk) * kBlockRows + j;
          const float shrink = exp2(of.largest[i] - largest)[j * kTokens];
          sum.a += sums->a * shrink;
          sum.b += sums->b * shrink;
        }
        const int at = chunk + 1 == layout.n_chunks ? p.head_dim - kChunk : chunk * kChunk;
        sum = Product::in_order(sum);
        store_chunk(p.query_element, out + at * size_of(p.query_element),
                    {sum.a * factor, sum.b * factor});
      }
    }
  }
}

}  // namespace kvspan::flash::KVSPAN_LEVEL

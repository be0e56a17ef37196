// One call of the decode kernel: where everything lies, and what attention is asked for. Strides
// are in bytes. The caller keeps all memory alive.
//
// Here and in work.hpp is plain data only, for it crosses into code that is compiled for other
// processors: an inline function that two such files compiled would be linked once, and might be
// the one that this processor cannot run. Hence always_inline, and no standard library there.
#pragma once

#include <cstddef>
#include <cstdint>

namespace kvspan::flash {

enum class Element : int { float32, bfloat16, float16, int8, float8_e4m3, float8_e5m2 };

[[gnu::always_inline]] constexpr int size_of(Element element) {
  return element == Element::float32 ? 4 : element < Element::int8 ? 2 : 1;
}

// Keys or values: [slots, positions, heads, head_dim], the last dimension dense. Through a block
// table a slot is a block.
struct Plane {
  const char* data;
  std::ptrdiff_t slot_stride, position_stride, head_stride;
  const float* scales;          // what stored numbers are multiplied by; null: 1
  std::ptrdiff_t scale_stride;  // in floats, from head to head; 0: one for all
};

// Queries or outputs: [batch, query_length, n_heads, head_dim], the last dimension dense.
template <class Byte>
struct Rows {
  Byte* data;
  std::ptrdiff_t batch_stride, position_stride, head_stride;
};

struct Problem {
  int batch, query_length, n_heads, n_kv_heads, head_dim;
  Element query_element, key_element;  // of queries and outputs; of keys and values
  Rows<const char> queries;
  Rows<char> out;
  float* lse;  // [batch, n_heads, query_length], natural logarithms; or null
  Plane keys, values;

  const std::int32_t* lengths;  // where each row's keys end
  const std::int32_t* begins;   // and begin; null: at 0
  const std::int32_t* slots;    // which slot each row's keys are in; null: that of its number
  // [batch, blocks]: which blocks hold each row's keys, instead of slots; or null.
  const std::int32_t* block_table;
  std::ptrdiff_t block_table_stride;
  int block_size;
  // What lengths, slots and block numbers are checked against.
  std::int64_t n_slots, n_positions;

  float scale;
  float softcap;  // 0: none
  // How many positions before and behind its own a query sees; -1: all. The last query stands at
  // the last key.
  int window_left, window_right;
  const float* alibi_slopes;  // [n_heads], or with a stride in floats [batch, n_heads]; or null
  std::ptrdiff_t alibi_stride;

  [[gnu::always_inline]] int group() const { return n_heads / n_kv_heads; }
  // A group's query heads at all positions are the rows that read the same keys.
  [[gnu::always_inline]] int query_rows() const { return query_length * group(); }
};

}  // namespace kvspan::flash

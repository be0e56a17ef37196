// The Python module: one function, of addresses and sizes, and the names of the levels.
// flash_compat/native.py turns tensors into them.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "bindings/without_gil.hpp"
#include "kernel/decode.hpp"
#include "kernel/levels.hpp"

namespace py = pybind11;

namespace kvspan::flash {

namespace {

using Address = std::uintptr_t;

template <class T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

void check(bool holds, const char* what) {
  if (!holds) throw std::invalid_argument(what);
}

const Level& chosen_level(const std::string& name, int head_dim) {
  if (name.empty()) {
    const Level* best = level_for(head_dim);
    if (best != nullptr) return *best;
  }
  for (const Level* level : levels()) {
    if (level->name == name && level->least_head_dim() <= head_dim) return *level;
  }
  throw std::invalid_argument("no level '" + name + "' for a head_dim of " +
                              std::to_string(head_dim) + " on this processor");
}

// Strides are in elements; 0 as an address stands for what is not given.
void decode_addresses(Address out, std::int64_t out_batch, std::int64_t out_position,
                      std::int64_t out_head, Address q, std::int64_t q_batch,
                      std::int64_t q_position, std::int64_t q_head, Address k, std::int64_t k_slot,
                      std::int64_t k_position, std::int64_t k_head, Address v, std::int64_t v_slot,
                      std::int64_t v_position, std::int64_t v_head, int q_element, int kv_element,
                      int batch, int query_length, int n_heads, int n_kv_heads, int head_dim,
                      std::int64_t n_slots, std::int64_t n_positions, Address lengths,
                      Address begins, Address slots, Address block_table,
                      std::int64_t block_table_stride, int block_size, float scale, float softcap,
                      std::int64_t window_left, std::int64_t window_right, Address alibi_slopes,
                      std::int64_t alibi_stride, Address lse, Address k_scales,
                      std::int64_t k_scale_stride, Address v_scales, std::int64_t v_scale_stride,
                      int n_threads, const std::string& level) {
  check(batch >= 0 && query_length >= 1, "batch or query_length is negative, or there is no query");
  check(n_kv_heads >= 1 && n_heads >= 1 && n_heads % n_kv_heads == 0,
        "n_heads must be a multiple of n_kv_heads");
  check(0 <= kv_element && kv_element <= 5 && 0 <= q_element && q_element <= 2,
        "no such element type");
  check(block_table == 0 || (slots == 0 && block_size >= 1),
        "a block table goes without slots and needs a block_size");
  const auto stored = static_cast<Element>(kv_element), given = static_cast<Element>(q_element);
  const int kv = size_of(stored), io = size_of(given);
  // Beyond any position there is no difference to "all", and no room for sums.
  const auto window = [](std::int64_t n) {
    return n < 0 || n >= 1 << 30 ? -1 : static_cast<int>(n);
  };
  const Problem problem{
      .batch = batch,
      .query_length = query_length,
      .n_heads = n_heads,
      .n_kv_heads = n_kv_heads,
      .head_dim = head_dim,
      .query_element = given,
      .key_element = stored,
      .queries = {pointer<const char>(q), q_batch * io, q_position * io, q_head * io},
      .out = {pointer<char>(out), out_batch * io, out_position * io, out_head * io},
      .lse = pointer<float>(lse),
      .keys = {pointer<const char>(k), k_slot * kv, k_position * kv, k_head * kv,
               pointer<const float>(k_scales), k_scale_stride},
      .values = {pointer<const char>(v), v_slot * kv, v_position * kv, v_head * kv,
                 pointer<const float>(v_scales), v_scale_stride},
      .lengths = pointer<const std::int32_t>(lengths),
      .begins = pointer<const std::int32_t>(begins),
      .slots = pointer<const std::int32_t>(slots),
      .block_table = pointer<const std::int32_t>(block_table),
      .block_table_stride = block_table_stride,
      .block_size = block_size,
      .n_slots = n_slots,
      .n_positions = n_positions,
      .scale = scale,
      .softcap = softcap,
      .window_left = window(window_left),
      .window_right = window(window_right),
      .alibi_slopes = pointer<const float>(alibi_slopes),
      .alibi_stride = alibi_stride,
  };
  const Level& chosen = chosen_level(level, head_dim);
  const WithoutGil released;
  decode(problem, chosen, n_threads);
}

py::list level_names() {
  py::list names;
  for (const Level* level : levels()) names.append(level->name);
  return names;
}

}  // namespace

PYBIND11_MODULE(_decode, m) {
  m.doc() = "The decode kernel; use flash_compat.";
  m.def("decode", &decode_addresses);
  m.def("levels", &level_names);
}

}  // namespace kvspan::flash

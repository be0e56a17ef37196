// The models of the comparison: their caches.
#pragma once

#include <string>
#include <vector>

#include "cache/layout.hpp"

namespace kvspan::bench {

struct Model {
  std::string name;
  std::vector<LayerSpec> layers;
};

inline LayerSpec keys_and_values(std::int32_t heads) {
  return {.planes = {{"k", DType::bf16, heads, 128}, {"v", DType::bf16, heads, 128}}};
}

inline std::vector<Model> models() {
  return {
      {"Llama-3-8B", std::vector<LayerSpec>(32, keys_and_values(8))},
      {"70B/TP8", std::vector<LayerSpec>(80, keys_and_values(1))},
      {"Yi-34B/TP2", std::vector<LayerSpec>(60, keys_and_values(4))},
      {"Qwen2.5-7B", std::vector<LayerSpec>(28, keys_and_values(4))},
      {"MLA", std::vector<LayerSpec>(60, LayerSpec{.planes = {{"latent", DType::bf16, 1, 576}}})},
  };
}

}  // namespace kvspan::bench

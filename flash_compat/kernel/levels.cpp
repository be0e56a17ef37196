#include "kernel/levels.hpp"

namespace kvspan::flash {

#if defined(__x86_64__)
namespace avx512bf16 {
extern const Level level;
}
namespace avx512 {
extern const Level level;
}
namespace avx2 {
extern const Level level;
}
#endif
namespace baseline {
extern const Level level;
}

const std::vector<const Level*>& levels() {
  static const std::vector<const Level*> found = [] {
    std::vector<const Level*> list;
#if defined(__x86_64__)
    const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                          __builtin_cpu_supports("f16c");
    const bool has_avx512 =
        has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (has_avx512 && __builtin_cpu_supports("avx512bf16")) list.push_back(&avx512bf16::level);
    if (has_avx512) list.push_back(&avx512::level);
    if (has_avx2) list.push_back(&avx2::level);
#endif
    list.push_back(&baseline::level);
    return list;
  }();
  return found;
}

const Level* level_for(int head_dim) {
  for (const Level* level : levels()) {
    if (level->least_head_dim() <= head_dim) return level;
  }
  return nullptr;
}

}  // namespace kvspan::flash

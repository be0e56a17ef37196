// One level's kernel: CMakeLists.txt compiles this file once for each, with KVSPAN_LEVEL and the
// processor's flags.
#include "kernel/begin.hpp"
#include "kernel/finish.hpp"
#include "kernel/level.hpp"
#include "kernel/scores.hpp"
#include "kernel/softmax.hpp"
#include "kernel/sums.hpp"
#include "kernel/tile.hpp"

namespace kvspan::flash::KVSPAN_LEVEL {

namespace {

template <class Product, int kBlockRows>
void attend(const Piece& piece) {
  const Problem& problem = *piece.problem;
  const Layout& layout = *piece.layout;
  Scratch scratch(piece);
  Tiles tiles(piece);
  Tile tile[2];
  bool more = tiles.next(tile[0]);
  for (int i = 0; more; i ^= 1) {
    const Tile &now = tile[i], &ahead = tile[i ^ 1];
    more = tiles.next(tile[i ^ 1]);
    const Item& item = *now.item;
    if (now.index == item.first_tile || now.index == piece.begin) {
      begin<Product, kBlockRows>(piece, item, scratch);
    }
    Prefetch prefetch(more ? &ahead : nullptr, problem);
    score<Product, kBlockRows>(problem, layout, now, prefetch, scratch);
    weigh<Product, kBlockRows>(problem, layout, now, scratch);
    add_values<Product, kBlockRows>(problem, layout, now, prefetch, scratch);
    if (more && ahead.item == now.item) continue;

    if (item.first_tile < piece.begin || item.last_tile() > piece.end) continue;
    for (int head = 0; head < item.n_heads; ++head) {
      finish<Product, kBlockRows>({&problem, &layout, &item, head, 1, piece.own, nullptr, 0});
    }
  }
}

template <class Product, int kBlockRows>
constexpr Kernel kKernel = {attend<Product, kBlockRows>, finish<Product, kBlockRows>};

template <class Stored>
Kernel kernel_of(int block_rows) {
  using Product = typename ProductOf<Stored>::Type;
  if (block_rows == 1) return kKernel<Product, 1>;
  if (block_rows == 2) return kKernel<Product, 2>;
  return kKernel<Product, 4>;
}

Kernel kernel(Element element, int block_rows) {
  switch (element) {
    case Element::float32:
      return kernel_of<Float32>(block_rows);
    case Element::bfloat16:
      return kernel_of<BFloat16>(block_rows);
    case Element::float16:
      return kernel_of<Float16>(block_rows);
    case Element::int8:
      return kernel_of<Int8>(block_rows);
    case Element::float8_e4m3:
      return kernel_of<Float8E4M3>(block_rows);
    case Element::float8_e5m2:
      return kernel_of<Float8E5M2>(block_rows);
  }
  __builtin_unreachable();
}

}  // namespace

#define KVSPAN_NAME_(name) #name
#define KVSPAN_NAME(name) KVSPAN_NAME_(name)
extern const Level level;
const Level level = {KVSPAN_NAME(KVSPAN_LEVEL), kLanes, kernel};

}  // namespace kvspan::flash::KVSPAN_LEVEL

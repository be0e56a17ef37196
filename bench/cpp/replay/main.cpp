// Replays a trace from standard input: `kvspan_bench_replay MODEL MEMORY saturated|arriving`.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <iostream>
#include <memory>

#include "core/sizes.hpp"
#include "replay/block_table.hpp"
#include "replay/engine.hpp"
#include "replay/models.hpp"
#include "replay/span_memory.hpp"
#include "samples.hpp"

namespace {

using namespace kvspan;
using namespace kvspan::bench;

constexpr double kCapacity = 60.0 * (1 << 30);

double share(const std::vector<double>& sorted, double quantile) {
  if (sorted.empty()) return 0;
  const auto i = static_cast<std::size_t>(quantile * static_cast<double>(sorted.size()));
  return sorted[std::min(i, sorted.size() - 1)];
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 4) return 2;
  const auto all = models();
  const auto model = std::ranges::find(all, std::string(argv[1]), &Model::name);
  if (model == all.end()) return 2;
  const std::string how = argv[2];
  const bool saturated = std::strcmp(argv[3], "saturated") == 0;
  const std::vector<Request> requests = read_trace(std::cin);
  std::int64_t longest = 0;
  for (const Request& r : requests) longest = std::max(longest, r.prompt + r.output);
  std::int64_t max_seq_len = 1024;
  while (max_seq_len < longest) max_seq_len *= 2;
  double token_bytes = 0;
  for (const LayerSpec& layer : model->layers) {
    for (const PlaneSpec& plane : layer.planes) {
      token_bytes += 2.0 * static_cast<double>(plane.heads) * static_cast<double>(plane.dim);
    }
  }

  std::unique_ptr<Memory> memory;
  const double capacity = saturated ? kCapacity : 16 * kCapacity;
  if (how == "blocks") {
    memory = std::make_unique<BlockTable>(capacity, token_bytes, 16);
  } else if (how == "slots") {
    memory = std::make_unique<BlockTable>(capacity, token_bytes, max_seq_len);
  } else {
    SpanOptions options;
    options.layers = model->layers;
    options.max_seq_len = max_seq_len;
    options.max_seqs = 4096;
    options.page_size = kKiB * (argc > 5 ? static_cast<std::uint64_t>(std::atoi(argv[5])) : 2048);
    options.capacity = Bytes(static_cast<std::uint64_t>(capacity));
    options.largest = SizeClass(argc > 4 ? static_cast<std::uint8_t>(std::atoi(argv[4])) : 6);
    if (how == "host") options.kind = DeviceKind::cpu;
    if (how == "per-layer") options.layers_per_page = 1;
    if (how == "split") options.layers_per_page = 1, options.split_planes = true;
    memory = std::make_unique<SpanMemory>(options);
  }
  ReplayResult r;
  const double took = timed([&] { r = replay(*memory, requests, saturated); });
  std::ranges::sort(r.step_stalls);
  std::ranges::sort(r.piece_stalls);
  const double n = static_cast<double>(r.n_requests);
  const double late_steps =
      static_cast<double>(r.step_stalls.end() - std::ranges::upper_bound(r.step_stalls, 0.0));
  DriverWork sum = r.in_calls;
  sum += r.in_background;
  const auto percent = [&](double part) { return 100 * part / r.held.mapped; };
  std::printf(
      "%s %s: waste %.2f%% (partial %.2f ahead %.2f kept %.2f), concurrency %.1f peak %.0f, "
      "preempted %zu\n"
      "  calls/request %.1f (create %.2f map %.2f unmap %.2f release %.2f), ms/request %.3f, "
      "pages/request %.1f\n"
      "  late steps %.3f%% (%.0f of %zu), step stall us p50 %.0f p99 %.0f p99.9 %.0f max %.0f; "
      "piece p50 %.0f p99 %.0f max %.0f\n"
      "  in background: all %.1f%%, worst second %.1f%% of %.0f pages (%.1f ms); took %.1f s\n",
      argv[1], argv[2], percent(r.held.mapped - r.held.used), percent(r.held.partial),
      percent(r.held.ahead), percent(r.held.kept), r.concurrency / r.weighted_s, r.peak_concurrency,
      r.n_preempted, static_cast<double>(sum.all_calls()) / n,
      static_cast<double>(sum.calls[0]) / n, static_cast<double>(sum.calls[1]) / n,
      static_cast<double>(sum.calls[3]) / n, static_cast<double>(sum.calls[4]) / n,
      sum.seconds * 1e3 / n, sum.pages_mapped / n,
      100 * late_steps / static_cast<double>(r.step_stalls.size()), late_steps,
      r.step_stalls.size(), 1e6 * share(r.step_stalls, .5), 1e6 * share(r.step_stalls, .99),
      1e6 * share(r.step_stalls, .999), 1e6 * share(r.step_stalls, 1),
      1e6 * share(r.piece_stalls, .5), 1e6 * share(r.piece_stalls, .99),
      1e6 * share(r.piece_stalls, 1), 100 * r.in_background.seconds / sum.seconds,
      100 * (1 - r.worst_seconds_in_calls / r.worst_seconds), r.worst_pages, 1e3 * r.worst_seconds,
      took);
}

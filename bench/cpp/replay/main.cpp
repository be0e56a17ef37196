// Replays a trace in virtual time: `kvspan_bench_replay TRACE saturated|arriving MODEL MEMORY
// [PAGE_KIB [LARGEST_CLASS]]`. MEMORY is blocks, slots, naive, handle-pool, vattention,
// vattention-sync, vattention-layers, kvcached, kvcached-split; or the real cache: auto, per-layer,
// split, on a GPU's terms, or host. In real time, at 10 times the speed of the trace
// (paced_span.hpp): host@10, emulator@10.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <memory>
#include <optional>
#include <string>

#include "core/sizes.hpp"
#include "replay/block_table.hpp"
#include "replay/engine.hpp"
#include "replay/modelled_span.hpp"
#include "replay/models.hpp"
#include "replay/paced_span.hpp"
#include "replay/peers.hpp"
#include "samples.hpp"

namespace {

using namespace kvspan;
using namespace kvspan::bench;

constexpr double kCapacity = 60.0 * (1 << 30), kAmple = 16 * kCapacity;
constexpr std::int32_t kMaxSeqs = 4096;
constexpr double kPacedSeconds = 8;  // of real time
constexpr std::uint64_t kPageKib = 2048;
constexpr std::uint8_t kLargest = 6;  // 128 MiB

Shape shape_of(const Model& model, double capacity) {
  Shape shape{.n_layers = static_cast<std::int64_t>(model.layers.size()),
              .n_planes = static_cast<std::int64_t>(model.layers.front().planes.size()),
              .capacity_bytes = capacity};
  for (const LayerSpec& layer : model.layers) {
    for (const PlaneSpec& plane : layer.planes) {
      shape.token_bytes += 2.0 * static_cast<double>(plane.heads) * static_cast<double>(plane.dim);
    }
  }
  return shape;
}

SpanOptions span_options(const std::string& how, const Model& model, double capacity,
                         std::int64_t max_seq_len, Bytes page_size, SizeClass largest) {
  return {
      .layers = model.layers,
      .max_seq_len = max_seq_len,
      .max_seqs = kMaxSeqs,
      .kind = how == "host" ? DeviceKind::cpu : DeviceKind::cuda,
      .page_size = page_size,
      .capacity = Bytes(static_cast<std::uint64_t>(capacity)),
      .largest = largest,
      .layers_per_page = how == "per-layer" || how == "split" ? 1 : 0,
      .split_planes = how == "split",
  };
}

std::unique_ptr<Memory> make_memory(const std::string& how, const Model& model,
                                    const SpanOptions& options) {
  const auto capacity = static_cast<double>(options.capacity.value);
  const Shape shape = shape_of(model, capacity);
  if (how == "blocks") return std::make_unique<BlockTable>(capacity, shape.token_bytes, 16);
  if (how == "slots") {
    return std::make_unique<BlockTable>(capacity, shape.token_bytes, options.max_seq_len);
  }
  if (how == "naive") return std::make_unique<Naive>(shape, false);
  if (how == "handle-pool") return std::make_unique<Naive>(shape, true);
  if (how.starts_with("vattention")) {
    return std::make_unique<VAttention>(shape, how != "vattention-layers",
                                        how != "vattention-sync");
  }
  if (how == "kvcached") return std::make_unique<Kvcached>(shape, true);
  if (how == "kvcached-split") return std::make_unique<Kvcached>(shape, false);
  return std::make_unique<ModelledSpan>(options);
}

double quantile(std::vector<double>& values, double q) {
  if (values.empty()) return 0;
  std::ranges::sort(values);
  const auto i = static_cast<std::size_t>(q * static_cast<double>(values.size()));
  return values[std::min(i, values.size() - 1)];
}

void print(ReplayResult& r, double took) {
  const double n = static_cast<double>(r.n_requests);
  DriverWork all = r.in_calls;
  all += r.in_background;
  const auto share = [](double part, double whole) { return whole > 0 ? 100 * part / whole : 0; };
  const auto percent = [&](double bytes) { return share(bytes, r.held.mapped); };
  print_samples("waste", {percent(r.held.mapped - r.held.used)}, "%");
  print_samples("of it partial", {percent(r.held.partial)}, "%");
  print_samples("of it ahead", {percent(r.held.ahead)}, "%");
  print_samples("of it kept", {percent(r.held.kept)}, "%");
  print_samples("concurrency", {r.weighted_s > 0 ? r.concurrency / r.weighted_s : 0}, "");
  print_samples("peak concurrency", {r.peak_concurrency}, "");
  if (!r.waste_over_time.empty()) print_samples("waste over time", r.waste_over_time, "%");
  print_samples("preempted", {static_cast<double>(r.n_preempted)}, "");
  constexpr const char* names[] = {"create", "map", "set_access", "unmap", "release"};
  for (std::size_t i = 0; i < DriverWork::kNames; ++i) {
    print_samples(std::string("calls a request: ") + names[i],
                  {static_cast<double>(all.calls[i]) / n}, "");
  }
  print_samples("calls a request", {static_cast<double>(all.all_calls()) / n}, "");
  print_samples("driver time a request", {all.seconds / n}, "s");
  print_samples("pages mapped a request", {all.pages_mapped / n}, "");
  for (const auto& [name, stalls] :
       {std::pair("step", &r.step_stalls), std::pair("piece of a prompt", &r.piece_stalls)}) {
    for (const auto& [label, q] : {std::pair("p50", .5), std::pair("p99", .99),
                                   std::pair("p99.9", .999), std::pair("max", 1.0)}) {
      print_samples(std::string("wait of a ") + name + ", " + label, {quantile(*stalls, q)}, "s");
    }
  }
  print_samples("driver time in the background", {share(r.in_background.seconds, all.seconds)},
                "%");
  print_samples("pages of the worst second", {r.worst_pages}, "");
  print_samples("driver time of the worst second", {r.worst_seconds}, "s");
  print_samples("of it in the background",
                {share(r.worst_seconds - r.worst_seconds_in_calls, r.worst_seconds)}, "%");
  const double virtual_s = static_cast<double>(r.n_ticks) * kTick;
  print_samples("calls a second", {static_cast<double>(all.all_calls()) / virtual_s}, "");
  print_samples("pages mapped a second", {all.pages_mapped / virtual_s}, "");
  print_samples("faster than the requests", {virtual_s / took}, "x");
  print_samples("pages mapped a second of its own time", {all.pages_mapped / took}, "");
}

int replay_paced(std::span<const Request> requests, bool saturated, const std::string& how,
                 const SpanOptions& options, double speed) {
  std::optional<Emulator> emulator;
  if (how == "emulator") emulator.emplace("memory_free=1,time=real,memory=64GiB");
  const PacedSpan::Speed at{speed, saturated ? kWarmUp : 0, kPacedSeconds};
  const auto memory =
      emulator ? PacedSpan::on_emulator(options, at, *emulator) : PacedSpan::on_host(options, at);
  ReplayResult result;
  const double took = timed([&] { result = replay(*memory, requests, saturated); });
  print(result, took);
  const PacedSpan::Pace pace = memory->pace();
  print_samples("speed", {pace.speed}, "x");
  print_samples("calls a second of real time", {pace.calls_a_second}, "");
  print_samples("pages mapped a second of real time", {pace.pages_a_second}, "");
  print_samples("steps that began without room", {100 * pace.late_steps}, "%");
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  const auto all = models();
  if (argc < 5) return 2;
  std::ifstream file(argv[1]);
  const std::vector<Request> requests = read_trace(file);
  const bool saturated = argv[2] == std::string("saturated");
  const auto model = std::ranges::find(all, std::string(argv[3]), &Model::name);
  if (model == all.end() || requests.empty()) {
    std::fprintf(stderr, "no such model, or no requests in %s\n", argv[1]);
    return 2;
  }
  const auto argument = [&](int i, std::uint64_t otherwise) {
    return argc > i ? std::strtoull(argv[i], nullptr, 10) : otherwise;
  };
  std::int64_t longest = 0;
  for (const Request& r : requests) longest = std::max(longest, r.prompt + r.output);
  std::int64_t max_seq_len = 1024;
  while (max_seq_len < longest) max_seq_len *= 2;
  std::string how = argv[4];
  double speed = 0;  // in real time; 0: in virtual time
  if (const std::size_t sign = how.find('@'); sign != std::string::npos) {
    speed = std::strtod(how.c_str() + sign + 1, nullptr);
    how.resize(sign);
  }
  const SpanOptions options = span_options(
      how, *model, saturated || speed > 0 ? kCapacity : kAmple, max_seq_len,
      kKiB * argument(5, kPageKib), SizeClass(static_cast<std::uint8_t>(argument(6, kLargest))));
  if (speed > 0) return replay_paced(requests, saturated, how, options, speed);
  const auto memory = make_memory(how, *model, options);
  ReplayResult result;
  const double took = timed([&] { result = replay(*memory, requests, saturated); });
  const auto n_steps = static_cast<double>(result.step_stalls.size());
  const auto n_late = std::ranges::count_if(result.step_stalls, [](double s) { return s > 0; });
  print(result, took);
  print_samples("steps that called the driver, or waited for who did",
                {n_steps > 0 ? 100 * static_cast<double>(n_late) / n_steps : 0}, "%");
}

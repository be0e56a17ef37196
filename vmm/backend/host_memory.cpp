#include "backend/host_memory.hpp"

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <optional>
#include <sstream>
#include <string_view>

#include "backend/host_files.hpp"
#include "core/errors.hpp"
#include "core/sizes.hpp"

namespace kvspan {

namespace {

constexpr Bytes kLeastReserve = kMiB * 256;
constexpr std::uint64_t kReservePercent = 5;

// cgroup v1 writes "no limit" as the largest multiple of its page size below 2^63.
constexpr std::uint64_t kNoLimit = std::uint64_t{1} << 60;

std::optional<std::uint64_t> leading_number(std::string_view text) {
  const std::size_t start = text.find_first_not_of(" \t");
  if (start == std::string_view::npos) return std::nullopt;
  std::uint64_t value = 0;
  const auto result = std::from_chars(text.data() + start, text.data() + text.size(), value);
  if (result.ec != std::errc{}) return std::nullopt;  // "max", for one
  return value;
}

// The number behind `key` at the start of a line.
std::optional<std::uint64_t> number_of(std::string_view text, std::string_view key) {
  for (std::size_t at = 0; at < text.size();) {
    const std::size_t end = std::min(text.find('\n', at), text.size());
    const std::string_view line = text.substr(at, end - at);
    if (line.starts_with(key)) return leading_number(line.substr(key.size()));
    at = end + 1;
  }
  return std::nullopt;
}

// Whether "memory" is one of the words of "cpu,memory,...".
bool lists_memory(const std::string& words) {
  std::istringstream list(words);
  for (std::string word; std::getline(list, word, ',');) {
    if (word == "memory") return true;
  }
  return false;
}

struct Mount {
  std::string root;   // which directory of the file system
  std::string point;  // is seen where
  bool is_v2;
};

// The mounted cgroup file systems that may have the memory controller.
std::vector<Mount> cgroup_mounts(const std::string& mountinfo) {
  std::vector<Mount> mounts;
  std::istringstream lines(mountinfo);
  for (std::string line; std::getline(lines, line);) {
    // 36 35 98:0 ROOT POINT OPTIONS [TAGS...] - TYPE SOURCE OPTIONS, proc(5)
    const std::size_t dash = line.find(" - ");
    if (dash == std::string::npos) continue;
    std::istringstream head(line.substr(0, dash)), tail(line.substr(dash + 3));
    std::string id, parent, device, root, point, type, source, options;
    head >> id >> parent >> device >> root >> point;
    tail >> type >> source >> options;
    const bool is_v1 = type == "cgroup" && lists_memory(options);
    if (type == "cgroup2" || is_v1) mounts.push_back({root, point, !is_v1});
  }
  return mounts;
}

// Our path in the hierarchy, from /proc/self/cgroup: "0::/path" (v2), "4:memory:/path" (v1).
std::optional<std::string> own_cgroup(const std::string& text, bool is_v2) {
  std::istringstream lines(text);
  for (std::string line; std::getline(lines, line);) {
    const std::size_t a = line.find(':');
    const std::size_t b = a == std::string::npos ? a : line.find(':', a + 1);
    if (b == std::string::npos) continue;
    const std::string controllers = line.substr(a + 1, b - a - 1);
    if (is_v2 ? controllers.empty() : lists_memory(controllers)) {
      return line.substr(b + 1);
    }
  }
  return std::nullopt;
}

Bytes default_reserve(Bytes total) {
  return std::max(kLeastReserve, Bytes(total.value / 100 * kReservePercent));
}

}  // namespace

MemoryReader::MemoryReader(std::string root, std::optional<NumaNode> node)
    : root_(std::move(root)), node_(node), cgroups_(find_cgroups(root_)) {}

std::vector<MemoryReader::Cgroup> MemoryReader::find_cgroups(const std::string& root) {
  const auto mountinfo = read_file(root + "/proc/self/mountinfo");
  const auto membership = read_file(root + "/proc/self/cgroup");
  std::vector<Cgroup> cgroups;
  if (!mountinfo || !membership) return cgroups;
  for (const Mount& mount : cgroup_mounts(*mountinfo)) {
    auto path = own_cgroup(*membership, mount.is_v2);
    if (!path) continue;
    // A container often sees only its own part of the tree, mounted as if it were all of it, while
    // the path still counts from the host's root. Then the path leads nowhere, and the mount point
    // itself is our cgroup; so the mount point is always looked at, whatever the path says.
    if (mount.root != "/" && path->starts_with(mount.root)) path->erase(0, mount.root.size());
    while (!path->empty() && path->back() == '/') path->pop_back();
    while (!path->empty()) {
      cgroups.push_back({root + mount.point + *path, mount.is_v2});
      path->resize(path->find_last_of('/') == std::string::npos ? 0 : path->find_last_of('/'));
    }
    cgroups.push_back({root + mount.point, mount.is_v2});
  }
  return cgroups;
}

MemoryReading MemoryReader::read() const {
  const std::string path = root_ + "/proc/meminfo";
  const auto text = read_file(path);
  if (!text && (errno == EMFILE || errno == ENFILE)) {
    throw CapacityError("no file descriptor is left to read " + path +
                        ": raise RLIMIT_NOFILE (ulimit -n) or the machine's fs.file-max");
  }
  const auto total = text ? number_of(*text, "MemTotal:") : std::nullopt;
  auto available = text ? number_of(*text, "MemAvailable:") : std::nullopt;
  if (!available && text) available = number_of(*text, "MemFree:");
  if (!total || !available) {
    throw system_error("read", text ? EINVAL : ENOENT, path + " does not tell the memory's size");
  }
  MemoryReading reading{kKiB * *total, kKiB * *available, "/proc/meminfo"};
  if (node_) take_node_in(reading);

  for (const Cgroup& c : cgroups_) {
    const auto limit =
        read_number(c.directory + (c.is_v2 ? "/memory.max" : "/memory.limit_in_bytes"));
    if (!limit || *limit >= kNoLimit) continue;  // the usual case costs one file
    const std::uint64_t used =
        read_number(c.directory + (c.is_v2 ? "/memory.current" : "/memory.usage_in_bytes"))
            .value_or(0);
    // Cached files are counted as used but are given up first.
    const auto stat = read_file(c.directory + "/memory.stat");
    const std::uint64_t cached =
        stat ? number_of(*stat, c.is_v2 ? "inactive_file " : "total_inactive_file ").value_or(0)
             : 0;
    const std::uint64_t held = used - std::min(used, cached);
    const Bytes headroom(*limit - std::min(*limit, held));
    reading.total = std::min(reading.total, Bytes(*limit));
    if (headroom < reading.available) {
      reading.available = headroom;
      reading.limited_by = c.directory.substr(root_.size());
    }
  }
  return reading;
}

void MemoryReader::take_node_in(MemoryReading& reading) const {
  const std::string number = std::to_string(node_->value);
  const std::string path = "/sys/devices/system/node/node" + number + "/meminfo";
  const auto text = read_file(root_ + path);
  if (!text) return;  // no such node: whoever binds memory to it is told
  const auto figure = [&](const char* name) {
    return kKiB * number_of(*text, "Node " + number + " " + name + ":").value_or(0);
  };
  // The kernel gives no MemAvailable of a node. For the machine it counts what caches hold but for
  // a part, which is half of it at most.
  const Bytes cached = figure("Active(file)") + figure("Inactive(file)") + figure("SReclaimable");
  const Bytes available = figure("MemFree") + Bytes(cached.value / 2);
  reading.total = std::min(reading.total, figure("MemTotal"));
  if (available < reading.available) {
    reading.available = available;
    reading.limited_by = path;
  }
}

MemoryGauge::MemoryGauge(Bytes reserve, std::string root, std::optional<NumaNode> node)
    : reader_(std::move(root), node), reserve_(reserve) {
  if (reserve_ == Bytes(0)) reserve_ = default_reserve(reader_.read().total);
}

Bytes MemoryGauge::less_reserve(Bytes available) const noexcept {
  return available - std::min(available, reserve_);
}

MemoryInfo MemoryGauge::info() const {
  const MemoryReading now = reader_.read();
  return {now.total, less_reserve(now.available)};
}

MemoryGauge::Admission MemoryGauge::admit(Bytes size) {
  std::scoped_lock lock(mutex_);
  const auto now = Clock::now();
  if (allowance_ < size || now - read_at_ > kMaxAge) {
    const MemoryReading reading = reader_.read();
    const Bytes free = less_reserve(reading.available);
    allowance_ = free - std::min(free, in_flight_);
    read_at_ = now;
    if (allowance_ < size) {
      throw OutOfMemory(size, allowance_, Bytes(0),
                        "the limit is " + reading.limited_by + ", " + to_string(reserve_) +
                            " of which are kept for others (`reserve`): release sequences, trim "
                            "the pool, or give the process more memory");
    }
  }
  allowance_ -= size;
  in_flight_ += size;
  return {*this, size};
}

MemoryGauge::Admission::~Admission() {
  std::scoped_lock lock(gauge_->mutex_);
  gauge_->in_flight_ -= size_;
}

}  // namespace kvspan

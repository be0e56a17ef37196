// Device memory: physical allocations (handles), address reservations, the mappings that join them,
// and who may access what. One memfd stands behind each exportable handle, shared anonymous memory
// behind the others. A device address is a PROT_NONE reservation to the host, mapped or not, as
// with a card (unless visible=1): the emulator itself reads and writes through an alias mapping of
// the handle, made at first use. Memory-free, there are only the books. Guarded by State::mutex.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "cuda_api.h"

namespace emulator {

struct Options;

using Address = std::uint64_t;

// The bytes themselves.
class Physical {
 public:
  // Throws std::bad_alloc.
  Physical(std::size_t size_bytes, int fd);  // takes the fd; -1: memory without a name
  ~Physical();
  Physical(const Physical&) = delete;
  Physical& operator=(const Physical&) = delete;

  std::byte* alias();  // nullptr: the host has no room for it
  bool map_at(Address at, std::size_t size_bytes, int protection);

  const std::size_t size_bytes;
  const int fd;
  std::size_t n_handles = 0;

 private:
  std::byte* alias_ = nullptr;
};

struct Handle {
  std::size_t size_bytes = 0;
  CUmemAllocationProp properties{};
  int device = -1;  // -1: host memory
  bool imported = false;
  std::uint32_t references = 1;
  std::uint32_t mappings = 0;
  std::shared_ptr<Physical> physical;                        // none when memory-free
  std::vector<std::pair<Address, std::uint32_t>> aliases{};  // reservation -> mappings in it
};

struct Reservation {
  std::size_t size_bytes = 0;
  std::size_t mappings = 0;
};

// A mapping made by cuMemMap, or an allocation of cuMemAlloc (handle 0, its own device's access).
struct Mapping {
  std::size_t size_bytes = 0;
  std::uint64_t handle = 0;
  Address reservation = 0;
  int device = -1;
  std::uint32_t access = 0;  // two bits a device: 1 read, 3 read and write
  unsigned host_access = 0;
  std::shared_ptr<Physical> physical;

  unsigned access_of(int of_device) const { return (access >> (2 * of_device)) & 3U; }
};

struct Pinned {
  std::size_t size_bytes = 0;
  unsigned flags = 0;
  bool registered = false;  // the client's own memory
  int device = 0;
};

struct Piece {
  std::shared_ptr<Physical> physical;
  std::byte* data = nullptr;  // nullptr: memory-free
  std::size_t n = 0;
};

class Memory {
 public:
  using Reservations = std::map<Address, Reservation>;
  using Mappings = std::map<Address, Mapping>;

  explicit Memory(const Options& options) : options_(options) {}
  void reset();  // wants an empty ledger

  // Address space. 0: there is none left.
  Address take_range(std::size_t size_bytes, std::size_t alignment, Address hint);
  void give_range(Address base, std::size_t size_bytes);

  // Physical memory. 0: out of memory.
  std::uint64_t create(std::size_t size_bytes, const CUmemAllocationProp& properties, int device);
  std::uint64_t import(int fd);  // 0: not a memory of an emulator
  Handle* handle(std::uint64_t id);
  bool existed(std::uint64_t id) const;
  void drop_if_unused(std::uint64_t id);

  void map(Address at, std::size_t size_bytes, std::uint64_t id, Address reservation);
  void unmap(Mappings::iterator at);
  bool apply_access(Address at, const Mapping& mapping);  // the host's view of it

  // The mappings that together are exactly [at, at + size): first and one past the last. False when
  // the range is not fully mapped or cuts a mapping.
  bool exactly(Address at, std::size_t size_bytes, Mappings::iterator* first,
               Mappings::iterator* last, std::string* why);
  Mappings::iterator mapping_of(Address at);
  Reservations::iterator reservation_of(Address at);
  bool overlaps_mapping(Address at, std::size_t size_bytes);
  bool is_device(Address at);

  // Who uses memory. Copies reach what cuMemAlloc gave to any device, by unified addressing.
  struct User {
    int device;  // < 0: whatever the rights
    bool copies = false;
  };
  // The memory behind [at, at + n) as `user` may use it.
  bool resolve(Address at, std::size_t n, User user, bool write, std::vector<Piece>* pieces,
               std::string* why);

  // cuMemAlloc; 0: out of memory.
  Address allocate(std::size_t size_bytes, int device);
  void deallocate(Mappings::iterator at);

  void* allocate_pinned(std::size_t size_bytes, unsigned flags, int device);
  void free_pinned(std::map<Address, Pinned>::iterator at);
  std::map<Address, Pinned>::iterator pinned_of(Address at, std::size_t n);

  Reservations reservations;
  Mappings mappings;
  Mappings allocations;  // cuMemAlloc
  std::map<std::uint64_t, Handle> handles;
  std::map<Address, Pinned> pinned;
  std::vector<std::size_t> used_bytes;      // by device
  std::vector<std::size_t> mapped_handles;  // live mappings by device

 private:
  const Options& options_;
  std::uint64_t next_handle_ = 0;
  Address next_fictitious_ = 0;
  std::map<Address, std::size_t> fictitious_;  // ranges in use
};

}  // namespace emulator

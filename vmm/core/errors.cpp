#include "core/errors.hpp"

#include <cerrno>
#include <system_error>

#include "core/sizes.hpp"

namespace kvspan {

namespace {

// glibc's strerrorname_np would do, but is younger than the oldest glibc that the wheel supports.
std::string error_name(int error_number) {
  switch (error_number) {
    case EACCES:
      return "EACCES";
    case EAGAIN:
      return "EAGAIN";
    case EBADF:
      return "EBADF";
    case EBUSY:
      return "EBUSY";
    case EEXIST:
      return "EEXIST";
    case EFBIG:
      return "EFBIG";
    case EINVAL:
      return "EINVAL";
    case EMFILE:
      return "EMFILE";
    case ENFILE:
      return "ENFILE";
    case ENOENT:
      return "ENOENT";
    case ENOMEM:
      return "ENOMEM";
    case ENOSPC:
      return "ENOSPC";
    case ENOSYS:
      return "ENOSYS";
    case EPERM:
      return "EPERM";
    default:
      return "errno " + std::to_string(error_number);
  }
}

}  // namespace

OutOfMemory::OutOfMemory(Bytes requested, Bytes free, Bytes reclaimable, const std::string& hint)
    : Error("out of memory: " + to_string(requested) + " asked, " + to_string(free) + " free, " +
            to_string(reclaimable) + " reclaimable; " + hint),
      requested_(requested),
      free_(free),
      reclaimable_(reclaimable) {}

OutOfFrames::OutOfFrames(std::uint64_t requested, std::uint64_t free, const std::string& hint)
    : Error("out of frames: " + std::to_string(requested) + " asked, " + std::to_string(free) +
            " free; " + hint),
      requested_(requested),
      free_(free) {}

RefusedError::RefusedError(std::uint32_t n_refused, const std::string& message)
    : Error(message), n_refused_(n_refused) {}

DriverError::DriverError(const std::string& call, const std::string& code,
                         const std::string& detail)
    : Error(call + " failed with " + code + ": " + detail), call_(call), code_(code) {}

DriverError system_error(const std::string& call, int error_number, const std::string& detail) {
  return {call, error_name(error_number),
          detail + " (" + std::generic_category().message(error_number) + ")"};
}

}  // namespace kvspan

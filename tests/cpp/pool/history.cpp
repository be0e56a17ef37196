#include "pool/history.hpp"

namespace kvspan_test {

std::string describe(const Operation& operation, Operation::Stamp origin) {
  static constexpr const char* kNames[] = {"take",  "take_recycled", "take_fresh",
                                           "share", "give",          "references"};
  std::string text = std::to_string(operation.begin - origin) + " to " +
                     std::to_string(operation.end - origin) + ": " +
                     kNames[static_cast<std::size_t>(operation.kind)] + "(";
  if (operation.is_take()) {
    text += std::to_string(operation.n_frames) + "): ";
    if (operation.is_refused) return text + "refused";
  }
  for (const FrameId frame : operation.frames()) text += std::to_string(frame.index()) + " ";
  if (operation.is_take()) return text;
  text += "): " + std::to_string(operation.result);
  if (operation.kind == Operation::Kind::give) {
    text += " freed, " + std::to_string(operation.refused) + " refused";
  }
  return text;
}

}  // namespace kvspan_test

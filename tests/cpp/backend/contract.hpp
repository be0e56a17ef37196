// The contract of backend.hpp as tests, written once and run for every backend: one call of
// `add_contract` each. They use only what every device can do: whole frames are mapped and
// unmapped, and bytes are looked at through the subject, which on a GPU copies them.
#pragma once

#include <boost/test/unit_test.hpp>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>

#include "backend/backend.hpp"

namespace kvspan::test {

struct ContractSubject {
  std::string name;
  // A backend with frames of classes 0 to 2 at least, that can be exported.
  std::function<std::unique_ptr<Backend>(Bytes page_size, Bytes capacity)> make;
  Bytes page_size;
  std::function<std::uint8_t(Backend&, Address)> peek = [](Backend&, Address at) {
    return *reinterpret_cast<const volatile std::uint8_t*>(at.value);
  };
  std::function<void()> after = [] {};  // each test, when its backends are gone
  // Whether the machine has what it takes; if not, the suite is skipped.
  std::function<boost::test_tools::assertion_result(boost::unit_test::test_unit_id)> precondition =
      [](boost::unit_test::test_unit_id) { return true; };

  std::unique_ptr<Backend> make_with(std::uint32_t pages) const {
    return make(page_size, page_size * pages);
  }
};

struct ContractTest {
  const char* name;
  void (*run)(const ContractSubject&);
};

// Adds the suite "contract/<name>" to the module.
bool add_contract(const ContractSubject& subject);

}  // namespace kvspan::test

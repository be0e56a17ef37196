// The entry point that the test executables of all layers share: Boost.Test, header-only.
#define BOOST_TEST_MODULE kvspan
#include <boost/test/included/unit_test.hpp>

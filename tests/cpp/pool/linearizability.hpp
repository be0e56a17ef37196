// Whether what threads saw of a pool can be explained: their operations' steps, put into one order
// that keeps each between its operation's beginning and end, must give the model the same results.
//
// It is searched depth first, what was tried being remembered. A history is cut wherever no
// operation is underway: all orders of what came before leave the same state.
//
// Sources: Herlihy and Wing, "Linearizability", TOPLAS 1990; Wing and Gong, "Testing and verifying
// concurrent objects", JPDC 1993 (the search); Lowe, "Testing for linearizability", 2017 (what is
// remembered); Castaneda, Rajsbaum and Raynal, "Unifying concurrent objects and distributed tasks",
// J. ACM 2018 (operations of several steps).
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "pool/history.hpp"
#include "pool/pool_model.hpp"

namespace kvspan_test {

// Nothing when the threads' logs are explained, `model` having become the state after them;
// otherwise the part that is not.
std::optional<std::string> find_unexplained(const std::vector<Log>& logs, PoolModel& model);

}  // namespace kvspan_test

// Requests of a trace, as bench_replay.py hands them over: lines of arrival time in seconds, tokens
// of the prompt and tokens of the output.
#pragma once

#include <cstdint>
#include <istream>
#include <vector>

namespace kvspan::bench {

struct Request {
  double arrival_s = 0;
  std::int64_t prompt = 0, output = 0;
};

inline std::vector<Request> read_trace(std::istream& in) {
  std::vector<Request> requests;
  for (Request r; in >> r.arrival_s >> r.prompt >> r.output;) requests.push_back(r);
  return requests;
}

}  // namespace kvspan::bench

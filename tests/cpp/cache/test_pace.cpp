// What the mapper expects of a sequence that it has looked at a few times.
#include <boost/test/unit_test.hpp>

#include "cache/pace.hpp"

using namespace kvspan;
using namespace std::chrono_literals;

namespace {

constexpr auto kLead = 10ms;

// A sequence that grows, and who looks at it.
class Watched {
 public:
  explicit Watched(std::int64_t expected = 0) : expected_(expected) {}

  // So many more tokens now, and the room there should be then.
  std::int64_t grow(std::int64_t n) {
    length_ += n;
    return look();
  }
  std::int64_t look_after(Pace::Clock::duration time) {
    now_ += time;
    return look();
  }
  std::int64_t grow_after(Pace::Clock::duration time, std::int64_t n) {
    now_ += time;
    return grow(n);
  }

 private:
  std::int64_t look() {
    return pace_.look(Tokens(length_), Tokens(expected_), now_, kLead, prefill_).value;
  }

  Pace pace_;
  Pace::Prefill prefill_;
  std::int64_t length_ = 0, expected_;
  Pace::Clock::time_point now_{};
};

}  // namespace

BOOST_AUTO_TEST_SUITE(pace)

BOOST_AUTO_TEST_CASE(slow_decoding_needs_room_just_before_its_next_token) {
  Watched w;
  BOOST_TEST(w.grow(0) == 0);
  BOOST_TEST(w.grow_after(1ms, 1000) == 8);  // nothing is known of its decoding
  BOOST_TEST(w.grow_after(200ms, 1) == 8);
  BOOST_TEST(w.grow_after(40ms, 1) == 0);
  BOOST_TEST(w.look_after(15ms) == 0);  // 30 ms is the least that it may take, and 10 the lead
  BOOST_TEST(w.look_after(6ms) == 1);
  BOOST_TEST(w.grow_after(19ms, 1) == 0);
}

BOOST_AUTO_TEST_CASE(fast_decoding_needs_room_for_all_that_comes_within_the_lead) {
  Watched w;
  w.grow(100);
  w.grow_after(1ms, 1);
  BOOST_TEST(w.grow_after(4ms, 1) == 3);
  BOOST_TEST(w.grow_after(10us, 1) == 8);  // but not for ever more
  BOOST_TEST(w.look_after(10s) == 8);      // nor when it pauses
}

BOOST_AUTO_TEST_CASE(speculation_needs_room_for_its_longer_steps) {
  Watched w;
  w.grow(100);
  w.grow_after(20ms, 5);
  w.grow_after(20ms, 2);
  BOOST_TEST(w.look_after(10ms) == 5);
  w.grow_after(10ms, 12);
  BOOST_TEST(w.look_after(10ms) == 12);
}

BOOST_AUTO_TEST_CASE(a_prompt_that_was_announced_comes_piece_by_piece) {
  Watched w(5000);
  BOOST_TEST(w.grow(0) == 2048);
  BOOST_TEST(w.grow_after(5ms, 1500) == 1500);  // nobody knows when the next piece comes
  BOOST_TEST(w.grow_after(100ms, 1500) == 0);
  BOOST_TEST(w.look_after(83ms) == 0);
  BOOST_TEST(w.look_after(2ms) == 1500);
  BOOST_TEST(w.grow_after(15ms, 1500) == 0);
  BOOST_TEST(w.look_after(90ms) == 508);     // what there is, and the tokens that follow at once
  BOOST_TEST(w.grow_after(10ms, 500) == 8);  // and now it decodes
}

// Of an engine's tick of 33 ms, which 8, 8 and 7 of them take.
BOOST_AUTO_TEST_CASE(pieces_are_expected_after_their_mean_time) {
  Watched w(100'000);
  w.grow(0);
  w.grow_after(5ms, 2048);
  w.grow_after(264ms, 2048);
  w.grow_after(264ms, 2048);
  BOOST_TEST(w.grow_after(231ms, 2048) == 0);
  BOOST_TEST(w.look_after(228ms) == 0);  // 14/15 of (3 * 264 + 231) / 4 ms, less the lead
  BOOST_TEST(w.look_after(2ms) == 2048);
}

BOOST_AUTO_TEST_CASE(shrinking_makes_it_forget) {
  Watched w;
  w.grow(100);
  w.grow_after(40ms, 1);
  BOOST_TEST(w.grow_after(40ms, 1) == 0);
  BOOST_TEST(w.grow_after(40ms, -50) == 8);
  BOOST_TEST(w.grow_after(40ms, 1) == 8);
  BOOST_TEST(w.grow_after(40ms, 1) == 0);
}

BOOST_AUTO_TEST_SUITE_END()

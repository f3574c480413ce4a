// The registers of one thread that products of a warpgroup (wgmma) accumulate in, for the race detector: they are the
// engine's until the thread has waited, and what the thread did to them before the next product is behind a
// wgmma.fence.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "sim/symbols.h"

namespace simt::race {

class Accumulators {
 public:
  // A product, in flight until `token` is done. False when the thread has accessed registers that an earlier product
  // used and called no fence() since.
  bool add(const Range& range, uint64_t token) {
    in_flight_.push_back({range, token});
    widen(bounds_, range);
    const auto overlaps = [&range](const Place& place) {
      return place.range.begin < range.end && range.begin < place.range.end;
    };
    for (const Place& place : places_) {
      if (place.accessed && overlaps(place)) return false;
    }
    places_.erase(std::remove_if(places_.begin(), places_.end(), overlaps), places_.end());
    places_.push_back({range, false});
    widen(place_bounds_, range);
    return true;
  }

  void done(uint64_t token) {
    const auto finished = [token](const InFlight& product) { return product.token == token; };
    in_flight_.erase(std::remove_if(in_flight_.begin(), in_flight_.end(), finished), in_flight_.end());
    if (in_flight_.empty()) bounds_ = kNothing;
  }

  void fence() {
    for (Place& place : places_) place.accessed = false;
  }

  // The thread accesses a local variable. Which register of a product in flight that is, or -1.
  ptrdiff_t access(uintptr_t address) {
    if (!place_bounds_.holds(address, 1)) return -1;
    for (Place& place : places_) place.accessed = place.accessed || place.range.holds(address, 1);
    if (!bounds_.holds(address, 1)) return -1;
    for (const InFlight& product : in_flight_) {
      if (product.range.holds(address, 1)) return (address - product.range.begin) / sizeof(float);
    }
    return -1;
  }

 private:
  struct InFlight {
    Range range;
    uint64_t token;
  };
  struct Place {
    Range range;
    bool accessed;  // since the last fence
  };
  static constexpr Range kNothing = {UINTPTR_MAX, 0};

  static void widen(Range& bounds, const Range& by) {
    bounds = {std::min(bounds.begin, by.begin), std::max(bounds.end, by.end)};
  }

  std::vector<InFlight> in_flight_;
  std::vector<Place> places_;                          // where a product ever was, the latest at each
  Range bounds_ = kNothing, place_bounds_ = kNothing;  // around each, for a quick no
};

}  // namespace simt::race

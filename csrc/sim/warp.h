// Warp collectives. Each is a Deposit with the lane's operand and a place for its result, and one function that
// computes all results when the last lane has come. A lane reads its result from its own deposit, so that the others
// may go on to their next collective before it runs again.
//
// Lanes named in the mask that have exited are not waited for. What a shuffle reads from a lane that does not take
// part is undefined on the GPU, and all ones here (NaN as a float).
#pragma once

#include <cstdint>
#include <cstring>

#include "sim/intrinsics.h"
#include "sim/scheduler.h"

namespace simt {

// Calls function(lane) for every set bit.
template <typename Function>
inline void for_each_lane(uint32_t lanes, Function function) {
  for (; lanes != 0; lanes &= lanes - 1) function(__builtin_ctz(lanes));
}

struct ShuffleDeposit : Deposit {
  uint64_t value;   // brought by this lane
  uint64_t result;  // the value of `source`
  int source;

  static void finish_all(Deposit* const* lanes, uint32_t participants) {
    for_each_lane(participants, [&](int lane) {
      auto& mine = *static_cast<ShuffleDeposit*>(lanes[lane]);
      const bool valid = (participants >> mine.source & 1) != 0;
      mine.result = valid ? static_cast<ShuffleDeposit*>(lanes[mine.source])->value : ~uint64_t{0};
    });
  }
};

template <typename T>
inline T shuffle(const char* name, unsigned mask, T value, int source) {
  static_assert(sizeof(T) <= 8, "a shuffle moves up to 8 bytes");
  ShuffleDeposit deposit;
  deposit.name = name;
  deposit.mask = mask;
  deposit.finish = &ShuffleDeposit::finish_all;
  deposit.value = 0;
  memcpy(&deposit.value, &value, sizeof(T));
  deposit.source = source;
  current->block->collective(deposit);
  memcpy(&value, &deposit.result, sizeof(T));
  return value;
}

// First lane of the segment of `width` lanes that the caller is in.
inline int segment(const char* name, int width) {
  if (width < 1 || width > 32 || (width & (width - 1)) != 0) {
    fail("%s: width: expected a power of two from 1 to 32, got %d", name, width);
  }
  return current->lane & ~(width - 1);
}

struct VoteDeposit : Deposit {
  uint32_t value;   // brought by this lane
  uint32_t result;  // the lanes that brought a true value; or the reduction

  static void ballot(Deposit* const* lanes, uint32_t participants) {
    uint32_t votes = 0;
    for_each_lane(participants, [&](int lane) {
      if (static_cast<VoteDeposit*>(lanes[lane])->value != 0) votes |= 1u << lane;
    });
    for_each_lane(participants, [&](int lane) { static_cast<VoteDeposit*>(lanes[lane])->result = votes; });
  }

  // Combine: a stateless callable (T, T) -> T.
  template <typename T, typename Combine>
  static void reduce(Deposit* const* lanes, uint32_t participants) {
    const int first = __builtin_ctz(participants);
    auto total = static_cast<T>(static_cast<VoteDeposit*>(lanes[first])->value);
    for_each_lane(participants & (participants - 1), [&](int lane) {
      total = Combine()(total, static_cast<T>(static_cast<VoteDeposit*>(lanes[lane])->value));
    });
    for_each_lane(participants,
                  [&](int lane) { static_cast<VoteDeposit*>(lanes[lane])->result = static_cast<uint32_t>(total); });
  }
};

inline uint32_t vote(const char* name, unsigned mask, uint32_t value,
                     void (*finish)(Deposit* const*, uint32_t) = &VoteDeposit::ballot) {
  VoteDeposit deposit;
  deposit.name = name;
  deposit.mask = mask;
  deposit.finish = finish;
  deposit.value = value;
  current->block->collective(deposit);
  return deposit.result;
}

struct Add {
  template <typename T>
  T operator()(T a, T b) const {
    return a + b;
  }
};
struct Min {
  template <typename T>
  T operator()(T a, T b) const {
    return b < a ? b : a;
  }
};
struct Max {
  template <typename T>
  T operator()(T a, T b) const {
    return a < b ? b : a;
  }
};
struct And {
  template <typename T>
  T operator()(T a, T b) const {
    return a & b;
  }
};
struct Or {
  template <typename T>
  T operator()(T a, T b) const {
    return a | b;
  }
};
struct Xor {
  template <typename T>
  T operator()(T a, T b) const {
    return a ^ b;
  }
};

}  // namespace simt

inline void __syncwarp(unsigned mask = 0xffffffffu) { simt::vote("__syncwarp", mask, 0); }
inline unsigned __activemask() { return simt::current->block->alive_lanes(); }

// Shuffles over segments of `width` lanes. A source outside the segment leaves the caller's own value.
template <typename T>
inline T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  const int first = simt::segment("__shfl_sync", width);
  return simt::shuffle("__shfl_sync", mask, value, first + (source & (width - 1)));
}
template <typename T>
inline T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32) {
  const int first = simt::segment("__shfl_xor_sync", width);
  const int lane = simt::current->lane, source = lane ^ lane_mask;
  return simt::shuffle("__shfl_xor_sync", mask, value, source >= 0 && source < first + width ? source : lane);
}
template <typename T>
inline T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  const int first = simt::segment("__shfl_down_sync", width);
  const int lane = simt::current->lane;
  const int64_t source = static_cast<int64_t>(lane) + delta;
  return simt::shuffle("__shfl_down_sync", mask, value, source < first + width ? static_cast<int>(source) : lane);
}
template <typename T>
inline T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  const int first = simt::segment("__shfl_up_sync", width);
  const int lane = simt::current->lane;
  const int64_t source = static_cast<int64_t>(lane) - delta;
  return simt::shuffle("__shfl_up_sync", mask, value, source >= first ? static_cast<int>(source) : lane);
}

inline unsigned __ballot_sync(unsigned mask, int predicate) {
  return simt::vote("__ballot_sync", mask, predicate != 0);
}
inline int __any_sync(unsigned mask, int predicate) { return simt::vote("__any_sync", mask, predicate != 0) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return simt::vote("__all_sync", mask, predicate == 0) == 0; }

inline unsigned __reduce_add_sync(unsigned mask, unsigned value) {
  return simt::vote("__reduce_add_sync", mask, value, &simt::VoteDeposit::reduce<unsigned, simt::Add>);
}
inline unsigned __reduce_min_sync(unsigned mask, unsigned value) {
  return simt::vote("__reduce_min_sync", mask, value, &simt::VoteDeposit::reduce<unsigned, simt::Min>);
}
inline unsigned __reduce_max_sync(unsigned mask, unsigned value) {
  return simt::vote("__reduce_max_sync", mask, value, &simt::VoteDeposit::reduce<unsigned, simt::Max>);
}
inline unsigned __reduce_and_sync(unsigned mask, unsigned value) {
  return simt::vote("__reduce_and_sync", mask, value, &simt::VoteDeposit::reduce<unsigned, simt::And>);
}
inline unsigned __reduce_or_sync(unsigned mask, unsigned value) {
  return simt::vote("__reduce_or_sync", mask, value, &simt::VoteDeposit::reduce<unsigned, simt::Or>);
}
inline unsigned __reduce_xor_sync(unsigned mask, unsigned value) {
  return simt::vote("__reduce_xor_sync", mask, value, &simt::VoteDeposit::reduce<unsigned, simt::Xor>);
}

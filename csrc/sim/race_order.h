// What the race detector knows of order: who may rely on which access. race.h says how.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <unordered_map>
#include <vector>

#include "sim/shadow.h"

namespace simt::race {

// The clocks of a cluster's threads, of what passes them on, and of who waited for which asynchronous operation.
class Order {
 public:
  void start(int threads) {
    threads_ = threads;
    width_ = (static_cast<size_t>(threads) + 7) / 8 * 8;
    clocks_.assign(threads * width_, 0);
    for (int t = 0; t < threads; ++t) clock(t)[t] = 1;
    fences_.clear();
    objects_.clear();
    numbers_.clear();
    operations_.clear();
    finished_.assign(threads, {});
  }

  uint32_t epoch(int thread) const { return clocks_[thread * width_ + thread]; }

  // Whether `me` may rely on anything that threads [first, end) have done.
  bool knows_one_of(int first, int end, int me) const {
    const uint32_t* mine = &clocks_[me * width_];
    return std::any_of(mine + first, mine + end, [](uint32_t epoch) { return epoch != 0; });
  }
  // What threads [first, end) may rely on together: of each thread, the last epoch. Until the next call of a join.
  const uint32_t* joined(int first, int end) {
    joined_.assign(width_, 0);
    for (int thread = first; thread < end; ++thread) join(joined_.data(), clock(thread));
    return joined_.data();
  }

  // Barriers, mbarriers and atomic variables.
  void release(const void* object, int me) {
    Object& to = objects_[object];
    if (!to.released) to.clock.assign(width_, 0);
    to.released = true;
    join(to.clock.data(), clock(me));
    ++clock(me)[me];
  }
  void acquire(const void* object, int thread) {
    const auto found = objects_.find(object);
    if (found == objects_.end()) return;
    Object& from = found->second;
    if (from.released) join(clock(thread), from.clock.data());
    if (from.operations.empty()) return;
    from.acquired.resize(threads_, 0);
    uint32_t& acquired = from.acquired[thread];
    for (; acquired < from.operations.size(); ++acquired) done(from.operations[acquired], thread);
  }
  void forget(const void* object) {
    const auto found = objects_.find(object);
    if (found != objects_.end()) found->second.released = false;
  }
  void pass_on(const void* from, const void* to) {
    Object &target = objects_[to], &source = objects_[from];
    target.clock = source.clock;
    target.released = source.released;
    source.released = false;
  }
  // A collective of threads first + each bit of `lanes`.
  void join_lanes(int first, uint32_t lanes) {
    joined_.assign(width_, 0);
    for (uint32_t left = lanes; left != 0; left &= left - 1) join(joined_.data(), clock(first + __builtin_ctz(left)));
    for (uint32_t left = lanes; left != 0; left &= left - 1) {
      const int thread = first + __builtin_ctz(left);
      uint32_t* mine = clock(thread);
      const uint32_t epoch = mine[thread];
      memcpy(mine, joined_.data(), width_ * sizeof *mine);
      mine[thread] = epoch + 1;
    }
  }

  // Asynchronous operations. Tokens are numbered as they come; mostly the same one comes again. Each block of a cluster
  // has its own.
  uint32_t operation(uint64_t token, unsigned rank) {
    token ^= static_cast<uint64_t>(rank) << 56;
    if (operations_.empty() || token != last_token_) {
      const auto [found, added] = numbers_.try_emplace(token, static_cast<uint32_t>(operations_.size()));
      if (added) operations_.emplace_back();
      last_token_ = token;
      last_operation_ = found->second;
    }
    return last_operation_;
  }
  void signals(uint32_t operation, const void* object) { objects_[object].operations.push_back(operation); }
  void done(uint32_t operation, int thread) {
    operations_[operation].waits.push_back({static_cast<uint32_t>(thread), epoch(thread)});
  }
  bool waited_for(uint32_t operation, int first, int end) const {
    const std::vector<Operation::Wait>& waits = operations_[operation].waits;
    return std::any_of(waits.begin(), waits.end(), [=](const Operation::Wait& wait) {
      return static_cast<int>(wait.thread) >= first && static_cast<int>(wait.thread) < end;
    });
  }

  void proxy_fence(int me) {
    if (fences_.empty()) fences_.assign(threads_ * width_, 0);
    memcpy(&fences_[me * width_], clock(me), width_ * sizeof(uint32_t));
    ++clock(me)[me];
  }

  // Whether thread `me` may rely on `access`. Once it may, it always may: operations that it asked for are kept.
  bool is_behind(const Access& access, int me) {
    const uint32_t* mine = clock(me);
    if (!access.engine) return mine[access.thread] >= access.epoch;
    uint32_t& kept = finished_[me][access.operation % kFinished];
    if (kept == access.operation + 1) return true;
    for (const Operation::Wait& wait : operations_[access.operation].waits) {
      if (mine[wait.thread] < wait.epoch) continue;
      kept = access.operation + 1;
      return true;
    }
    return false;
  }
  // Whether the async proxy, for `me`, may: there was a fence of it behind `access`.
  bool is_fenced(const Access& access, int me) const {
    // By `thread` itself or by the issuing one, after that thread's `epoch`.
    const auto fenced = [&](int thread, uint32_t epoch) {
      return !fences_.empty() && (fences_[thread * width_ + thread] >= epoch || fences_[me * width_ + thread] >= epoch);
    };
    if (!access.engine) return fenced(static_cast<int>(access.thread), access.epoch);
    const std::vector<Operation::Wait>& waits = operations_[access.operation].waits;  // of cp.async
    return std::any_of(waits.begin(), waits.end(),
                       [&](const Operation::Wait& wait) { return fenced(static_cast<int>(wait.thread), wait.epoch); });
  }

 private:
  // Who waited for an asynchronous operation, and when. Of one thread the first wait alone counts.
  struct Operation {
    struct Wait {
      uint32_t thread, epoch;
    };
    std::vector<Wait> waits;
  };

  // What a barrier, an mbarrier or an atomic variable passes on.
  struct Object {
    bool released = false;
    std::vector<uint32_t> clock;       // valid once released
    std::vector<uint32_t> operations;  // whose completion this object signals
    std::vector<uint32_t> acquired;    // of each thread, how many of those it has waited for
  };

  uint32_t* clock(int thread) { return &clocks_[thread * width_]; }

  void join(uint32_t* to, const uint32_t* from) const {
    for (size_t i = 0; i < width_; i += 8) {
      for (size_t j = i; j < i + 8; ++j) to[j] = std::max(to[j], from[j]);
    }
  }

  int threads_ = 0;
  size_t width_ = 0;              // of a clock: the threads, rounded up
  std::vector<uint32_t> clocks_;  // of each thread
  std::vector<uint32_t> fences_;  // each thread's clock at its last proxy fence; empty when there was none
  std::vector<uint32_t> joined_;
  std::unordered_map<const void*, Object> objects_;
  std::unordered_map<uint64_t, uint32_t> numbers_;  // of tokens, in operations_
  std::vector<Operation> operations_;
  uint64_t last_token_ = 0;
  uint32_t last_operation_ = 0;
  static constexpr size_t kFinished = 64;
  // Per thread, 1 + operations that it was found to be ordered behind, each in the place of its number.
  std::vector<std::array<uint32_t, kFinished>> finished_;
};

}  // namespace simt::race

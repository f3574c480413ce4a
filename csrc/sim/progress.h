// Whether the blocks of a launch still get on, when some of them poll memory for what others write.
//
// Workers run blocks to their end, one each, so a block can wait for any block that started before it. A block that
// only polls gives its OS thread away again and again, and when it has done so for long it votes that it is stuck. The
// launch is stuck when every worker has voted in two rounds with no movement between: nobody has written anything since
// the first round ended, and everybody has looked again since.
#pragma once

#include <atomic>
#include <cstdint>
#include <mutex>

namespace simt {

class Progress {
 public:
  void enter() { change(+1); }  // a worker, before it takes blocks
  void leave() { change(-1); }
  void moved() { change(0); }  // a block that had voted found a change
  uint64_t round() const { return round_.load(); }
  // True when the launch is stuck. A vote of an earlier round does not count.
  bool vote(uint64_t round) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (round != round_.load() || ++votes_ < workers_) return false;
    votes_ = 0;
    round_.fetch_add(1);
    return ++full_rounds_ >= 2;
  }
  // A block failed; others need not wait for it.
  void cancel() { cancelled_.store(true); }
  bool cancelled() const { return cancelled_.load(std::memory_order_relaxed); }

 private:
  void change(int workers) {
    const std::lock_guard<std::mutex> lock(mutex_);
    workers_ += workers;
    votes_ = full_rounds_ = 0;
    round_.fetch_add(1);
  }

  std::mutex mutex_;
  std::atomic<uint64_t> round_{1};
  std::atomic<bool> cancelled_{false};
  int workers_ = 0, votes_ = 0, full_rounds_ = 0;
};

}  // namespace simt

// What the race detector remembers of each byte of shared memory: its last write, and its reads since then.
//
// Threads access words and vectors, so neighbouring bytes mostly share their history. A line of 16 bytes is therefore
// kept as equal cells, as many as its accesses have needed so far: one at first, and split in halves, down to single
// bytes, when an access covers part of a cell. A write of the whole line makes it one cell again.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>

namespace simt::race {

// Who made an access: a thread in one of its epochs, or an engine for a thread, in an operation of the block; and
// whether through the async proxy.
struct Access {
  uint64_t pc : 48, thread : 13, atomic : 1, engine : 1, async_proxy : 1;
  uint32_t epoch;      // 0: no access
  uint32_t operation;  // of an engine

  const void* where() const { return reinterpret_cast<const void*>(static_cast<uintptr_t>(pc)); }
  friend bool operator==(const Access& a, const Access& b) { return memcmp(&a, &b, sizeof a) == 0; }
};
static_assert(sizeof(Access) == 16, "no padding: compared byte by byte");

struct Cell {
  Access write = {};
  std::vector<Access> reads;
  size_t prune_at = 4;  // so many reads are looked through for those that need not be kept
};

class Line {
 public:
  static constexpr size_t kBytes = 16;

  // The cells that make up bytes [begin, end) of the line.
  struct Part {
    Cell *first, *last;
    size_t bytes;  // of each cell
  };
  Part part(size_t begin, size_t end) {
    const size_t bounds = begin | end | kBytes, finest = bounds & (~bounds + 1);
    while (bytes_ > finest) split();
    return {cells_ + begin / bytes_, cells_ + end / bytes_, bytes_};
  }
  // All of the line was written by one access, the last of any cell.
  void merge() { bytes_ = kBytes; }
  void reset() {
    bytes_ = kBytes;
    cells_[0].write = {};
    cells_[0].reads.clear();
  }

  uint64_t block = 0;  // whose accesses these are

 private:
  void split() {
    for (size_t i = kBytes / bytes_; i-- > 0;) {
      cells_[2 * i + 1] = cells_[i];
      if (i > 0) cells_[2 * i] = cells_[i];
    }
    bytes_ /= 2;
  }

  size_t bytes_ = kBytes;  // of each cell
  Cell cells_[kBytes];
};

class Shadow {
 public:
  // Forgets everything, for a block with `bytes` of shared memory.
  void start(size_t bytes) {
    ++block_;
    const size_t lines = (bytes + Line::kBytes - 1) / Line::kBytes;
    if (lines_.size() < lines) lines_.resize(lines);
  }
  Line& line(size_t index) {
    std::unique_ptr<Line>& line = lines_[index];
    if (line == nullptr) line = std::make_unique<Line>();
    if (line->block != block_) {
      line->block = block_;
      line->reset();
    }
    return *line;
  }

 private:
  uint64_t block_ = 0;
  std::vector<std::unique_ptr<Line>> lines_;
};

}  // namespace simt::race

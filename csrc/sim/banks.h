// Bank conflicts of shared memory, for the counters of a race build.
//
// Shared memory has 32 banks of 4 bytes; word w lies in bank w % 32. A warp's load or store takes one pass per 128
// bytes that its lanes ask for (32 lanes of up to 4 bytes, 16 of 8, 8 of 16), and within a pass as many cycles as the
// busiest bank has distinct words. Every cycle beyond one per pass is a conflict.
//
// Lanes run one after the other here. Taken together are the lanes' k-th executions of one instruction since the warp
// last synchronised, which is what a GPU executes together as long as the warp does not diverge.
// Not counted: asynchronous copies, and products that read shared memory.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <unordered_map>
#include <vector>

namespace simt {

struct Conflicts {
  uint64_t requests = 0;   // load and store instructions of a warp
  uint64_t conflicts = 0;  // cycles lost
};

class BankCounter {
 public:
  static constexpr int kLanes = 32;

  void access(int lane, const void* instruction, uint32_t offset, uint32_t bytes) {
    if (instruction != last_) {
      last_ = instruction;
      here_ = &instructions_[instruction];
    }
    if (!here_->pending) pending_.push_back(here_);
    here_->pending = true;
    const uint32_t occurrence = here_->executed[lane]++;
    if (occurrence >= here_->requests.size()) here_->requests.resize(occurrence + 1);
    Request& request = here_->requests[occurrence];
    request.bytes = bytes;
    request.offsets[lane] = offset;
    request.lanes |= 1u << lane;
    if (request.lanes == ~0u) settle(request);
  }

  // The warp has synchronised: what follows is executed together anew.
  void flush() {
    for (Instruction* instruction : pending_) {
      for (Request& request : instruction->requests) settle(request);
      instruction->requests.clear();
      instruction->executed = {};
      instruction->pending = false;
    }
    pending_.clear();
  }

  Conflicts total;

 private:
  struct Request {
    std::array<uint32_t, kLanes> offsets;
    uint32_t bytes = 0, lanes = 0;
  };
  struct Instruction {
    std::array<uint32_t, kLanes> executed = {};
    std::vector<Request> requests;
    bool pending = false;
  };

  void settle(Request& request) {
    if (request.lanes == 0) return;
    ++total.requests;
    const int lanes_per_pass = request.bytes <= 4 ? 32 : request.bytes <= 8 ? 16 : 8;
    for (int first = 0; first < kLanes; first += lanes_per_pass) {
      uint32_t words[32][kLanes], count[32] = {};  // of each bank; a lane adds at most one
      uint32_t cycles = 0;
      for (int lane = first; lane < first + lanes_per_pass; ++lane) {
        if ((request.lanes >> lane & 1) == 0) continue;
        const uint32_t end = request.offsets[lane] + request.bytes;
        for (uint32_t word = request.offsets[lane] / 4; word * 4 < end; ++word) {
          uint32_t *bank = words[word % 32], &known = count[word % 32];
          if (std::find(bank, bank + known, word) != bank + known) continue;
          bank[known++] = word;
          cycles = std::max(cycles, known);
        }
      }
      if (cycles > 1) total.conflicts += cycles - 1;
    }
    request.lanes = 0;
  }

  std::unordered_map<const void*, Instruction> instructions_;
  std::vector<Instruction*> pending_;  // executed since the warp last synchronised
  const void* last_ = nullptr;
  Instruction* here_ = nullptr;  // of last_
};

}  // namespace simt

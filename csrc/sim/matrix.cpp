#include "sim/matrix.h"

#include <cstring>

#include "sim/async.h"
#include "sim/race.h"
#include "sim/warp.h"

namespace simt {
namespace {

void require_warp(const char* name, uint32_t participants) {
  if (participants != ~0u) fail("%s: lanes 0x%08x of the warp have exited", name, ~participants);
}

struct MatrixDeposit : Deposit {
  uint32_t* registers;
  char* row;
  int matrices;
  bool store, transposed;

  static void finish_all(Deposit* const* lanes, uint32_t participants) {
    const auto lane = [&](int i) -> MatrixDeposit& { return *static_cast<MatrixDeposit*>(lanes[i]); };
    const MatrixDeposit& first = lane(0);
    require_warp(first.name, participants);
    for (int matrix = 0; matrix < first.matrices; ++matrix) {
      for (int i = 0; i < kLanes; ++i) {
        for (int half = 0; half < 2; ++half) {
          int row = i / 4, column = i % 4 * 2 + half;
          if (first.transposed) std::swap(row, column);
          char* element = lane(matrix * 8 + row).row + column * 2;
          char* reg = reinterpret_cast<char*>(&lane(i).registers[matrix]) + half * 2;
          if (first.store)
            memcpy(element, reg, 2);
          else
            memcpy(reg, element, 2);
        }
      }
    }
  }
};

void move_matrices(const char* name, uint32_t* registers, char* row, int matrices, bool store, bool transposed) {
  if (current->lane < matrices * 8) {
    require_aligned(name, "row address", row, 16);
    require_inside(name, "row", row, 16);
    store ? race::write(row, 16) : race::read(row, 16);
  }
  MatrixDeposit deposit;
  deposit.name = name;
  deposit.mask = ~0u;
  deposit.finish = &MatrixDeposit::finish_all;
  deposit.registers = registers;
  deposit.row = row;
  deposit.matrices = matrices;
  deposit.store = store;
  deposit.transposed = transposed;
  current->block->collective(deposit);
}

struct MmaDeposit : Deposit {
  float* d;
  const uint32_t *a, *b;
  Element element;

  static void finish_all(Deposit* const* lanes, uint32_t participants) {
    require_warp("mma.sync", participants);
    float a[16][16], b[16][8], d[16][8];
    for (int i = 0; i < kLanes; ++i) {
      const MmaDeposit& lane = *static_cast<MmaDeposit*>(lanes[i]);
      const int group = i / 4, pair = i % 4 * 2;
      for (int reg = 0; reg < 4; ++reg) {
        float* to = &a[group + reg % 2 * 8][pair + reg / 2 * 8];
        unpack_pair(lane.a[reg], lane.element, to[0], to[1]);
        d[group + reg / 2 * 8][pair + reg % 2] = lane.d[reg];
      }
      for (int reg = 0; reg < 2; ++reg) {
        unpack_pair(lane.b[reg], lane.element, b[pair + reg * 8][group], b[pair + reg * 8 + 1][group]);
      }
    }
    for (int row = 0; row < 16; ++row) multiply_row(a[row], 1, b[0], 8, d[row]);
    count::tensor_ops(16 * 8 * 16);
    for (int i = 0; i < kLanes; ++i) {
      for (int reg = 0; reg < 4; ++reg) {
        static_cast<MmaDeposit*>(lanes[i])->d[reg] = d[i / 4 + reg / 2 * 8][i % 4 * 2 + reg % 2];
      }
    }
  }
};

}  // namespace

void ldmatrix(uint32_t* registers, const void* row, int matrices, bool transposed) {
  move_matrices("ldmatrix", registers, static_cast<char*>(const_cast<void*>(row)), matrices, false, transposed);
}

void stmatrix(const uint32_t* registers, void* row, int matrices, bool transposed) {
  require_hopper("stmatrix");
  move_matrices("stmatrix", const_cast<uint32_t*>(registers), static_cast<char*>(row), matrices, true, transposed);
}

void mma_m16n8k16(float* d, const uint32_t* a, const uint32_t* b, Element element) {
  MmaDeposit deposit;
  deposit.name = "mma.sync";
  deposit.mask = ~0u;
  deposit.finish = &MmaDeposit::finish_all;
  deposit.d = d;
  deposit.a = a;
  deposit.b = b;
  deposit.element = element;
  current->block->collective(deposit);
}

}  // namespace simt

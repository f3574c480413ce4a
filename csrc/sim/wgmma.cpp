#include "sim/wgmma.h"

#include <cstring>
#include <vector>

#include "sim/async.h"
#include "sim/half.h"
#include "sim/matrix.h"
#include "sim/race.h"
#include "sim/warp.h"

namespace simt {
namespace {

struct Descriptor {
  uint32_t start, leading, stride, swizzle;  // bytes

  explicit Descriptor(uint64_t bits)
      : start((bits & 0x3fff) << 4), leading((bits >> 16 & 0x3fff) << 4), stride((bits >> 32 & 0x3fff) << 4) {
    constexpr uint32_t kSpans[] = {0, 128, 64, 32};
    swizzle = kSpans[bits >> 62];
  }
};

// Calls visit(chunk, row, k) for every 16 bytes of an operand with `rows` rows along M or N: the elements (row,
// k..k+7), or, transposed, (row..row+7, k).
template <typename Visit>
void for_each_chunk(uint64_t bits, bool transposed, int first_row, int rows, Visit visit) {
  const Descriptor d(bits);
  const uint32_t span = d.swizzle == 0 ? 16 : d.swizzle;
  const auto base = reinterpret_cast<uintptr_t>(dynamic_shared());
  const size_t bytes = current->block->kernel().shared_bytes;
  const auto chunk = [&](uint32_t offset) {
    const uintptr_t place = swizzled(d.start + offset, d.swizzle);
    if (place + 16 > bytes) {
      fail("wgmma: an operand reaches byte %zu of the dynamic shared memory; the launch gave it %zu bytes",
           static_cast<size_t>(place) + 16, bytes);
    }
    return reinterpret_cast<const uint16_t*>(base + place);
  };
  if (!transposed) {
    const uint32_t next_k = d.swizzle == 0 ? d.leading : 16;
    for (int row = 0; row < rows; ++row) {
      const uint32_t i = first_row + row;
      for (uint32_t half = 0; half < 2; ++half) {
        visit(chunk(i / 8 * d.stride + i % 8 * span + half * next_k), row, static_cast<int>(half * 8));
      }
    }
  } else {
    const uint32_t next_rows = d.swizzle == 0 ? d.stride : d.leading;
    const uint32_t next_k = d.swizzle == 0 ? d.leading : d.stride;
    for (int row = 0; row < rows; row += 8) {
      const uint32_t e = (first_row + row) * 2;
      for (uint32_t k = 0; k < 16; ++k) {
        visit(chunk(e / span * next_rows + e % span + k / 8 * next_k + k % 8 * span), row, static_cast<int>(k));
      }
    }
  }
}

// The elements (i, k), k = 0..15, of an operand, into out[k * pitch + i] as fp32.
void fetch(uint64_t bits, bool transposed, int first_row, int rows, Element element, float* out, int pitch) {
  float values[8];
  for_each_chunk(bits, transposed, first_row, rows, [&](const uint16_t* chunk, int row, int k) {
    if (transposed) {
      to_floats(chunk, element, out + k * pitch + row);
    } else {
      to_floats(chunk, element, values);
      for (int i = 0; i < 8; ++i) out[(k + i) * pitch + row] = values[i];
    }
  });
}

// Tells the race detector of the operands that the running thread's warp has the engine read.
void observe(const Product& p) {
  const auto read = [&](const uint16_t* chunk, int, int) { race::engine_read(chunk, 16, p.token); };
  if (!p.a_in_registers) for_each_chunk(p.a, p.transpose_a, current->warp % 4 * 16, 16, read);
  for_each_chunk(p.b, p.transpose_b, 0, p.n, read);
}

// One warp's 16 rows.
void compute(const Product* const* lanes, int warp_in_group) {
  const Product& p = *lanes[0];
  alignas(16) float a[16 * 16], b[16 * 256], d[16 * 256];
  if (p.a_in_registers) {
    for (int lane = 0; lane < kLanes; ++lane) {
      for (int reg = 0; reg < 4; ++reg) {
        const int row = lane / 4 + reg % 2 * 8, k = lane % 4 * 2 + reg / 2 * 8;
        unpack_pair(lanes[lane]->a_registers[reg], p.element, a[k * 16 + row], a[(k + 1) * 16 + row]);
      }
    }
  } else {
    fetch(p.a, p.transpose_a, warp_in_group * 16, 16, p.element, a, 16);
  }
  fetch(p.b, p.transpose_b, 0, p.n, p.element, b, p.n);
  count::tensor_ops(16 * 16 * p.n);
  for (int row = 0; row < 16; ++row) {
    float* out = d + row * p.n;
    if (p.accumulate) {
      for (int c = 0; c < p.n; ++c) {
        out[c] = lanes[row % 8 * 4 + c % 8 / 2]->accumulator[c / 8 * 4 + row / 8 * 2 + c % 2];
      }
    } else {
      memset(out, 0, sizeof(float) * p.n);
    }
    multiply_row(a + row, 16, b, p.n, out);
    for (int c = 0; c < p.n; ++c) {
      lanes[row % 8 * 4 + c % 8 / 2]->accumulator[c / 8 * 4 + row / 8 * 2 + c % 2] = out[c];
    }
  }
}

struct WaitDeposit : Deposit {
  Engine::Thread* thread;
  size_t keep;
  std::vector<uint64_t> done;  // tokens of the products waited for

  static void finish_all(Deposit* const* deposits, uint32_t participants) {
    if (participants != ~0u) fail("wgmma.wait_group: lanes 0x%08x of the warp have exited", ~participants);
    WaitDeposit* lanes[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) lanes[lane] = static_cast<WaitDeposit*>(deposits[lane]);
    const size_t due = lanes[0]->thread->products.due(lanes[0]->keep);
    for (int lane = 1; lane < kLanes; ++lane) {
      const size_t other = lanes[lane]->thread->products.due(lanes[lane]->keep);
      if (other != due) {
        fail("wgmma.wait_group: lane 0 waits for %zu products, lane %d for %zu; all lanes must issue the same", due,
             lane, other);
      }
    }
    for (size_t i = 0; i < due; ++i) {
      if (race::enabled) {
        for (WaitDeposit* lane : lanes) lane->done.push_back(lane->thread->products[i].token);
      }
      const Product* products[kLanes];
      for (int lane = 0; lane < kLanes; ++lane) {
        products[lane] = &lanes[lane]->thread->products[i];
        const Product &mine = *products[lane], &first = *products[0];
        if (mine.a != first.a || mine.b != first.b || mine.n != first.n || mine.accumulate != first.accumulate) {
          fail("wgmma: lane %d brings another descriptor, shape or scale-d than lane 0", lane);
        }
      }
      compute(products, current->warp % 4);
    }
    for (WaitDeposit* lane : lanes) lane->thread->products.forget(lane->keep);
  }
};

}  // namespace

uint32_t shared_address(const void* pointer) {
  const auto offset = static_cast<const unsigned char*>(pointer) - static_cast<unsigned char*>(dynamic_shared());
  if (offset < 0 || static_cast<size_t>(offset) >= kMaxSharedBytes) {
    fail("shared address: expected a pointer into the dynamic shared memory, got %p", pointer);
  }
  return static_cast<uint32_t>(offset);
}

uint64_t matrix_descriptor(const void* start, uint32_t leading_bytes, uint32_t stride_bytes, uint32_t swizzle) {
  const uint64_t address = shared_address(start);
  if (address % 16 != 0 || leading_bytes % 16 != 0 || stride_bytes % 16 != 0) {
    fail("matrix descriptor: start, leading and stride: expected multiples of 16 bytes, got %u, %u, %u",
         static_cast<unsigned>(address), leading_bytes, stride_bytes);
  }
  const uint64_t mode = swizzle == 128 ? 1 : swizzle == 64 ? 2 : swizzle == 32 ? 3 : 0;
  return (address >> 4 & 0x3fff) | static_cast<uint64_t>(leading_bytes >> 4 & 0x3fff) << 16 |
         static_cast<uint64_t>(stride_bytes >> 4 & 0x3fff) << 32 | mode << 62;
}

void wgmma(const Product& product) {
  require_hopper("wgmma.mma_async");
  if (!engine().mine().fenced) fail("wgmma: no wgmma.fence before the first product");
  if (current->lane == 0 && current->warp % 4 == 0 && engine().mine().products_issued == 0) count::warpgroup();
  Product& mine = engine().mine().products.add(product);
  // All lanes of a warp issue the same products, so counting them gives one token per product and warp; the high bit
  // keeps it apart from the tokens of copies.
  mine.token = uint64_t{1} << 63 | static_cast<uint64_t>(current->warp) << 48 | engine().mine().products_issued++;
  race::accumulates(mine.accumulator, mine.n / 2 * sizeof(float), mine.token);
  if (race::enabled && current->lane == 0) observe(mine);
}

void wgmma_fence() {
  require_hopper("wgmma.fence");
  engine().mine().fenced = true;
  race::register_fence();
}

void wgmma_commit() {
  require_hopper("wgmma.commit_group");
  engine().mine().products.commit();
}

void wgmma_wait(size_t keep) {
  require_hopper("wgmma.wait_group");
  WaitDeposit deposit;
  deposit.name = "wgmma.wait_group";
  deposit.mask = ~0u;
  deposit.finish = &WaitDeposit::finish_all;
  deposit.thread = &engine().mine();
  deposit.keep = keep;
  current->block->collective(deposit);
  for (const uint64_t token : deposit.done) race::engine_done(token);
}

}  // namespace simt

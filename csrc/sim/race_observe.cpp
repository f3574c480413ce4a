// The calls that -fsanitize=thread makes g++ put into kernels: before each load and store, and in place of each atomic.
// Part of the race build alone: other sanitizers declare the same names.
#include "sim/race_observe.h"

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "sim/race.h"
#include "sim/scheduler.h"

namespace {

inline void see(const void* pointer, size_t bytes, bool write, simt::race::Kind kind, size_t alignment,
                const void* pc) {
  // Host code of a kernel file is instrumented as well; it runs outside a fiber.
  if (!simt::race::enabled) return;
  if (const simt::Fiber* fiber = simt::current) simt::race::observe(*fiber, pointer, bytes, write, kind, alignment, pc);
}

// The orders that atomics.h names for accesses that synchronise; plain CUDA atomics are relaxed.
constexpr int kAcquire = __ATOMIC_ACQUIRE, kRelease = __ATOMIC_RELEASE;

inline void before_atomic(const volatile void* pointer, size_t bytes, bool write, int order, const void* pc) {
  if (!simt::race::enabled || simt::current == nullptr) return;
  see(const_cast<const void*>(pointer), bytes, write, simt::race::kAtomic, bytes, pc);
  if (order == kRelease) simt::race::release(const_cast<const void*>(pointer));
}
inline void after_atomic(const volatile void* pointer, int order) {
  if (order == kAcquire && simt::current != nullptr) simt::race::acquire(const_cast<const void*>(pointer));
}

}  // namespace

#define PC __builtin_return_address(0)

extern "C" {

void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
void __tsan_atomic_thread_fence(int) { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
void __tsan_atomic_signal_fence(int) {}
void __tsan_read_range(void* p, size_t n) { see(p, n, false, simt::race::kPlain, 1, PC); }
void __tsan_write_range(void* p, size_t n) { see(p, n, true, simt::race::kPlain, 1, PC); }

// An access of n bytes: natural alignment; any; volatile, which a kernel uses to poll.
#define SIMT_ACCESS(n)                                                                              \
  void __tsan_read##n(void* p) { see(p, n, false, simt::race::kPlain, n, PC); }                     \
  void __tsan_write##n(void* p) { see(p, n, true, simt::race::kPlain, n, PC); }                     \
  void __tsan_unaligned_read##n(void* p) { see(p, n, false, simt::race::kPlain, 1, PC); }           \
  void __tsan_unaligned_write##n(void* p) { see(p, n, true, simt::race::kPlain, 1, PC); }           \
  void __tsan_volatile_read##n(void* p) { see(p, n, false, simt::race::kAtomic, n, PC); }           \
  void __tsan_volatile_write##n(void* p) { see(p, n, true, simt::race::kAtomic, n, PC); }           \
  void __tsan_unaligned_volatile_read##n(void* p) { see(p, n, false, simt::race::kAtomic, 1, PC); } \
  void __tsan_unaligned_volatile_write##n(void* p) { see(p, n, true, simt::race::kAtomic, 1, PC); }
SIMT_ACCESS(1)
SIMT_ACCESS(2)
SIMT_ACCESS(4)
SIMT_ACCESS(8)
SIMT_ACCESS(16)
#undef SIMT_ACCESS

#define SIMT_FETCH(bits, name)                                                                                 \
  uint##bits##_t __tsan_atomic##bits##_fetch_##name(volatile uint##bits##_t* p, uint##bits##_t x, int order) { \
    before_atomic(p, bits / 8, true, order, PC);                                                               \
    const uint##bits##_t old = __atomic_fetch_##name(p, x, __ATOMIC_SEQ_CST);                                  \
    after_atomic(p, order);                                                                                    \
    return old;                                                                                                \
  }
#define SIMT_COMPARE(bits, name)                                                                          \
  int __tsan_atomic##bits##_compare_exchange_##name(volatile uint##bits##_t* p, uint##bits##_t* expected, \
                                                    uint##bits##_t desired, int order, int) {             \
    before_atomic(p, bits / 8, true, order, PC);                                                          \
    return __atomic_compare_exchange_n(p, expected, desired, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);  \
  }
#define SIMT_ATOMIC(bits)                                                                                  \
  uint##bits##_t __tsan_atomic##bits##_load(const volatile uint##bits##_t* p, int order) {                 \
    before_atomic(p, bits / 8, false, order, PC);                                                          \
    const uint##bits##_t x = __atomic_load_n(p, __ATOMIC_SEQ_CST);                                         \
    after_atomic(p, order);                                                                                \
    return x;                                                                                              \
  }                                                                                                        \
  void __tsan_atomic##bits##_store(volatile uint##bits##_t* p, uint##bits##_t x, int order) {              \
    before_atomic(p, bits / 8, true, order, PC);                                                           \
    __atomic_store_n(p, x, __ATOMIC_SEQ_CST);                                                              \
  }                                                                                                        \
  uint##bits##_t __tsan_atomic##bits##_exchange(volatile uint##bits##_t* p, uint##bits##_t x, int order) { \
    before_atomic(p, bits / 8, true, order, PC);                                                           \
    return __atomic_exchange_n(p, x, __ATOMIC_SEQ_CST);                                                    \
  }                                                                                                        \
  SIMT_FETCH(bits, add)                                                                                    \
  SIMT_FETCH(bits, sub)                                                                                    \
  SIMT_FETCH(bits, and)                                                                                    \
  SIMT_FETCH(bits, or)                                                                                     \
  SIMT_FETCH(bits, xor)                                                                                    \
  SIMT_COMPARE(bits, strong)                                                                               \
  SIMT_COMPARE(bits, weak)
SIMT_ATOMIC(8)
SIMT_ATOMIC(16)
SIMT_ATOMIC(32)
SIMT_ATOMIC(64)

}  // extern "C"

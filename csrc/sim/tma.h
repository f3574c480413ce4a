// Bulk copies: boxes of a tensor of up to four dimensions, or plain rows of bytes, between global and shared memory.
//
// A box lies densely in shared memory, dimension 0 innermost. Elements outside the tensor arrive as zeros and are left
// out of stores, but count as bytes. With a swizzle the rows are as wide as its span, and 16-byte chunks are permuted
// by the address itself: bits 4.. are exclusive-ored with bits 7.. (3 bits for 128 B, 2 for 64 B, 1 for 32 B).
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace simt {

enum class Element : uint8_t { kFloat32, kHalf, kBfloat16 };
constexpr uint32_t element_bytes(Element element) { return element == Element::kFloat32 ? 4 : 2; }

struct TensorMap {
  void* base;
  uint32_t rank;
  uint64_t size[4];    // elements
  uint64_t stride[4];  // bytes; stride[0] is the element's
  uint32_t box[4];     // elements
  uint32_t swizzle;    // bytes: 0, 32, 64 or 128
  Element element;

  uint32_t box_bytes() const;
};

struct Coordinates {
  int at[4];
};

// `address` after the permutation of a swizzle of `span` bytes.
inline uintptr_t swizzled(uintptr_t address, uint32_t span) {
  const uintptr_t mask = span == 0 ? 0 : span / 16 - 1;
  return address ^ (address >> 7 & mask) << 4;
}

struct BulkLoad {
  TensorMap map;
  Coordinates at;
  void* to;
  const void* from;  // of a plain copy of `bytes`; null: a box
  uint32_t bytes;
  uint64_t* barrier;
};

struct BulkStore {
  TensorMap map;
  Coordinates at;
  const void* from;
  uint64_t token;  // of the race detector
  bool add;
  bool read;                        // `data` holds what shared memory held
  std::vector<unsigned char> data;  // the box, not swizzled
};

void tma_load(void* shared, const TensorMap& map, Coordinates at, uint64_t* barrier);
// To the same place in each block of the cluster whose bit of `blocks` is set, and to the mbarrier there. The tensor is
// read once.
void tma_load_multicast(void* shared, const TensorMap& map, Coordinates at, uint64_t* barrier, uint16_t blocks);
void bulk_load(void* shared, const void* global, uint32_t bytes, uint64_t* barrier);
void tma_store(const TensorMap& map, Coordinates at, const void* shared, bool add);
void bulk_commit();
void bulk_wait(size_t keep, bool read_only);  // read_only: until shared memory has been read

void land_load(const BulkLoad& load);
void write_store(BulkStore& store);

}  // namespace simt

#include "sim/tma.h"

#include <cstring>

#include "sim/async.h"
#include "sim/cluster.h"
#include "sim/half.h"
#include "sim/intrinsics.h"
#include "sim/mbarrier.h"

namespace simt {
namespace {

// Calls row(linear element offset in the box, address in the tensor or null, first and end of the elements inside) for
// every row of the box along dimension 0.
template <typename Row>
void for_each_row(const TensorMap& map, const Coordinates& at, Row row) {
  uint32_t linear = 0;
  for (uint32_t k = 0; k < (map.rank > 3 ? map.box[3] : 1); ++k) {
    for (uint32_t j = 0; j < (map.rank > 2 ? map.box[2] : 1); ++j) {
      for (uint32_t i = 0; i < (map.rank > 1 ? map.box[1] : 1); ++i, linear += map.box[0]) {
        const uint32_t in_box[4] = {0, i, j, k};
        char* address = static_cast<char*>(map.base);
        bool inside = true;
        for (uint32_t d = 1; d < map.rank; ++d) {
          const int64_t c = static_cast<int64_t>(at.at[d]) + in_box[d];
          inside = inside && c >= 0 && c < static_cast<int64_t>(map.size[d]);
          address += c * static_cast<int64_t>(map.stride[d]);
        }
        const int64_t first = at.at[0], width = static_cast<int64_t>(map.size[0]);
        const int64_t begin = first < 0 ? -first : 0;
        int64_t end = width - first < map.box[0] ? width - first : map.box[0];
        if (!inside || end < begin) end = begin;
        address += first * static_cast<int64_t>(element_bytes(map.element));
        row(linear, address, begin, end);
      }
    }
  }
}

// Copies `bytes` between a swizzled place in shared memory and a plain buffer, one 16-byte chunk at a time.
template <typename Move>
void for_each_chunk(const void* shared, uint32_t offset, uint32_t bytes, uint32_t swizzle, Move move) {
  const auto start = reinterpret_cast<uintptr_t>(shared) + offset;
  for (uint32_t done = 0; done < bytes;) {
    const uint32_t left_in_chunk = 16 - (start + done) % 16;
    const uint32_t step = bytes - done < left_in_chunk ? bytes - done : left_in_chunk;
    move(reinterpret_cast<char*>(swizzled(start + done, swizzle)), done, step);
    done += step;
  }
}

template <typename Bits, typename Decode, typename Encode>
void atomic_add(void* to, const void* term, Decode decode, Encode encode) {
  Bits x;
  memcpy(&x, term, sizeof x);
  auto* pointer = static_cast<Bits*>(to);
  Bits before = __atomic_load_n(pointer, __ATOMIC_RELAXED);
  while (!__atomic_compare_exchange_n(pointer, &before, encode(decode(before) + decode(x)), true, __ATOMIC_RELAXED,
                                      __ATOMIC_RELAXED)) {
  }
}

void add_element(Element element, void* to, const void* term) {
  if (element == Element::kFloat32)
    atomic_add<uint32_t>(to, term, bits_float, float_bits);
  else if (element == Element::kHalf)
    atomic_add<uint16_t>(to, term, float_from_half, half_from_float);
  else
    atomic_add<uint16_t>(to, term, float_from_bfloat16, bfloat16_from_float);
}

void read_store(BulkStore& store) {
  if (store.read) return;
  store.read = true;
  store.data.resize(store.map.box_bytes());
  for_each_chunk(store.from, 0, store.map.box_bytes(), store.map.swizzle,
                 [&](const char* from, uint32_t at, uint32_t bytes) { memcpy(&store.data[at], from, bytes); });
}

// Tells the race detector what the box has of global memory: for its bounds and its counters.
void observe_box(const TensorMap& map, const Coordinates& at, uint64_t token, bool write) {
  const uint32_t size = element_bytes(map.element);
  for_each_row(map, at, [&](uint32_t, char* address, int64_t begin, int64_t end) {
    if (end <= begin) return;
    const size_t bytes = static_cast<size_t>(end - begin) * size;
    write ? race::engine_write(address + begin * size, bytes, token)
          : race::engine_read(address + begin * size, bytes, token);
  });
}

// Sends off the copy to one block, whose threads land it when they wait.
void deliver(const BulkLoad& load, uint64_t token, Engine& there) {
  require_inside("cp.async.bulk", "destination", load.to, load.bytes);
  require_fenced(load.barrier, "cp.async.bulk");
  race::engine_write(load.to, load.bytes, token);
  race::engine_signals(token, load.barrier);
  if (eager()) return land_load(load);
  there.loads().push_back(load);
  there.wake(load.barrier);  // who waits already completes the copy
}

void issue(const BulkLoad& load) {
  const uint64_t token = engine().new_token();
  if (load.from != nullptr)
    race::engine_read(load.from, load.bytes, token);
  else if (race::enabled)
    observe_box(load.map, load.at, token, false);
  deliver(load, token, engine());
}

}  // namespace

uint32_t TensorMap::box_bytes() const {
  uint32_t bytes = element_bytes(element);
  for (uint32_t d = 0; d < rank; ++d) bytes *= box[d];
  return bytes;
}

void land_load(const BulkLoad& load) {
  if (load.from != nullptr) {
    memcpy(load.to, load.from, load.bytes);
  } else {
    const uint32_t size = element_bytes(load.map.element);
    std::vector<char> row(load.map.box[0] * size);
    for_each_row(load.map, load.at, [&](uint32_t linear, const char* address, int64_t begin, int64_t end) {
      memset(row.data(), 0, row.size());
      if (end > begin) memcpy(&row[begin * size], address + begin * size, (end - begin) * size);
      for_each_chunk(load.to, linear * size, static_cast<uint32_t>(row.size()), load.map.swizzle,
                     [&](char* to, uint32_t at, uint32_t bytes) { memcpy(to, &row[at], bytes); });
    });
  }
  mbarrier_complete(load.barrier, load.bytes);
}

void write_store(BulkStore& store) {
  read_store(store);
  const uint32_t size = element_bytes(store.map.element);
  for_each_row(store.map, store.at, [&](uint32_t linear, char* address, int64_t begin, int64_t end) {
    const unsigned char* row = &store.data[linear * size];
    if (!store.add) {
      if (end > begin) memcpy(address + begin * size, row + begin * size, (end - begin) * size);
      return;
    }
    for (int64_t i = begin; i < end; ++i) add_element(store.map.element, address + i * size, row + i * size);
  });
}

void tma_load(void* shared, const TensorMap& map, Coordinates at, uint64_t* barrier) {
  require_hopper("cp.async.bulk.tensor");
  require_aligned("cp.async.bulk.tensor", "destination", shared, 128);
  issue({map, at, shared, nullptr, map.box_bytes(), barrier});
}

void tma_load_multicast(void* shared, const TensorMap& map, Coordinates at, uint64_t* barrier, uint16_t blocks) {
  constexpr const char* kName = "cp.async.bulk.tensor.multicast::cluster";
  require_hopper(kName);
  require_aligned(kName, "destination", shared, 128);
  const unsigned size = cluster().size();
  if (blocks == 0 || blocks >> size != 0) {
    fail("%s: mask: expected some of the cluster's %u blocks, one bit each, got 0x%x", kName, size, blocks);
  }
  const uint64_t token = engine().new_token();
  if (race::enabled) observe_box(map, at, token, false);
  for (unsigned rank = 0; rank < size; ++rank) {
    if ((blocks >> rank & 1) == 0) continue;
    void* to = cluster().map(shared, rank, kName);
    auto* signalled = static_cast<uint64_t*>(cluster().map(barrier, rank, kName));
    deliver({map, at, to, nullptr, map.box_bytes(), signalled}, token, cluster().reach(rank, kName).engine());
  }
}

void bulk_load(void* shared, const void* global, uint32_t bytes, uint64_t* barrier) {
  require_hopper("cp.async.bulk");
  require_aligned("cp.async.bulk", "destination", shared, 16);
  require_aligned("cp.async.bulk", "source", global, 16);
  if (bytes == 0 || bytes % 16 != 0) fail("cp.async.bulk: size: expected a multiple of 16 bytes, got %u", bytes);
  issue({{}, {}, shared, global, bytes, barrier});
}

void tma_store(const TensorMap& map, Coordinates at, const void* shared, bool add) {
  const char* name = add ? "cp.reduce.async.bulk.tensor" : "cp.async.bulk.tensor (store)";
  require_hopper(name);
  require_aligned(name, "source", shared, 128);
  require_inside(name, "source", shared, map.box_bytes());
  BulkStore& store = engine().mine().stores.add({map, at, shared, engine().new_token(), add, false, {}});
  race::engine_read(shared, map.box_bytes(), store.token);
  if (race::enabled) observe_box(map, at, store.token, true);
  if (eager()) read_store(store);
}

void bulk_commit() { engine().mine().stores.commit(); }

void bulk_wait(size_t keep, bool read_only) {
  Groups<BulkStore>& stores = engine().mine().stores;
  const size_t due = stores.due(keep);
  for (size_t i = 0; i < due; ++i) {
    race::engine_done(stores[i].token);
    if (read_only)
      read_store(stores[i]);
    else
      write_store(stores[i]);
  }
  if (!read_only) stores.forget(keep);
}

}  // namespace simt

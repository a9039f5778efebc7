// Emulates a GPU's block on a CPU, for tests: every thread is a fiber that runs until it waits for others. Errors that
// a GPU does not report end the launch with a message: an element out of bounds or misaligned, shared memory read
// before it is written, two accesses of one element (shared or global) without a barrier between them, a barrier or a
// warp operation that not all threads reach, an asynchronous copy that is never waited for.
#pragma once

#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <map>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#define DEVICE inline
constexpr int architecture = 0;
#define KERNEL(...) extern "C"
#define LINE int line = __builtin_LINE()

namespace emulator {

constexpr size_t stack_bytes = 256 << 10;

enum class Wait { None, Block, Warp, Done };

struct Copy {
  char* to;
  const char* from;
  u32 at;  // byte in shared memory
};

struct Fiber {
  jmp_buf at;
  bool is_started = false;
  Wait wait = Wait::None;
  int line = 0;   // of the call that waits
  u32 calls = 0;  // number of warp operations so far
  std::vector<std::vector<Copy>> committed;
  std::vector<Copy> uncommitted;
};

// The last accesses of two bytes of shared memory.
struct SharedAccess {
  u64 written = 0, read = 0;  // barrier epochs; 0: never
  u64 write_warp_epoch = 0, read_warp_epoch = 0;
  u32 writer = 0, reader = 0;
  bool several_readers = false, several_warps = false;
  u64 block = 0;  // the block that made the accesses: shared memory is unwritten at the start of every other block
};

// The accesses of a byte of global memory in this launch.
struct GlobalAccess {
  u64 writer = 0, reader = 0;  // threads of the grid, numbered from 1; several: ~0
  u64 epoch = 0;
};

struct Machine {
  u32 thread = 0, threads = 0, block[3] = {}, grid[3] = {};
  u64 number = 0, epoch = 1;  // of this block, and of its barriers; never reset
  std::vector<Fiber> fibers;
  std::vector<u64> warp_epochs;
  std::vector<char> arena;
  std::vector<SharedAccess> shared_accesses;
  std::map<const void*, std::vector<GlobalAccess>> global_accesses;
  std::vector<char> slots;  // two exchange slots of 64 bytes per thread
  void (*body)(void*) = nullptr;
  void* arguments = nullptr;
  jmp_buf scheduler, failed;
  char* stacks = nullptr;
  size_t stack_count = 0;
  std::string error;
  bool running = false;
};

inline Machine machine;

[[noreturn]] inline void fail(const std::string& what, int line) {
  auto& m = machine;
  char place[160];
  snprintf(place, sizeof place, "block (%u, %u, %u), thread %u, line %d: ", m.block[0], m.block[1], m.block[2],
           m.thread, line);
  m.error = place + what;
  _longjmp(m.failed, 1);
}

inline void wait(Wait what, int line) {
  auto& fiber = machine.fibers[machine.thread];
  fiber.wait = what;
  fiber.line = line;
  if (_setjmp(fiber.at) == 0) _longjmp(machine.scheduler, 1);
}

inline void start() {
  machine.body(machine.arguments);
  auto& fiber = machine.fibers[machine.thread];
  if (!fiber.committed.empty() || !fiber.uncommitted.empty())
    fail("it ends before its asynchronous copies have arrived", 0);
  fiber.wait = Wait::Done;
  _longjmp(machine.scheduler, 1);
}

// Runs thread t until it waits.
inline void resume(u32 t) {
  auto& m = machine;
  m.thread = t;
  auto& fiber = m.fibers[t];
  fiber.wait = Wait::None;
  if (_setjmp(m.scheduler) != 0) return;
  if (fiber.is_started) _longjmp(fiber.at, 1);
  fiber.is_started = true;
  ucontext_t context;
  getcontext(&context);
  context.uc_stack.ss_sp = m.stacks + t * stack_bytes;
  context.uc_stack.ss_size = stack_bytes;
  context.uc_link = nullptr;
  makecontext(&context, start, 0);
  setcontext(&context);
}

// Runs one block to its end.
inline void run_block() {
  auto& m = machine;
  m.number += 1;
  m.epoch += 1;
  m.fibers.assign(m.threads, Fiber());
  m.warp_epochs.assign((m.threads + 31) / 32, 1);
  for (u32 t = 0; t < m.threads; ++t) resume(t);
  for (;;) {
    bool progressed = false;
    for (u32 first = 0; first < m.threads; first += 32) {
      const u32 end = std::min(first + 32, m.threads);
      const auto at_warp = [&](u32 t) { return m.fibers[t].wait == Wait::Warp; };
      bool all = true;
      for (u32 t = first; t < end; ++t) all = all && at_warp(t) && m.fibers[t].line == m.fibers[first].line;
      if (!all) continue;
      m.warp_epochs[first / 32] += 1;
      for (u32 t = first; t < end; ++t) resume(t);
      progressed = true;
    }
    if (progressed) continue;
    u32 done = 0, waiting = 0;
    for (auto& fiber : m.fibers) done += fiber.wait == Wait::Done, waiting += fiber.wait == Wait::Block;
    if (done == m.threads) return;
    const int line = m.fibers[0].line;
    for (u32 t = 0; t < m.threads; ++t) {
      auto& fiber = m.fibers[t];
      m.thread = t;
      if (fiber.wait == Wait::Warp) fail("a warp operation that not every lane of the warp has reached", fiber.line);
      if (fiber.wait == Wait::Done) fail("it ended while others wait at a barrier", fiber.line);
      if (fiber.line != line) {
        fail("it waits at this barrier while others wait at line " + std::to_string(line), fiber.line);
      }
    }
    m.epoch += 1;
    for (u32 t = 0; t < m.threads; ++t) resume(t);
  }
}

// ---- checks of every access --------------------------------------------------------------------------------------

inline void check_shared(size_t offset, size_t bytes, bool write, int line) {
  auto& m = machine;
  if (offset + bytes > m.arena.size()) {
    fail("shared memory byte " + std::to_string(offset + bytes - 1) + " of " + std::to_string(m.arena.size()), line);
  }
  const u32 t = m.thread, w = t / 32;
  const u64 warp_epoch = m.warp_epochs[w];
  for (size_t at = offset / 2; at < (offset + bytes + 1) / 2; ++at) {
    auto& access = m.shared_accesses[at];
    const auto describe = [&](const char* what, u32 other) {
      return std::string(what) + " at shared memory byte " + std::to_string(2 * at) + " with thread " +
             std::to_string(other) + ": there is no barrier between them";
    };
    if (access.block != m.number) access = SharedAccess{.block = m.number};
    const bool unordered_write = access.written == m.epoch && access.writer != t &&
                                 (access.writer / 32 != w || access.write_warp_epoch == warp_epoch);
    if (write) {
      if (unordered_write) fail(describe("a race of two writers", access.writer), line);
      const bool others = access.several_readers || access.reader != t;
      if (access.read == m.epoch && others &&
          (access.several_warps || access.reader / 32 != w || access.read_warp_epoch == warp_epoch)) {
        fail(describe("a race of a writer with a reader", access.reader), line);
      }
      access.written = m.epoch, access.writer = t, access.write_warp_epoch = warp_epoch;
    } else {
      if (access.written == 0)
        fail("shared memory byte " + std::to_string(2 * at) + " is read before it is written", line);
      if (unordered_write) fail(describe("a race of a reader with a writer", access.writer), line);
      if (access.read != m.epoch) {
        access.several_readers = access.several_warps = false;
      } else if (!access.several_warps && access.reader / 32 == w && access.read_warp_epoch != warp_epoch) {
        access.several_readers = false;  // All earlier readers were of this warp, which has synchronized since.
      } else {
        access.several_readers |= access.reader != t;
        access.several_warps |= access.reader / 32 != w;
      }
      access.read = m.epoch, access.reader = t, access.read_warp_epoch = warp_epoch;
    }
  }
}

inline void check_global(const void* base, size_t bytes_held, size_t offset, size_t bytes, bool write, int line) {
  auto& m = machine;
  if (base == nullptr) fail("a tensor that was not given is used", line);
  if (offset + bytes > bytes_held || offset > bytes_held) {
    fail("global memory byte " + std::to_string(i64(offset + bytes) - 1) + " of " + std::to_string(bytes_held), line);
  }
  if (offset % bytes != 0) fail("global memory byte " + std::to_string(offset) + " is not aligned", line);
  auto& global_accesses = m.global_accesses[base];
  global_accesses.resize(bytes_held);
  const u64 block = m.block[0] + u64(m.grid[0]) * (m.block[1] + u64(m.grid[1]) * m.block[2]);
  const u64 self = block * m.threads + m.thread + 1, several = ~u64(0);
  const auto is_race = [&](u64 other, u64 epoch) {
    // Threads of one block may access an element in turn, with a barrier between them.
    const bool same_block = other != several && (other - 1) / m.threads == block;
    return other != 0 && other != self && !(same_block && epoch < m.epoch);
  };
  for (size_t at = offset; at < offset + bytes; ++at) {
    auto& access = global_accesses[at];
    if (is_race(access.writer, access.epoch)) {
      fail("a race at global memory byte " + std::to_string(at) + ": another thread has written it", line);
    }
    if (write) {
      if (is_race(access.reader, access.epoch)) {
        fail("a race at global memory byte " + std::to_string(at) + ": another thread has read it", line);
      }
      access.writer = self;
    } else {
      access.reader = access.reader == 0 || access.reader == self ? self : several;
    }
    access.epoch = m.epoch;
  }
}

// Shares every lane's value with the warp; returns the warp's slots.
template <class T>
const char* exchange(const T& value, int line) {
  static_assert(sizeof(T) <= 64);
  auto& m = machine;
  const u32 t = m.thread, parity = m.fibers[t].calls++ % 2;
  if (m.threads % 32 != 0) fail("warp operations want blocks of whole warps", line);
  memcpy(&m.slots[(parity * m.threads + t) * 64], &value, sizeof value);
  wait(Wait::Warp, line);
  return &m.slots[(parity * m.threads + t / 32 * 32) * 64];
}
template <class T>
T slot(const char* slots, u32 lane) {
  T value;
  memcpy(&value, slots + lane * 64, sizeof value);
  return value;
}

// ---- launching -----------------------------------------------------------------------------------------------------

// One argument as the caller passes it: a tensor's address and bytes, or a number in `data`.
struct Argument {
  void* data;
  size_t bytes;
};

template <class T>
struct FromArgument {
  static T from(const Argument& a) {
    T value;
    memcpy(&value, &a.data, sizeof value);
    return value;
  }
};

template <class... A>
struct Call {
  void (*kernel)(A...);
  const Argument* arguments;
  static void run(void* self) { static_cast<Call*>(self)->apply(std::index_sequence_for<A...>()); }
  template <size_t... I>
  void apply(std::index_sequence<I...>) {
    kernel(FromArgument<A>::from(arguments[I])...);
  }
};

template <class... A>
const char* launch(void (*kernel)(A...), const Argument* arguments, size_t count, const u32* grid, u32 threads,
                   u32 shared_bytes) {
  auto& m = machine;
  m.error.clear();
  if (count != sizeof...(A)) {
    m.error =
        "the kernel takes " + std::to_string(sizeof...(A)) + " arguments, " + std::to_string(count) + " were given";
    return m.error.c_str();
  }
  Call<A...> call{kernel, arguments};
  m.body = &Call<A...>::run;
  m.arguments = &call;
  m.threads = threads;
  std::copy(grid, grid + 3, m.grid);
  m.arena.assign(shared_bytes, char(0xAB));
  m.shared_accesses.assign(shared_bytes / 2 + 1, SharedAccess());
  m.slots.assign(size_t(threads) * 128, 0);
  m.global_accesses.clear();
  if (m.stack_count < threads) {
    if (m.stacks) munmap(m.stacks, m.stack_count * stack_bytes);
    m.stacks = static_cast<char*>(mmap(nullptr, threads * stack_bytes, PROT_READ | PROT_WRITE,
                                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    m.stack_count = threads;
  }
  if (_setjmp(m.failed) == 0) {
    for (m.block[2] = 0; m.block[2] < grid[2]; ++m.block[2])
      for (m.block[1] = 0; m.block[1] < grid[1]; ++m.block[1])
        for (m.block[0] = 0; m.block[0] < grid[0]; ++m.block[0]) run_block();
  }
  return m.error.empty() ? nullptr : m.error.c_str();
}

}  // namespace emulator

#define ENTRY(name)                                                                                        \
  extern "C" __attribute__((visibility("default"))) const char* name##_entry(                              \
      const emulator::Argument* arguments, size_t count, const u32* grid, u32 threads, u32 shared_bytes) { \
    return emulator::launch(name, arguments, count, grid, threads, shared_bytes);                          \
  }

inline u32 thread() { return emulator::machine.thread; }
inline u32 threads() { return emulator::machine.threads; }
inline u32 block() { return emulator::machine.block[0]; }
inline u32 block_y() { return emulator::machine.block[1]; }
inline u32 blocks() { return emulator::machine.grid[0]; }

// ---- memory --------------------------------------------------------------------------------------------------------

template <class T>
struct Global {
  using Value = std::remove_const_t<T>;
  char* base;
  size_t bytes_held;
  size_t start = 0;
  const char* at(i64 i, size_t bytes, bool write, int line) const {
    const i64 offset = i64(start) + i * i64(sizeof(T));
    if (offset < 0) emulator::fail("global memory byte " + std::to_string(offset), line);
    emulator::check_global(base, bytes_held, size_t(offset), bytes, write, line);
    return base + offset;
  }
  struct Index {
    i64 i;
    int line;
    template <class I>
    Index(I i, LINE) : i(i64(i)), line(line) {}
  };
  Value operator[](Index index) const {
    Value value;
    memcpy(&value, at(index.i, sizeof value, false, index.line), sizeof value);
    return value;
  }
  void set(i64 i, Value value, LINE) const
    requires(!std::is_const_v<T>)
  {
    memcpy(const_cast<char*>(at(i, sizeof value, true, line)), &value, sizeof value);
  }
  template <int N>
  Pack<Value, N> load(i64 i, LINE) const {
    Pack<Value, N> value;
    memcpy(&value, at(i, sizeof value, false, line), sizeof value);
    return value;
  }
  template <int N>
  void store(i64 i, Pack<Value, N> value, LINE) const
    requires(!std::is_const_v<T>)
  {
    memcpy(const_cast<char*>(at(i, sizeof value, true, line)), &value, sizeof value);
  }
  Global offset(i64 i) const { return {base, bytes_held, start + size_t(i) * sizeof(T)}; }
  bool is_present() const { return base != nullptr; }
};

template <class T>
struct emulator::FromArgument<Global<T>> {
  static Global<T> from(const Argument& a) { return {static_cast<char*>(a.data), a.bytes}; }
};

template <class T>
struct Shared {
  static_assert(sizeof(T) >= 2);
  size_t start, end;  // in bytes
  char* at(u32 i, size_t bytes, bool write, int line) const {
    const size_t offset = start + size_t(i) * sizeof(T);
    if (offset + bytes > end)
      emulator::fail("element " + std::to_string(i) + " is beyond its part of shared memory", line);
    if (offset % bytes != 0) emulator::fail("shared memory byte " + std::to_string(offset) + " is not aligned", line);
    emulator::check_shared(offset, bytes, write, line);
    return &emulator::machine.arena[offset];
  }
  struct Index {
    u32 i;
    int line;
    template <class I>
    Index(I i, LINE) : i(u32(i)), line(line) {}
  };
  T operator[](Index index) const {
    T value;
    memcpy(&value, at(index.i, sizeof value, false, index.line), sizeof value);
    return value;
  }
  void set(u32 i, T value, LINE) const { memcpy(at(i, sizeof value, true, line), &value, sizeof value); }
  template <int N>
  Pack<T, N> load(u32 i, LINE) const {
    Pack<T, N> value;
    memcpy(&value, at(i, sizeof value, false, line), sizeof value);
    return value;
  }
  template <int N>
  void store(u32 i, Pack<T, N> value, LINE) const {
    memcpy(at(i, sizeof value, true, line), &value, sizeof value);
  }
  Shared offset(u32 i) const { return {start + size_t(i) * sizeof(T), end}; }
};

template <class T>
Shared<T> shared(u32 offset, u32 count, LINE) {
  const size_t end = offset + size_t(count) * sizeof(T), arena_size = emulator::machine.arena.size();
  if (end > arena_size) {
    emulator::fail(
        std::to_string(end) + " bytes of shared memory are used, " + std::to_string(arena_size) + " were given", line);
  }
  return {offset, end};
}

// ---- synchronization and exchange --------------------------------------------------------------------------------

inline void barrier(LINE) { emulator::wait(emulator::Wait::Block, line); }
inline void warp_barrier(LINE) { emulator::wait(emulator::Wait::Warp, line); }

template <class T>
T shuffle(T value, u32 from, LINE) {
  return emulator::slot<T>(emulator::exchange(value, line), from % 32);
}
template <class T>
T shuffle_xor(T value, u32 mask, LINE) {
  const u32 self = emulator::machine.thread % 32;
  return emulator::slot<T>(emulator::exchange(value, line), self ^ mask);
}
inline u32 ballot(bool value, LINE) {
  const char* slots = emulator::exchange(value, line);
  u32 all = 0;
  for (u32 l = 0; l < 32; ++l) all |= u32(emulator::slot<bool>(slots, l)) << l;
  return all;
}

template <class T>
void copy_async(Shared<T> to, u32 i, Global<const T> src, i64 j, LINE) {
  const size_t at = to.start + size_t(i) * sizeof(T);
  if (at + 16 > to.end || at % 16 != 0) emulator::fail("an asynchronous copy out of bounds or not aligned", line);
  const char* source = src.at(j, 16, false, line);
  emulator::machine.fibers[emulator::machine.thread].uncommitted.push_back(
      {&emulator::machine.arena[at], source, u32(at)});
}
inline void copy_commit() {
  auto& fiber = emulator::machine.fibers[emulator::machine.thread];
  fiber.committed.push_back(std::move(fiber.uncommitted));
  fiber.uncommitted.clear();
}
// Performs the copies only now, so that a premature read finds the old bytes.
template <int N>
void copy_wait(LINE) {
  auto& committed = emulator::machine.fibers[emulator::machine.thread].committed;
  while (committed.size() > N) {
    for (auto& copy : committed.front()) {
      emulator::check_shared(copy.at, 16, true, line);
      memcpy(copy.to, copy.from, 16);
    }
    committed.erase(committed.begin());
  }
}

// ---- numbers -------------------------------------------------------------------------------------------------------

using std::max;
using std::min;
inline float float_from_bits(u32 x) { return std::bit_cast<float>(x); }
inline u32 float_bits(float x) { return std::bit_cast<u32>(x); }
inline float wide(float x) { return x; }
inline float wide(u8 x) { return x; }
inline float wide(bf16 x) { return float_from_bits(u32(x.bits) << 16); }
inline float wide(f16 x) {
  const u32 sign = u32(x.bits >> 15) << 31, exponent = x.bits >> 10 & 31, digits = x.bits & 0x3FF;
  if (exponent == 31) return float_from_bits(sign | 0x7F800000 | digits << 13);
  const float size = exponent == 0 ? ldexpf(float(digits), -24) : ldexpf(float(1024 + digits), int(exponent) - 25);
  return sign ? -size : size;
}
template <class T>
T narrow(float x);
template <>
inline float narrow<float>(float x) {
  return x;
}
template <>
inline bf16 narrow<bf16>(float x) {
  const u32 bits = float_bits(x);
  if (x != x) return {0x7FFF};
  return {u16((bits + 0x7FFF + (bits >> 16 & 1)) >> 16)};
}
template <>
inline f16 narrow<f16>(float x) {
  const u16 sign = u16(float_bits(x) >> 16 & 0x8000);
  const float size = fabsf(x);
  if (x != x) return {0x7FFF};
  if (size >= 65520.0f) return {u16(sign | 0x7C00)};
  if (size == 0) return {sign};
  int exponent = 0;
  frexpf(size, &exponent);                        // size = m · 2^exponent with m in [0.5, 1)
  const int step = std::max(exponent - 11, -24);  // exponent of the last digit
  const u32 count = u32(nearbyintf(ldexpf(size, -step)));
  // A count of 2048 carries into the next exponent, which the addition below does implicitly.
  return {u16(sign | (step == -24 ? count : (u32(step + 24) << 10) + count))};
}
template <class T>
u32 narrow_pair(float low, float high) {
  return u32(narrow<T>(low).bits) | u32(narrow<T>(high).bits) << 16;
}
inline float exp2_approx(float x) { return exp2f(x); }
inline u32 mul_high(u32 a, u32 b) { return u32(u64(a) * b >> 32); }
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }

// ---- matrices ------------------------------------------------------------------------------------------------------

template <bool Transposed, class T>
void load_matrices(u32 (&out)[4], Shared<T> from, u32 i, LINE) {
  static_assert(sizeof(T) == 2);
  struct Row {
    u16 data[8];
  } row;
  memcpy(&row, from.at(i, 16, false, line), 16);
  const char* slots = emulator::exchange(row, line);
  const u32 l = emulator::machine.thread % 32;
  for (u32 m = 0; m < 4; ++m) {
    u16 pair[2];
    for (u32 e = 0; e < 2; ++e) {
      const u32 r = l / 4, c = 2 * (l % 4) + e;
      pair[e] = emulator::slot<Row>(slots, 8 * m + (Transposed ? c : r)).data[Transposed ? r : c];
    }
    out[m] = u32(pair[0]) | u32(pair[1]) << 16;
  }
}

template <class T>
void multiply(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1, LINE) {
  struct Fragments {
    u32 a[4], b[2];
  } self = {{a[0], a[1], a[2], a[3]}, {b0, b1}};
  const char* slots = emulator::exchange(self, line);
  const auto half = [](u32 pair, u32 e) { return wide(T{u16(pair >> 16 * e)}); };
  const u32 l = emulator::machine.thread % 32, g = l / 4, t = l % 4;
  for (u32 e = 0; e < 4; ++e) {
    const u32 row = g + 8 * (e / 2), column = 2 * t + e % 2;
    float sum = c[e];
    for (u32 k = 0; k < 16; ++k) {
      const auto left = emulator::slot<Fragments>(slots, row % 8 * 4 + k % 8 / 2);
      const auto right = emulator::slot<Fragments>(slots, column * 4 + k % 8 / 2);
      sum += half(left.a[row / 8 + 2 * (k / 8)], k % 2) * half(right.b[k / 8], k % 2);
    }
    c[e] = sum;
  }
}

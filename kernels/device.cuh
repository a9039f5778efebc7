// The thin layer that every kernel is written against: types, memory, warps, barriers, asynchronous copies, matrix
// products. On a GPU each name is one instruction or none; under OCCLUDE_HOST the same names are those of the emulator
// (host/emulator.hpp), which checks every use. A kernel touches memory through Global and Shared alone, knows nothing
// of atomics, and has blocks of one dimension.
#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

// Half-precision numbers are stored, and computed with in fp32.
struct bf16 { u16 bits; };
struct f16 { u16 bits; };

// N neighbours in memory, moved by one instruction where they fill 4, 8 or 16 bytes.
template <class T, int N>
struct alignas(sizeof(T) * N) Pack {
  T at[N];
};

#ifdef OCCLUDE_HOST
#include "host/emulator.hpp"
#else

#define DEVICE __device__ __forceinline__
// What is compiled for: 80 for Ampere, 90 for Hopper, 100 for Blackwell.
constexpr int architecture = __CUDA_ARCH__ / 10;
// A kernel: `KERNEL(128) void name(...) {...} ENTRY(name)`, its blocks of at most so many threads; `KERNEL(128, 4)` where the
// compiler is to use as few registers as let a multiprocessor hold 4 of them.
#define KERNEL(...) extern "C" __global__ __launch_bounds__(__VA_ARGS__)
#define ENTRY(name)

DEVICE u32 thread() { return threadIdx.x; }
DEVICE u32 threads() { return blockDim.x; }
DEVICE u32 block() { return blockIdx.x; }
DEVICE u32 block_y() { return blockIdx.y; }
DEVICE u32 blocks() { return gridDim.x; }

// ---- memory ----------------------------------------------------------------------------------------------------

// A tensor's elements. `Global<const T>` is only read.
template <class T>
struct Global {
  T* data;
  DEVICE T operator[](i64 i) const { return data[i]; }
  DEVICE void set(i64 i, T value) const { data[i] = value; }
  // N neighbours from element i on, which must be a multiple of N.
  template <int N>
  DEVICE Pack<T, N> load(i64 i) const { return *reinterpret_cast<const Pack<T, N>*>(data + i); }
  template <int N>
  DEVICE void store(i64 i, Pack<T, N> value) const { *reinterpret_cast<Pack<T, N>*>(data + i) = value; }
  // The same elements from i on.
  DEVICE Global from(i64 i) const { return {data + i}; }
  // Whether the caller gave a tensor at all.
  DEVICE bool given() const { return data != nullptr; }
};

template <class T>
struct Global<const T> {
  const T* data;
  DEVICE T operator[](i64 i) const { return __ldg(data + i); }
  template <int N>
  DEVICE Pack<T, N> load(i64 i) const { return *reinterpret_cast<const Pack<T, N>*>(data + i); }
  DEVICE Global from(i64 i) const { return {data + i}; }
  DEVICE bool given() const { return data != nullptr; }
};
template <>
DEVICE bf16 Global<const bf16>::operator[](i64 i) const { return data[i]; }
template <>
DEVICE f16 Global<const f16>::operator[](i64 i) const { return data[i]; }

// A part of the block's shared memory. Elements have at least two bytes.
template <class T>
struct Shared {
  T* data;
  DEVICE T operator[](u32 i) const { return data[i]; }
  DEVICE void set(u32 i, T value) const { data[i] = value; }
  template <int N>
  DEVICE Pack<T, N> load(u32 i) const { return *reinterpret_cast<const Pack<T, N>*>(data + i); }
  template <int N>
  DEVICE void store(u32 i, Pack<T, N> value) const { *reinterpret_cast<Pack<T, N>*>(data + i) = value; }
  DEVICE Shared from(u32 i) const { return {data + i}; }
  DEVICE u32 address(u32 i) const { return static_cast<u32>(__cvta_generic_to_shared(data + i)); }
};

extern __shared__ __align__(128) char occlude_arena[];

// `count` elements of the shared memory given at launch, from byte `offset` on.
template <class T>
DEVICE Shared<T> shared(u32 offset, u32) { return {reinterpret_cast<T*>(occlude_arena + offset)}; }

// ---- threads together ------------------------------------------------------------------------------------------

// Every thread of the block; what was written before is seen after.
DEVICE void barrier() { __syncthreads(); }
// Every thread of the warp.
DEVICE void warp_barrier() { __syncwarp(); }

template <class T>
DEVICE T shuffle(T value, u32 lane) { return __shfl_sync(~0u, value, lane); }
template <class T>
DEVICE T shuffle_xor(T value, u32 mask) { return __shfl_xor_sync(~0u, value, mask); }
// Bit l: what lane l says.
DEVICE u32 ballot(bool value) { return __ballot_sync(~0u, value); }

// Starts copying 16 bytes from element j of global memory to element i of shared memory.
template <class T>
DEVICE void copy_async(Shared<T> to, u32 i, Global<const T> from, i64 j) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to.address(i)), "l"(from.data + j) : "memory");
}
// Ends a group of this thread's copies.
DEVICE void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until all but the newest N groups of this thread have arrived; a barrier shows them to the others.
template <int N>
DEVICE void copy_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory"); }

// ---- numbers ---------------------------------------------------------------------------------------------------

DEVICE float wide(float x) { return x; }
DEVICE float wide(bf16 x) { return __uint_as_float(u32(x.bits) << 16); }
DEVICE float wide(f16 x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
}
DEVICE float wide(u8 x) { return x; }
// To the nearest, ties to even.
template <class T>
DEVICE T narrow(float x);
template <>
DEVICE float narrow<float>(float x) { return x; }
template <>
DEVICE bf16 narrow<bf16>(float x) {
  bf16 y;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
  return y;
}
template <>
DEVICE f16 narrow<f16>(float x) {
  f16 y;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
  return y;
}
// Two numbers side by side, the first in the low half.
template <class T>
DEVICE u32 narrow_pair(float low, float high);
template <>
DEVICE u32 narrow_pair<bf16>(float low, float high) {
  u32 y;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  return y;
}
template <>
DEVICE u32 narrow_pair<f16>(float low, float high) {
  u32 y;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  return y;
}
// 2^x within 2 units in the last place.
DEVICE float power_of_two(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
DEVICE u32 high_product(u32 a, u32 b) { return __umulhi(a, b); }
DEVICE u32 bits_of(float x) { return __float_as_uint(x); }
DEVICE float of_bits(u32 x) { return __uint_as_float(x); }

// ---- matrices --------------------------------------------------------------------------------------------------

// Four 8 × 8 matrices of 2-byte elements. Lane l names the 16-byte aligned element where row l % 8 of matrix l / 8
// begins; it gets, of each matrix, elements 2 (l % 4) and the next one of row l / 4 — of its transpose with `Turned`.
template <bool Turned, class T>
DEVICE void load_matrices(u32 (&out)[4], Shared<T> from, u32 i) {
  if constexpr (Turned) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(from.address(i))
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(from.address(i))
                 : "memory");
  }
}

// c [16, 8] += a [16, 16] · b [16, 8], the sums in fp32, over the warp. With g = lane / 4 and t = lane % 4 a lane holds
//   a: rows g, g + 8, g, g + 8 at columns 2t, 2t, 2t + 8, 2t + 8, and the column after each
//   b: rows 2t and 2t + 8, and the row after each, at column g
//   c: row g at columns 2t and 2t + 1, row g + 8 at the same
template <class T>
DEVICE void multiply(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1);
template <>
DEVICE void multiply<bf16>(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
               "{%0, %1, %2, %3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
DEVICE void multiply<f16>(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
               "{%0, %1, %2, %3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
#endif

// ---- made of the above -----------------------------------------------------------------------------------------

DEVICE u32 lane() { return thread() % 32; }
DEVICE u32 warp() { return thread() / 32; }

DEVICE float warp_sum(float x) {
  for (u32 mask = 16; mask > 0; mask /= 2) x += shuffle_xor(x, mask);
  return x;
}

DEVICE float warp_max(float x) {
  for (u32 mask = 16; mask > 0; mask /= 2) x = fmaxf(x, shuffle_xor(x, mask));
  return x;
}

// The sum over the block, for every thread; `room` holds one number a warp. Blocks of whole warps.
DEVICE float block_sum(float x, Shared<float> room) {
  x = warp_sum(x);
  barrier();  // Whoever still reads an earlier sum is done.
  if (lane() == 0) room.set(warp(), x);
  barrier();
  float sum = 0;
  for (u32 i = 0; i < threads() / 32; ++i) sum += room[i];
  return sum;
}

// The thin layer that every kernel is written against: types, memory, warps, barriers, asynchronous copies and matrix
// products. On a GPU each name is at most one instruction; under OCCLUDE_HOST the same names are those of the emulator
// (host/emulator.hpp), which checks every use. Kernels access memory only through Global and Shared, use no atomics,
// and have one-dimensional blocks.
#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

// Half-precision formats for storage; arithmetic is in fp32.
struct bf16 {
  u16 bits;
};
struct f16 {
  u16 bits;
};

// N neighboring elements, moved by one instruction if they fill 4, 8 or 16 bytes.
template <class T, int N>
struct alignas(sizeof(T) * N) Pack {
  T data[N];
};

#ifdef OCCLUDE_HOST
#include "host/emulator.hpp"
#else

#define DEVICE __device__ __forceinline__
// The target architecture: 80 for Ampere, 90 for Hopper, 100 for Blackwell.
constexpr int architecture = __CUDA_ARCH__ / 10;
// Defines a kernel: `KERNEL(128) void name(...) {...} ENTRY(name)` for blocks of at most 128 threads; `KERNEL(128, 4)`
// limits the registers so that a multiprocessor holds 4 blocks.
#define KERNEL(...) extern "C" __global__ __launch_bounds__(__VA_ARGS__)
#define ENTRY(name)

DEVICE u32 thread() { return threadIdx.x; }
DEVICE u32 threads() { return blockDim.x; }
DEVICE u32 block() { return blockIdx.x; }
DEVICE u32 block_y() { return blockIdx.y; }
DEVICE u32 blocks() { return gridDim.x; }

// ---- memory ----------------------------------------------------------------------------------------------------

// The elements of a tensor. `Global<const T>` is read-only.
template <class T>
struct Global {
  T* data;
  DEVICE T operator[](i64 i) const { return data[i]; }
  DEVICE void set(i64 i, T value) const { data[i] = value; }
  // N neighboring elements from element i on; i must be a multiple of N.
  template <int N>
  DEVICE Pack<T, N> load(i64 i) const {
    return *reinterpret_cast<const Pack<T, N>*>(data + i);
  }
  template <int N>
  DEVICE void store(i64 i, Pack<T, N> value) const {
    *reinterpret_cast<Pack<T, N>*>(data + i) = value;
  }
  // The same elements from i on.
  DEVICE Global offset(i64 i) const { return {data + i}; }
  // True if the caller passed a tensor; optional tensors may be absent.
  DEVICE bool is_present() const { return data != nullptr; }
};

template <class T>
struct Global<const T> {
  const T* data;
  DEVICE T operator[](i64 i) const { return __ldg(data + i); }
  template <int N>
  DEVICE Pack<T, N> load(i64 i) const {
    return *reinterpret_cast<const Pack<T, N>*>(data + i);
  }
  DEVICE Global offset(i64 i) const { return {data + i}; }
  DEVICE bool is_present() const { return data != nullptr; }
};
template <>
DEVICE bf16 Global<const bf16>::operator[](i64 i) const {
  return data[i];
}
template <>
DEVICE f16 Global<const f16>::operator[](i64 i) const {
  return data[i];
}

// A part of the block's shared memory. Elements have at least two bytes.
template <class T>
struct Shared {
  T* data;
  DEVICE T operator[](u32 i) const { return data[i]; }
  DEVICE void set(u32 i, T value) const { data[i] = value; }
  template <int N>
  DEVICE Pack<T, N> load(u32 i) const {
    return *reinterpret_cast<const Pack<T, N>*>(data + i);
  }
  template <int N>
  DEVICE void store(u32 i, Pack<T, N> value) const {
    *reinterpret_cast<Pack<T, N>*>(data + i) = value;
  }
  DEVICE Shared offset(u32 i) const { return {data + i}; }
  DEVICE u32 address(u32 i) const { return static_cast<u32>(__cvta_generic_to_shared(data + i)); }
};

extern __shared__ __align__(128) char occlude_arena[];

// `count` elements of the dynamic shared memory of the launch, from byte `offset` on.
template <class T>
DEVICE Shared<T> shared(u32 offset, u32) {
  return {reinterpret_cast<T*>(occlude_arena + offset)};
}

// ---- synchronization and exchange ------------------------------------------------------------------------------

// Waits for all threads of the block; earlier writes are then visible to all of them.
DEVICE void barrier() { __syncthreads(); }
// Waits for all threads of the warp.
DEVICE void warp_barrier() { __syncwarp(); }

template <class T>
DEVICE T shuffle(T value, u32 lane) {
  return __shfl_sync(~0u, value, lane);
}
template <class T>
DEVICE T shuffle_xor(T value, u32 mask) {
  return __shfl_xor_sync(~0u, value, mask);
}
// Bit l is the value of lane l.
DEVICE u32 ballot(bool value) { return __ballot_sync(~0u, value); }

// Starts an asynchronous copy of 16 bytes from element j of global memory to element i of shared memory.
template <class T>
DEVICE void copy_async(Shared<T> dst, u32 i, Global<const T> src, i64 j) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(dst.address(i)), "l"(src.data + j) : "memory");
}
// Closes a group of this thread's copies.
DEVICE void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most the newest N groups of this thread are pending; a barrier makes the copies visible to other
// threads.
template <int N>
DEVICE void copy_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// ---- numbers ---------------------------------------------------------------------------------------------------

DEVICE float wide(float x) { return x; }
DEVICE float wide(bf16 x) { return __uint_as_float(u32(x.bits) << 16); }
DEVICE float wide(f16 x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
}
DEVICE float wide(u8 x) { return x; }
// Rounds to nearest, ties to even.
template <class T>
DEVICE T narrow(float x);
template <>
DEVICE float narrow<float>(float x) {
  return x;
}
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
// Two numbers packed into one word, the first in the low half.
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
DEVICE float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
DEVICE u32 mul_high(u32 a, u32 b) { return __umulhi(a, b); }
DEVICE u32 float_bits(float x) { return __float_as_uint(x); }
DEVICE float float_from_bits(u32 x) { return __uint_as_float(x); }

// ---- matrices --------------------------------------------------------------------------------------------------

// Loads four 8 × 8 matrices of 2-byte elements. Lane l passes the 16-byte aligned element where row l % 8 of matrix l /
// 8 begins, and receives elements 2 (l % 4) and 2 (l % 4) + 1 of row l / 4 of each matrix, or of its transpose.
template <bool Transposed, class T>
DEVICE void load_matrices(u32 (&out)[4], Shared<T> src, u32 i) {
  if constexpr (Transposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(src.address(i))
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(src.address(i))
                 : "memory");
  }
}

// c [16, 8] += a [16, 16] · b [16, 8] over the warp, accumulated in fp32. With g = lane / 4 and t = lane % 4 a lane
// holds
//   a: rows g, g + 8, g, g + 8 at columns 2t, 2t, 2t + 8, 2t + 8, and the column after each
//   b: rows 2t and 2t + 8, and the row after each, at column g
//   c: row g at columns 2t and 2t + 1, row g + 8 at the same
template <class T>
DEVICE void multiply(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1);
template <>
DEVICE void multiply<bf16>(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
DEVICE void multiply<f16>(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
#endif

// ---- reductions ------------------------------------------------------------------------------------------------

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

// Returns the sum over the block to every thread; `scratch` holds one number per warp. Blocks consist of whole warps.
DEVICE float block_sum(float x, Shared<float> scratch) {
  x = warp_sum(x);
  barrier();  // All threads have finished reading an earlier sum.
  if (lane() == 0) scratch.set(warp(), x);
  barrier();
  float sum = 0;
  for (u32 i = 0; i < threads() / 32; ++i) sum += scratch[i];
  return sum;
}

// Multiplies x by one number in device memory: the backward pass of a loss that has kept its gradient.
#include "device.cuh"

typedef ELEMENT T;

// x [numel], by [] → y [numel]. Loads and stores move WIDE neighboring elements at a time.
KERNEL(256) void scale(Global<const T> x, Global<const float> by, Global<T> y, i64 numel) {
  const i64 first = (i64(block()) * 256 + thread()) * WIDE;
  if (first >= numel) return;
  const float factor = by[0];
  const auto in = x.load<WIDE>(first);
  Pack<T, WIDE> out;
  for (int i = 0; i < WIDE; ++i) out.data[i] = narrow<T>(wide(in.data[i]) * factor);
  y.store<WIDE>(first, out);
}
ENTRY(scale)

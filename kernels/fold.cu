// The second half of every sum over rows: partial sums, one row a block of the first half, added in their order.
#include "device.cuh"

typedef ELEMENT T;

// parts fp32 [n, width] → out [width]. One thread a column.
KERNEL(128) void fold(Global<const float> parts, Global<T> out, int n, int width) {
  const int column = block() * 128 + thread();
  if (column >= width) return;
  float sum = 0;
  for (int row = 0; row < n; ++row) sum += parts[i64(row) * width + column];
  out.set(column, narrow<T>(sum));
}
ENTRY(fold)

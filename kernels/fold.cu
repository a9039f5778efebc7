// The second half of every sum over rows: partial sums, one row a block of the first half, added in an order that their
// number alone decides.
#include "device.cuh"

typedef ELEMENT T;

// A sum that keeps what rounding takes from it (Kahan, 1965): parts may be many, and a loss is one number.
struct Sum {
  float value = 0, excess = 0;
  DEVICE void add(float x) {
    const float less = x - excess, sum = value + less;
    excess = (sum - value) - less;
    value = sum;
  }
};

// parts fp32 [n, width] → out [width]. A block has 32 columns; each of its 16 warps adds a run of rows, then the runs'
// sums are added.
KERNEL(512) void fold(Global<const float> parts, Global<T> out, int n, int width) {
  const auto room = shared<float>(0, 512);
  const int column = block() * 32 + lane(), run = (n + 15) / 16;
  const int begin = warp() * run, end = min(begin + run, n);
  Sum sum;
  if (column < width) {
    for (int row = begin; row < end; ++row) sum.add(parts[i64(row) * width + column]);
  }
  room.set(thread(), sum.value);
  barrier();
  if (warp() != 0 || column >= width) return;
  for (u32 w = 1; w < 16; ++w) sum.add(room[32 * w + lane()]);
  out.set(column, narrow<T>(sum.value));
}
ENTRY(fold)

// The second stage of every reduction over rows: sums one row of partial sums per block of the first stage, in an order
// that depends only on their number.
#include "device.cuh"

typedef ELEMENT T;

// Compensated (Kahan, 1965) summation: there may be many parts, and a loss is a single number.
struct KahanSum {
  float value = 0, compensation = 0;
  DEVICE void add(float x) {
    const float corrected = x - compensation, total = value + corrected;
    compensation = (total - value) - corrected;
    value = total;
  }
};

// parts fp32 [n, width] → out [width]. A block covers 32 columns. Each of its 16 warps sums a contiguous run of rows,
// then warp 0 sums the runs.
KERNEL(512) void sum_partials(Global<const float> parts, Global<T> out, int n, int width) {
  const auto scratch = shared<float>(0, 512);
  const int column = block() * 32 + lane(), run = (n + 15) / 16;
  const int begin = warp() * run, end = min(begin + run, n);
  KahanSum total;
  if (column < width) {
    for (int row = begin; row < end; ++row) total.add(parts[i64(row) * width + column]);
  }
  scratch.set(thread(), total.value);
  barrier();
  if (warp() != 0 || column >= width) return;
  for (u32 w = 1; w < 16; ++w) total.add(scratch[32 * w + lane()]);
  out.set(column, narrow<T>(total.value));
}
ENTRY(sum_partials)

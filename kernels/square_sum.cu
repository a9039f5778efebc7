// The sum of squares of a flat buffer, in an order that depends only on its length: each block sums its part, then one
// block sums the blocks' results. Non-finite values propagate.
#include "device.cuh"

typedef ELEMENT T;
constexpr int load_width = 16 / sizeof(T), unroll = 4;

DEVICE float squares(Pack<T, load_width> x) {
  float sum = 0;
  for (int i = 0; i < load_width; ++i) sum += wide(x.data[i]) * wide(x.data[i]);
  return sum;
}

// x [n] → parts [blocks]. Each thread keeps four 16-byte loads in flight.
KERNEL(256) void square_sum(Global<const T> x, Global<float> parts, i64 n) {
  const auto scratch = shared<float>(0, 8);
  const i64 stride = i64(blocks()) * 256 * load_width;
  float sums[unroll] = {};
  i64 index = (i64(block()) * 256 + thread()) * load_width;
  for (; index + (unroll - 1) * stride + load_width <= n; index += unroll * stride) {
    Pack<T, load_width> in[unroll];
    for (int d = 0; d < unroll; ++d) in[d] = x.load<load_width>(index + d * stride);
    for (int d = 0; d < unroll; ++d) sums[d] += squares(in[d]);
  }
  for (; index < n; index += stride) {
    if (index + load_width <= n)
      sums[0] += squares(x.load<load_width>(index));
    else
      for (i64 i = index; i < n; ++i) sums[0] += wide(x[i]) * wide(x[i]);
  }
  const float sum = block_sum((sums[0] + sums[1]) + (sums[2] + sums[3]), scratch);
  if (thread() == 0) parts.set(block(), sum);
}
ENTRY(square_sum)

// parts [n] → out [1]. One block.
KERNEL(256) void square_sum_final(Global<const float> parts, Global<float> out, int n) {
  const auto scratch = shared<float>(0, 8);
  float sum = 0;
  for (int i = thread(); i < n; i += 256) sum += parts[i];
  sum = block_sum(sum, scratch);
  if (thread() == 0) out.set(0, sum);
}
ENTRY(square_sum_final)

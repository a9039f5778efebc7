// The sum of squares of a flat buffer, in an order that depends on nothing but its length: each block sums its share,
// one block then the blocks' sums. Whatever is not finite stays so.
#include "device.cuh"

typedef ELEMENT T;
constexpr int wide_at = 16 / sizeof(T), deep = 4;

DEVICE float squares(Pack<T, wide_at> x) {
  float sum = 0;
  for (int i = 0; i < wide_at; ++i) sum += wide(x.at[i]) * wide(x.at[i]);
  return sum;
}

// x [n] → parts [blocks]. Each thread has four loads of 16 bytes on their way at a time.
KERNEL(256) void square_sum(Global<const T> x, Global<float> parts, i64 n) {
  const auto room = shared<float>(0, 8);
  const i64 all = i64(blocks()) * 256 * wide_at;
  float sums[deep] = {};
  i64 at = (i64(block()) * 256 + thread()) * wide_at;
  for (; at + (deep - 1) * all + wide_at <= n; at += deep * all) {
    Pack<T, wide_at> in[deep];
    for (int d = 0; d < deep; ++d) in[d] = x.load<wide_at>(at + d * all);
    for (int d = 0; d < deep; ++d) sums[d] += squares(in[d]);
  }
  for (; at < n; at += all) {
    if (at + wide_at <= n) sums[0] += squares(x.load<wide_at>(at));
    else for (i64 i = at; i < n; ++i) sums[0] += wide(x[i]) * wide(x[i]);
  }
  const float sum = block_sum((sums[0] + sums[1]) + (sums[2] + sums[3]), room);
  if (thread() == 0) parts.set(block(), sum);
}
ENTRY(square_sum)

// parts [n] → out [1]. One block.
KERNEL(256) void square_sum_end(Global<const float> parts, Global<float> out, int n) {
  const auto room = shared<float>(0, 8);
  float sum = 0;
  for (int i = thread(); i < n; i += 256) sum += parts[i];
  sum = block_sum(sum, room);
  if (thread() == 0) out.set(0, sum);
}
ENTRY(square_sum_end)

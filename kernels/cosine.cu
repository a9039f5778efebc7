// The cosine distance of rows, and its gradient in the same pass. A warp has a row and reads it a second time, from the
// first cache, for the gradient; WIDE neighbours are moved at a time.
#include "device.cuh"

typedef ELEMENT T;

// x and y [rows, width] → gradient [rows, width] or absent, that of the sum for x; parts [blocks]: the sum over each
// block's rows of 1 − x · y / (|x| |y|), lengths being at least 1e-8.
KERNEL(256) void cosine(Global<const T> x, Global<const OTHER> y, Global<T> gradient, Global<float> parts, int rows,
                        int width) {
  const auto room = shared<float>(0, 8);
  float sum = 0;
  for (i64 row = i64(block()) * 8 + warp(); row < rows; row += i64(blocks()) * 8) {
    float xx = 0, yy = 0, xy = 0;
    for (int column = lane() * WIDE; column < width; column += 32 * WIDE) {
      const auto a = x.load<WIDE>(row * width + column);
      const auto b = y.load<WIDE>(row * width + column);
      for (int i = 0; i < WIDE; ++i) {
        xx += wide(a.at[i]) * wide(a.at[i]);
        yy += wide(b.at[i]) * wide(b.at[i]);
        xy += wide(a.at[i]) * wide(b.at[i]);
      }
    }
    const float length = sqrtf(warp_sum(xx)), of_x = fmaxf(length, 1e-8f), of_y = fmaxf(sqrtf(warp_sum(yy)), 1e-8f);
    const float cosine = warp_sum(xy) / of_x / of_y;
    sum += 1.0f - cosine;
    if (!gradient.given()) continue;
    // Below the least length, that is a constant.
    const float along = length < 1e-8f ? 0.0f : cosine / of_x / of_x, towards = 1.0f / of_x / of_y;
    for (int column = lane() * WIDE; column < width; column += 32 * WIDE) {
      const auto a = x.load<WIDE>(row * width + column);
      const auto b = y.load<WIDE>(row * width + column);
      Pack<T, WIDE> out;
      for (int i = 0; i < WIDE; ++i) out.at[i] = narrow<T>(along * wide(a.at[i]) - towards * wide(b.at[i]));
      gradient.store<WIDE>(row * width + column, out);
    }
  }
  // Every lane has its row's distance; one of them counts.
  sum = block_sum(lane() == 0 ? sum : 0.0f, room);
  if (thread() == 0) parts.set(block(), sum);
}
ENTRY(cosine)

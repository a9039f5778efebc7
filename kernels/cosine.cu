// The cosine distance of rows and its gradient in one pass. A warp processes one row and reads it a second time, from
// the L1 cache, for the gradient. Loads move WIDE neighboring elements at a time.
#include "device.cuh"

typedef ELEMENT T;

// x and y [rows, width] → gradient [rows, width] or absent: the gradient of the sum with respect to x; parts [blocks]:
// the sum over each block's rows of 1 − x · y / (|x| |y|), with norms clamped to at least 1e-8.
KERNEL(256)
void cosine(Global<const T> x, Global<const OTHER> y, Global<T> gradient, Global<float> parts, int rows, int width) {
  const auto scratch = shared<float>(0, 8);
  float sum = 0;
  for (i64 row = i64(block()) * 8 + warp(); row < rows; row += i64(blocks()) * 8) {
    float xx = 0, yy = 0, xy = 0;
    for (int column = lane() * WIDE; column < width; column += 32 * WIDE) {
      const auto a = x.load<WIDE>(row * width + column);
      const auto b = y.load<WIDE>(row * width + column);
      for (int i = 0; i < WIDE; ++i) {
        xx += wide(a.data[i]) * wide(a.data[i]);
        yy += wide(b.data[i]) * wide(b.data[i]);
        xy += wide(a.data[i]) * wide(b.data[i]);
      }
    }
    const float norm = sqrtf(warp_sum(xx)), clamped_x = fmaxf(norm, 1e-8f),
                clamped_y = fmaxf(sqrtf(warp_sum(yy)), 1e-8f);
    const float cosine = warp_sum(xy) / clamped_x / clamped_y;
    sum += 1.0f - cosine;
    if (!gradient.is_present()) continue;
    // A clamped norm is constant.
    const float x_factor = norm < 1e-8f ? 0.0f : cosine / clamped_x / clamped_x,
                y_factor = 1.0f / clamped_x / clamped_y;
    for (int column = lane() * WIDE; column < width; column += 32 * WIDE) {
      const auto a = x.load<WIDE>(row * width + column);
      const auto b = y.load<WIDE>(row * width + column);
      Pack<T, WIDE> out;
      for (int i = 0; i < WIDE; ++i) out.data[i] = narrow<T>(x_factor * wide(a.data[i]) - y_factor * wide(b.data[i]));
      gradient.store<WIDE>(row * width + column, out);
    }
  }
  // All lanes hold their row's distance; lane 0 counts it.
  sum = block_sum(lane() == 0 ? sum : 0.0f, scratch);
  if (thread() == 0) parts.set(block(), sum);
}
ENTRY(cosine)

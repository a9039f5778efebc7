// y = f(x + b), where f is the Gaussian error linear unit or one of its two approximations; and its gradients, computed
// again from x rather than kept. WIDE neighbours are moved at a time.
#include "device.cuh"

typedef ELEMENT T;

// Forms, as src/op/bias_gelu.rs numbers them.
constexpr int exact = 0, tanh_form = 1;

DEVICE float value(float x, int form) {
  if (form == exact) return 0.5f * x * (1.0f + erff(x * 0.70710678f));
  if (form == tanh_form) return 0.5f * x * (1.0f + tanhf(0.79788456f * (x + 0.044715f * x * x * x)));
  return x / (1.0f + expf(-1.702f * x));
}

DEVICE float slope(float x, int form) {
  if (form == exact) return 0.5f * (1.0f + erff(x * 0.70710678f)) + x * 0.39894228f * expf(-0.5f * x * x);
  if (form == tanh_form) {
    const float t = tanhf(0.79788456f * (x + 0.044715f * x * x * x));
    return 0.5f * (1.0f + t) + 0.5f * x * (1.0f - t * t) * 0.79788456f * (1.0f + 0.134145f * x * x);
  }
  const float s = 1.0f / (1.0f + expf(-1.702f * x));
  return s + 1.702f * x * s * (1.0f - s);
}

// x [rows, width], bias [width] or absent → y [rows, width].
KERNEL(256) void bias_gelu(Global<const T> x, Global<const T> bias, Global<T> y, i64 numel, int width, int form) {
  const i64 first = (i64(block()) * 256 + thread()) * WIDE;
  if (first >= numel) return;
  const auto in = x.load<WIDE>(first);
  Pack<T, WIDE> b, out;
  if (bias.given()) b = bias.load<WIDE>(first % width);
  for (int i = 0; i < WIDE; ++i) out.at[i] = narrow<T>(value(wide(in.at[i]) + (bias.given() ? wide(b.at[i]) : 0), form));
  y.store<WIDE>(first, out);
}
ENTRY(bias_gelu)

// → gx [rows, width], and in parts [blocks, width] this block's rows of gx summed. A warp covers 32 · WIDE columns, the
// eight warps of a block every eighth of its rows. grid.x counts runs of rows, grid.y runs of columns.
KERNEL(256) void bias_gelu_backward(Global<const T> x, Global<const T> bias, Global<const T> gy, Global<T> gx,
                                    Global<float> parts, int rows, int width, int rows_per_block, int form) {
  const auto room = shared<float>(0, 8 * 32 * WIDE);
  const int column = (block_y() * 32 + lane()) * WIDE;
  const int begin = block() * rows_per_block, end = min(begin + rows_per_block, rows);
  float sums[WIDE] = {};
  if (column < width) {
    Pack<T, WIDE> b;
    if (bias.given()) b = bias.load<WIDE>(column);
    for (int row = begin + warp(); row < end; row += 8) {
      const i64 at = i64(row) * width + column;
      const auto in = x.load<WIDE>(at), up = gy.load<WIDE>(at);
      Pack<T, WIDE> out;
      for (int i = 0; i < WIDE; ++i) {
        const float g = wide(up.at[i]) * slope(wide(in.at[i]) + (bias.given() ? wide(b.at[i]) : 0), form);
        out.at[i] = narrow<T>(g);
        sums[i] += g;
      }
      gx.store<WIDE>(at, out);
    }
  }
  if (!parts.given()) return;
  for (int i = 0; i < WIDE; ++i) room.set((warp() * WIDE + i) * 32 + lane(), sums[i]);
  barrier();
  for (u32 i = warp(); i < WIDE; i += 8) {
    float sum = 0;
    for (u32 w = 0; w < 8; ++w) sum += room[(w * WIDE + i) * 32 + lane()];
    if (column < width) parts.set(i64(block()) * width + column + i, sum);
  }
}
ENTRY(bias_gelu_backward)

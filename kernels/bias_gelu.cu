// y = GELU(x + b), exact or in one of two approximations, and its gradients, recomputed from x. Loads and stores move
// WIDE neighboring elements at a time.
#include "device.cuh"

typedef ELEMENT T;

// Values of Gelu in src/op/bias_gelu.rs.
constexpr int exact_gelu = 0, tanh_gelu = 1;

DEVICE float value(float x, int gelu) {
  if (gelu == exact_gelu) return 0.5f * x * (1.0f + erff(x * 0.70710678f));
  if (gelu == tanh_gelu) return 0.5f * x * (1.0f + tanhf(0.79788456f * (x + 0.044715f * x * x * x)));
  return x / (1.0f + expf(-1.702f * x));
}

DEVICE float derivative(float x, int gelu) {
  if (gelu == exact_gelu) return 0.5f * (1.0f + erff(x * 0.70710678f)) + x * 0.39894228f * expf(-0.5f * x * x);
  if (gelu == tanh_gelu) {
    const float t = tanhf(0.79788456f * (x + 0.044715f * x * x * x));
    return 0.5f * (1.0f + t) + 0.5f * x * (1.0f - t * t) * 0.79788456f * (1.0f + 0.134145f * x * x);
  }
  const float s = 1.0f / (1.0f + expf(-1.702f * x));
  return s + 1.702f * x * s * (1.0f - s);
}

// x [rows, width], bias [width] or absent → y [rows, width].
KERNEL(256) void bias_gelu(Global<const T> x, Global<const T> bias, Global<T> y, i64 numel, int width, int gelu) {
  const i64 first = (i64(block()) * 256 + thread()) * WIDE;
  if (first >= numel) return;
  const auto in = x.load<WIDE>(first);
  Pack<T, WIDE> b, out;
  if (bias.is_present()) b = bias.load<WIDE>(first % width);
  for (int i = 0; i < WIDE; ++i)
    out.data[i] = narrow<T>(value(wide(in.data[i]) + (bias.is_present() ? wide(b.data[i]) : 0), gelu));
  y.store<WIDE>(first, out);
}
ENTRY(bias_gelu)

// x, bias and gy as above → gx [rows, width] and, if present, parts [blocks, width]: the sum of this block's rows of
// gx. A warp covers 32 · WIDE columns; the eight warps of a block take every eighth row. grid.x counts runs of rows,
// grid.y runs of columns.
KERNEL(256)
void bias_gelu_backward(Global<const T> x, Global<const T> bias, Global<const T> gy, Global<T> gx, Global<float> parts,
                        int rows, int width, int rows_per_block, int gelu) {
  const auto scratch = shared<float>(0, 8 * 32 * WIDE);
  const int column = (block_y() * 32 + lane()) * WIDE;
  const int begin = block() * rows_per_block, end = min(begin + rows_per_block, rows);
  float sums[WIDE] = {};
  if (column < width) {
    Pack<T, WIDE> b;
    if (bias.is_present()) b = bias.load<WIDE>(column);
    for (int row = begin + warp(); row < end; row += 8) {
      const i64 index = i64(row) * width + column;
      const auto in = x.load<WIDE>(index), g_out = gy.load<WIDE>(index);
      Pack<T, WIDE> out;
      for (int i = 0; i < WIDE; ++i) {
        const float g =
            wide(g_out.data[i]) * derivative(wide(in.data[i]) + (bias.is_present() ? wide(b.data[i]) : 0), gelu);
        out.data[i] = narrow<T>(g);
        sums[i] += g;
      }
      gx.store<WIDE>(index, out);
    }
  }
  if (!parts.is_present()) return;
  for (int i = 0; i < WIDE; ++i) scratch.set((warp() * WIDE + i) * 32 + lane(), sums[i]);
  barrier();
  for (u32 i = warp(); i < WIDE; i += 8) {
    float sum = 0;
    for (u32 w = 0; w < 8; ++w) sum += scratch[(w * WIDE + i) * 32 + lane()];
    if (column < width) parts.set(i64(block()) * width + column + i, sum);
  }
}
ENTRY(bias_gelu_backward)

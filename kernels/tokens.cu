// Assembles token sequences in one pass: the class token, visible tokens with their positions, and the mask token with
// the positions of the hidden ones; and its backward pass. A warp covers 32 · WIDE columns of a row.
#include "device.cuh"

typedef ELEMENT T;

// class_tokens is 0 or 1. visible [batch, kept, width], or [batch, class_tokens + kept, width] if class_token is absent
// and the class token is already part of the input; class_token and mask_token [width] or absent; positions [n, width],
// keep [batch, kept], drop [batch, hidden] → out [batch, class_tokens + kept + hidden, width]. grid.x counts runs of
// rows, grid.y runs of columns.
KERNEL(256)
void assemble_tokens(Global<const T> visible, Global<const T> class_token, Global<const T> mask_token,
                     Global<const float> positions, Global<const i64> keep, Global<const i64> drop, Global<T> out,
                     int rows, int width, int kept, int hidden, int class_tokens, int rows_per_block) {
  const int column = (block_y() * 32 + lane()) * WIDE, per_sample = class_tokens + kept + hidden;
  const int class_in_input = class_tokens && !class_token.is_present();
  if (column >= width) return;
  const int begin = block() * rows_per_block, end = min(begin + rows_per_block, rows);
  for (int row = begin + warp(); row < end; row += 8) {
    const int sample = row / per_sample, position_index = row % per_sample;
    Pack<T, WIDE> value;
    if (position_index >= class_tokens + kept) {
      value = mask_token.load<WIDE>(column);
    } else if (position_index < class_tokens && !class_in_input) {
      value = class_token.load<WIDE>(column);
    } else {
      value = visible.load<WIDE>(
          (i64(sample) * (kept + class_in_input) + position_index - class_tokens + class_in_input) * width + column);
    }
    if (position_index >= class_tokens) {
      const i64 grid_index = position_index >= class_tokens + kept
                                 ? drop[i64(sample) * hidden + position_index - class_tokens - kept]
                                 : keep[i64(sample) * kept + position_index - class_tokens];
      const auto position = positions.load<WIDE>(grid_index * width + column);
      for (int i = 0; i < WIDE; ++i) value.data[i] = narrow<T>(wide(value.data[i]) + position.data[i]);
    }
    out.store<WIDE>(i64(row) * width + column, value);
  }
}
ENTRY(assemble_tokens)

// gy as out above → g_visible as visible (or absent) and parts [blocks, 2, width] (or absent): the sums of this block's
// gradients of the mask token and of the class token.
KERNEL(256)
void assemble_tokens_backward(Global<const T> gy, Global<T> g_visible, Global<float> parts, int rows, int width,
                              int kept, int hidden, int class_tokens, int class_in_input, int rows_per_block) {
  const auto scratch = shared<float>(0, 8 * 32 * WIDE);
  const int first_column = block_y() * 32 * WIDE, column = first_column + lane() * WIDE,
            per_sample = class_tokens + kept + hidden;
  const int begin = block() * rows_per_block, end = min(begin + rows_per_block, rows);
  float sums[2][WIDE] = {};
  if (column < width) {
    for (int row = begin + warp(); row < end; row += 8) {
      const int sample = row / per_sample, position_index = row % per_sample;
      const auto g_out = gy.load<WIDE>(i64(row) * width + column);
      if (position_index >= class_tokens + kept) {
        for (int i = 0; i < WIDE; ++i) sums[0][i] += wide(g_out.data[i]);
      } else if (position_index < class_tokens && !class_in_input) {
        for (int i = 0; i < WIDE; ++i) sums[1][i] += wide(g_out.data[i]);
      } else if (g_visible.is_present()) {
        g_visible.store<WIDE>(
            (i64(sample) * (kept + class_in_input) + position_index - class_tokens + class_in_input) * width + column,
            g_out);
      }
    }
  }
  if (!parts.is_present()) return;
#pragma unroll
  for (int vector = 0; vector < 2; ++vector) {
    barrier();
    for (int i = 0; i < WIDE; ++i) scratch.set((warp() * 32 + lane()) * WIDE + i, sums[vector][i]);
    barrier();
    for (int element = thread(); element < 32 * WIDE; element += 256) {
      if (first_column + element >= width) continue;
      float sum = 0;
      for (int w = 0; w < 8; ++w) sum += scratch[w * 32 * WIDE + element];
      parts.set((2 * i64(block()) + vector) * width + first_column + element, sum);
    }
  }
}
ENTRY(assemble_tokens_backward)

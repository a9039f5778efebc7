// Sequences of tokens: a class token, visible tokens with their positions, and the mask token with the positions of what
// is hidden, written in one pass; and the way back. A warp has 32 · WIDE columns of a row.
#include "device.cuh"

typedef ELEMENT T;

// With `front` class tokens, one or none: seen [batch, kept, width], or [batch, front + kept, width] where class is
// absent and rides there; class and token [width]
// or absent; positions [n, width], keep [batch, kept], drop [batch, hidden] → out [batch, front + kept + hidden, width].
// grid.x counts runs of rows, grid.y runs of columns.
KERNEL(256) void fill(Global<const T> seen, Global<const T> class_token, Global<const T> token,
                      Global<const float> positions, Global<const i64> keep, Global<const i64> drop, Global<T> out,
                      int rows, int width, int kept, int hidden, int front, int rows_per_block) {
  const int column = (block_y() * 32 + lane()) * WIDE, of_sample = front + kept + hidden;
  const int rides = front && !class_token.given();
  if (column >= width) return;
  const int begin = block() * rows_per_block, end = min(begin + rows_per_block, rows);
  for (int row = begin + warp(); row < end; row += 8) {
    const int sample = row / of_sample, at = row % of_sample;
    Pack<T, WIDE> value;
    if (at >= front + kept) {
      value = token.load<WIDE>(column);
    } else if (at < front && !rides) {
      value = class_token.load<WIDE>(column);
    } else {
      value = seen.load<WIDE>((i64(sample) * (kept + rides) + at - front + rides) * width + column);
    }
    if (at >= front) {
      const i64 place = at >= front + kept ? drop[i64(sample) * hidden + at - front - kept]
                                            : keep[i64(sample) * kept + at - front];
      const auto position = positions.load<WIDE>(place * width + column);
      for (int i = 0; i < WIDE; ++i) value.at[i] = narrow<T>(wide(value.at[i]) + position.at[i]);
    }
    out.store<WIDE>(i64(row) * width + column, value);
  }
}
ENTRY(fill)

// gy as out above → g_seen as seen (or absent), and in parts [blocks, 2, width] (or absent) this block's rows of the
// mask token summed, and those of the class token.
KERNEL(256) void fill_backward(Global<const T> gy, Global<T> g_seen, Global<float> parts, int rows, int width, int kept,
                               int hidden, int front, int rides, int rows_per_block) {
  const auto room = shared<float>(0, 8 * 32 * WIDE);
  const int first = block_y() * 32 * WIDE, column = first + lane() * WIDE, of_sample = front + kept + hidden;
  const int begin = block() * rows_per_block, end = min(begin + rows_per_block, rows);
  float sums[2][WIDE] = {};
  if (column < width) {
    for (int row = begin + warp(); row < end; row += 8) {
      const int sample = row / of_sample, at = row % of_sample;
      const auto up = gy.load<WIDE>(i64(row) * width + column);
      if (at >= front + kept) {
        for (int i = 0; i < WIDE; ++i) sums[0][i] += wide(up.at[i]);
      } else if (at < front && !rides) {
        for (int i = 0; i < WIDE; ++i) sums[1][i] += wide(up.at[i]);
      } else if (g_seen.given()) {
        g_seen.store<WIDE>((i64(sample) * (kept + rides) + at - front + rides) * width + column, up);
      }
    }
  }
  if (!parts.given()) return;
#pragma unroll
  for (int which = 0; which < 2; ++which) {
    barrier();
    for (int i = 0; i < WIDE; ++i) room.set((warp() * 32 + lane()) * WIDE + i, sums[which][i]);
    barrier();
    for (int at = thread(); at < 32 * WIDE; at += 256) {
      if (first + at >= width) continue;
      float sum = 0;
      for (int w = 0; w < 8; ++w) sum += room[w * 32 * WIDE + at];
      parts.set((2 * i64(block()) + which) * width + first + at, sum);
    }
  }
}
ENTRY(fill_backward)

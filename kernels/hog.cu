// Histograms of oriented gradients, one a cell of 8 × 8 pixels and channel, normalised by themselves.
#include "device.cuh"

typedef ELEMENT T;
constexpr int bins = 9, side = 8, wide_at = 16 / sizeof(T);

// cos and sin of k · 20°, k = 1..8: where a bin begins.
constexpr float cosines[8] = {0.93969262f, 0.76604444f, 0.5f, 0.17364818f, -0.17364818f, -0.5f, -0.76604444f, -0.93969262f};
constexpr float sines[8] = {0.34202014f, 0.64278761f, 0.8660254f, 0.98480775f, 0.98480775f, 0.8660254f, 0.64278761f, 0.34202014f};

DEVICE int mirrored(int i, int n) { return i < 0 ? -i : i >= n ? 2 * n - 2 - i : i; }

// x [samples · channels, height, width] → out [samples, tokens, channels · 9 · cells of a patch]. One block a row of
// cells of one channel; eight lanes, one a row of pixels, share a cell. The rows lie in shared memory with a line of
// mirrored pixels around, `pitch` apart: 1 more than a multiple of 8, so that a warp's lanes read 32 banks.
KERNEL(256) void hog(Global<const T> x, Global<float> out, int channels, int height, int width, int patch, int pitch) {
  const auto rows = shared<float>(0, (side + 2) * pitch);
  const int lines = height / side, plane = block() / lines, line = block() % lines;
  const int packs = width / wide_at;
  for (int i = thread(); i < (side + 2) * packs; i += 256) {
    const int row = i / packs, column = i % packs * wide_at;
    const i64 from = i64(plane) * height + mirrored(line * side + row - 1, height);
    const auto in = x.load<wide_at>(from * width + column);
    const u32 at = row * pitch + 1 + column;
    for (int j = 0; j < wide_at; ++j) rows.set(at + j, wide(in.at[j]));
    // The neighbour of the first and of the last column is mirrored beyond it.
    if (column == 0) rows.set(at - 1, wide(in.at[1]));
    if (column + wide_at == width) rows.set(at + wide_at, wide(in.at[wide_at - 2]));
  }
  barrier();
  const int cells = patch / side, sample = plane / channels, channel = plane % channels;
  for (int first = 0; first < width; first += 256) {
    const int item = first + int(thread()), row = item % side, cell = item / side;
    float sums[bins] = {};
    if (item < width) {
      const u32 at = row * pitch + cell * side;
      // Of three columns side by side: the pixels above, here and below, weighted 1 2 1, and their slope downwards.
      float smooth[3], slope[3];
      const auto column = [&](int k, u32 i) {
        const float above = rows[i], here = rows[i + pitch], below = rows[i + 2 * pitch];
        smooth[k] = above + 2 * here + below;
        slope[k] = above - below;
      };
      column(1, at), column(2, at + 1);
      for (int i = 0; i < side; ++i) {
        smooth[0] = smooth[1], smooth[1] = smooth[2], slope[0] = slope[1], slope[1] = slope[2];
        column(2, at + i + 2);
        float across = smooth[0] - smooth[2], down = slope[0] + 2 * slope[1] + slope[2];
        const float size = sqrtf(across * across + down * down);
        // Opposite directions are one.
        if (across < 0 || (across == 0 && down < 0)) across = -across, down = -down;
        int bin = 0;
        for (int k = 0; k < bins - 1; ++k) bin += cosines[k] * across >= sines[k] * down;
        for (int k = 0; k < bins; ++k) sums[k] += bin == k ? size : 0;
      }
    }
    float square = 0;
    for (int k = 0; k < bins; ++k) {
      for (u32 mask = 1; mask < side; mask *= 2) sums[k] += shuffle_xor(sums[k], mask);
      square += sums[k] * sums[k];
    }
    if (item >= width) continue;
    const float norm = fmaxf(sqrtf(square), 1e-12f);
    const int token = line / cells * (width / patch) + cell / cells;
    const i64 tokens = i64(height / patch) * (width / patch);
    const i64 base = (sample * tokens + token) * channels * bins * cells * cells + line % cells * cells + cell % cells;
    for (int k = 0; k < bins; ++k)
      if (k % side == row) out.set(base + (channel * bins + k) * cells * cells, sums[k] / norm);
  }
}
ENTRY(hog)

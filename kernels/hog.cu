// Histograms of oriented gradients per cell of 8 × 8 pixels and channel, each normalized by its own L2 norm.
#include "device.cuh"

typedef ELEMENT T;
constexpr int bins = 9, side = 8, load_width = 16 / sizeof(T);

// cos and sin of k · 20°, k = 1..8: the lower bounds of the bins.
constexpr float cosines[8] = {0.93969262f,  0.76604444f, 0.5f,         0.17364818f,
                              -0.17364818f, -0.5f,       -0.76604444f, -0.93969262f};
constexpr float sines[8] = {0.34202014f, 0.64278761f, 0.8660254f,  0.98480775f,
                            0.98480775f, 0.8660254f,  0.64278761f, 0.34202014f};

DEVICE int mirror(int i, int n) { return i < 0 ? -i : i >= n ? 2 * n - 2 - i : i; }

// x [samples · channels, height, width] → out [samples, tokens, channels · 9 · cells of a patch]. One block per row of
// cells of one channel; eight lanes, one per row of pixels, share a cell. The rows are in shared memory with a border
// of mirrored pixels. `pitch`, the distance between rows, is 1 more than a multiple of 8, so that the lanes of a warp
// read 32 different banks.
KERNEL(256) void hog(Global<const T> x, Global<float> out, int channels, int height, int width, int patch, int pitch) {
  const auto rows = shared<float>(0, (side + 2) * pitch);
  const int cell_rows = height / side, plane = block() / cell_rows, cell_row = block() % cell_rows;
  const int packs = width / load_width;
  for (int i = thread(); i < (side + 2) * packs; i += 256) {
    const int row = i / packs, column = i % packs * load_width;
    const i64 source_row = i64(plane) * height + mirror(cell_row * side + row - 1, height);
    const auto in = x.load<load_width>(source_row * width + column);
    const u32 index = row * pitch + 1 + column;
    for (int j = 0; j < load_width; ++j) rows.set(index + j, wide(in.data[j]));
    // The mirrored pixel beyond the first and the last column equals the neighbor of that column.
    if (column == 0) rows.set(index - 1, wide(in.data[1]));
    if (column + load_width == width) rows.set(index + load_width, wide(in.data[load_width - 2]));
  }
  barrier();
  const int cells = patch / side, sample = plane / channels, channel = plane % channels;
  for (int first_item = 0; first_item < width; first_item += 256) {
    const int item = first_item + int(thread()), row = item % side, cell = item / side;
    float sums[bins] = {};
    if (item < width) {
      const u32 index = row * pitch + cell * side;
      // Per column of a window of three: the pixels above, here and below weighted 1 2 1, and the vertical difference.
      float smoothed[3], difference[3];
      const auto column = [&](int k, u32 i) {
        const float above = rows[i], center = rows[i + pitch], below = rows[i + 2 * pitch];
        smoothed[k] = above + 2 * center + below;
        difference[k] = above - below;
      };
      column(1, index), column(2, index + 1);
      for (int i = 0; i < side; ++i) {
        smoothed[0] = smoothed[1], smoothed[1] = smoothed[2], difference[0] = difference[1],
        difference[1] = difference[2];
        column(2, index + i + 2);
        float gx = smoothed[0] - smoothed[2], gy = difference[0] + 2 * difference[1] + difference[2];
        const float magnitude = sqrtf(gx * gx + gy * gy);
        // Orientations are unsigned.
        if (gx < 0 || (gx == 0 && gy < 0)) gx = -gx, gy = -gy;
        int bin = 0;
        for (int k = 0; k < bins - 1; ++k) bin += cosines[k] * gx >= sines[k] * gy;
        for (int k = 0; k < bins; ++k) sums[k] += bin == k ? magnitude : 0;
      }
    }
    float squares = 0;
    for (int k = 0; k < bins; ++k) {
      for (u32 mask = 1; mask < side; mask *= 2) sums[k] += shuffle_xor(sums[k], mask);
      squares += sums[k] * sums[k];
    }
    if (item >= width) continue;
    const float norm = fmaxf(sqrtf(squares), 1e-12f);
    const int token = cell_row / cells * (width / patch) + cell / cells;
    const i64 tokens = i64(height / patch) * (width / patch);
    const i64 out_index =
        (sample * tokens + token) * channels * bins * cells * cells + cell_row % cells * cells + cell % cells;
    for (int k = 0; k < bins; ++k)
      if (k % side == row) out.set(out_index + (channel * bins + k) * cells * cells, sums[k] / norm);
  }
}
ENTRY(hog)

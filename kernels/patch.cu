// Gathers patches from pixels in one pass: reads pixels in place, normalizes them and writes them channel last; for
// targets, also normalizes each patch. Loads move VEC neighboring pixels of a row at a time.
#include "device.cuh"

typedef FROM S;
typedef INTO T;

constexpr int store_width = VEC == 1 ? 1 : 4;  // values per store: the size of an even patch is a multiple of four
// Values of PatchNorm in src/op/patch.rs.
constexpr int raw_norm = 0, patch_norm = 1, channel_norm = 2;

// Division of small numbers by a divisor that is the same for all of them: exact while their product is below 2³².
struct Divider {
  u32 divisor, factor;
  DEVICE explicit Divider(u32 divisor) : divisor(divisor), factor(~0u / divisor + 1) {}
  DEVICE u32 operator()(u32 x) const { return divisor == 1 ? x : mul_high(x, factor); }
};

// x [batch, channels, frames · f, rows · p, cols · p], index [batch, kept] → out [count = batch · kept, f · p · p ·
// channels]. A byte b of channel c is read as b · factor_c + offset_c. A block processes one patch at a time, in shared
// memory as [channel, frame, row, column].
KERNEL(64)
void patch(Global<const S> x, Global<const i64> index, Global<T> out, int count, int kept, int channels, int frames,
           int rows, int cols, int f, int p, int norm, float factor0, float factor1, float factor2, float factor3,
           float offset0, float offset1, float offset2, float offset3) {
  const int plane = f * p * p, values = channels * plane;  // per channel; per patch
  const auto scratch = shared<float>(0, 2), patch_values = shared<float>(16, values);
  const Divider by_row(p / VEC), by_square(p), by_frames(f), by_channels(channels);
  const i64 row_pixels = i64(cols) * p, frame_pixels = row_pixels * rows * p;
  for (int row = block(); row < count; row += blocks()) {
    barrier();  // All threads have finished reading the previous patch.
    const int token = int(index[row]), sample = row / kept;
    const int grid_row = token / cols % rows, slot = token / (cols * rows);
    // The first pixel of the patch in its first channel.
    const i64 start =
        (i64(sample) * channels * frames + slot) * f * frame_pixels + i64(grid_row) * p * row_pixels + token % cols * p;
    for (int element = thread() * VEC; element < values; element += 64 * VEC) {
      const u32 pixel_row = by_row(element / VEC), plane_index = by_square(pixel_row), channel = by_frames(plane_index);
      const i64 source = start + (i64(channel) * frames * f + plane_index - channel * f) * frame_pixels +
                         (pixel_row - plane_index * p) * row_pixels + element - pixel_row * p;
      const float factor = channel == 0 ? factor0 : channel == 1 ? factor1 : channel == 2 ? factor2 : factor3;
      const float offset = channel == 0 ? offset0 : channel == 1 ? offset1 : channel == 2 ? offset2 : offset3;
      const auto in = x.load<VEC>(source);
      Pack<float, VEC> value;
      for (int i = 0; i < VEC; ++i) value.data[i] = wide(in.data[i]) * factor + offset;
      patch_values.store<VEC>(element, value);
    }
    barrier();
    const int group_size = norm == patch_norm ? values : plane;
    for (int begin = 0; norm != raw_norm && begin < values; begin += group_size) {
      float sum = 0, squares = 0;
      for (int element = begin + thread(); element < begin + group_size; element += 64) sum += patch_values[element];
      const float mean = block_sum(sum, scratch) / group_size;
      for (int element = begin + thread(); element < begin + group_size; element += 64)
        squares += (patch_values[element] - mean) * (patch_values[element] - mean);
      const float variance = block_sum(squares, scratch) / (group_size - 1);
      const float std = norm == channel_norm ? sqrtf(variance) + 1e-6f : sqrtf(variance + 1e-6f);
      for (int element = begin + thread(); element < begin + group_size; element += 64)
        patch_values.set(element, (patch_values[element] - mean) / std);
    }
    barrier();
    for (int element = thread() * store_width; element < values; element += 64 * store_width) {
      u32 pixel = by_channels(element), channel = element - pixel * channels;
      Pack<T, store_width> pack;
      for (int i = 0; i < store_width; ++i) {
        pack.data[i] = narrow<T>(patch_values[channel * plane + pixel]);
        if (++channel == u32(channels)) channel = 0, ++pixel;
      }
      out.store<store_width>(i64(row) * values + element, pack);
    }
  }
}
ENTRY(patch)

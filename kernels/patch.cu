// Rows of patches out of pixels: read where they lie, normalised, and written channel last, in one pass; as targets also
// levelled patch by patch. VEC neighbouring pixels of a row are read at a time.
#include "device.cuh"

typedef FROM S;
typedef INTO T;

constexpr int fill_width = VEC == 1 ? 1 : 4;  // values written at a time: an even patch has a multiple of four
// Levels, as src/op/patch.rs numbers them.
constexpr int raw = 0, by_patch = 1, by_channel = 2;

// Division of small numbers by one that is known early: exact while their product is below 2³².
struct Divider {
  u32 by, factor;
  DEVICE explicit Divider(u32 by) : by(by), factor(~0u / by + 1) {}
  DEVICE u32 operator()(u32 x) const { return by == 1 ? x : high_product(x, factor); }
};

// x [batch, channels, frames · f, rows · p, cols · p], index [batch, kept] → out [count = batch · kept, f · p · p ·
// channels]. Byte b of channel c is read as b · factor_c + offset_c. A block has a patch at a time, on chip as
// [channel, frame, row, column].
KERNEL(64) void patch(Global<const S> x, Global<const i64> index, Global<T> out, int count, int kept, int channels,
                      int frames, int rows, int cols, int f, int p, int level, float factor0, float factor1,
                      float factor2, float factor3, float offset0, float offset1, float offset2, float offset3) {
  const int plane = f * p * p, values = channels * plane;  // of a channel; of a patch
  const auto room = shared<float>(0, 2), on_chip = shared<float>(16, values);
  const Divider of_row(p / VEC), of_square(p), of_clip(f), of_pixel(channels);
  const i64 wide_row = i64(cols) * p, frame = wide_row * rows * p;
  for (int row = block(); row < count; row += blocks()) {
    barrier();  // Whoever still reads the last patch is done.
    const int token = int(index[row]), sample = row / kept;
    const int down = token / cols % rows, time = token / (cols * rows);
    // Where the patch's first pixel lies in its first channel.
    const i64 start = (i64(sample) * channels * frames + time) * f * frame + i64(down) * p * wide_row + token % cols * p;
    for (int at = thread() * VEC; at < values; at += 64 * VEC) {
      const u32 line = of_row(at / VEC), square = of_square(line), channel = of_clip(square);
      const i64 source = start + (i64(channel) * frames * f + square - channel * f) * frame +
                         (line - square * p) * wide_row + at - line * p;
      const float factor = channel == 0 ? factor0 : channel == 1 ? factor1 : channel == 2 ? factor2 : factor3;
      const float offset = channel == 0 ? offset0 : channel == 1 ? offset1 : channel == 2 ? offset2 : offset3;
      const auto in = x.load<VEC>(source);
      Pack<float, VEC> value;
      for (int i = 0; i < VEC; ++i) value.at[i] = wide(in.at[i]) * factor + offset;
      on_chip.store<VEC>(at, value);
    }
    barrier();
    const int size = level == by_patch ? values : plane;
    for (int begin = 0; level != raw && begin < values; begin += size) {
      float sum = 0, squares = 0;
      for (int at = begin + thread(); at < begin + size; at += 64) sum += on_chip[at];
      const float mean = block_sum(sum, room) / size;
      for (int at = begin + thread(); at < begin + size; at += 64) squares += (on_chip[at] - mean) * (on_chip[at] - mean);
      const float variance = block_sum(squares, room) / (size - 1);
      const float deviation = level == by_channel ? sqrtf(variance) + 1e-6f : sqrtf(variance + 1e-6f);
      for (int at = begin + thread(); at < begin + size; at += 64) on_chip.set(at, (on_chip[at] - mean) / deviation);
    }
    barrier();
    for (int at = thread() * fill_width; at < values; at += 64 * fill_width) {
      u32 pixel = of_pixel(at), channel = at - pixel * channels;
      Pack<T, fill_width> pack;
      for (int i = 0; i < fill_width; ++i) {
        pack.at[i] = narrow<T>(on_chip[channel * plane + pixel]);
        if (++channel == u32(channels)) channel = 0, ++pixel;
      }
      out.store<fill_width>(i64(row) * values + at, pack);
    }
  }
}
ENTRY(patch)

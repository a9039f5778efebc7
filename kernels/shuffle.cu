// Samples the visible tokens of each sample from the sample's own random stream (src/rng.rs). The rule marks units of
// the grid as hidden or not, the keys (mark, noise, unit) are sorted, and the first units stay visible. All arithmetic
// is in integers, so that the result equals `MaskPlan::sample_order` in src/op/shuffle.rs. One block per sample.
#include "philox.cuh"

// Rules, numbered as in src/op/shuffle.rs.
constexpr int block_rule = 1, axes_rule = 2;

// A uniform integer in 0..n from one random word.
DEVICE int uniform_below(u32 bits, int n) { return int(mul_high(bits, u32(n))); }

// ---- the marks of a rule ---------------------------------------------------------------------------------------

// 2^(e / 2^16) in units of 2^-16, as a product of one root of two per binary digit of the fraction.
DEVICE u64 exp2_fixed(int e) {
  constexpr u32 roots[16] = {3037000500u, 2553802834u, 2341847524u, 2242560872u, 2194507417u, 2170868212u,
                             2159144272u, 2153306067u, 2150392887u, 2148937775u, 2148210589u, 2147847087u,
                             2147665360u, 2147574502u, 2147529075u, 2147506361u};
  u64 x = 1ull << 31;
#pragma unroll
  for (int i = 0; i < 16; ++i)
    if (e >> (15 - i) & 1) x = x * roots[i] >> 31;
  return x >> (15 - (e >> 16));
}

// √(area · 2^(e / 2^16)) rounded to the nearest integer, at most `max_side`; area in units of 2^-16.
DEVICE int nearest_side(u32 area, int e, int max_side) {
  const u64 square = area * exp2_fixed(e);
  int best = 0;
  while (best < max_side && (u64(2 * best + 1) * u64(2 * best + 1) << 30) <= square) ++best;
  return best;
}

struct BlockOptions {
  int target, min_area, max_area, max_tries, aspect_span;
};

// Hides rectangles until `target` units are hidden or `max_tries` rectangles in a row did not fit. Executed by one
// warp; consumes six words per try, from `word_index` on.
DEVICE void hide_blocks(Shared<u32> hidden, const Stream& stream, u32 word_index, int frames, int rows, int cols,
                        BlockOptions options) {
  int count = 0;
  for (int failed = 0; count < options.target && failed < options.max_tries; word_index += 6, ++failed) {
    const u32 lane_word = random_word(stream, word_index + min(lane(), 5u));
    u32 words[6];
    for (u32 i = 0; i < 6; ++i) words[i] = shuffle(lane_word, i);
    const int remaining = options.target - count, max_box = min(remaining, options.max_area),
              min_box = min(options.min_area, max_box);
    const u32 area =
        (u32(min_box) << 16) + mul_high(words[0], (u32(max(options.min_area, max_box) - min_box) << 16) + 1);
    const int e = uniform_below(words[1], 2 * options.aspect_span + 1) - options.aspect_span;
    const int height = nearest_side(area, e, rows), width = nearest_side(area, -e, cols);
    if (height >= rows || width >= cols) continue;
    const int depth = 1 + uniform_below(words[4], frames);
    const int top = uniform_below(words[2], rows - height + 1), left_col = uniform_below(words[3], cols - width + 1);
    const int begin = uniform_below(words[5], frames - depth + 1), box_units = depth * height * width;
    const auto unit = [&](int box_unit) {
      const int row = box_unit / width;
      return u32(((begin + row / height) * rows + top + row % height) * cols + left_col + box_unit % width);
    };
    int new_units = 0;
    for (int box_unit = int(lane()); box_unit < box_units; box_unit += 32) new_units += hidden[unit(box_unit)] == 0;
    for (u32 mask = 16; mask > 0; mask /= 2) new_units += shuffle_xor(new_units, mask);
    if (new_units == 0 || new_units > min(remaining, options.max_area * frames)) continue;
    for (int box_unit = int(lane()); box_unit < box_units; box_unit += 32) hidden.set(unit(box_unit), 1);
    warp_barrier();
    count += new_units, failed = -1;
  }
}

// Marks the hidden rows and columns: marks[i], rows first. The kept_rows rows and kept_cols columns with the least
// noise stay visible.
DEVICE void hide_axes(Shared<u32> marks, Shared<u32> noise, const Stream& stream, u32 word_index, int rows, int cols,
                      int kept_rows, int kept_cols) {
  const int lines = rows + cols;
  for (int i = int(thread()); i < lines; i += int(threads())) noise.set(i, random_word(stream, word_index + i));
  barrier();
  for (int i = int(thread()); i < lines; i += int(threads())) {
    const int begin = i < rows ? 0 : rows, end = i < rows ? rows : lines;
    const u32 own_noise = noise[i];
    int rank = 0;
    for (int j = begin; j < end; ++j) rank += noise[j] < own_noise || (noise[j] == own_noise && j < i);
    marks.set(i, rank >= (i < rows ? kept_rows : kept_cols));
  }
}

// ---- the order -------------------------------------------------------------------------------------------------

// Bitonic sort, ascending; `count` is a power of two, at least 32. At distances up to 32 a warp's pairs are within 64
// keys that no other warp touches at those distances.
DEVICE void sort(Shared<u64> keys, u32 count) {
  u32 last_step = count;
  for (u32 run = 2; run <= count; run *= 2)
    for (u32 step = run / 2; step > 0; step /= 2) {
      if (max(last_step, step) > 32)
        barrier();
      else
        warp_barrier();
      last_step = step;
      for (u32 pair = thread(); pair < count / 2; pair += threads()) {
        const u32 i = pair / step * 2 * step + pair % step;
        const u64 a = keys[i], b = keys[i + step];
        if ((a > b) == ((i & run) == 0)) keys.set(i, b), keys.set(i + step, a);
      }
    }
  barrier();
}

// sample_keys [3, samples]: ids, epochs, repeats → keep [samples, kept], drop [samples, tokens − kept], restore
// [samples, tokens]. Units are boxes of unit_frames × unit_rows × unit_cols tokens on a grid of frames × rows × cols
// units; `count` is the next power of two. a to e are the parameters of the rule.
KERNEL(512)
void token_order(Global<const i64> sample_keys, Global<i64> keep, Global<i64> drop, Global<i64> restore, u64 seed,
                 int samples, int frames, int rows, int cols, int unit_frames, int unit_rows, int unit_cols, int kept,
                 int count, int rule, int a, int b, int c, int d, int e) {
  const Stream stream = sample_stream(sample_keys, samples, int(block()), seed, 0);
  const int units = frames * rows * cols, lines = rows + cols;
  const auto keys = shared<u64>(0, count);
  const u32 mark_count = rule == block_rule ? units : rule == axes_rule ? 2 * lines : 0;
  const auto marks = shared<u32>(8 * count, mark_count);
  if (rule == block_rule) {
    for (int i = int(thread()); i < units; i += int(threads())) marks.set(i, 0);
    barrier();
    if (warp() == 0) hide_blocks(marks, stream, units, frames, rows, cols, {a, b, c, d, e});
  } else if (rule == axes_rule) {
    hide_axes(marks, marks.offset(lines), stream, units, rows, cols, a, b);
  }
  barrier();

  for (int first = 4 * int(thread()); first < count; first += 4 * int(threads())) {
    const auto noise = random_words(stream, first / 4);
    for (int j = 0; j < 4; ++j) {
      const int i = first + j;
      u64 mark = 0;
      if (i < units && rule == block_rule) mark = marks[i];
      if (i < units && rule == axes_rule) mark = marks[i / cols % rows] | marks[rows + i % cols];
      keys.set(i, i < units ? mark << 63 | u64(noise.data[j]) << 31 | u64(i) : ~0ull);
    }
  }
  sort(keys, count);

  const int unit_tokens = unit_frames * unit_rows * unit_cols, tokens = units * unit_tokens;
  for (int slot = int(thread()); slot < tokens; slot += int(threads())) {
    const int unit = int(keys[slot / unit_tokens] & 0x7FFFFFFF), token_in_unit = slot % unit_tokens;
    const int frame = unit / (rows * cols) * unit_frames + token_in_unit / (unit_rows * unit_cols);
    const int row = unit / cols % rows * unit_rows + token_in_unit / unit_cols % unit_rows;
    const int token =
        (frame * rows * unit_rows + row) * cols * unit_cols + unit % cols * unit_cols + token_in_unit % unit_cols;
    if (slot < kept)
      keep.set(i64(block()) * kept + slot, token);
    else
      drop.set(i64(block()) * (tokens - kept) + slot - kept, token);
    restore.set(i64(block()) * tokens + token, slot);
  }
}
ENTRY(token_order)

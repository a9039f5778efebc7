// Which tokens of each sample stay, drawn from the sample's own stream of numbers (src/rng.rs). Units of the grid are
// marked as hidden or not by their policy; the keys (mark, noise, unit) are sorted; the first units stay. Whole numbers
// throughout, so that this and `Plan::order` in src/op/shuffle.rs cannot differ. One block a sample.
#include "device.cuh"

// Policies, as src/op/shuffle.rs numbers them.
constexpr int blocks_policy = 1, axes_policy = 2;

// ---- the stream of a sample ------------------------------------------------------------------------------------

struct Stream {
  u32 key[2], counter[4];
};

// Philox4x32-10: the four words from 4 i on.
DEVICE Pack<u32, 4> four(const Stream& stream, u32 i) {
  u32 a = stream.counter[0], b = stream.counter[1], c = stream.counter[2], d = stream.counter[3] + i;
  u32 k = stream.key[0], l = stream.key[1];
  for (int round = 0; round < 10; ++round) {
    const u32 high_a = high_product(a, 0xD2511F53u), low_a = a * 0xD2511F53u;
    const u32 high_c = high_product(c, 0xCD9E8D57u), low_c = c * 0xCD9E8D57u;
    a = high_c ^ b ^ k, b = low_c, c = high_a ^ d ^ l, d = low_a;
    k += 0x9E3779B9u, l += 0xBB67AE85u;
  }
  return {{a, b, c, d}};
}

DEVICE u32 word(const Stream& stream, u32 i) {
  const auto words = four(stream, i / 4);
  const u32 low = i % 2 ? words.at[1] : words.at[0], high = i % 2 ? words.at[3] : words.at[2];
  return i % 4 / 2 ? high : low;
}

// Uniform among 0..n from one word.
DEVICE int below(u32 bits, int n) { return int(high_product(bits, u32(n))); }

// ---- the marks of a policy -------------------------------------------------------------------------------------

// 2^(e / 2^16) in units of 2^-16, by one root of two for each digit of the fraction.
DEVICE u64 power(int e) {
  constexpr u32 roots[16] = {3037000500u, 2553802834u, 2341847524u, 2242560872u, 2194507417u, 2170868212u,
                             2159144272u, 2153306067u, 2150392887u, 2148937775u, 2148210589u, 2147847087u,
                             2147665360u, 2147574502u, 2147529075u, 2147506361u};
  u64 x = 1ull << 31;
#pragma unroll
  for (int i = 0; i < 16; ++i)
    if (e >> (15 - i) & 1) x = x * roots[i] >> 31;
  return x >> (15 - (e >> 16));
}

// √(area · 2^(e / 2^16)) to the nearest whole number up to `most`; area in units of 2^-16.
DEVICE int side(u32 area, int e, int most) {
  const u64 square = area * power(e);
  int side = 0;
  while (side < most && (u64(2 * side + 1) * u64(2 * side + 1) << 30) <= square) ++side;
  return side;
}

struct Blocks {
  int goal, least, most, tries, span;
};

// Rectangles until `goal` units are hidden or `tries` in a row did not fit. By one warp; six words a try, from `at` on.
DEVICE void hide_blocks(Shared<u32> hidden, const Stream& stream, u32 at, int frames, int rows, int cols, Blocks want) {
  int count = 0;
  for (int failed = 0; count < want.goal && failed < want.tries; at += 6, ++failed) {
    const u32 own = word(stream, at + min(lane(), 5u));
    u32 words[6];
    for (u32 i = 0; i < 6; ++i) words[i] = shuffle(own, i);
    const int left = want.goal - count, widest = min(left, want.most), low = min(want.least, widest);
    const u32 area = (u32(low) << 16) + high_product(words[0], (u32(max(want.least, widest) - low) << 16) + 1);
    const int e = below(words[1], 2 * want.span + 1) - want.span;
    const int height = side(area, e, rows), width = side(area, -e, cols);
    if (height >= rows || width >= cols) continue;
    const int depth = 1 + below(words[4], frames);
    const int top = below(words[2], rows - height + 1), side = below(words[3], cols - width + 1);
    const int begin = below(words[5], frames - depth + 1), cells = depth * height * width;
    const auto unit = [&](int cell) {
      const int row = cell / width;
      return u32(((begin + row / height) * rows + top + row % height) * cols + side + cell % width);
    };
    int fresh = 0;
    for (int cell = int(lane()); cell < cells; cell += 32) fresh += hidden[unit(cell)] == 0;
    for (u32 mask = 16; mask > 0; mask /= 2) fresh += shuffle_xor(fresh, mask);
    if (fresh == 0 || fresh > min(left, want.most * frames)) continue;
    for (int cell = int(lane()); cell < cells; cell += 32) hidden.set(unit(cell), 1);
    warp_barrier();
    count += fresh, failed = -1;
  }
}

// marks[i] of the rows and then the columns: whether it is hidden. Of `rows` the `kept_rows` with the least noise stay.
DEVICE void hide_axes(Shared<u32> marks, Shared<u32> noise, const Stream& stream, u32 at, int rows, int cols,
                      int kept_rows, int kept_cols) {
  const int lines = rows + cols;
  for (int i = int(thread()); i < lines; i += int(threads())) noise.set(i, word(stream, at + i));
  barrier();
  for (int i = int(thread()); i < lines; i += int(threads())) {
    const int begin = i < rows ? 0 : rows, end = i < rows ? rows : lines;
    const u32 own = noise[i];
    int before = 0;
    for (int j = begin; j < end; ++j) before += noise[j] < own || (noise[j] == own && j < i);
    marks.set(i, before >= (i < rows ? kept_rows : kept_cols));
  }
}

// ---- the order -------------------------------------------------------------------------------------------------

// Bitonic, ascending; `count` is a power of two from 32 on. A warp's pairs at distances up to 32 lie in the 64 keys that
// no other warp touches at those distances.
DEVICE void sort(Shared<u64> keys, u32 count) {
  u32 before = count;
  for (u32 run = 2; run <= count; run *= 2)
    for (u32 step = run / 2; step > 0; step /= 2) {
      if (max(before, step) > 32) barrier();
      else warp_barrier();
      before = step;
      for (u32 pair = thread(); pair < count / 2; pair += threads()) {
        const u32 i = pair / step * 2 * step + pair % step;
        const u64 a = keys[i], b = keys[i + step];
        if ((a > b) == ((i & run) == 0)) keys.set(i, b), keys.set(i + step, a);
      }
    }
  barrier();
}

// origins [3, samples]: ids, epochs, repeats → keep [samples, kept], drop [samples, the rest], restore [samples, tokens].
// Units are boxes of of_frames × of_rows × of_cols tokens on a grid of frames × rows × cols units; `count` is the power
// of two that holds them. a to e are the policy's numbers.
KERNEL(512) void token_order(Global<const i64> origins, Global<i64> keep, Global<i64> drop, Global<i64> restore,
                             u64 seed, int samples, int frames, int rows, int cols, int of_frames, int of_rows,
                             int of_cols, int kept, int count, int policy, int a, int b, int c, int d, int e) {
  const u64 id = u64(origins[block()]);
  const u32 epoch = u32(origins[samples + block()]), repeat = u32(origins[2 * samples + block()]);
  const Stream stream = {{u32(seed), u32(seed >> 32)}, {u32(id), u32(id >> 32), epoch * 256, repeat << 20}};
  const int units = frames * rows * cols, lines = rows + cols;
  const auto keys = shared<u64>(0, count);
  const u32 marked = policy == blocks_policy ? units : policy == axes_policy ? 2 * lines : 0;
  const auto marks = shared<u32>(8 * count, marked);
  if (policy == blocks_policy) {
    for (int i = int(thread()); i < units; i += int(threads())) marks.set(i, 0);
    barrier();
    if (warp() == 0) hide_blocks(marks, stream, units, frames, rows, cols, {a, b, c, d, e});
  } else if (policy == axes_policy) {
    hide_axes(marks, marks.from(lines), stream, units, rows, cols, a, b);
  }
  barrier();

  for (int first = 4 * int(thread()); first < count; first += 4 * int(threads())) {
    const auto noise = four(stream, first / 4);
    for (int j = 0; j < 4; ++j) {
      const int i = first + j;
      u64 mark = 0;
      if (i < units && policy == blocks_policy) mark = marks[i];
      if (i < units && policy == axes_policy) mark = marks[i / cols % rows] | marks[rows + i % cols];
      keys.set(i, i < units ? mark << 63 | u64(noise.at[j]) << 31 | u64(i) : ~0ull);
    }
  }
  sort(keys, count);

  const int of_unit = of_frames * of_rows * of_cols, tokens = units * of_unit;
  for (int place = int(thread()); place < tokens; place += int(threads())) {
    const int unit = int(keys[place / of_unit] & 0x7FFFFFFF), inside = place % of_unit;
    const int frame = unit / (rows * cols) * of_frames + inside / (of_rows * of_cols);
    const int row = unit / cols % rows * of_rows + inside / of_cols % of_rows;
    const int token = (frame * rows * of_rows + row) * cols * of_cols + unit % cols * of_cols + inside % of_cols;
    if (place < kept) keep.set(i64(block()) * kept + place, token);
    else drop.set(i64(block()) * (tokens - kept) + place - kept, token);
    restore.set(i64(block()) * tokens + token, place);
  }
}
ENTRY(token_order)

// y = (s − mean) / √(variance + 1e-6) · scale + shift over rows, where s is x or x + r; and the gradients. A team of TEAM
// warps has one row, of which each thread keeps PACKS packs of WIDE neighbours in registers, so that memory is read once.
#include "device.cuh"

typedef ELEMENT T;

constexpr int members = 32 * TEAM, span = members * WIDE;  // threads of a team; columns that they cover with one pack
constexpr int most = TEAM == 1 ? 128 : 256;  // threads of a block

// The sum over the team. A team of several warps is the whole block.
DEVICE float team_sum(float x, Shared<float> room) {
  if constexpr (TEAM == 1) return warp_sum(x);
  return block_sum(x, room);
}

// x [rows, width], r [rows, width] or absent, scale and shift [width] → s [rows, width] where r is given, y
// [rows, width], and of each row its mean and 1 / √(variance + 1e-6), stats [rows, 2].
KERNEL(most) void layer_norm(Global<const T> x, Global<const T> r, Global<const T> scale, Global<const T> shift,
                            Global<T> s, Global<T> y, Global<float> stats, int rows, int width) {
  const auto room = shared<float>(0, TEAM);
  const int row = block() * (threads() / members) + thread() / members, member = thread() % members;
  if (row >= rows) return;
  const i64 start = i64(row) * width;
  float v[PACKS][WIDE] = {}, sum = 0;
  #pragma unroll
  for (int p = 0; p < PACKS; ++p) {
    const int column = p * span + member * WIDE;
    if (column >= width) continue;
    const auto in = x.load<WIDE>(start + column);
    #pragma unroll
    for (int i = 0; i < WIDE; ++i) v[p][i] = wide(in.at[i]);
    if (r.given()) {
      const auto plus = r.load<WIDE>(start + column);
      Pack<T, WIDE> out;
      // What is normalised is what others will read: the rounded sum.
      #pragma unroll
      for (int i = 0; i < WIDE; ++i) {
        out.at[i] = narrow<T>(v[p][i] + wide(plus.at[i]));
        v[p][i] = wide(out.at[i]);
      }
      s.store<WIDE>(start + column, out);
    }
    #pragma unroll
    for (int i = 0; i < WIDE; ++i) sum += v[p][i];
  }
  const float mean = team_sum(sum, room) / width;
  float squares = 0;
  #pragma unroll
  for (int p = 0; p < PACKS; ++p) {
    if (p * span + member * WIDE >= width) continue;
    #pragma unroll
    for (int i = 0; i < WIDE; ++i) squares += (v[p][i] - mean) * (v[p][i] - mean);
  }
  const float inverse = 1.0f / sqrtf(team_sum(squares, room) / width + 1e-6f);
  #pragma unroll
  for (int p = 0; p < PACKS; ++p) {
    const int column = p * span + member * WIDE;
    if (column >= width) continue;
    const auto by = scale.load<WIDE>(column), plus = shift.load<WIDE>(column);
    Pack<T, WIDE> out;
    #pragma unroll
    for (int i = 0; i < WIDE; ++i) {
      out.at[i] = narrow<T>((v[p][i] - mean) * inverse * wide(by.at[i]) + wide(plus.at[i]));
    }
    y.store<WIDE>(start + column, out);
  }
  if (member == 0) stats.store<2>(2 * i64(row), {mean, inverse});
}
ENTRY(layer_norm)

// s, stats as the forward pass left them; gs [rows, width] or absent and gy [rows, width], the gradients of s and y →
// gx [rows, width], that of x and of r alike, and parts [blocks, 2 · width]: the gradients of scale and shift from this
// block's rows.
KERNEL(most) void layer_norm_backward(Global<const T> s, Global<const T> scale, Global<const float> stats,
                                     Global<const T> gs, Global<const T> gy, Global<T> gx, Global<float> parts, int rows,
                                     int width, int rows_per_block) {
  const int teams = threads() / members, team = thread() / members, member = thread() % members;
  const auto sums = shared<float>(0, TEAM), room = shared<float>(32, 2 * teams * span);
  const int end = min(int(block() + 1) * rows_per_block, rows);
  float of_scale[PACKS][WIDE] = {}, of_shift[PACKS][WIDE] = {};
  for (int row = block() * rows_per_block + team; row < end; row += teams) {
    const i64 start = i64(row) * width;
    const auto stat = stats.load<2>(2 * i64(row));
    const float mean = stat.at[0], inverse = stat.at[1];
    Pack<T, WIDE> in[PACKS], up[PACKS], past[PACKS];
    #pragma unroll
    for (int p = 0; p < PACKS; ++p) {
      const int column = p * span + member * WIDE;
      if (column >= width) continue;
      in[p] = s.load<WIDE>(start + column);
      up[p] = gy.load<WIDE>(start + column);
      if (gs.given()) past[p] = gs.load<WIDE>(start + column);
    }
    float plain = 0, leaning = 0;  // of the gradient of the normalised row: its sum, and its product with that row
    #pragma unroll
    for (int p = 0; p < PACKS; ++p) {
      const int column = p * span + member * WIDE;
      if (column >= width) continue;
      const auto by = scale.load<WIDE>(column);
      #pragma unroll
      for (int i = 0; i < WIDE; ++i) {
        const float hat = (wide(in[p].at[i]) - mean) * inverse, u = wide(up[p].at[i]);
        of_scale[p][i] += u * hat;
        of_shift[p][i] += u;
        plain += u * wide(by.at[i]);
        leaning += u * wide(by.at[i]) * hat;
      }
    }
    plain = team_sum(plain, sums) / width;
    leaning = team_sum(leaning, sums) / width;
    #pragma unroll
    for (int p = 0; p < PACKS; ++p) {
      const int column = p * span + member * WIDE;
      if (column >= width) continue;
      const auto by = scale.load<WIDE>(column);
      Pack<T, WIDE> out;
      #pragma unroll
      for (int i = 0; i < WIDE; ++i) {
        const float hat = (wide(in[p].at[i]) - mean) * inverse;
        const float g = (wide(up[p].at[i]) * wide(by.at[i]) - plain - hat * leaning) * inverse;
        out.at[i] = narrow<T>(gs.given() ? g + wide(past[p].at[i]) : g);
      }
      gx.store<WIDE>(start + column, out);
    }
  }
  // The teams' sums are added in their order, one run of columns after the other.
  #pragma unroll
  for (int p = 0; p < PACKS; ++p) {
    if (p * span >= width) continue;
    barrier();
    #pragma unroll
    for (int i = 0; i < WIDE; ++i) {
      room.set((2 * team + 0) * span + member * WIDE + i, of_scale[p][i]);
      room.set((2 * team + 1) * span + member * WIDE + i, of_shift[p][i]);
    }
    barrier();
    for (int at = thread(); at < 2 * span; at += threads()) {
      const int which = at / span, column = p * span + at % span;
      if (column >= width) continue;
      float sum = 0;
      for (int t = 0; t < teams; ++t) sum += room[2 * t * span + at];
      parts.set((2 * i64(block()) + which) * width + column, sum);
    }
  }
}
ENTRY(layer_norm_backward)

// y = (s − mean) / √(variance + 1e-6) · scale + shift over rows, where s is x or x + r; and its gradients. A team of
// TEAM warps processes one row. Each thread keeps PACKS packs of WIDE neighboring elements in registers, so that memory
// is read once.
#include "device.cuh"

typedef ELEMENT T;

constexpr int members = 32 * TEAM;  // threads of a team
constexpr int span = members * WIDE;  // columns that one pack of each thread covers
constexpr int max_threads = TEAM == 1 ? 128 : 256;  // threads of a block

// Returns the sum over the team. A team of several warps is the whole block.
DEVICE float team_sum(float x, Shared<float> scratch) {
  if constexpr (TEAM == 1) return warp_sum(x);
  return block_sum(x, scratch);
}

// x [rows, width], r [rows, width] or absent, scale and shift [width] → s [rows, width] if r is present, y [rows,
// width], and stats [rows, 2]: the mean of each row and 1 / √(variance + 1e-6).
KERNEL(max_threads)
void layer_norm(Global<const T> x, Global<const T> r, Global<const T> scale, Global<const T> shift, Global<T> s,
                Global<T> y, Global<float> stats, int rows, int width) {
  const auto scratch = shared<float>(0, TEAM);
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
    for (int i = 0; i < WIDE; ++i) v[p][i] = wide(in.data[i]);
    if (r.is_present()) {
      const auto addend = r.load<WIDE>(start + column);
      Pack<T, WIDE> out;
      // Normalizes the rounded sum, which is what the following layers read.
#pragma unroll
      for (int i = 0; i < WIDE; ++i) {
        out.data[i] = narrow<T>(v[p][i] + wide(addend.data[i]));
        v[p][i] = wide(out.data[i]);
      }
      s.store<WIDE>(start + column, out);
    }
#pragma unroll
    for (int i = 0; i < WIDE; ++i) sum += v[p][i];
  }
  const float mean = team_sum(sum, scratch) / width;
  float squares = 0;
#pragma unroll
  for (int p = 0; p < PACKS; ++p) {
    if (p * span + member * WIDE >= width) continue;
#pragma unroll
    for (int i = 0; i < WIDE; ++i) squares += (v[p][i] - mean) * (v[p][i] - mean);
  }
  const float inv_std = 1.0f / sqrtf(team_sum(squares, scratch) / width + 1e-6f);
#pragma unroll
  for (int p = 0; p < PACKS; ++p) {
    const int column = p * span + member * WIDE;
    if (column >= width) continue;
    const auto gamma = scale.load<WIDE>(column), addend = shift.load<WIDE>(column);
    Pack<T, WIDE> out;
#pragma unroll
    for (int i = 0; i < WIDE; ++i) {
      out.data[i] = narrow<T>((v[p][i] - mean) * inv_std * wide(gamma.data[i]) + wide(addend.data[i]));
    }
    y.store<WIDE>(start + column, out);
  }
  if (member == 0) stats.store<2>(2 * i64(row), {mean, inv_std});
}
ENTRY(layer_norm)

// s and stats from the forward pass; gs [rows, width] or absent and gy [rows, width], the gradients of s and y → gx
// [rows, width], the gradient of x and of r, and parts [blocks, 2 · width]: the gradients of scale and shift from this
// block's rows.
KERNEL(max_threads)
void layer_norm_backward(Global<const T> s, Global<const T> scale, Global<const float> stats, Global<const T> gs,
                         Global<const T> gy, Global<T> gx, Global<float> parts, int rows, int width,
                         int rows_per_block) {
  const int teams = threads() / members, team = thread() / members, member = thread() % members;
  const auto sums = shared<float>(0, TEAM), scratch = shared<float>(32, 2 * teams * span);
  const int end = min(int(block() + 1) * rows_per_block, rows);
  float g_scale[PACKS][WIDE] = {}, g_shift[PACKS][WIDE] = {};
  for (int row = block() * rows_per_block + team; row < end; row += teams) {
    const i64 start = i64(row) * width;
    const auto stat = stats.load<2>(2 * i64(row));
    const float mean = stat.data[0], inv_std = stat.data[1];
    Pack<T, WIDE> in[PACKS], g_out[PACKS], g_sum[PACKS];
#pragma unroll
    for (int p = 0; p < PACKS; ++p) {
      const int column = p * span + member * WIDE;
      if (column >= width) continue;
      in[p] = s.load<WIDE>(start + column);
      g_out[p] = gy.load<WIDE>(start + column);
      if (gs.is_present()) g_sum[p] = gs.load<WIDE>(start + column);
    }
    // Sums over the row: the gradient of the normalized row, and its product with that row.
    float g_mean = 0, g_dot = 0;
#pragma unroll
    for (int p = 0; p < PACKS; ++p) {
      const int column = p * span + member * WIDE;
      if (column >= width) continue;
      const auto gamma = scale.load<WIDE>(column);
#pragma unroll
      for (int i = 0; i < WIDE; ++i) {
        const float normalized = (wide(in[p].data[i]) - mean) * inv_std, u = wide(g_out[p].data[i]);
        g_scale[p][i] += u * normalized;
        g_shift[p][i] += u;
        g_mean += u * wide(gamma.data[i]);
        g_dot += u * wide(gamma.data[i]) * normalized;
      }
    }
    g_mean = team_sum(g_mean, sums) / width;
    g_dot = team_sum(g_dot, sums) / width;
#pragma unroll
    for (int p = 0; p < PACKS; ++p) {
      const int column = p * span + member * WIDE;
      if (column >= width) continue;
      const auto gamma = scale.load<WIDE>(column);
      Pack<T, WIDE> out;
#pragma unroll
      for (int i = 0; i < WIDE; ++i) {
        const float normalized = (wide(in[p].data[i]) - mean) * inv_std;
        const float g = (wide(g_out[p].data[i]) * wide(gamma.data[i]) - g_mean - normalized * g_dot) * inv_std;
        out.data[i] = narrow<T>(gs.is_present() ? g + wide(g_sum[p].data[i]) : g);
      }
      gx.store<WIDE>(start + column, out);
    }
  }
  // Adds the sums of the teams in order, one run of columns after the other.
#pragma unroll
  for (int p = 0; p < PACKS; ++p) {
    if (p * span >= width) continue;
    barrier();
#pragma unroll
    for (int i = 0; i < WIDE; ++i) {
      scratch.set((2 * team + 0) * span + member * WIDE + i, g_scale[p][i]);
      scratch.set((2 * team + 1) * span + member * WIDE + i, g_shift[p][i]);
    }
    barrier();
    for (int index = thread(); index < 2 * span; index += threads()) {
      const int vector = index / span, column = p * span + index % span;
      if (column >= width) continue;
      float sum = 0;
      for (int t = 0; t < teams; ++t) sum += scratch[2 * t * span + index];
      parts.set((2 * i64(block()) + vector) * width + column, sum);
    }
  }
}
ENTRY(layer_norm_backward)

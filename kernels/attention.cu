// Softmax attention over short sequences. A block computes a few heads of one sample with their keys and values in
// shared memory and scores and probabilities in registers; the softmax is computed online along the keys (Milakov and
// Gimelshein, 2018; Dao et al., 2022).
#include "attention.cuh"

// Tiles of 16 rows per warp; src/op/attention/short.rs uses the same number. With two, each matrix loaded from shared
// memory is used twice, which is the bottleneck of long sequences of narrow heads.
constexpr int row_tiles = HEAD <= 32 && !WINDOWED ? 2 : 1;
// Tiles of 16 keys per update of the running maximum.
constexpr int key_tiles = WINDOWED || HEAD == 80 ? 1 : 2;
// Minimum number of resident blocks of 256 threads per multiprocessor. With two, a thread has 128 registers; with more
// registers, fewer warps would hide the loads of one behind the products of another. One kernel does not fit and must
// not spill.
constexpr int min_blocks = HEAD == 80 && WINDOWED ? 1 : 2;

// Loads the queries from `row` on as A fragments directly from global memory: no other warp reads them.
DEVICE void load_query_fragments(u32 (&a)[row_tiles][k_steps][4], Global<const T> q, const HeadGroup& item, int head,
                                 int row, int stride) {
#pragma unroll
  for (int r = 0; r < row_tiles; ++r) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int i = row + 16 * r + 8 * h + lane() / 4;
      const i64 offset = i < item.queries ? item.query_row(i) * stride + (item.head + head) * HEAD : 0;
#pragma unroll
      for (int half = 0; half < 2 * k_steps; ++half) {
        const int column = 8 * half + 2 * (lane() % 4);
        Pack<T, 2> x = {};
        if (i < item.queries && column < HEAD) x = q.load<2>(offset + column);
        a[r][half / 2][half % 2 * 2 + h] = u32(x.data[0].bits) | u32(x.data[1].bits) << 16;
      }
    }
  }
}

// Normalizes the queries of the A fragments to unit length.
DEVICE void normalize_queries(u32 (&a)[row_tiles][k_steps][4]) {
#pragma unroll
  for (int r = 0; r < row_tiles; ++r) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float squares = 0;
#pragma unroll
      for (int half = 0; half < 2 * k_steps; ++half) {
        const auto x = unpack_pair(a[r][half / 2][half % 2 * 2 + h]);
        squares += wide(x.data[0]) * wide(x.data[0]) + wide(x.data[1]) * wide(x.data[1]);
      }
      squares += shuffle_xor(squares, 1);
      squares += shuffle_xor(squares, 2);
      const float factor = inverse_norm(squares);
#pragma unroll
      for (int half = 0; half < 2 * k_steps; ++half) {
        u32& pair = a[r][half / 2][half % 2 * 2 + h];
        const auto x = unpack_pair(pair);
        pair = narrow_pair<T>(wide(x.data[0]) * factor, wide(x.data[1]) * factor);
      }
    }
  }
}

// State of the online softmax of a warp's queries over the keys so far: the unnormalized output, the sum of weights,
// and the maximum score.
struct SoftmaxState {
  float output[row_tiles][col_tiles][4] = {}, sum[row_tiles][2], max[row_tiles][2];
};

// Replaces the scores s of key_tiles times 16 keys by weights 2^(c · (s − max)) and rescales the state to the new
// maximum.
DEVICE void update_softmax(float (&s)[row_tiles][key_tiles][2][4], SoftmaxState& state, float c, bool first) {
#pragma unroll
  for (int r = 0; r < row_tiles; ++r) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float max = first ? neg_infinity() : state.max[r][h];
#pragma unroll
      for (int n = 0; n < 2 * key_tiles; ++n) {
        max = fmaxf(max, fmaxf(s[r][n / 2][n % 2][2 * h], s[r][n / 2][n % 2][2 * h + 1]));
      }
      max = fmaxf(max, shuffle_xor(max, 1));
      max = fmaxf(max, shuffle_xor(max, 2));
      const float offset = max == neg_infinity() ? 0 : max * c;  // all keys so far are masked
      float sum = 0;
#pragma unroll
      for (int n = 0; n < 4 * key_tiles; ++n) {
        float& x = s[r][n / 4][n / 2 % 2][2 * h + n % 2];
        x = exp2_approx(x * c - offset);
        sum += x;
      }
      if (!first) {
        const float rescale = exp2_approx(state.max[r][h] * c - offset);
        sum += state.sum[r][h] * rescale;
#pragma unroll
        for (int n = 0; n < col_tiles; ++n)
          state.output[r][n][2 * h] *= rescale, state.output[r][n][2 * h + 1] *= rescale;
      }
      state.sum[r][h] = sum;
      state.max[r][h] = max;
    }
  }
}

// Processes keys j0 .. j0 + 16 · key_tiles, at most to `end`, for the queries from `row` on. c converts dot products to
// base-2 exponents.
DEVICE void process_keys(SoftmaxState& state, const u32 (&a)[row_tiles][k_steps][4], Shared<T> k, Shared<T> v,
                         const AttentionMask& mask, const Bias& bias, int row, int j0, int end, float c) {
  float s[row_tiles][key_tiles][2][4];
#pragma unroll
  for (int w = 0; w < key_tiles; ++w) {
    const int j = j0 + 16 * w;
    float tile[row_tiles][2][4] = {};
    if (j < end) accumulate_transposed(tile, a, k, j);
#pragma unroll
    for (int r = 0; r < row_tiles; ++r) {
      const bool is_full = mask.is_full(row + 16 * r, j);
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        float x = tile[r][e / 4][e % 4];
        const int query = row + 16 * r + lane() / 4 + e % 4 / 2 * 8, key = j + e / 4 * 8 + lane() % 4 * 2 + e % 2;
        if (!is_full && (j >= end || !mask.is_visible(query, key))) {
          x = neg_infinity();
        } else if (COSINE) {
          x = x * c + bias.scaled(query, key);
        }
        s[r][w][e / 4][e % 4] = x;
      }
    }
  }
  update_softmax(s, state, COSINE ? 1.0f : c, j0 == 0);
#pragma unroll
  for (int w = 0; w < key_tiles; ++w) {
    if (j0 + 16 * w >= end) continue;
    u32 p[row_tiles][4];
#pragma unroll
    for (int r = 0; r < row_tiles; ++r) to_a_fragment(p[r], s[r][w]);
    accumulate(state.output, p, v, j0 + 16 * w);
  }
}

// q [B, first_query + windows · queries, q_stride] at column 0; keys and then values in the last 2 · D columns of kv
// [B, windows · keys, kv_stride], HEAD columns per head; index [windows, keys] and region [tokens] of windows, or
// absent; scales [heads] and bias [heads, keys, keys] of cosine attention, or absent → out [B, windows · queries, D]
// and lse [B, heads, windows · queries], the base-2 logarithm of each query's sum of exponentials. One block per group
// of heads of each window of each sample.
KERNEL(256, min_blocks)
void attention(Global<const T> q, Global<const T> kv, Global<const int> index, Global<const int> region,
               Global<const float> scales, Global<const float> bias, Global<T> out, Global<float> lse, int heads,
               int group_size, int windows, int queries, int first_query, int keys, int q_stride, int kv_stride,
               int causal, float scale) {
  const HeadGroup item(index, heads, group_size, windows, queries, first_query, keys,
                       block() / HeadGroup::groups(heads, group_size));
  const int padded = round_up(keys, 16), width = heads * HEAD;
  const u32 bytes = group_size * padded * pitch * 2;
  const auto k = shared<T>(0, bytes / 2), v = shared<T>(bytes, bytes / 2);
  const int region_rows = WINDOWED ? round_up(keys, 16 * row_tiles) : 0;
  const AttentionMask mask = {shared<int>(2 * bytes, region_rows), causal != 0, keys, first_query};

  const int key_column = kv_stride - 2 * width + item.head * HEAD;
  load_rows(k, kv, item.heads, keys, padded, [&](int j) { return item.key_row(j) * kv_stride + key_column; });
  load_rows(v, kv, item.heads, keys, padded, [&](int j) { return item.key_row(j) * kv_stride + key_column + width; });
  copy_commit();
  if (WINDOWED) load_regions(mask.region, region, item, region_rows);
  if (COSINE) {
    copy_wait<0>();
    barrier();
    normalize_rows(k, item.heads * padded, [](int, float) {});
  }

  const int tiles_per_head = round_up(queries, 16 * row_tiles) / (16 * row_tiles), jobs = item.heads * tiles_per_head;
  for (int job = warp();; job += threads() / 32) {
    const int head = job / tiles_per_head, row = job % tiles_per_head * 16 * row_tiles;
    u32 a[row_tiles][k_steps][4];
    if (job < jobs) load_query_fragments(a, q, item, head, row, q_stride);
    if (job == int(warp())) {
      copy_wait<0>();
      barrier();
    }
    if (job >= jobs) return;
    if (COSINE) normalize_queries(a);
    const float c = (COSINE ? scales[item.head + head] : scale) * 1.44269504f, exponent = COSINE ? 1.0f : c;
    const Bias head_bias = {COSINE ? bias.offset((item.head + head) * keys * keys) : bias, keys};
    const int end = causal ? min(keys, row + 16 * row_tiles + first_query) : keys;
    const auto head_k = k.offset(head * padded * pitch), head_v = v.offset(head * padded * pitch);
    SoftmaxState state;
    for (int j = 0; j < end; j += 16 * key_tiles) {
      process_keys(state, a, head_k, head_v, mask, head_bias, row, j, end, c);
    }
#pragma unroll
    for (int r = 0; r < row_tiles; ++r) {
      i64 offsets[2];
      bool is_valid[2];
      float factor[2];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int i = row + 16 * r + 8 * h + lane() / 4;
        float sum = state.sum[r][h];
        sum += shuffle_xor(sum, 1);
        sum += shuffle_xor(sum, 2);
        is_valid[h] = i < queries;
        offsets[h] = is_valid[h] ? item.output_row(i) * width + (item.head + head) * HEAD : 0;
        factor[h] = 1.0f / sum;
        if (is_valid[h] && lane() % 4 == 0) {
          lse.set(item.lse_offset(head, heads) + i, state.max[r][h] * exponent + log2f(sum));
        }
      }
      store_rows(out, offsets, is_valid, state.output[r], factor);
    }
  }
}
ENTRY(attention)

// Softmax attention over short sequences: a block computes a few heads of one sample, their keys and values in shared
// memory, scores and probabilities in registers alone, the softmax as it goes along the keys (Milakov and Gimelshein,
// 2018; Dao et al., 2022).
#include "attention.cuh"

// Tiles of 16 rows that a warp computes at once, as src/op/attention/short.rs knows. Two make each matrix that comes from
// shared memory serve twice, which is what bounds long sequences of narrow heads.
constexpr int rows_at_once = HEAD <= 32 && !WINDOWED ? 2 : 1;
// Tiles of 16 keys between two looks at the largest score.
constexpr int span = WINDOWED || HEAD == 80 ? 1 : 2;
// Blocks of 256 threads that a multiprocessor is to hold. With two, a thread has 128 registers: with more registers fewer
// warps would hide one's loads behind another's products. One kernel does not fit, and must not spill.
constexpr int held = HEAD == 80 && WINDOWED ? 1 : 2;

// The queries' rows from `row` on as the left factor, straight from global memory: no other warp wants them.
DEVICE void load_queries(u32 (&a)[rows_at_once][steps][4], Global<const T> q, const Part& part, int head, int row,
                         int stride) {
#pragma unroll
  for (int r = 0; r < rows_at_once; ++r) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int i = row + 16 * r + 8 * h + lane() / 4;
      const i64 at = i < part.queries ? part.query(i) * stride + (part.head + head) * HEAD : 0;
#pragma unroll
      for (int half = 0; half < 2 * steps; ++half) {
        const int column = 8 * half + 2 * (lane() % 4);
        Pack<T, 2> x = {};
        if (i < part.queries && column < HEAD) x = q.load<2>(at + column);
        a[r][half / 2][half % 2 * 2 + h] = u32(x.at[0].bits) | u32(x.at[1].bits) << 16;
      }
    }
  }
}

// Brings the queries of the left factor to length one.
DEVICE void normalise_queries(u32 (&a)[rows_at_once][steps][4]) {
#pragma unroll
  for (int r = 0; r < rows_at_once; ++r) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float squares = 0;
#pragma unroll
      for (int half = 0; half < 2 * steps; ++half) {
        const auto x = two(a[r][half / 2][half % 2 * 2 + h]);
        squares += wide(x.at[0]) * wide(x.at[0]) + wide(x.at[1]) * wide(x.at[1]);
      }
      squares += shuffle_xor(squares, 1);
      squares += shuffle_xor(squares, 2);
      const float factor = to_one(squares);
#pragma unroll
      for (int half = 0; half < 2 * steps; ++half) {
        u32& pair = a[r][half / 2][half % 2 * 2 + h];
        const auto x = two(pair);
        pair = narrow_pair<T>(wide(x.at[0]) * factor, wide(x.at[1]) * factor);
      }
    }
  }
}

// Sums of a warp's queries over the keys so far, relative to the largest score so far.
struct Sums {
  float values[rows_at_once][tiles][4] = {}, weights[rows_at_once][2], top[rows_at_once][2];
};

// Scores s of span times 16 keys become weights 2^(c · (s − top)), and the sums relative to the new top.
DEVICE void weigh(float (&s)[rows_at_once][span][2][4], Sums& sums, float c, bool first) {
#pragma unroll
  for (int r = 0; r < rows_at_once; ++r) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float top = first ? nothing() : sums.top[r][h];
#pragma unroll
      for (int n = 0; n < 2 * span; ++n) {
        top = fmaxf(top, fmaxf(s[r][n / 2][n % 2][2 * h], s[r][n / 2][n % 2][2 * h + 1]));
      }
      top = fmaxf(top, shuffle_xor(top, 1));
      top = fmaxf(top, shuffle_xor(top, 2));
      const float offset = top == nothing() ? 0 : top * c;  // Nothing seen yet.
      float weights = 0;
#pragma unroll
      for (int n = 0; n < 4 * span; ++n) {
        float& x = s[r][n / 4][n / 2 % 2][2 * h + n % 2];
        x = power_of_two(x * c - offset);
        weights += x;
      }
      if (!first) {
        const float shrink = power_of_two(sums.top[r][h] * c - offset);
        weights += sums.weights[r][h] * shrink;
#pragma unroll
        for (int n = 0; n < tiles; ++n) sums.values[r][n][2 * h] *= shrink, sums.values[r][n][2 * h + 1] *= shrink;
      }
      sums.weights[r][h] = weights;
      sums.top[r][h] = top;
    }
  }
}

// Takes keys j0 .. j0 + 16 · span, as far as `end`, into the sums of the queries from `row` on. c takes products to the
// base-2 exponents of weights.
DEVICE void attend(Sums& sums, const u32 (&a)[rows_at_once][steps][4], Shared<T> k, Shared<T> v, const Sight& sight,
                   const Bias& bias, int row, int j0, int end, float c) {
  float s[rows_at_once][span][2][4];
#pragma unroll
  for (int w = 0; w < span; ++w) {
    const int j = j0 + 16 * w;
    float tile[rows_at_once][2][4] = {};
    if (j < end) add_scores(tile, a, k, j);
#pragma unroll
    for (int r = 0; r < rows_at_once; ++r) {
      const bool whole = sight.whole(row + 16 * r, j);
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        float x = tile[r][e / 4][e % 4];
        const int query = row + 16 * r + lane() / 4 + e % 4 / 2 * 8, key = j + e / 4 * 8 + lane() % 4 * 2 + e % 2;
        if (!whole && (j >= end || !sight.sees(query, key))) {
          x = nothing();
        } else if (COSINE) {
          x = x * c + bias.of(query, key);
        }
        s[r][w][e / 4][e % 4] = x;
      }
    }
  }
  weigh(s, sums, COSINE ? 1.0f : c, j0 == 0);
#pragma unroll
  for (int w = 0; w < span; ++w) {
    if (j0 + 16 * w >= end) continue;
    u32 p[rows_at_once][4];
#pragma unroll
    for (int r = 0; r < rows_at_once; ++r) as_left(p[r], s[r][w]);
    add_mixture(sums.values, p, v, j0 + 16 * w);
  }
}

// q [B, from + windows · queries, q_stride] at column 0, keys and then values in the last 2 · D columns of kv
// [B, windows · keys, kv_stride], heads of HEAD inside each; index [windows, keys] and region [tokens] of windows, or
// absent; scales [heads] and bias [heads, keys, keys] of cosines, or absent → out [B, windows · queries, D] and lse
// [B, heads, windows · queries], the base-2 logarithm of each query's sum of exponentials. A block for each group of heads
// of each window of each sample.
KERNEL(256, held) void attention(Global<const T> q, Global<const T> kv, Global<const int> index,
                                 Global<const int> region, Global<const float> scales, Global<const float> bias,
                                 Global<T> out, Global<float> lse, int heads, int group, int windows, int queries,
                                 int from, int keys, int q_stride, int kv_stride, int causal, float scale) {
  const Part part(index, heads, group, windows, queries, from, keys, block() / Part::groups(heads, group));
  const int padded = up(keys, 16), width = heads * HEAD;
  const u32 bytes = group * padded * pitch * 2;
  const auto k = shared<T>(0, bytes / 2), v = shared<T>(bytes, bytes / 2);
  const int marked = WINDOWED ? up(keys, 16 * rows_at_once) : 0;
  const Sight sight = {shared<int>(2 * bytes, marked), causal != 0, keys, from};

  const int key_column = kv_stride - 2 * width + part.head * HEAD;
  stage(k, kv, part.heads, keys, padded, [&](int j) { return part.key(j) * kv_stride + key_column; });
  stage(v, kv, part.heads, keys, padded, [&](int j) { return part.key(j) * kv_stride + key_column + width; });
  copy_commit();
  if (WINDOWED) stage_regions(sight.region, region, part, marked);
  if (COSINE) {
    copy_wait<0>();
    barrier();
    normalise(k, part.heads * padded, [](int, float) {});
  }

  const int each = up(queries, 16 * rows_at_once) / (16 * rows_at_once), jobs = part.heads * each;
  for (int job = warp();; job += threads() / 32) {
    const int head = job / each, row = job % each * 16 * rows_at_once;
    u32 a[rows_at_once][steps][4];
    if (job < jobs) load_queries(a, q, part, head, row, q_stride);
    if (job == int(warp())) {
      copy_wait<0>();
      barrier();
    }
    if (job >= jobs) return;
    if (COSINE) normalise_queries(a);
    const float c = (COSINE ? scales[part.head + head] : scale) * 1.44269504f, exponent = COSINE ? 1.0f : c;
    const Bias own_bias = {COSINE ? bias.from((part.head + head) * keys * keys) : bias, keys};
    const int end = causal ? min(keys, row + 16 * rows_at_once + from) : keys;
    const auto own_k = k.from(head * padded * pitch), own_v = v.from(head * padded * pitch);
    Sums sums;
    for (int j = 0; j < end; j += 16 * span) {
      attend(sums, a, own_k, own_v, sight, own_bias, row, j, end, c);
    }
#pragma unroll
    for (int r = 0; r < rows_at_once; ++r) {
      i64 at[2];
      bool kept[2];
      float factor[2];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int i = row + 16 * r + 8 * h + lane() / 4;
        float weights = sums.weights[r][h];
        weights += shuffle_xor(weights, 1);
        weights += shuffle_xor(weights, 2);
        kept[h] = i < queries;
        at[h] = kept[h] ? part.answer(i) * width + (part.head + head) * HEAD : 0;
        factor[h] = 1.0f / weights;
        if (kept[h] && lane() % 4 == 0) {
          lse.set(part.number(head, heads) + i, sums.top[r][h] * exponent + log2f(weights));
        }
      }
      put(out, at, kept, sums.values[r], factor);
    }
  }
}
ENTRY(attention)

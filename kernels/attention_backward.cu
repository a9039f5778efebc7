// Gradients of attention over short sequences. A block computes a few heads of one sample with all inputs in shared
// memory. Probabilities are recomputed from the log-sum-exp that the forward pass saved, once with keys as rows and
// once with queries as rows, so that one warp accumulates the whole of each gradient in registers, in a fixed order.
#include "attention.cuh"

// Jobs per tile of 16 keys; src/op/attention/short.rs uses the same number. One job computes the gradients of keys and
// values; if the registers do not hold both, there is one job for each, and the probabilities are computed once more.
constexpr int jobs_per_key_tile = HEAD <= 32 ? 1 : 2;
// Threads of a block, and minimum number of resident blocks per multiprocessor, as in the forward pass. On Blackwell
// one kernel does not fit. Cosine attention takes more than 128 registers and works on small windows: its blocks are
// smaller.
constexpr int max_threads = COSINE ? 128 : 256;
constexpr int min_blocks = COSINE ? (HEAD <= 32 ? 3 : 2) : HEAD == 80 && architecture == 100 ? 1 : 2;

// Shared memory of one head. Rows of queries and of keys are padded to whole jobs.
struct HeadMemory {
  Shared<T> q, k, v, g;      // g: the gradient of the output
  Shared<float> lse, delta;  // per query; delta: output · g
  // Cosine attention only: the factors that normalized each query and key, and the accumulated gradients of the bias
  // [padded_queries, bias_pitch] and, per job of queries, of the scale.
  Shared<float> query_inv_norm, key_inv_norm, bias_grad, scale_grad;
  int bias_pitch;
};

// Elements between rows of the bias gradient, for padded keys: the 4 rows that half a warp accesses at once are in
// different banks.
DEVICE int bias_grad_pitch(int padded_keys) { return padded_keys + 8; }

// Loads the A fragments of 16 rows.
DEVICE void load_a_fragments(u32 (&a)[1][k_steps][4], Shared<T> rows, int row) {
#pragma unroll
  for (int step = 0; step < k_steps; ++step) load_fragment<false>(a[0][step], rows, row, step);
}

// Backward pass of softmax for one score: s becomes its probability; d, the dot product of g and the key's value,
// becomes the gradient of the scaled score.
DEVICE void softmax_backward(float& s, float& d, float c, float lse, float delta, bool is_visible) {
  s = is_visible ? exp2_approx(s * c - lse) : 0;
  d = s * (d - delta);
}

// Computes the gradients of the 16 keys from `row` on, of their values, or of both: rows are keys, columns queries.
template <bool KEYS, bool VALUES>
DEVICE void key_gradients(const HeadMemory& memory, const AttentionMask& mask, const Bias& bias, int row, int queries,
                          float c, float (&gk)[1][col_tiles][4], float (&gv)[1][col_tiles][4]) {
  u32 k[1][k_steps][4], v[1][k_steps][4];
  load_a_fragments(k, memory.k, row);
  if (KEYS) load_a_fragments(v, memory.v, row);
  for (int i = mask.causal ? max(0, row - mask.first_query) / 16 * 16 : 0; i < queries; i += 16) {
    float s[1][2][4] = {}, d[1][2][4] = {};
    accumulate_transposed(s, k, memory.q, i);
    if (KEYS) accumulate_transposed(d, v, memory.g, i);
    const bool is_full = mask.is_full(i, row);
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      const int query = i + 8 * n + lane() % 4 * 2;
      const auto lse = memory.lse.load<2>(query), delta = memory.delta.load<2>(query);
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int query_index = query + e % 2, key = row + lane() / 4 + e / 2 * 8;
        const bool is_visible = is_full || mask.is_visible(query_index, key);
        const float score_bias = COSINE && is_visible ? bias.scaled(query_index, key) : 0;
        softmax_backward(s[0][n][e], d[0][n][e], c, lse.data[e % 2] - score_bias, delta.data[e % 2], is_visible);
      }
    }
    u32 a[1][4];
    if (VALUES) to_a_fragment(a[0], s[0]), accumulate(gv, a, memory.g, i);
    if (KEYS) to_a_fragment(a[0], d[0]), accumulate(gk, a, memory.q, i);
  }
}

// Adds the gradients of 16 × 16 scores, starting at `row` and `key`, to the gradient of the bias.
DEVICE void add_to_bias_grad(const HeadMemory& memory, const float (&d)[2][4], int row, int key) {
#pragma unroll
  for (int n = 0; n < 2; ++n) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const u32 index = (row + lane() / 4 + 8 * h) * memory.bias_pitch + key + 8 * n + lane() % 4 * 2;
      auto sum = memory.bias_grad.load<2>(index);
      sum.data[0] += d[n][2 * h], sum.data[1] += d[n][2 * h + 1];
      memory.bias_grad.store<2>(index, sum);
    }
  }
}

// Accumulates, for one query over its keys, the means whose covariance is the gradient of the scale: of the cosine x
// and of d, the dot product of g and the value, under probabilities p. (Summing the gradients of scores times cosines
// would carry the rounding error of delta along.)
struct ScaleGradient {
  float cosine = 0, value = 0, product = 0;
  DEVICE void add(float p, float d, float x) { cosine += p * x, value += p * d, product += p * d * x; }
  // Sums over the four lanes that share the query.
  DEVICE float covariance() const {
    float sums[3] = {cosine, value, product};
#pragma unroll
    for (int i = 0; i < 3; ++i) {
      sums[i] += shuffle_xor(sums[i], 1);
      sums[i] += shuffle_xor(sums[i], 2);
    }
    return sums[2] - sums[0] * sums[1];
  }
};

// Computes the gradients of the 16 queries from `row` on: rows are queries, columns keys. For cosine attention, returns
// the sum over two queries of the gradient of the scale, in each of their four lanes.
DEVICE float query_gradients(const HeadMemory& memory, const AttentionMask& mask, const Bias& bias, int row, float c,
                             float (&gq)[1][col_tiles][4]) {
  u32 q[1][k_steps][4], g[1][k_steps][4];
  load_a_fragments(q, memory.q, row);
  load_a_fragments(g, memory.g, row);
  const int query = row + lane() / 4;
  const float lse[2] = {memory.lse[query], memory.lse[query + 8]},
              delta[2] = {memory.delta[query], memory.delta[query + 8]};
  const int end = mask.causal ? min(mask.keys, row + 16 + mask.first_query) : mask.keys;
  ScaleGradient scale_gradients[2];
  for (int j = 0; j < end; j += 16) {
    float s[1][2][4] = {}, d[1][2][4] = {};
    accumulate_transposed(s, q, memory.k, j);
    accumulate_transposed(d, g, memory.v, j);
    const bool is_full = mask.is_full(row, j);
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      const int h = e % 4 / 2, key = j + e / 4 * 8 + lane() % 4 * 2 + e % 2;
      const bool is_visible = is_full || mask.is_visible(query + 8 * h, key);
      const float score_bias = COSINE && is_visible ? bias.scaled(query + 8 * h, key) : 0;
      const float product = s[0][e / 4][e % 4], value = d[0][e / 4][e % 4];
      softmax_backward(s[0][e / 4][e % 4], d[0][e / 4][e % 4], c, lse[h] - score_bias, delta[h], is_visible);
      if (COSINE) scale_gradients[h].add(s[0][e / 4][e % 4], value, product);
    }
    if (COSINE) add_to_bias_grad(memory, d[0], row, j);
    u32 a[1][4];
    to_a_fragment(a[0], d[0]);
    accumulate(gq, a, memory.k, j);
  }
  return COSINE ? scale_gradients[0].covariance() + scale_gradients[1].covariance() : 0;
}

// Backward pass of normalization, without the factor 1 / norm: removes from the gradients x of 16 unit rows their
// component along the row.
DEVICE void normalize_backward(float (&x)[col_tiles][4], Shared<T> rows, int row) {
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const u32 start = (row + lane() / 4 + 8 * h) * pitch + lane() % 4 * 2;
    float dot = 0;
#pragma unroll
    for (int n = 0; n < col_tiles; ++n) {
      const auto y = rows.load<2>(start + 8 * n);
      dot += x[n][2 * h] * wide(y.data[0]) + x[n][2 * h + 1] * wide(y.data[1]);
    }
    dot += shuffle_xor(dot, 1);
    dot += shuffle_xor(dot, 2);
#pragma unroll
    for (int n = 0; n < col_tiles; ++n) {
      const auto y = rows.load<2>(start + 8 * n);
      x[n][2 * h] -= wide(y.data[0]) * dot, x[n][2 * h + 1] -= wide(y.data[1]) * dot;
    }
  }
}

// Stores the 16 rows from `row` on, up to `rows`, multiplied by factor(row), at row_offset(row).
template <class Factor, class RowOffset>
DEVICE void store_tile(Global<T> to, const float (&x)[1][col_tiles][4], int row, int rows, Factor factor,
                       RowOffset row_offset) {
  i64 offsets[2];
  bool is_valid[2];
  float factors[2];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int i = row + 8 * h + lane() / 4;
    is_valid[h] = i < rows;
    offsets[h] = is_valid[h] ? row_offset(i) : 0;
    factors[h] = factor(i);
  }
  store_rows(to, offsets, is_valid, x[0], factors);
}

// Loads lse and computes delta for each query of each of the block's heads: [heads, padded] each. Padding rows get
// values that make their probabilities, and thus everything they contribute, zero.
DEVICE void load_lse_and_delta(Shared<float> lse_dst, Shared<float> delta_dst, Global<const T> out,
                               Global<const T> gout, Global<const float> lse, const HeadGroup& item, int all_heads,
                               int padded) {
  for (int n = thread(); n < item.heads * padded; n += threads()) {
    const int head = n / padded, i = n % padded;
    float query_lse = -neg_infinity(), delta = 0;
    if (i < item.queries) {
      const i64 offset = (item.output_row(i) * all_heads + item.head + head) * HEAD;
#pragma unroll
      for (int column = 0; column < HEAD; column += 8) {
        const auto x = out.load<8>(offset + column), y = gout.load<8>(offset + column);
#pragma unroll
        for (int e = 0; e < 8; ++e) delta += wide(x.data[e]) * wide(y.data[e]);
      }
      query_lse = lse[item.lse_offset(head, all_heads) + i];
    }
    lse_dst.set(n, query_lse);
    delta_dst.set(n, delta);
  }
}

// The kernel's arguments and the block's shared memory.
struct BlockContext {
  Global<const T> q, kv, out, gout;
  Global<const int> index, region;
  Global<const float> scales, bias, lse;
  Global<T> gq, gkv;
  int heads, group_size, windows, queries, first_query, keys, q_stride, kv_stride, causal;
  float scale;
  HeadMemory memory;
  Shared<int> regions;
  int first_column, key_column;  // of the block's first head

  DEVICE int padded_queries() const { return round_up(queries, 16); }
  DEVICE int padded_keys() const { return round_up(keys, 16); }
  // Assigns shared memory; src/op/attention/short.rs computes the same size.
  DEVICE void assign_shared_memory() {
    const u32 query_bytes = group_size * padded_queries() * pitch * 2,
              key_bytes = group_size * padded_keys() * pitch * 2;
    memory.q = shared<T>(0, query_bytes / 2);
    memory.g = shared<T>(query_bytes, query_bytes / 2);
    memory.k = shared<T>(2 * query_bytes, key_bytes / 2);
    memory.v = shared<T>(2 * query_bytes + key_bytes, key_bytes / 2);
    u32 offset = 2 * query_bytes + 2 * key_bytes;
    const auto floats = [&](u32 count) {
      const auto part = shared<float>(offset, count);
      offset += 4 * count;
      return part;
    };
    memory.lse = floats(group_size * padded_queries());
    memory.delta = floats(group_size * padded_queries());
    regions = shared<int>(offset, WINDOWED ? padded_keys() : 0);
    if (!COSINE) return;
    offset += 4 * padded_keys();
    memory.bias_pitch = bias_grad_pitch(padded_keys());
    memory.query_inv_norm = floats(group_size * padded_queries());
    memory.key_inv_norm = floats(group_size * padded_keys());
    memory.bias_grad = floats(group_size * padded_queries() * memory.bias_pitch);
    memory.scale_grad = floats(group_size * padded_queries() / 16);
  }
  DEVICE HeadMemory memory_of_head(int head) const {
    const u32 query = head * padded_queries(), key = head * padded_keys();
    HeadMemory result = {memory.q.offset(query * pitch), memory.k.offset(key * pitch), memory.v.offset(key * pitch),
                         memory.g.offset(query * pitch), memory.lse.offset(query),     memory.delta.offset(query)};
    if (COSINE) {
      result.query_inv_norm = memory.query_inv_norm.offset(query);
      result.key_inv_norm = memory.key_inv_norm.offset(key);
      result.bias_grad = memory.bias_grad.offset(query * memory.bias_pitch);
      result.scale_grad = memory.scale_grad.offset(query / 16);
      result.bias_pitch = memory.bias_pitch;
    }
    return result;
  }
  // Offsets of the rows of the block's first head.
  DEVICE i64 query_offset(const HeadGroup& item, int i) const { return item.query_row(i) * q_stride + first_column; }
  DEVICE i64 key_offset(const HeadGroup& item, int j) const { return item.key_row(j) * kv_stride + key_column; }
};

// Loads everything that the gradients of one sequence depend on to shared memory, and writes the zero gradients of the
// queries before first_query.
DEVICE void load_sequence(const BlockContext& context, const HeadGroup& item) {
  const HeadMemory& memory = context.memory;
  const int padded_queries = context.padded_queries(), padded_keys = context.padded_keys(),
            width = context.heads * HEAD;
  load_rows(memory.q, context.q, item.heads, item.queries, padded_queries,
            [&](int i) { return context.query_offset(item, i); });
  load_rows(memory.g, context.gout, item.heads, item.queries, padded_queries,
            [&](int i) { return item.output_row(i) * width + context.first_column; });
  load_rows(memory.k, context.kv, item.heads, item.keys, padded_keys,
            [&](int j) { return context.key_offset(item, j); });
  load_rows(memory.v, context.kv, item.heads, item.keys, padded_keys,
            [&](int j) { return context.key_offset(item, j) + width; });
  copy_commit();
  if (WINDOWED) load_regions(context.regions, context.region, item, padded_keys);
  load_lse_and_delta(memory.lse, memory.delta, context.out, context.gout, context.lse, item, context.heads,
                     padded_queries);
  const u32 packs = item.heads * col_tiles;
  for (u32 i = thread(); i < context.first_query * packs; i += threads()) {
    const Pack<T, 8> zeros = {};
    const i64 row = i64(item.sample) * (context.first_query + context.queries) + i / packs;
    context.gq.store<8>(row * context.q_stride + context.first_column + i % packs * 8, zeros);
  }
  copy_wait<0>();
  barrier();
  if (!COSINE) return;
  normalize_rows(memory.q, item.heads * padded_queries,
                 [&](int n, float factor) { memory.query_inv_norm.set(n, factor); });
  normalize_rows(memory.k, item.heads * padded_keys, [&](int n, float factor) { memory.key_inv_norm.set(n, factor); });
  barrier();
}

// Executes one job of a head: the gradients of 16 queries, or of 16 keys, their values, or both.
DEVICE void run_job(const BlockContext& context, const HeadGroup& item, const AttentionMask& mask, int head, int job) {
  const HeadMemory memory = context.memory_of_head(head);
  const Bias bias = {COSINE ? context.bias.offset((item.head + head) * item.keys * item.keys) : context.bias,
                     item.keys};
  const float scale = COSINE ? context.scales[item.head + head] : context.scale, c = scale * 1.44269504f;
  const int column = head * HEAD, width = context.heads * HEAD,
            key_jobs = jobs_per_key_tile * context.padded_keys() / 16;
  float first_sums[1][col_tiles][4] = {}, second_sums[1][col_tiles][4] = {};
  const auto key_offset = [&](int j) { return context.key_offset(item, j) + column; };
  const auto value_offset = [&](int j) { return context.key_offset(item, j) + width + column; };
  const auto key_factor_of = [&](int j) { return COSINE ? scale * memory.key_inv_norm[j] : scale; };
  const auto unit_factor = [](int) { return 1.0f; };
  if (job >= key_jobs) {
    const int row = (job - key_jobs) * 16;
    const float scale_grad = query_gradients(memory, mask, bias, row, c, first_sums);
    if (COSINE) {
      normalize_backward(first_sums[0], memory.q, row);
      const float sum = warp_sum(lane() % 4 == 0 ? scale_grad : 0.0f);
      if (lane() == 0) memory.scale_grad.set(row / 16, memory.scale_grad[row / 16] + sum);
    }
    store_tile(
        context.gq, first_sums, row, item.queries,
        [&](int i) { return COSINE ? scale * memory.query_inv_norm[i] : scale; },
        [&](int i) { return context.query_offset(item, i) + column; });
  } else if (jobs_per_key_tile == 1) {
    key_gradients<true, true>(memory, mask, bias, job * 16, item.queries, c, first_sums, second_sums);
    if (COSINE) normalize_backward(first_sums[0], memory.k, job * 16);
    store_tile(context.gkv, first_sums, job * 16, item.keys, key_factor_of, key_offset);
    store_tile(context.gkv, second_sums, job * 16, item.keys, unit_factor, value_offset);
  } else if (job % 2 == 0) {
    key_gradients<true, false>(memory, mask, bias, job / 2 * 16, item.queries, c, first_sums, second_sums);
    if (COSINE) normalize_backward(first_sums[0], memory.k, job / 2 * 16);
    store_tile(context.gkv, first_sums, job / 2 * 16, item.keys, key_factor_of, key_offset);
  } else {
    key_gradients<false, true>(memory, mask, bias, job / 2 * 16, item.queries, c, second_sums, first_sums);
    store_tile(context.gkv, first_sums, job / 2 * 16, item.keys, unit_factor, value_offset);
  }
}

// Executes all jobs of one sequence.
DEVICE void run_sequence(const BlockContext& context, u32 sequence) {
  const HeadGroup item(context.index, context.heads, context.group_size, context.windows, context.queries,
                       context.first_query, context.keys, sequence);
  const AttentionMask mask = {context.regions, context.causal != 0, context.keys, context.first_query};
  load_sequence(context, item);
  const int jobs_per_head = (jobs_per_key_tile * context.padded_keys() + context.padded_queries()) / 16;
  for (int job = warp(); job < item.heads * jobs_per_head; job += threads() / 32) {
    run_job(context, item, mask, job / jobs_per_head, job % jobs_per_head);
  }
}

// Zeros the block's accumulated gradients of bias and scale. A barrier must follow.
DEVICE void clear_grad_sums(const BlockContext& context) {
  const int jobs = context.group_size * context.padded_queries() / 16, count = jobs * 16 * context.memory.bias_pitch;
  for (int i = thread(); i < count; i += threads()) context.memory.bias_grad.set(i, 0);
  for (int i = thread(); i < jobs; i += threads()) context.memory.scale_grad.set(i, 0);
}

// Stores them to a row of parts: [heads, keys, keys] of the bias, then [heads] of the scale.
DEVICE void store_grad_sums(const BlockContext& context, Global<float> parts, int first_head, int block_heads) {
  const int keys = context.keys, pairs = keys * keys, jobs = context.padded_queries() / 16;
  for (int i = thread(); i < block_heads * pairs; i += threads()) {
    const int row = i / pairs * context.padded_queries() + i % pairs / keys;
    parts.set(first_head * pairs + i, context.memory.bias_grad[row * context.memory.bias_pitch + i % keys]);
  }
  for (int head = thread(); head < block_heads; head += threads()) {
    float sum = 0;
    for (int job = 0; job < jobs; ++job) sum += context.memory.scale_grad[head * jobs + job];
    parts.set(context.heads * pairs + first_head + head, sum);
  }
}

// Inputs as in the forward pass, its outputs out and lse, and the gradient gout [B, windows · queries, D] → gq and gkv,
// laid out as q and kv; they may be one tensor; queries before first_query get zeros. One warp accumulates each row of
// a gradient, in a fixed order. For cosine attention, a block processes sequences_per_block of the `sequences` one
// after the other and sums their gradients of bias and scale in its row of parts [sequences / sequences_per_block,
// heads · keys · keys + heads]; otherwise it processes one sequence.
KERNEL(max_threads, min_blocks)
void attention_backward(Global<const T> q, Global<const T> kv, Global<const int> index, Global<const int> region,
                        Global<const float> scales, Global<const float> bias, Global<const T> out, Global<const T> gout,
                        Global<const float> lse, Global<T> gq, Global<T> gkv, Global<float> parts, int heads,
                        int group_size, int windows, int queries, int first_query, int keys, int q_stride,
                        int kv_stride, int causal, float scale, int sequences, int sequences_per_block) {
  BlockContext context = {q,       kv,          out,  gout,     index,     region,     scales,
                          bias,    lse,         gq,   gkv,      heads,     group_size, windows,
                          queries, first_query, keys, q_stride, kv_stride, causal,     scale};
  context.assign_shared_memory();
  context.first_column = block() % HeadGroup::groups(heads, group_size) * group_size * HEAD;
  context.key_column = kv_stride - 2 * heads * HEAD + context.first_column;
  const u32 run = block() / HeadGroup::groups(heads, group_size);
  if (!COSINE) {
    run_sequence(context, run);
    return;
  }
  clear_grad_sums(context);
  for (int sequence = run * sequences_per_block; sequence < min(int(run + 1) * sequences_per_block, sequences);
       ++sequence) {
    run_sequence(context, sequence);
    barrier();  // The next sequence reuses the shared memory.
  }
  const HeadGroup item(index, heads, group_size, windows, queries, first_query, keys, 0);
  const i64 row = i64(run) * (heads * keys * keys + heads);
  store_grad_sums(context, parts.offset(row), item.head, item.heads);
}
ENTRY(attention_backward)

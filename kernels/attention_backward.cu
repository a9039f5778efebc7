// Gradients of attention over short sequences: a block computes a few heads of one sample, all that they are made from in
// shared memory. Probabilities are computed again from the sums that forward kept, once where keys are rows and once
// where queries are, so that one warp sums up the whole of each gradient in registers, in a fixed order.
#include "attention.cuh"

// Jobs that sum up the gradients of the same keys and values, as src/op/attention/short.rs knows: one of both, or, where
// registers do not hold both sums, one of each, which computes the probabilities once more.
constexpr int jobs_of_keys = HEAD <= 32 ? 1 : 2;
// Threads of a block, at most, and blocks of so many that a multiprocessor is to hold, as in forward. On Blackwell one
// kernel does not fit. Cosines take more registers than 128, and work on small windows: their blocks are smaller.
constexpr int most = COSINE ? 128 : 256;
constexpr int held = COSINE ? (HEAD <= 32 ? 3 : 2) : HEAD == 80 && architecture == 100 ? 1 : 2;

// What backward keeps of one head in shared memory. Rows of queries and of keys are filled up to whole jobs.
struct Head {
  Shared<T> q, k, v, g;      // g: the gradient of the answers
  Shared<float> lse, delta;  // of each query; delta: its answer · g
  // Of cosines alone: what took each query and key to length one, and the sums so far of the gradients of the bias
  // [of_queries, bias_pitch] and, one of each job of queries, of the scale.
  Shared<float> query_factor, key_factor, of_bias, of_scale;
  int bias_pitch;
};

// From row to row of the bias's gradient, for keys filled up to whole jobs: the 4 rows that half a warp touches at once lie
// in different banks.
DEVICE int pitch_of_bias(int of_keys) { return of_keys + 8; }

// The left factors of 16 rows.
DEVICE void load_left(u32 (&a)[1][steps][4], Shared<T> rows, int row) {
#pragma unroll
  for (int step = 0; step < steps; ++step) load_square<false>(a[0][step], rows, row, step);
}

// A score s becomes its probability, and d, the product of g with the key's value, the gradient of the scaled score.
DEVICE void turn_back(float& s, float& d, float c, float lse, float delta, bool seen) {
  s = seen ? power_of_two(s * c - lse) : 0;
  d = s * (d - delta);
}

// Gradients of the 16 keys from `row` on, of their values, or of both: rows are keys, columns queries.
template <bool KEYS, bool VALUES>
DEVICE void keys_job(const Head& own, const Sight& sight, const Bias& bias, int row, int queries, float c,
                     float (&gk)[1][tiles][4], float (&gv)[1][tiles][4]) {
  u32 k[1][steps][4], v[1][steps][4];
  load_left(k, own.k, row);
  if (KEYS) load_left(v, own.v, row);
  for (int i = sight.causal ? max(0, row - sight.from) / 16 * 16 : 0; i < queries; i += 16) {
    float s[1][2][4] = {}, d[1][2][4] = {};
    add_scores(s, k, own.q, i);
    if (KEYS) add_scores(d, v, own.g, i);
    const bool whole = sight.whole(i, row);
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      const int query = i + 8 * n + lane() % 4 * 2;
      const auto lse = own.lse.load<2>(query), delta = own.delta.load<2>(query);
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int of_query = query + e % 2, key = row + lane() / 4 + e / 2 * 8;
        const bool seen = whole || sight.sees(of_query, key);
        const float plus = COSINE && seen ? bias.of(of_query, key) : 0;
        turn_back(s[0][n][e], d[0][n][e], c, lse.at[e % 2] - plus, delta.at[e % 2], seen);
      }
    }
    u32 a[1][4];
    if (VALUES) as_left(a[0], s[0]), add_mixture(gv, a, own.g, i);
    if (KEYS) as_left(a[0], d[0]), add_mixture(gk, a, own.q, i);
  }
}

// Adds the gradients of 16 × 16 scores, from a row and a key on, to that of the bias.
DEVICE void add_to_bias(const Head& own, const float (&d)[2][4], int row, int key) {
#pragma unroll
  for (int n = 0; n < 2; ++n) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const u32 at = (row + lane() / 4 + 8 * h) * own.bias_pitch + key + 8 * n + lane() % 4 * 2;
      auto sum = own.of_bias.load<2>(at);
      sum.at[0] += d[n][2 * h], sum.at[1] += d[n][2 * h + 1];
      own.of_bias.store<2>(at, sum);
    }
  }
}

// Of one query over its keys, by probability p and product d of g with the value: means that make the scale's gradient,
// the covariance of cosine and d. (Summing up d's gradients times cosines would carry delta's rounding along.)
struct Means {
  float cosine = 0, value = 0, both = 0;
  DEVICE void add(float p, float d, float x) { cosine += p * x, value += p * d, both += p * d * x; }
  // Over the four lanes that share the query.
  DEVICE float covariance() const {
    float sums[3] = {cosine, value, both};
#pragma unroll
    for (int i = 0; i < 3; ++i) {
      sums[i] += shuffle_xor(sums[i], 1);
      sums[i] += shuffle_xor(sums[i], 2);
    }
    return sums[2] - sums[0] * sums[1];
  }
};

// Gradients of the 16 queries from `row` on: rows are queries, columns keys. Returns, of cosines, the sum over two queries
// of the scale's gradient, in each of their four lanes.
DEVICE float queries_job(const Head& own, const Sight& sight, const Bias& bias, int row, float c,
                        float (&gq)[1][tiles][4]) {
  u32 q[1][steps][4], g[1][steps][4];
  load_left(q, own.q, row);
  load_left(g, own.g, row);
  const int query = row + lane() / 4;
  const float lse[2] = {own.lse[query], own.lse[query + 8]}, delta[2] = {own.delta[query], own.delta[query + 8]};
  const int end = sight.causal ? min(sight.keys, row + 16 + sight.from) : sight.keys;
  Means means[2];
  for (int j = 0; j < end; j += 16) {
    float s[1][2][4] = {}, d[1][2][4] = {};
    add_scores(s, q, own.k, j);
    add_scores(d, g, own.v, j);
    const bool whole = sight.whole(row, j);
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      const int h = e % 4 / 2, key = j + e / 4 * 8 + lane() % 4 * 2 + e % 2;
      const bool seen = whole || sight.sees(query + 8 * h, key);
      const float plus = COSINE && seen ? bias.of(query + 8 * h, key) : 0;
      const float product = s[0][e / 4][e % 4], value = d[0][e / 4][e % 4];
      turn_back(s[0][e / 4][e % 4], d[0][e / 4][e % 4], c, lse[h] - plus, delta[h], seen);
      if (COSINE) means[h].add(s[0][e / 4][e % 4], value, product);
    }
    if (COSINE) add_to_bias(own, d[0], row, j);
    u32 a[1][4];
    as_left(a[0], d[0]);
    add_mixture(gq, a, own.k, j);
  }
  return COSINE ? means[0].covariance() + means[1].covariance() : 0;
}

// The gradients x of 16 rows of length one become those of the rows before they were brought to it, but for the factor that
// did: what points along a row would change nothing.
DEVICE void turn_across(float (&x)[tiles][4], Shared<T> rows, int row) {
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const u32 first = (row + lane() / 4 + 8 * h) * pitch + lane() % 4 * 2;
    float along = 0;
#pragma unroll
    for (int n = 0; n < tiles; ++n) {
      const auto y = rows.load<2>(first + 8 * n);
      along += x[n][2 * h] * wide(y.at[0]) + x[n][2 * h + 1] * wide(y.at[1]);
    }
    along += shuffle_xor(along, 1);
    along += shuffle_xor(along, 2);
#pragma unroll
    for (int n = 0; n < tiles; ++n) {
      const auto y = rows.load<2>(first + 8 * n);
      x[n][2 * h] -= wide(y.at[0]) * along, x[n][2 * h + 1] -= wide(y.at[1]) * along;
    }
  }
}

// Writes the 16 rows from `row` on, as far as `rows`; `place` says where a row begins, `factor` what it is multiplied by.
template <class Factor, class Place>
DEVICE void put_rows(Global<T> to, const float (&x)[1][tiles][4], int row, int rows, Factor factor, Place place) {
  i64 at[2];
  bool kept[2];
  float factors[2];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int i = row + 8 * h + lane() / 4;
    kept[h] = i < rows;
    at[h] = kept[h] ? place(i) : 0;
    factors[h] = factor(i);
  }
  put(to, at, kept, x[0], factors);
}

// Every query's two numbers, for each of the block's heads: [heads, padded] each. A row beyond the queries gets those
// that make its probabilities, and with them all that it adds, zero.
DEVICE void stage_numbers(Shared<float> lse_room, Shared<float> delta_room, Global<const T> out, Global<const T> gout,
                          Global<const float> lse, const Part& part, int all_heads, int padded) {
  for (int n = thread(); n < part.heads * padded; n += threads()) {
    const int head = n / padded, i = n % padded;
    float top = -nothing(), delta = 0;
    if (i < part.queries) {
      const i64 at = (part.answer(i) * all_heads + part.head + head) * HEAD;
#pragma unroll
      for (int column = 0; column < HEAD; column += 8) {
        const auto x = out.load<8>(at + column), y = gout.load<8>(at + column);
#pragma unroll
        for (int e = 0; e < 8; ++e) delta += wide(x.at[e]) * wide(y.at[e]);
      }
      top = lse[part.number(head, all_heads) + i];
    }
    lse_room.set(n, top);
    delta_room.set(n, delta);
  }
}

// What the kernel is given, and this block's room.
struct Whole {
  Global<const T> q, kv, out, gout;
  Global<const int> index, region;
  Global<const float> scales, bias, lse;
  Global<T> gq, gkv;
  int heads, group, windows, queries, from, keys, q_stride, kv_stride, causal;
  float scale;
  Head all;
  Shared<int> regions;
  int first, key_column;  // of the block's first head

  DEVICE int of_queries() const { return up(queries, 16); }
  DEVICE int of_keys() const { return up(keys, 16); }
  // Lays out the block's room, as src/op/attention/short.rs counts it.
  DEVICE void lay_out() {
    const u32 query_bytes = group * of_queries() * pitch * 2, key_bytes = group * of_keys() * pitch * 2;
    all.q = shared<T>(0, query_bytes / 2);
    all.g = shared<T>(query_bytes, query_bytes / 2);
    all.k = shared<T>(2 * query_bytes, key_bytes / 2);
    all.v = shared<T>(2 * query_bytes + key_bytes, key_bytes / 2);
    u32 at = 2 * query_bytes + 2 * key_bytes;
    const auto floats = [&](u32 count) {
      const auto room = shared<float>(at, count);
      at += 4 * count;
      return room;
    };
    all.lse = floats(group * of_queries());
    all.delta = floats(group * of_queries());
    regions = shared<int>(at, WINDOWED ? of_keys() : 0);
    if (!COSINE) return;
    at += 4 * of_keys();
    all.bias_pitch = pitch_of_bias(of_keys());
    all.query_factor = floats(group * of_queries());
    all.key_factor = floats(group * of_keys());
    all.of_bias = floats(group * of_queries() * all.bias_pitch);
    all.of_scale = floats(group * of_queries() / 16);
  }
  DEVICE Head of_head(int head) const {
    const u32 query = head * of_queries(), key = head * of_keys();
    Head own = {all.q.from(query * pitch), all.k.from(key * pitch), all.v.from(key * pitch),
                all.g.from(query * pitch), all.lse.from(query),     all.delta.from(query)};
    if (COSINE) {
      own.query_factor = all.query_factor.from(query);
      own.key_factor = all.key_factor.from(key);
      own.of_bias = all.of_bias.from(query * all.bias_pitch);
      own.of_scale = all.of_scale.from(query / 16);
      own.bias_pitch = all.bias_pitch;
    }
    return own;
  }
  // Where the rows of the block's first head begin.
  DEVICE i64 query_place(const Part& part, int i) const { return part.query(i) * q_stride + first; }
  DEVICE i64 key_place(const Part& part, int j) const { return part.key(j) * kv_stride + key_column; }
};

// Brings all that one sequence's gradients are made from into shared memory; meanwhile writes the zeros of queries that
// were not asked for.
DEVICE void stage_sequence(const Whole& whole, const Part& part) {
  const Head& all = whole.all;
  const int of_queries = whole.of_queries(), of_keys = whole.of_keys(), width = whole.heads * HEAD;
  stage(all.q, whole.q, part.heads, part.queries, of_queries, [&](int i) { return whole.query_place(part, i); });
  stage(all.g, whole.gout, part.heads, part.queries, of_queries,
        [&](int i) { return part.answer(i) * width + whole.first; });
  stage(all.k, whole.kv, part.heads, part.keys, of_keys, [&](int j) { return whole.key_place(part, j); });
  stage(all.v, whole.kv, part.heads, part.keys, of_keys, [&](int j) { return whole.key_place(part, j) + width; });
  copy_commit();
  if (WINDOWED) stage_regions(whole.regions, whole.region, part, of_keys);
  stage_numbers(all.lse, all.delta, whole.out, whole.gout, whole.lse, part, whole.heads, of_queries);
  const u32 packs = part.heads * tiles;
  for (u32 i = thread(); i < whole.from * packs; i += threads()) {
    const Pack<T, 8> zeros = {};
    const i64 row = i64(part.sample) * (whole.from + whole.queries) + i / packs;
    whole.gq.store<8>(row * whole.q_stride + whole.first + i % packs * 8, zeros);
  }
  copy_wait<0>();
  barrier();
  if (!COSINE) return;
  normalise(all.q, part.heads * of_queries, [&](int n, float factor) { all.query_factor.set(n, factor); });
  normalise(all.k, part.heads * of_keys, [&](int n, float factor) { all.key_factor.set(n, factor); });
  barrier();
}

// One job: the gradients of 16 queries, or of 16 keys, their values, or both, of a head.
DEVICE void work(const Whole& whole, const Part& part, const Sight& sight, int head, int kind) {
  const Head own = whole.of_head(head);
  const Bias bias = {COSINE ? whole.bias.from((part.head + head) * part.keys * part.keys) : whole.bias, part.keys};
  const float scale = COSINE ? whole.scales[part.head + head] : whole.scale, c = scale * 1.44269504f;
  const int column = head * HEAD, width = whole.heads * HEAD, of_keys_head = jobs_of_keys * whole.of_keys() / 16;
  float first_sums[1][tiles][4] = {}, second_sums[1][tiles][4] = {};
  const auto own_key = [&](int j) { return whole.key_place(part, j) + column; };
  const auto own_value = [&](int j) { return whole.key_place(part, j) + width + column; };
  const auto of_key = [&](int j) { return COSINE ? scale * own.key_factor[j] : scale; };
  const auto once = [](int) { return 1.0f; };
  if (kind >= of_keys_head) {
    const int row = (kind - of_keys_head) * 16;
    const float of_scale = queries_job(own, sight, bias, row, c, first_sums);
    if (COSINE) {
      turn_across(first_sums[0], own.q, row);
      const float sum = warp_sum(lane() % 4 == 0 ? of_scale : 0.0f);
      if (lane() == 0) own.of_scale.set(row / 16, own.of_scale[row / 16] + sum);
    }
    put_rows(
        whole.gq, first_sums, row, part.queries,
        [&](int i) { return COSINE ? scale * own.query_factor[i] : scale; },
        [&](int i) { return whole.query_place(part, i) + column; });
  } else if (jobs_of_keys == 1) {
    keys_job<true, true>(own, sight, bias, kind * 16, part.queries, c, first_sums, second_sums);
    if (COSINE) turn_across(first_sums[0], own.k, kind * 16);
    put_rows(whole.gkv, first_sums, kind * 16, part.keys, of_key, own_key);
    put_rows(whole.gkv, second_sums, kind * 16, part.keys, once, own_value);
  } else if (kind % 2 == 0) {
    keys_job<true, false>(own, sight, bias, kind / 2 * 16, part.queries, c, first_sums, second_sums);
    if (COSINE) turn_across(first_sums[0], own.k, kind / 2 * 16);
    put_rows(whole.gkv, first_sums, kind / 2 * 16, part.keys, of_key, own_key);
  } else {
    keys_job<false, true>(own, sight, bias, kind / 2 * 16, part.queries, c, second_sums, first_sums);
    put_rows(whole.gkv, first_sums, kind / 2 * 16, part.keys, once, own_value);
  }
}

// One sequence, all its jobs.
DEVICE void work_through(const Whole& whole, u32 sequence) {
  const Part part(whole.index, whole.heads, whole.group, whole.windows, whole.queries, whole.from, whole.keys, sequence);
  const Sight sight = {whole.regions, whole.causal != 0, whole.keys, whole.from};
  stage_sequence(whole, part);
  const int of_head = (jobs_of_keys * whole.of_keys() + whole.of_queries()) / 16;
  for (int job = warp(); job < part.heads * of_head; job += threads() / 32) {
    work(whole, part, sight, job / of_head, job % of_head);
  }
}

// Sets the block's sums of the gradients of bias and scale to zero; the next barrier shows it.
DEVICE void clear_sums(const Whole& whole) {
  const int jobs = whole.group * whole.of_queries() / 16, numbers = jobs * 16 * whole.all.bias_pitch;
  for (int i = thread(); i < numbers; i += threads()) whole.all.of_bias.set(i, 0);
  for (int i = thread(); i < jobs; i += threads()) whole.all.of_scale.set(i, 0);
}

// Writes them into a row of parts: [heads, keys, keys] of the bias, then [heads] of the scale.
DEVICE void put_sums(const Whole& whole, Global<float> parts, int first_head, int some_heads) {
  const int keys = whole.keys, square = keys * keys, jobs = whole.of_queries() / 16;
  for (int i = thread(); i < some_heads * square; i += threads()) {
    const int row = i / square * whole.of_queries() + i % square / keys;
    parts.set(first_head * square + i, whole.all.of_bias[row * whole.all.bias_pitch + i % keys]);
  }
  for (int head = thread(); head < some_heads; head += threads()) {
    float sum = 0;
    for (int job = 0; job < jobs; ++job) sum += whole.all.of_scale[head * jobs + job];
    parts.set(whole.heads * square + first_head + head, sum);
  }
}

// The same, its answers out, lse, and their gradient gout [B, windows · queries, D] → gq and gkv, which lie as q and kv
// do and may be one tensor; queries before `from` get zeros. One warp sums up all of a gradient's row, in a fixed order.
// Where scores are cosines, a block takes `each` of the `sequences` one after the other and sums up their gradients of bias
// and scale in its row of parts [sequences / each, heads · keys · keys + heads]; else it takes one.
KERNEL(most, held) void attention_backward(Global<const T> q, Global<const T> kv, Global<const int> index,
                                          Global<const int> region, Global<const float> scales,
                                          Global<const float> bias, Global<const T> out, Global<const T> gout,
                                          Global<const float> lse, Global<T> gq, Global<T> gkv, Global<float> parts,
                                          int heads, int group, int windows, int queries, int from, int keys,
                                          int q_stride, int kv_stride, int causal, float scale, int sequences,
                                          int each) {
  Whole whole = {q,   kv,    out,     gout,    index, region, scales, bias,     lse,       gq,
                 gkv, heads, group,   windows, queries, from, keys,   q_stride, kv_stride, causal, scale};
  whole.lay_out();
  whole.first = block() % Part::groups(heads, group) * group * HEAD;
  whole.key_column = kv_stride - 2 * heads * HEAD + whole.first;
  const u32 run = block() / Part::groups(heads, group);
  if (!COSINE) {
    work_through(whole, run);
    return;
  }
  clear_sums(whole);
  for (int sequence = run * each; sequence < min(int(run + 1) * each, sequences); ++sequence) {
    work_through(whole, sequence);
    barrier();  // The next sequence takes this one's room.
  }
  const Part part(index, heads, group, windows, queries, from, keys, 0);
  const i64 row = i64(run) * (heads * keys * keys + heads);
  put_sums(whole, parts.from(row), part.head, part.heads);
}
ENTRY(attention_backward)

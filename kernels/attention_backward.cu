// Gradients of attention over short sequences: a block computes a few heads of one sample, all that they are made from in
// shared memory. Probabilities are computed again from the sums that forward kept, once where keys are rows and once
// where queries are, so that one warp sums up the whole of each gradient in registers, in a fixed order.
#include "attention.cuh"

// Jobs that sum up the gradients of the same keys and values, as src/op/attention/short.rs knows: one of both, or, where
// registers do not hold both sums, one of each, which computes the probabilities once more.
constexpr int jobs_of_keys = HEAD <= 32 ? 1 : 2;
// Blocks of 256 threads that a multiprocessor is to hold, as in forward. On Blackwell one kernel does not fit.
constexpr int held = HEAD == 80 && architecture == 100 ? 1 : 2;

// What backward keeps of one head in shared memory. Rows of queries and of keys are filled up to whole jobs.
struct Head {
  Shared<T> q, k, v, g;      // g: the gradient of the answers
  Shared<float> lse, delta;  // of each query; delta: its answer · g
};

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
DEVICE void keys_job(const Head& own, const Sight& sight, int row, int queries, float c, float (&gk)[1][tiles][4],
                     float (&gv)[1][tiles][4]) {
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
        const bool seen = whole || sight.sees(query + e % 2, row + lane() / 4 + e / 2 * 8);
        turn_back(s[0][n][e], d[0][n][e], c, lse.at[e % 2], delta.at[e % 2], seen);
      }
    }
    u32 a[1][4];
    if (VALUES) as_left(a[0], s[0]), add_mixture(gv, a, own.g, i);
    if (KEYS) as_left(a[0], d[0]), add_mixture(gk, a, own.q, i);
  }
}

// Gradients of the 16 queries from `row` on: rows are queries, columns keys.
DEVICE void queries_job(const Head& own, const Sight& sight, int row, float c, float (&gq)[1][tiles][4]) {
  u32 q[1][steps][4], g[1][steps][4];
  load_left(q, own.q, row);
  load_left(g, own.g, row);
  const int query = row + lane() / 4;
  const float lse[2] = {own.lse[query], own.lse[query + 8]}, delta[2] = {own.delta[query], own.delta[query + 8]};
  const int end = sight.causal ? min(sight.keys, row + 16 + sight.from) : sight.keys;
  for (int j = 0; j < end; j += 16) {
    float s[1][2][4] = {}, d[1][2][4] = {};
    add_scores(s, q, own.k, j);
    add_scores(d, g, own.v, j);
    const bool whole = sight.whole(row, j);
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      const int h = e % 4 / 2;
      const bool seen = whole || sight.sees(query + 8 * h, j + e / 4 * 8 + lane() % 4 * 2 + e % 2);
      turn_back(s[0][e / 4][e % 4], d[0][e / 4][e % 4], c, lse[h], delta[h], seen);
    }
    u32 a[1][4];
    as_left(a[0], d[0]);
    add_mixture(gq, a, own.k, j);
  }
}

// Writes the 16 rows from `row` on, as far as `rows`, times `factor`; `place` says where a row begins.
template <class Place>
DEVICE void put_rows(Global<T> to, const float (&x)[1][tiles][4], int row, int rows, float factor, Place place) {
  i64 at[2];
  bool kept[2];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int i = row + 8 * h + lane() / 4;
    kept[h] = i < rows;
    at[h] = kept[h] ? place(i) : 0;
  }
  const float factors[2] = {factor, factor};
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

// The same, its answers out, lse, and their gradient gout [B, windows · queries, D] → gq and gkv, which lie as q and kv
// do and may be one tensor; queries before `from` get zeros. One warp sums up all of a gradient's row, in a fixed order.
KERNEL(256, held) void attention_backward(Global<const T> q, Global<const T> kv, Global<const int> index,
                                          Global<const int> region, Global<const T> out, Global<const T> gout,
                                          Global<const float> lse, Global<T> gq, Global<T> gkv, int heads, int group,
                                          int windows, int queries, int from, int keys, int q_stride, int kv_stride,
                                          int causal, float scale) {
  const Part part(index, heads, group, windows, queries, from, keys);
  const int of_queries = up(queries, 16), of_keys = up(keys, 16), width = heads * HEAD;
  const u32 query_bytes = group * of_queries * pitch * 2, key_bytes = group * of_keys * pitch * 2;
  const u32 numbers = group * of_queries, after = 2 * query_bytes + 2 * key_bytes;
  const Head all = {shared<T>(0, query_bytes / 2),
                    shared<T>(2 * query_bytes, key_bytes / 2),
                    shared<T>(2 * query_bytes + key_bytes, key_bytes / 2),
                    shared<T>(query_bytes, query_bytes / 2),
                    shared<float>(after, numbers),
                    shared<float>(after + 4 * numbers, numbers)};
  const Sight sight = {shared<int>(after + 8 * numbers, WINDOWED ? of_keys : 0), causal != 0, keys, from};

  const int first = part.head * HEAD, key_column = kv_stride - 2 * width + first;
  const auto query_place = [&](int i) { return part.query(i) * q_stride + first; };
  const auto key_place = [&](int j) { return part.key(j) * kv_stride + key_column; };
  stage(all.q, q, part.heads, queries, of_queries, query_place);
  stage(all.g, gout, part.heads, queries, of_queries, [&](int i) { return part.answer(i) * width + first; });
  stage(all.k, kv, part.heads, keys, of_keys, key_place);
  stage(all.v, kv, part.heads, keys, of_keys, [&](int j) { return key_place(j) + width; });
  copy_commit();
  if (WINDOWED) stage_regions(sight.region, region, part, of_keys);
  stage_numbers(all.lse, all.delta, out, gout, lse, part, heads, of_queries);
  const u32 each = part.heads * tiles;
  for (u32 i = thread(); i < from * each; i += threads()) {
    const Pack<T, 8> zeros = {};
    gq.store<8>((i64(part.sample) * (from + queries) + i / each) * q_stride + first + i % each * 8, zeros);
  }
  copy_wait<0>();
  barrier();

  const int of_keys_head = jobs_of_keys * of_keys / 16, of_head = of_keys_head + of_queries / 16;
  for (int job = warp(); job < part.heads * of_head; job += threads() / 32) {
    const int head = job / of_head, kind = job % of_head, column = head * HEAD;
    const u32 from_query = head * of_queries, from_key = head * of_keys;
    const Head own = {all.q.from(from_query * pitch), all.k.from(from_key * pitch), all.v.from(from_key * pitch),
                      all.g.from(from_query * pitch), all.lse.from(from_query),     all.delta.from(from_query)};
    const float c = scale * 1.44269504f;
    float first_sums[1][tiles][4] = {}, second_sums[1][tiles][4] = {};
    const auto own_key = [&](int j) { return key_place(j) + column; };
    const auto own_value = [&](int j) { return key_place(j) + width + column; };
    if (kind >= of_keys_head) {
      const int row = (kind - of_keys_head) * 16;
      queries_job(own, sight, row, c, first_sums);
      put_rows(gq, first_sums, row, queries, scale, [&](int i) { return query_place(i) + column; });
    } else if (jobs_of_keys == 1) {
      keys_job<true, true>(own, sight, kind * 16, queries, c, first_sums, second_sums);
      put_rows(gkv, first_sums, kind * 16, keys, scale, own_key);
      put_rows(gkv, second_sums, kind * 16, keys, 1, own_value);
    } else if (kind % 2 == 0) {
      keys_job<true, false>(own, sight, kind / 2 * 16, queries, c, first_sums, second_sums);
      put_rows(gkv, first_sums, kind / 2 * 16, keys, scale, own_key);
    } else {
      keys_job<false, true>(own, sight, kind / 2 * 16, queries, c, second_sums, first_sums);
      put_rows(gkv, first_sums, kind / 2 * 16, keys, 1, own_value);
    }
  }
}
ENTRY(attention_backward)

// Softmax attention over short sequences: a block computes a few heads of one sample, their whole sequence in shared
// memory, the probabilities in registers alone. Queries, keys and values are read where the projection wrote them, and
// gradients written where they belong. A sequence may be a window, whose tokens an index names: nothing is rolled,
// gathered or partitioned in memory.
#include "device.cuh"

typedef ELEMENT T;

constexpr int steps = (HEAD + 15) / 16;  // of 16 through a head's width, which zeros fill up
constexpr int tiles = HEAD / 8;          // of 8 columns of a result
// Elements from row to row in shared memory: an odd number of 16 bytes, so that the 8 rows of a matrix, which are loaded
// at once, lie in different banks.
constexpr int pitch = steps * 16 + 8;
// Tiles of 16 rows that a warp computes at once. Two make each matrix that comes from shared memory serve twice, which
// is what bounds narrow heads; wide ones have no registers for it. src/op/attention/short.rs knows these numbers.
constexpr int rows_at_once = HEAD <= 32 ? 2 : 1;

DEVICE float nothing() { return of_bits(0xFF800000); }  // −∞
DEVICE int up(int n, int to) { return (n + to - 1) / to * to; }

// What a block computes: heads `head`, `head + 1`, .. of one window of one sample. Without an index, the one window is
// the sample, and the answered queries may begin at token `from`.
struct Part {
  Global<const int> index;  // [windows, keys]
  i64 sample;
  int window, windows, head, heads, queries, from, keys;

  DEVICE Part(Global<const int> index, int all_heads, int group, int windows, int queries, int from, int keys)
      : index(index), windows(windows), queries(queries), from(from), keys(keys) {
    const u32 groups = (all_heads + group - 1) / group;
    head = block() % groups * group;
    heads = min(group, all_heads - head);
    window = block() / groups % windows;
    sample = block() / groups / windows;
  }
  DEVICE int token(int row) const { return index.given() ? index[i64(window) * keys + row] : row; }
  // Rows of the tensors of queries, of keys and values, of answers.
  DEVICE i64 query(int i) const { return sample * (i64(windows) * queries + from) + from + token(i); }
  DEVICE i64 key(int j) const { return sample * windows * keys + token(j); }
  DEVICE i64 answer(int i) const { return sample * windows * queries + token(i); }
  // Where [B, H, windows · queries] has the first query's number of the block's head n.
  DEVICE i64 number(int n, int all_heads) const {
    return ((sample * all_heads + head + n) * windows + window) * queries;
  }
};

// Who sees whom.
struct Sight {
  Shared<int> region;
  bool regions, causal;
  int keys, from;

  DEVICE bool sees(int query, int key) const {
    return key < keys && !(causal && key > query + from) && !(regions && region[query] != region[key]);
  }
  // Whether all of the 16 queries see all of the 16 keys, as in most tiles.
  DEVICE bool whole(int query, int key) const {
    return key + 16 <= keys && !(causal && key + 15 > query + from) && !regions;
  }
};

// Begins to copy `rows` rows of the block's heads to room [heads, padded, pitch]; zeros fill it up. Neighbouring threads
// copy neighbouring heads' parts of one row. `place` says where a row begins.
template <class Place>
DEVICE void stage(Shared<T> room, Global<const T> from, int heads, int rows, int padded, Place place) {
  const Pack<T, 8> zeros = {};
  const u32 wide = heads * 2 * steps;
  for (u32 i = thread(); i < padded * wide; i += threads()) {
    const u32 row = i / wide, head = i % wide / (2 * steps), column = i % (2 * steps) * 8;
    const u32 at = (head * padded + row) * pitch + column;
    if (row < rows && column < HEAD) {
      copy_async(room, at, from, place(row) + head * HEAD + column);
    } else {
      room.store<8>(at, zeros);
    }
  }
}

// The token's region of each row of a window, none for rows beyond it. [padded]
DEVICE void stage_regions(Shared<int> room, Global<const int> region, const Part& part, int padded) {
  for (int i = thread(); i < padded; i += threads()) room.set(i, i < part.keys ? region[part.token(i)] : -1);
}

// ---- factors of products, from rows [.., pitch] ------------------------------------------------------------------

// Rows row .. row + 15 at the columns of a step, as the left factor.
DEVICE void left(u32 (&a)[4], Shared<T> rows, int row, int step) {
  load_matrices<false>(a, rows, (row + lane() % 16) * pitch + step * 16 + lane() / 16 * 8);
}
// The same turned, as the right factor: two tiles of 8 columns.
DEVICE void right(u32 (&b)[4], Shared<T> rows, int row, int step) {
  load_matrices<false>(b, rows, (row + lane() / 16 * 8 + lane() % 8) * pitch + step * 16 + lane() / 8 % 2 * 8);
}
// The same as the right factor.
DEVICE void right_straight(u32 (&b)[4], Shared<T> rows, int row, int step) {
  load_matrices<true>(b, rows, (row + lane() % 16) * pitch + step * 16 + lane() / 16 * 8);
}

// c [ROWS · 16, 16] += a · bᵀ, where rows row .. row + 15 of `rows` are b and a is HEAD wide.
template <int ROWS>
DEVICE void add_scores(float (&c)[ROWS][2][4], const u32 (&a)[ROWS][steps][4], Shared<T> rows, int row) {
#pragma unroll
  for (int step = 0; step < steps; ++step) {
    u32 b[4];
    right(b, rows, row, step);
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      multiply<T>(c[r][0], a[r][step], b[0], b[1]);
      multiply<T>(c[r][1], a[r][step], b[2], b[3]);
    }
  }
}

// c [ROWS · 16, HEAD] += a [ROWS · 16, 16] · b, where rows row .. row + 15 of `rows` are b.
template <int ROWS>
DEVICE void add_mixture(float (&c)[ROWS][tiles][4], const u32 (&a)[ROWS][4], Shared<T> rows, int row) {
#pragma unroll
  for (int step = 0; step < steps; ++step) {
    u32 b[4];
    right_straight(b, rows, row, step);
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      multiply<T>(c[r][2 * step], a[r], b[0], b[1]);
      if (2 * step + 1 < tiles) multiply<T>(c[r][2 * step + 1], a[r], b[2], b[3]);
    }
  }
}

// Two tiles of a product as the left factor of the next.
DEVICE void as_left(u32 (&a)[4], const float (&c)[2][4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) a[i] = narrow_pair<T>(c[i / 2][i % 2 * 2], c[i / 2][i % 2 * 2 + 1]);
}

DEVICE Pack<T, 2> two(u32 x) { return {T{u16(x)}, T{u16(x >> 16)}}; }

// Writes 16 rows of a result: rows lane / 4 and that plus 8, where `kept`, at elements at[..] on, times factor[..].
// Neighbouring lanes swap halves, so that each row's 32 bytes, a whole sector, leave at once.
DEVICE void put(Global<T> to, const i64 (&at)[2], const bool (&kept)[2], const float (&x)[tiles][4],
                const float (&factor)[2]) {
  const u32 t = lane() % 4;
  const bool odd = t % 2;
#pragma unroll
  for (int n = 0; n < tiles; n += 2) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const u32 low = narrow_pair<T>(x[n][2 * h] * factor[h], x[n][2 * h + 1] * factor[h]);
      if (n + 1 == tiles) {
        if (kept[h]) to.store<2>(at[h] + n * 8 + 2 * t, two(low));
        continue;
      }
      const u32 high = narrow_pair<T>(x[n + 1][2 * h] * factor[h], x[n + 1][2 * h + 1] * factor[h]);
      const u32 got = shuffle_xor(odd ? low : high, 1);
      const Pack<T, 2> first = two(odd ? got : low), second = two(odd ? high : got);
      const Pack<T, 4> four = {first.at[0], first.at[1], second.at[0], second.at[1]};
      if (kept[h]) to.store<4>(at[h] + (n + odd) * 8 + t / 2 * 4, four);
    }
  }
}

// ---- forward -----------------------------------------------------------------------------------------------------

// The queries' rows from `row` on as the left factor, straight from global memory: no other warp wants them.
template <int ROWS>
DEVICE void load_queries(u32 (&a)[ROWS][steps][4], Global<const T> q, const Part& part, int head, int row, int stride) {
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
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

// Sums of a warp's queries over the keys so far, relative to the largest score so far.
template <int ROWS>
struct Sums {
  float values[ROWS][tiles][4] = {}, weights[ROWS][2], top[ROWS][2];
};

// Scores s of SPAN times 16 keys become weights 2^(c · (s − top)), and the sums relative to the new top.
template <int ROWS, int SPAN>
DEVICE void weigh(float (&s)[ROWS][SPAN][2][4], Sums<ROWS>& sums, float c, bool first) {
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float top = first ? nothing() : sums.top[r][h];
#pragma unroll
      for (int n = 0; n < 2 * SPAN; ++n) {
        top = fmaxf(top, fmaxf(s[r][n / 2][n % 2][2 * h], s[r][n / 2][n % 2][2 * h + 1]));
      }
      top = fmaxf(top, shuffle_xor(top, 1));
      top = fmaxf(top, shuffle_xor(top, 2));
      const float offset = top == nothing() ? 0 : top * c;  // Nothing seen yet.
      float weights = 0;
#pragma unroll
      for (int n = 0; n < 4 * SPAN; ++n) {
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

// Takes keys j0 .. j0 + 16 · SPAN, as far as `end`, into the sums of the queries from `row` on.
template <int ROWS, int SPAN>
DEVICE void attend(Sums<ROWS>& sums, const u32 (&a)[ROWS][steps][4], Shared<T> k, Shared<T> v, const Sight& sight,
                   int row, int j0, int end, float c) {
  float s[ROWS][SPAN][2][4];
#pragma unroll
  for (int w = 0; w < SPAN; ++w) {
    const int j = j0 + 16 * w;
    float tile[ROWS][2][4] = {};
    if (j < end) add_scores<ROWS>(tile, a, k, j);
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      const bool whole = sight.whole(row + 16 * r, j);
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        float x = tile[r][e / 4][e % 4];
        const int query = row + 16 * r + lane() / 4 + e % 4 / 2 * 8, key = j + e / 4 * 8 + lane() % 4 * 2 + e % 2;
        if (!whole && (j >= end || !sight.sees(query, key))) x = nothing();
        s[r][w][e / 4][e % 4] = x;
      }
    }
  }
  weigh<ROWS, SPAN>(s, sums, c, j0 == 0);
#pragma unroll
  for (int w = 0; w < SPAN; ++w) {
    if (j0 + 16 * w >= end) continue;
    u32 p[ROWS][4];
#pragma unroll
    for (int r = 0; r < ROWS; ++r) as_left(p[r], s[r][w]);
    add_mixture<ROWS>(sums.values, p, v, j0 + 16 * w);
  }
}

// q [B, from + windows · queries, q_stride] at column 0, keys and values in kv [B, windows · keys, kv_stride] at columns
// key_column and D further, heads of HEAD inside each; index [windows, keys] and region [tokens] or absent
// → out [B, windows · queries, D] and lse [B, heads, windows · queries], the base-2 logarithm of each query's sum of
// exponentials. A block for each group of heads of each window of each sample.
KERNEL(256) void attention(Global<const T> q, Global<const T> kv, Global<const int> index, Global<const int> region,
                           Global<T> out, Global<float> lse, int heads, int group, int windows, int queries, int from,
                           int keys, int q_stride, int kv_stride, int causal, float scale) {
  constexpr int ROWS = rows_at_once, SPAN = 4 / ROWS;
  const Part part(index, heads, group, windows, queries, from, keys);
  const int padded = up(keys, 16), width = heads * HEAD;
  const u32 bytes = group * padded * pitch * 2;
  const auto k = shared<T>(0, bytes / 2), v = shared<T>(bytes, bytes / 2);
  const int marked = region.given() ? up(keys, 16 * ROWS) : 0;
  const Sight sight = {shared<int>(2 * bytes, marked), region.given(), causal != 0, keys, from};

  const int key_column = kv_stride - 2 * width + part.head * HEAD;
  stage(k, kv, part.heads, keys, padded, [&](int j) { return part.key(j) * kv_stride + key_column; });
  stage(v, kv, part.heads, keys, padded, [&](int j) { return part.key(j) * kv_stride + key_column + width; });
  copy_commit();
  if (region.given()) stage_regions(sight.region, region, part, marked);

  const int each = up(queries, 16 * ROWS) / (16 * ROWS), jobs = part.heads * each;
  int job = warp();
  u32 a[ROWS][steps][4];
  if (job < jobs) load_queries<ROWS>(a, q, part, job / each, job % each * 16 * ROWS, q_stride);
  copy_wait<0>();
  barrier();
  while (job < jobs) {
    const int head = job / each, row = job % each * 16 * ROWS;
    const int end = causal ? min(keys, row + 16 * ROWS + from) : keys;
    const auto own_k = k.from(head * padded * pitch), own_v = v.from(head * padded * pitch);
    Sums<ROWS> sums;
    for (int j = 0; j < end; j += 16 * SPAN) {
      attend<ROWS, SPAN>(sums, a, own_k, own_v, sight, row, j, end, scale * 1.44269504f);
    }
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
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
          lse.set(part.number(head, heads) + i, sums.top[r][h] * scale * 1.44269504f + log2f(weights));
        }
      }
      put(out, at, kept, sums.values[r], factor);
    }
    job += threads() / 32;
    if (job < jobs) load_queries<ROWS>(a, q, part, job / each, job % each * 16 * ROWS, q_stride);
  }
}
ENTRY(attention)

// ---- backward ----------------------------------------------------------------------------------------------------

// What backward keeps of one head in shared memory. Rows of queries and of keys are filled up to whole jobs.
struct Head {
  Shared<T> q, k, v, g;        // g: the gradient of the answers
  Shared<float> lse, delta;    // of each query; delta: its answer · g
};

// The left factors of a job's rows.
template <int ROWS>
DEVICE void load_left(u32 (&a)[ROWS][steps][4], Shared<T> rows, int row) {
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
#pragma unroll
    for (int step = 0; step < steps; ++step) left(a[r][step], rows, row + 16 * r, step);
  }
}

// A score s becomes its probability, and d, the product of g with the key's value, the gradient of the scaled score.
DEVICE void turn_back(float& s, float& d, float c, float lse, float delta, bool seen) {
  s = seen ? power_of_two(s * c - lse) : 0;
  d = s * (d - delta);
}

// Gradients of the keys and values from `row` on: rows are keys, columns queries.
template <int ROWS>
DEVICE void keys_job(const Head& own, const Sight& sight, int row, int queries, float c, float (&gk)[ROWS][tiles][4],
                     float (&gv)[ROWS][tiles][4]) {
  u32 k[ROWS][steps][4], v[ROWS][steps][4];
  load_left<ROWS>(k, own.k, row);
  load_left<ROWS>(v, own.v, row);
  for (int i = sight.causal ? max(0, row - sight.from) / 16 * 16 : 0; i < queries; i += 16) {
    float s[ROWS][2][4] = {}, d[ROWS][2][4] = {};
    add_scores<ROWS>(s, k, own.q, i);
    add_scores<ROWS>(d, v, own.g, i);
    u32 p[ROWS][4], ds[ROWS][4];
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      const int query = i + 8 * n + lane() % 4 * 2;
      const auto lse = own.lse.load<2>(query), delta = own.delta.load<2>(query);
#pragma unroll
      for (int r = 0; r < ROWS; ++r) {
        const bool whole = sight.whole(i, row + 16 * r);
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const bool seen = whole || sight.sees(query + e % 2, row + 16 * r + lane() / 4 + e / 2 * 8);
          turn_back(s[r][n][e], d[r][n][e], c, lse.at[e % 2], delta.at[e % 2], seen);
        }
      }
    }
#pragma unroll
    for (int r = 0; r < ROWS; ++r) as_left(p[r], s[r]), as_left(ds[r], d[r]);
    add_mixture<ROWS>(gv, p, own.g, i);
    add_mixture<ROWS>(gk, ds, own.q, i);
  }
}

// Gradients of the queries from `row` on: rows are queries, columns keys.
template <int ROWS>
DEVICE void queries_job(const Head& own, const Sight& sight, int row, float c, float (&gq)[ROWS][tiles][4]) {
  u32 q[ROWS][steps][4], g[ROWS][steps][4];
  load_left<ROWS>(q, own.q, row);
  load_left<ROWS>(g, own.g, row);
  float lse[ROWS][2], delta[ROWS][2];
#pragma unroll
  for (int e = 0; e < 2 * ROWS; ++e) {
    lse[e / 2][e % 2] = own.lse[row + 8 * e + lane() / 4];
    delta[e / 2][e % 2] = own.delta[row + 8 * e + lane() / 4];
  }
  const int end = sight.causal ? min(sight.keys, row + 16 * ROWS + sight.from) : sight.keys;
  for (int j = 0; j < end; j += 16) {
    float s[ROWS][2][4] = {}, d[ROWS][2][4] = {};
    add_scores<ROWS>(s, q, own.k, j);
    add_scores<ROWS>(d, g, own.v, j);
    u32 ds[ROWS][4];
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      const bool whole = sight.whole(row + 16 * r, j);
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        const int query = row + 16 * r + lane() / 4 + e % 4 / 2 * 8, key = j + e / 4 * 8 + lane() % 4 * 2 + e % 2;
        const bool seen = whole || sight.sees(query, key);
        turn_back(s[r][e / 4][e % 4], d[r][e / 4][e % 4], c, lse[r][e % 4 / 2], delta[r][e % 4 / 2], seen);
      }
      as_left(ds[r], d[r]);
    }
    add_mixture<ROWS>(gq, ds, own.k, j);
  }
}

// Writes a job's rows below `rows`, times `factor`; `place` says where a row begins.
template <int ROWS, class Place>
DEVICE void put_job(Global<T> to, const float (&x)[ROWS][tiles][4], int row, int rows, float factor, Place place) {
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
    i64 at[2];
    bool kept[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int i = row + 16 * r + 8 * h + lane() / 4;
      kept[h] = i < rows;
      at[h] = kept[h] ? place(i) : 0;
    }
    const float factors[2] = {factor, factor};
    put(to, at, kept, x[r], factors);
  }
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
KERNEL(256) void attention_backward(Global<const T> q, Global<const T> kv, Global<const int> index,
                                    Global<const int> region, Global<const T> out, Global<const T> gout,
                                    Global<const float> lse, Global<T> gq, Global<T> gkv, int heads, int group,
                                    int windows, int queries, int from, int keys, int q_stride, int kv_stride,
                                    int causal, float scale) {
  constexpr int ROWS = rows_at_once;
  const Part part(index, heads, group, windows, queries, from, keys);
  const int of_queries = up(queries, 16 * ROWS), of_keys = up(keys, 16 * ROWS), width = heads * HEAD;
  const u32 query_bytes = group * of_queries * pitch * 2, key_bytes = group * of_keys * pitch * 2;
  const u32 numbers = group * of_queries, after = 2 * query_bytes + 2 * key_bytes;
  const Head all = {shared<T>(0, query_bytes / 2),
                    shared<T>(2 * query_bytes, key_bytes / 2),
                    shared<T>(2 * query_bytes + key_bytes, key_bytes / 2),
                    shared<T>(query_bytes, query_bytes / 2),
                    shared<float>(after, numbers),
                    shared<float>(after + 4 * numbers, numbers)};
  const Sight sight = {shared<int>(after + 8 * numbers, region.given() ? of_keys : 0), region.given(), causal != 0, keys,
                       from};

  const int first = part.head * HEAD, key_column = kv_stride - 2 * width + first;
  const auto query_place = [&](int i) { return part.query(i) * q_stride + first; };
  const auto key_place = [&](int j) { return part.key(j) * kv_stride + key_column; };
  stage(all.q, q, part.heads, queries, of_queries, query_place);
  stage(all.g, gout, part.heads, queries, of_queries, [&](int i) { return part.answer(i) * width + first; });
  stage(all.k, kv, part.heads, keys, of_keys, key_place);
  stage(all.v, kv, part.heads, keys, of_keys, [&](int j) { return key_place(j) + width; });
  copy_commit();
  if (region.given()) stage_regions(sight.region, region, part, of_keys);
  stage_numbers(all.lse, all.delta, out, gout, lse, part, heads, of_queries);
  const u32 wide = part.heads * tiles;
  for (u32 i = thread(); i < from * wide; i += threads()) {
    const Pack<T, 8> zeros = {};
    gq.store<8>((part.sample * (from + queries) + i / wide) * q_stride + first + i % wide * 8, zeros);
  }
  copy_wait<0>();
  barrier();

  const int of_head = (of_queries + of_keys) / (16 * ROWS);
  for (int job = warp(); job < part.heads * of_head; job += threads() / 32) {
    const int head = job / of_head, column = head * HEAD, at = job % of_head * 16 * ROWS;
    const u32 from_query = head * of_queries, from_key = head * of_keys;
    const Head own = {all.q.from(from_query * pitch), all.k.from(from_key * pitch), all.v.from(from_key * pitch),
                      all.g.from(from_query * pitch), all.lse.from(from_query),     all.delta.from(from_query)};
    const float c = scale * 1.44269504f;
    if (at < of_keys) {
      float gk[ROWS][tiles][4] = {}, gv[ROWS][tiles][4] = {};
      keys_job<ROWS>(own, sight, at, queries, c, gk, gv);
      put_job<ROWS>(gkv, gk, at, keys, scale, [&](int j) { return key_place(j) + column; });
      put_job<ROWS>(gkv, gv, at, keys, 1, [&](int j) { return key_place(j) + width + column; });
    } else {
      float sums[ROWS][tiles][4] = {};
      queries_job<ROWS>(own, sight, at - of_keys, c, sums);
      put_job<ROWS>(gq, sums, at - of_keys, queries, scale, [&](int i) { return query_place(i) + column; });
    }
  }
}
ENTRY(attention_backward)

// What forward and backward of attention over short sequences share: a block's part of the work, who sees whom, staging
// in shared memory, and products of matrices. Queries, keys and values are read where the projection wrote them. A
// sequence may be a window, whose tokens an index names: nothing is rolled, gathered or partitioned in memory.
//
// Macros: ELEMENT, bf16 or f16; HEAD, a head's width; WINDOWED, 1 where sequences are windows; COSINE, 1 where a score is
// the cosine of query and key times the head's scale, plus the bias of their places, and else their product times d^−½.
#pragma once
#include "device.cuh"

typedef ELEMENT T;

constexpr int steps = (HEAD + 15) / 16;  // of 16 through a head's width, which zeros fill up
constexpr int tiles = HEAD / 8;          // of 8 columns of a result
// Elements from row to row in shared memory: an odd number of 16 bytes, so that the 8 rows of a matrix, which are loaded
// at once, lie in different banks.
constexpr int pitch = steps * 16 + 8;

DEVICE float nothing() { return of_bits(0xFF800000); }  // −∞
DEVICE int up(int n, int to) { return (n + to - 1) / to * to; }

// What a block computes: heads `head`, `head + 1`, .. of one window of one sample. Without windows, the one window is the
// sample, and the answered queries may begin at token `from`.
struct Part {
  Global<const int> index;  // [windows, keys]
  int sample;
  int window, windows, head, heads, queries, from, keys;

  // Sequences are counted through the windows of a sample, then the samples.
  DEVICE Part(Global<const int> index, int all_heads, int group, int windows, int queries, int from, int keys,
              u32 sequence)
      : index(index), windows(windows), queries(queries), from(from), keys(keys) {
    head = block() % groups(all_heads, group) * group;
    heads = min(group, all_heads - head);
    window = sequence % windows;
    sample = sequence / windows;
  }
  // Groups of heads, which blocks next to each other take.
  static DEVICE u32 groups(int all_heads, int group) { return (all_heads + group - 1) / group; }
  DEVICE int token(int row) const { return WINDOWED ? index[window * keys + row] : row; }
  // Rows of the tensors of queries, of keys and values, of answers.
  DEVICE i64 query(int i) const { return i64(sample) * (windows * queries + from) + from + token(i); }
  DEVICE i64 key(int j) const { return i64(sample) * (windows * keys) + token(j); }
  DEVICE i64 answer(int i) const { return i64(sample) * (windows * queries) + token(i); }
  // Where [B, H, windows · queries] has the first query's number of the block's head n.
  DEVICE i64 number(int n, int all_heads) const {
    return (i64(sample) * all_heads + head + n) * (windows * queries) + window * queries;
  }
};

// Who sees whom.
struct Sight {
  Shared<int> region;
  bool causal;
  int keys, from;

  // The last key that a query sees.
  DEVICE int last(int query) const { return causal ? min(keys - 1, query + from) : keys - 1; }
  DEVICE bool sees(int query, int key) const {
    return key <= last(query) && !(WINDOWED && region[query] != region[key]);
  }
  // Whether the 16 queries from one on all see the 16 keys from one on, as in most tiles.
  DEVICE bool whole(int query, int key) const { return !WINDOWED && key + 15 <= last(query); }
};

// What is added to the scores of one head [keys, keys], times log₂ e; asked for pairs that see each other alone.
struct Bias {
  Global<const float> values;
  int keys;
  DEVICE float of(int query, int key) const { return values[query * keys + key] * 1.44269504f; }
};

// Begins to copy `rows` rows of the block's heads to room [heads, padded, pitch]; zeros fill it up. Neighbouring threads
// copy neighbouring heads' parts of one row. `place` says where a row begins.
template <class Place>
DEVICE void stage(Shared<T> room, Global<const T> from, int heads, int rows, int padded, Place place) {
  const Pack<T, 8> zeros = {};
  const u32 each = heads * 2 * steps;  // times 8 elements of a row
  for (u32 i = thread(); i < padded * each; i += threads()) {
    const int row = i / each, head = i % each / (2 * steps), column = i % (2 * steps) * 8;
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

// ---- queries and keys of length one -------------------------------------------------------------------------------

// What takes a row to length one; what is shorter than 1e-6 counts as that.
DEVICE float to_one(float squares) { return 1.0f / fmaxf(sqrtf(squares), 1e-6f); }

// Brings each of `count` rows to length one and tells what was taken for it: keep(row, factor).
template <class Keep>
DEVICE void normalise(Shared<T> rows, int count, Keep keep) {
  for (int n = thread(); n < count; n += threads()) {
    float squares = 0;
#pragma unroll
    for (int column = 0; column < HEAD; column += 8) {
      const auto x = rows.load<8>(n * pitch + column);
#pragma unroll
      for (int e = 0; e < 8; ++e) squares += wide(x.at[e]) * wide(x.at[e]);
    }
    const float factor = to_one(squares);
#pragma unroll
    for (int column = 0; column < HEAD; column += 8) {
      auto x = rows.load<8>(n * pitch + column);
#pragma unroll
      for (int e = 0; e < 8; ++e) x.at[e] = narrow<T>(wide(x.at[e]) * factor);
      rows.store<8>(n * pitch + column, x);
    }
    keep(n, factor);
  }
}

// ---- factors of products, from rows [.., pitch] ------------------------------------------------------------------

// Rows row .. row + 15 at 16 columns: as the left factor of a product; as the right one, turned, where elements 0 and 2
// are its columns 0 .. 7 and elements 1 and 3 the others; and straight, where it is 0 and 1, and 2 and 3.
template <bool Straight>
DEVICE void load_square(u32 (&x)[4], Shared<T> rows, int row, int step) {
  load_matrices<Straight>(x, rows, (row + lane() % 16) * pitch + step * 16 + lane() / 16 * 8);
}

// c [ROWS · 16, 16] += a · bᵀ, where rows row .. row + 15 of `rows` are b and a is HEAD wide.
template <int ROWS>
DEVICE void add_scores(float (&c)[ROWS][2][4], const u32 (&a)[ROWS][steps][4], Shared<T> rows, int row) {
#pragma unroll
  for (int step = 0; step < steps; ++step) {
    u32 b[4];
    load_square<false>(b, rows, row, step);
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      multiply<T>(c[r][0], a[r][step], b[0], b[2]);
      multiply<T>(c[r][1], a[r][step], b[1], b[3]);
    }
  }
}
// c [ROWS · 16, HEAD] += a [ROWS · 16, 16] · b, where rows row .. row + 15 of `rows` are b.
template <int ROWS>
DEVICE void add_mixture(float (&c)[ROWS][tiles][4], const u32 (&a)[ROWS][4], Shared<T> rows, int row) {
#pragma unroll
  for (int step = 0; step < steps; ++step) {
    u32 b[4];
    load_square<true>(b, rows, row, step);
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

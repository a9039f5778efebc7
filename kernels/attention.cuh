// Shared parts of the forward and backward kernels of attention over short sequences: the work of a block, masking,
// loads to shared memory, and matrix products. Queries, keys and values are read where the projection wrote them. A
// sequence may be a window, whose tokens are listed by an index: nothing is rolled, gathered or partitioned in memory.
// Macros: ELEMENT, bf16 or f16; HEAD, the head width; WINDOWED, 1 if sequences are windows; COSINE, 1 if a score is the
// cosine of query and key times the head's scale, plus a position bias, and 0 if it is their dot product times d^−½.
#pragma once
#include "device.cuh"

typedef ELEMENT T;

constexpr int k_steps = (HEAD + 15) / 16;  // steps of 16 through the head width, padded with zeros
constexpr int col_tiles = HEAD / 8;        // tiles of 8 columns of a result
// Elements between rows in shared memory: an odd multiple of 16 bytes, so that the 8 rows of a matrix, which are loaded
// at once, are in different banks.
constexpr int pitch = k_steps * 16 + 8;

DEVICE float neg_infinity() { return float_from_bits(0xFF800000); }  // −∞
DEVICE int round_up(int n, int to) { return (n + to - 1) / to * to; }

// The work of a block: heads `head`, `head + 1`, .. of one window of one sample. Without windows, the one window is the
// sample, and outputs are computed for the queries from token `first_query` on.
struct HeadGroup {
  Global<const int> index;  // [windows, keys]
  int sample;
  int window, windows, head, heads, queries, first_query, keys;

  // Sequences are numbered by window within a sample, then by sample.
  DEVICE HeadGroup(Global<const int> index, int all_heads, int group_size, int windows, int queries, int first_query,
                   int keys, u32 sequence)
      : index(index), windows(windows), queries(queries), first_query(first_query), keys(keys) {
    head = block() % groups(all_heads, group_size) * group_size;
    heads = min(group_size, all_heads - head);
    window = sequence % windows;
    sample = sequence / windows;
  }
  // Number of groups of heads. Consecutive blocks take consecutive groups.
  static DEVICE u32 groups(int all_heads, int group_size) { return (all_heads + group_size - 1) / group_size; }
  DEVICE int token(int row) const { return WINDOWED ? index[window * keys + row] : row; }
  // Rows of the tensors of queries, of keys and values, and of outputs.
  DEVICE i64 query_row(int i) const { return i64(sample) * (windows * queries + first_query) + first_query + token(i); }
  DEVICE i64 key_row(int j) const { return i64(sample) * (windows * keys) + token(j); }
  DEVICE i64 output_row(int i) const { return i64(sample) * (windows * queries) + token(i); }
  // Offset in a tensor [B, H, windows · queries] of the first query of the block's n-th head.
  DEVICE i64 lse_offset(int n, int all_heads) const {
    return (i64(sample) * all_heads + head + n) * (windows * queries) + window * queries;
  }
};

// Which keys a query attends to.
struct AttentionMask {
  Shared<int> region;
  bool causal;
  int keys, first_query;

  // The last key that the query may attend to.
  DEVICE int last_visible(int query) const { return causal ? min(keys - 1, query + first_query) : keys - 1; }
  DEVICE bool is_visible(int query, int key) const {
    return key <= last_visible(query) && !(WINDOWED && region[query] != region[key]);
  }
  // True if each of the 16 queries from `query` on attends to each of the 16 keys from `key` on, as in most tiles.
  DEVICE bool is_full(int query, int key) const { return !WINDOWED && key + 15 <= last_visible(query); }
};

// The bias that is added to the scores of one head [keys, keys], times log₂ e. Read for visible pairs only.
struct Bias {
  Global<const float> values;
  int keys;
  DEVICE float scaled(int query, int key) const { return values[query * keys + key] * 1.44269504f; }
};

// Starts copying `rows` rows of the block's heads to dst [heads, padded, pitch], padded with zeros. Neighboring threads
// copy neighboring heads' parts of one row. row_offset(row) is where a row begins.
template <class RowOffset>
DEVICE void load_rows(Shared<T> dst, Global<const T> src, int heads, int rows, int padded, RowOffset row_offset) {
  const Pack<T, 8> zeros = {};
  const u32 packs_per_row = heads * 2 * k_steps;  // packs of 8 elements per row
  for (u32 i = thread(); i < padded * packs_per_row; i += threads()) {
    const int row = i / packs_per_row, head = i % packs_per_row / (2 * k_steps), column = i % (2 * k_steps) * 8;
    const u32 dst_index = (head * padded + row) * pitch + column;
    if (row < rows && column < HEAD) {
      copy_async(dst, dst_index, src, row_offset(row) + head * HEAD + column);
    } else {
      dst.store<8>(dst_index, zeros);
    }
  }
}

// Writes the region of each token of a window to dst [padded]; −1 in rows beyond the window.
DEVICE void load_regions(Shared<int> dst, Global<const int> region, const HeadGroup& item, int padded) {
  for (int i = thread(); i < padded; i += threads()) dst.set(i, i < item.keys ? region[item.token(i)] : -1);
}

// ---- cosine attention: queries and keys of unit length ------------------------------------------------------------

// Returns 1 / norm for a sum of squares, with the norm clamped to at least 1e-6.
DEVICE float inverse_norm(float squares) { return 1.0f / fmaxf(sqrtf(squares), 1e-6f); }

// Normalizes each of `count` rows to unit length and calls store(row, factor) with the factor that was applied.
template <class Store>
DEVICE void normalize_rows(Shared<T> rows, int count, Store store) {
  for (int n = thread(); n < count; n += threads()) {
    float squares = 0;
#pragma unroll
    for (int column = 0; column < HEAD; column += 8) {
      const auto x = rows.load<8>(n * pitch + column);
#pragma unroll
      for (int e = 0; e < 8; ++e) squares += wide(x.data[e]) * wide(x.data[e]);
    }
    const float factor = inverse_norm(squares);
#pragma unroll
    for (int column = 0; column < HEAD; column += 8) {
      auto x = rows.load<8>(n * pitch + column);
#pragma unroll
      for (int e = 0; e < 8; ++e) x.data[e] = narrow<T>(wide(x.data[e]) * factor);
      rows.store<8>(n * pitch + column, x);
    }
    store(n, factor);
  }
}

// ---- fragments for matrix products, from rows [.., pitch] ---------------------------------------------------------

// Loads rows row .. row + 15 at 16 columns. Not transposed: as the A fragment, or as the B fragment of the transposed
// matrix, where elements 0 and 2 are columns 0 .. 7 and elements 1 and 3 columns 8 .. 15. Transposed: as the B
// fragment, where elements 0 and 1 are columns 0 .. 7 and elements 2 and 3 columns 8 .. 15.
template <bool Transposed>
DEVICE void load_fragment(u32 (&x)[4], Shared<T> rows, int row, int step) {
  load_matrices<Transposed>(x, rows, (row + lane() % 16) * pitch + step * 16 + lane() / 16 * 8);
}

// c [ROWS · 16, 16] += a · bᵀ, where b is rows row .. row + 15 of `rows` and a has HEAD columns.
template <int ROWS>
DEVICE void accumulate_transposed(float (&c)[ROWS][2][4], const u32 (&a)[ROWS][k_steps][4], Shared<T> rows, int row) {
#pragma unroll
  for (int step = 0; step < k_steps; ++step) {
    u32 b[4];
    load_fragment<false>(b, rows, row, step);
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      multiply<T>(c[r][0], a[r][step], b[0], b[2]);
      multiply<T>(c[r][1], a[r][step], b[1], b[3]);
    }
  }
}
// c [ROWS · 16, HEAD] += a [ROWS · 16, 16] · b, where b is rows row .. row + 15 of `rows`.
template <int ROWS>
DEVICE void accumulate(float (&c)[ROWS][col_tiles][4], const u32 (&a)[ROWS][4], Shared<T> rows, int row) {
#pragma unroll
  for (int step = 0; step < k_steps; ++step) {
    u32 b[4];
    load_fragment<true>(b, rows, row, step);
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      multiply<T>(c[r][2 * step], a[r], b[0], b[1]);
      if (2 * step + 1 < col_tiles) multiply<T>(c[r][2 * step + 1], a[r], b[2], b[3]);
    }
  }
}

// Converts two tiles of a result to the A fragment of the next product.
DEVICE void to_a_fragment(u32 (&a)[4], const float (&c)[2][4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) a[i] = narrow_pair<T>(c[i / 2][i % 2 * 2], c[i / 2][i % 2 * 2 + 1]);
}

DEVICE Pack<T, 2> unpack_pair(u32 x) { return {T{u16(x)}, T{u16(x >> 16)}}; }

// Stores 16 rows of a result times factor[..]: rows lane / 4 and lane / 4 + 8, where is_valid, at offsets[..].
// Neighboring lanes exchange halves, so that each row's 32 bytes, a full sector, are stored at once.
DEVICE void store_rows(Global<T> to, const i64 (&offsets)[2], const bool (&is_valid)[2], const float (&x)[col_tiles][4],
                       const float (&factor)[2]) {
  const u32 t = lane() % 4;
  const bool odd = t % 2;
#pragma unroll
  for (int n = 0; n < col_tiles; n += 2) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const u32 low = narrow_pair<T>(x[n][2 * h] * factor[h], x[n][2 * h + 1] * factor[h]);
      if (n + 1 == col_tiles) {
        if (is_valid[h]) to.store<2>(offsets[h] + n * 8 + 2 * t, unpack_pair(low));
        continue;
      }
      const u32 high = narrow_pair<T>(x[n + 1][2 * h] * factor[h], x[n + 1][2 * h + 1] * factor[h]);
      const u32 received = shuffle_xor(odd ? low : high, 1);
      const Pack<T, 2> first = unpack_pair(odd ? received : low), second = unpack_pair(odd ? high : received);
      const Pack<T, 4> four = {first.data[0], first.data[1], second.data[0], second.data[1]};
      if (is_valid[h]) to.store<4>(offsets[h] + (n + odd) * 8 + t / 2 * 4, four);
    }
  }
}

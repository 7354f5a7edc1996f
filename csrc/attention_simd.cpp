// Attention over packed sequences on the CPU.  Compiled once for each vector unit.
//
// A work item is one head of one sequence.  Its scores live in a scratch tile of at most
// kQueryBlock x kKeyBlock floats: a sentence needs one tile, a long sequence goes tile by tile with
// a running maximum (forward; Milakov and Gimelshein 2018, arXiv:1805.02867) or with the saved
// log-sum-exp (backward; Dao et al. 2022, arXiv:2205.14135).  With a window it goes along the
// window: tiles outside are not computed.
//
// All arithmetic is float32, but for tensors stored in bfloat16 where the processor multiplies
// pairs of such numbers (simd_math.h): products then take the tensors as they are, and P f and dS
// rounded to bfloat16; everything else, their sums too, stays float32.
#include "attention.h"

#include "dropout_simd.h"
#include "simd_math.h"

namespace superbert::SUPERBERT_ISA {
namespace {

constexpr int64_t kQueryBlock = 64;
constexpr int64_t kKeyBlock = 128;
// A narrow window's queries, fewer since a block sees so many keys more than a query does, and the
// most keys that such a block sees.
constexpr int64_t kNarrowQueryBlock = 32, kNarrowKeys = 256;
constexpr int64_t kCacheLine = 64;
constexpr int64_t kItemsAhead = 2; // items that are prefetched while one is computed
constexpr float kInfinity = __builtin_inff();

int64_t round_up(int64_t n) { return (n + kWidth - 1) / kWidth * kWidth; }

// Where one head of one sequence stands in the packed streams.  Its first `blind` queries, from
// `first_query` on, see no key, and its first `unseen` keys, from `first_key` on, are seen by none;
// their results are zeros and they take part in nothing, so that no NaN that they or their
// gradients hold is multiplied by a zero.  Of the others every query sees a key and every key is
// seen: both sequences are aligned at their ends, as in flash-attn.
struct Span {
  int64_t head, first_query, blind, query, queries, first_key, unseen, key, keys, left, right;

  Span(const AttentionCall& call, int64_t item)
      : head(item % call.heads), left(call.options.left), right(call.options.right) {
    const int64_t sequence = item / call.heads;
    first_query = call.cu_seqlens_q[sequence];
    queries = call.cu_seqlens_q[sequence + 1] - first_query;
    first_key = call.cu_seqlens_k[sequence];
    keys = call.cu_seqlens_k[sequence + 1] - first_key;
    blind = keys == 0 ? queries : larger(0, queries - keys - right);
    unseen = queries == 0 ? keys : larger(0, keys - queries - left);
    query = first_query + blind;
    queries -= blind;
    key = first_key + unseen;
    keys -= unseen;
  }

  // The key at the place of query i, which need not exist.
  int64_t place(int64_t i) const { return i + keys - queries; }

  // The keys from first_seen() to before end_seen() are those that query i sees.
  int64_t first_seen(int64_t i) const { return larger(0, place(i) - left); }
  int64_t end_seen(int64_t i) const { return smaller(keys, place(i) + right + 1); }

  // The queries that see any of the keys from `key` to before `end`, likewise.
  int64_t first_seeing(int64_t key) const { return larger(0, key + queries - keys - right); }
  int64_t end_seeing(int64_t end) const { return smaller(queries, end + queries - keys + left); }

  bool has_window() const { return left < kNoLimit; }
};

// Whether all keys that a block of queries sees are in one tile, however long the sequence is.
bool is_narrow(const AttentionCall& call) {
  return call.options.left + call.options.right + kNarrowQueryBlock <= kNarrowKeys;
}

// The tiles of one item, laid out in the thread's scratch.
struct Tiles {
  int64_t row;     // floats of a row of width `width`
  int64_t packed;  // words of such a row as operand
  int64_t columns; // floats of a row of scores: a vector more than needed, against cache conflicts
  // Operands; pairs of the rows of some, and dS rounded: none if operands are float32.
  float *queries, *keys, *keys_t, *values, *values_t, *grad_out;
  float *paired_queries, *paired_keys, *paired_values, *paired_grad_out, *rounded;
  float *scores, *grad_scores, *factors, *out, *grad_queries, *grad_keys, *grad_values, *tile_max,
      *row_max, *row_sum, *delta, *bias_sums;
  float* scratch; // null: only count
  int64_t floats = 0;

  template <typename T>
  Tiles(const T*, const AttentionCall& call, int64_t num_queries, int64_t num_keys, float* memory)
      : row(round_up(call.width)), packed(round_up(words<Operand<T>>(call.width))),
        scratch(memory) {
    const bool narrow = is_narrow(call);
    columns = round_up(smaller(narrow ? kNarrowKeys : kKeyBlock, num_keys)) + kWidth;
    const int64_t rows = smaller(kQueryBlock, num_queries);
    const int64_t key_gradients = narrow ? larger(columns, num_keys) : columns;
    queries = take(rows * packed);
    keys = take(columns * packed);
    keys_t = take(columns * packed);
    values = take(columns * packed);
    values_t = take(columns * packed);
    grad_out = take(rows * packed);
    constexpr bool in_pairs = kInPairs<Operand<T>>;
    paired_queries = take(in_pairs ? (rows + 1) / 2 * row : 0);
    paired_keys = take(in_pairs ? columns / 2 * row : 0);
    paired_values = take(in_pairs ? columns / 2 * row : 0);
    paired_grad_out = take(in_pairs ? (rows + 1) / 2 * row : 0);
    rounded = take(in_pairs ? rows * columns / 2 : 0);
    scores = take(rows * columns);
    grad_scores = take(rows * columns);
    factors = take(rows * (columns + 8) + 4 * kQuads + kWidth); // whole quads, and read by vectors
    out = take(rows * row);
    grad_queries = take(num_queries * row);
    grad_keys = take(key_gradients * row);
    grad_values = take(key_gradients * row);
    tile_max = take(rows);
    row_max = take(rows);
    row_sum = take(rows);
    delta = take(num_queries);
    bias_sums = take(call.bias.data == nullptr ? 0 : rows + columns);
  }

  float* take(int64_t count) {
    float* start = scratch == nullptr ? nullptr : scratch + floats;
    floats += round_up(count);
    return start;
  }
};

int64_t scratch_floats(const AttentionCall& call) {
  int64_t num_queries = 0, num_keys = 0;
  for (int64_t s = 0; s < call.sequences; ++s) {
    const int64_t q = call.cu_seqlens_q[s + 1] - call.cu_seqlens_q[s];
    const int64_t k = call.cu_seqlens_k[s + 1] - call.cu_seqlens_k[s];
    num_queries = q > num_queries ? q : num_queries;
    num_keys = k > num_keys ? k : num_keys;
  }
  int64_t floats = 0;
  with_storage(call.storage, [&](const auto* type) {
    floats = Tiles(type, call, num_queries, num_keys, nullptr).floats;
  });
  return floats;
}

template <typename T>
T* element(const HeadRows& rows, int64_t i, int64_t head) {
  return static_cast<T*>(rows.data) + i * rows.row + head * rows.head;
}

// Rows first .. first + count of one head, as words, to `to` [count, row].
template <typename T>
void pack_rows(const HeadRows& from, int64_t head, int64_t first, int64_t count, int64_t width,
               float* to, int64_t row) {
  for (int64_t i = 0; i < count; ++i) {
    pack(element<const T>(from, first + i, head), width, to + i * row);
  }
}

// Asks the caches for rows of one head.  They lie a whole token apart, which the processor does not
// foresee; a long sequence's first rows show it the way.
void prefetch_rows(const HeadRows& rows, int64_t head, int64_t first, int64_t count,
                   int64_t row_bytes, int64_t element_bytes) {
  const char* data = static_cast<const char*>(rows.data) + head * rows.head * element_bytes;
  for (int64_t i = first; i < first + smaller(count, kQueryBlock); ++i) {
    const char* row = data + i * rows.row * element_bytes;
    for (int64_t byte = 0; byte < row_bytes; byte += kCacheLine) __builtin_prefetch(row + byte);
  }
}

// Asks for what a later item reads of q, k, v and, in the backward pass, of the output's gradient.
void prefetch_item(const AttentionCall& call, int64_t item, const HeadRows* grad_out) {
  if (item >= call.sequences * call.heads) return;
  const Span span(call, item);
  const int64_t element = call.storage == Storage::kFloat32 ? 4 : 2;
  const int64_t bytes = call.width * element;
  prefetch_rows(call.q, span.head, span.query, span.queries, bytes, element);
  prefetch_rows(call.k, span.head, span.key, span.keys, bytes, element);
  prefetch_rows(call.v, span.head, span.key, span.keys, bytes, element);
  if (grad_out != nullptr) {
    prefetch_rows(*grad_out, span.head, span.query, span.queries, bytes, element);
  }
}

template <typename T>
void narrow_rows(const float* from, int64_t row, const HeadRows& to, int64_t head, int64_t first,
                 int64_t count, int64_t width, float factor) {
  for (int64_t i = 0; i < count; ++i) {
    narrow(from + i * row, width, factor, element<T>(to, first + i, head));
  }
}

template <typename T>
void zero_rows(const HeadRows& to, int64_t head, int64_t first, int64_t count, int64_t width) {
  for (int64_t i = 0; i < count; ++i) {
    T* row = element<T>(to, first + i, head);
    for (int64_t d = 0; d < width; ++d) row[d] = T{};
  }
}

// The keys of a tile that one of its queries sees: `first` <= j < `end`, of which either may lie
// outside of the tile.
struct Seen {
  int64_t first, end;

  Seen(const Span& span, int64_t query, int64_t key)
      : first(span.first_seen(query) - key), end(span.end_seen(query) - key) {}

  // The scores of vector j of the query's row: -inf in the lanes of other keys.
  Floats load(const float* scores, int64_t j) const {
    Floats s = SUPERBERT_ISA::load(scores + j);
    if (j < first) {
      s = lane_numbers() < static_cast<int32_t>(smaller(first - j, kWidth)) ? splat(-kInfinity) : s;
    }
    return j + kWidth <= end ? s : first_lanes(s, end - j, -kInfinity);
  }
};

// The dropout factors of a tile; key j of query i has data[i * row + j].  Null: no dropout.
struct TileFactors {
  const float* data = nullptr;
  int64_t row = 0;

  TileFactors(const AttentionCall& call, const Span& span, int64_t query, int64_t queries,
              int64_t key, int64_t keys, float* buffer) {
    if (!call.options.dropout.active()) return;
    const int64_t first_key = span.key + key;
    attention_factors(call.options.dropout, span.head, span.query + query, queries, first_key, keys,
                      buffer);
    data = buffer + first_key % 4;
    row = 4 * attention_quads(first_key, keys);
  }

  const float* of(int64_t i) const { return data == nullptr ? nullptr : data + i * row; }

  // v, but zero where vector j of a row of factors is not positive, as lanes behind the last key
  // may be anything.  The scale of what is kept waits until after the products.
  static Floats keep(const float* factor, int64_t j, Floats v) {
    return factor == nullptr ? v : load(factor + j) > 0 ? v : Floats{};
  }
};

void add_row(const float* from, int64_t count, float* to) {
  int64_t j = 0;
  for (; j + kWidth <= count; j += kWidth) store(to + j, load(to + j) + load(from + j));
  for (; j < count; ++j) to[j] += from[j];
}

// Adds the biases of n keys from j0 on to the scores of m queries from i0 on.
void add_bias(const AttentionCall& call, const Span& span, int64_t i0, int64_t m, int64_t j0,
              int64_t n, const Tiles& tiles) {
  const RelativeBias& bias = call.bias;
  if (bias.data == nullptr) return;
  const float* at_zero = bias.data + span.head * bias.row() + bias.largest;
  for (int64_t i = 0; i < m; ++i) {
    add_row(at_zero + j0 - span.place(i0 + i), n, tiles.scores + i * tiles.columns);
  }
}

// ---- forward ------------------------------------------------------------------------------------

// Folds one tile of scores [queries, keys] into the running softmax.  The tile then holds, as left
// operand, the probabilities that multiply the values, up to the dropout's scale and the division
// by the row's final sum.  The rows' maxima come first, so that no row's exponentials wait for its
// own.
template <typename E>
void softmax_tile(const Span& span, int64_t query, int64_t queries, int64_t key, int64_t keys,
                  const TileFactors& factors, const Tiles& tiles) {
  for (int64_t i = 0; i < queries; ++i) {
    const float* scores = tiles.scores + i * tiles.columns;
    const Seen seen(span, query + i, key);
    Floats largest = splat(-kInfinity);
    for (int64_t j = 0; j < keys; j += kWidth) {
      const Floats s = seen.load(scores, j);
      largest = largest < s ? s : largest;
    }
    tiles.tile_max[i] = max_of_lanes(largest);
  }
  for (int64_t i = 0; i < queries; ++i) {
    float* scores = tiles.scores + i * tiles.columns;
    const Seen seen(span, query + i, key);
    const float old_max = tiles.row_max[i], tile_max = tiles.tile_max[i];
    const float new_max = tile_max > old_max ? tile_max : old_max;
    if (old_max != new_max && old_max != -kInfinity) {
      const float rescale = __builtin_expf(old_max - new_max);
      float* out = tiles.out + i * tiles.row;
      for (int64_t d = 0; d < tiles.row; d += kWidth) store(out + d, load(out + d) * rescale);
      tiles.row_sum[i] *= rescale;
    }
    tiles.row_max[i] = new_max;
    const float shift = new_max == -kInfinity ? 0.0f : new_max; // -inf: no key seen so far
    const float* factor = factors.of(i);
    auto* probabilities = reinterpret_cast<E*>(scores); // written behind what is read
    Floats total{};
    for (int64_t j = 0; j < keys; j += kWidth) {
      const Floats p = exponential(seen.load(scores, j) - shift);
      total += p;
      round_to(probabilities + j, TileFactors::keep(factor, j, p));
    }
    tiles.row_sum[i] += sum_of_lanes(total);
  }
}

template <typename T>
void forward_head(const AttentionCall& call, const Span& span, const Tiles& tiles) {
  using E = Operand<T>;
  const int64_t head = span.head, width = call.width;
  const int64_t row = tiles.row, packed = tiles.packed, columns = tiles.columns;
  Right values{};
  int64_t loaded = -1, num_loaded = 0; // first key of the block that the tiles hold, and how many
  const int64_t query_block = is_narrow(call) ? kNarrowQueryBlock : kQueryBlock;
  for (int64_t i0 = 0; i0 < span.queries; i0 += query_block) {
    const int64_t m = smaller(query_block, span.queries - i0);
    pack_rows<T>(call.q, head, span.query + i0, m, width, tiles.queries, packed);
    fill(tiles.row_max, m, -kInfinity);
    fill(tiles.row_sum, m, 0);
    const int64_t first = span.first_seen(i0), end = span.end_seen(i0 + m - 1);
    for (int64_t j0 = first; j0 < end; j0 += kKeyBlock) {
      const int64_t n = smaller(kKeyBlock, (span.has_window() ? end : span.keys) - j0);
      if (loaded != j0 || num_loaded != n) { // one block of keys serves all queries after it
        loaded = j0, num_loaded = n;
        pack_rows<T>(call.k, head, span.key + j0, n, width, tiles.keys, packed);
        pack_rows<T>(call.v, head, span.key + j0, n, width, tiles.values, packed);
        transpose(tiles.keys, packed, n, words<E>(width), tiles.keys_t, columns);
        values = pair_rows<E>(tiles.values, packed, n, width, tiles.paired_values, row);
      }
      multiply<E>(m, n, width, {tiles.queries, packed, 1}, {tiles.keys_t, columns},
                  {tiles.scores, columns, call.options.softmax_scale});
      add_bias(call, span, i0, m, j0, n, tiles);
      const TileFactors factors(call, span, i0, m, j0, n, tiles.factors);
      softmax_tile<E>(span, i0, m, j0, n, factors, tiles);
      multiply<E>(m, width, n, {tiles.scores, columns, 1}, values, {tiles.out, row, 1, j0 > first});
    }
    for (int64_t i = 0; i < m; ++i) {
      const int64_t query = span.query + i0 + i;
      const float total = tiles.row_sum[i];
      narrow(tiles.out + i * row, width, total == 0 ? 0 : call.options.dropout.scale / total,
             element<T>(call.out, query, span.head));
      call.lse[span.head * call.total_queries + query] = tiles.row_max[i] + __builtin_logf(total);
    }
  }
  zero_rows<T>(call.out, span.head, span.first_query, span.blind, width);
  fill(call.lse + span.head * call.total_queries + span.first_query, span.blind, -kInfinity);
}

void forward(const AttentionCall& call, int64_t item, float* scratch) {
  prefetch_item(call, item + kItemsAhead, nullptr);
  const Span span(call, item);
  with_storage(call.storage, [&]<typename T>(const T* type) {
    forward_head<T>(call, span, Tiles(type, call, span.queries, span.keys, scratch));
  });
}

// ---- backward -----------------------------------------------------------------------------------

// delta_i = sum_d dO_id O_id, for the queries of a head whose keys need several tiles.
template <typename T>
void row_products(const AttentionCall& call, const AttentionGradients& grads, const Span& span,
                  float* delta) {
  for (int64_t i = 0; i < span.queries; ++i) {
    const T* grad_out = element<const T>(grads.out, span.query + i, span.head);
    const T* out = element<const T>(call.out, span.query + i, span.head);
    Floats total{};
    for_row(call.width, [&](int64_t d, auto lanes) {
      total += lanes.load(grad_out + d) * lanes.load(out + d);
    });
    delta[i] = sum_of_lanes(total);
  }
}

// Turns the tiles S and dP = dO V^T / (1 - p), in place, into what multiplies dO / (1 - p) and Q:
//     P = exp(S - lse),   S <- P f,   dP <- P (dP f - delta)            f: 1 where kept, or 0
// A null `delta` says that the tile holds all keys of its rows.  Then P is divided by its sum,
// which takes away the rounding of lse, and delta_i = sum_j P_ij f_ij dP_ij, whose roundings are
// those of dP, so that their difference loses less than with the other form.
void grad_scores_tile(const Span& span, int64_t query, int64_t queries, int64_t key, int64_t keys,
                      const float* lse, const float* delta, const TileFactors& factors,
                      const Tiles& tiles) {
  for (int64_t i = 0; i < queries; ++i) {
    const Seen seen(span, query + i, key);
    const float* factor = factors.of(i);
    const float shift = lse[i] == -kInfinity ? 0.0f : lse[i]; // -inf: the query sees no key
    float* scores = tiles.scores + i * tiles.columns;
    float* grads = tiles.grad_scores + i * tiles.columns;
    Floats sum{}, weighted_sum{};
    for (int64_t j = 0; j < keys; j += kWidth) {
      const Floats p = exponential(seen.load(scores, j) - shift);
      const Floats weighted = TileFactors::keep(factor, j, p) * load(grads + j);
      store(scores + j, p);
      store(grads + j, weighted);
      sum += p;
      weighted_sum += j + kWidth <= keys ? weighted : first_lanes(weighted, keys - j, 0);
    }
    float norm = 1, row_delta;
    if (delta != nullptr) {
      row_delta = delta[i];
    } else {
      const float total = sum_of_lanes(sum);
      norm = total == 0 ? 0 : 1 / total;
      row_delta = sum_of_lanes(weighted_sum) * norm;
    }
    for (int64_t j = 0; j < keys; j += kWidth) {
      const Floats p = load(scores + j);
      store(grads + j, (load(grads + j) - p * row_delta) * norm);
      store(scores + j, TileFactors::keep(factor, j, p * norm));
    }
  }
}

// Fills the tiles of n keys from j0 on.  Returns K as right operand.
template <typename T>
Right load_keys(const AttentionCall& call, const Span& span, int64_t j0, int64_t n,
                const Tiles& tiles) {
  using E = Operand<T>;
  const int64_t width = call.width, packed = tiles.packed;
  pack_rows<T>(call.k, span.head, span.key + j0, n, width, tiles.keys, packed);
  pack_rows<T>(call.v, span.head, span.key + j0, n, width, tiles.values, packed);
  transpose(tiles.keys, packed, n, words<E>(width), tiles.keys_t, tiles.columns);
  transpose(tiles.values, packed, n, words<E>(width), tiles.values_t, tiles.columns);
  return pair_rows<E>(tiles.keys, packed, n, width, tiles.paired_keys, tiles.row);
}

// Adds the gradients of scores, of m queries from i0 on and n keys from j0 on, to those of biases.
// Those of the tile are summed first: sums of sums lose less than one long sum.
void add_bias_gradients(const AttentionCall& call, const AttentionGradients& grads,
                        const Span& span, int64_t i0, int64_t m, int64_t j0, int64_t n,
                        const Tiles& tiles) {
  if (grads.bias == nullptr) return;
  fill(tiles.bias_sums, m + n - 1, 0);
  for (int64_t i = 0; i < m; ++i) { // the last query is the farthest behind the first key
    add_row(tiles.grad_scores + i * tiles.columns, n, tiles.bias_sums + m - 1 - i);
  }
  float* own = grads.bias_of(call.heads, span.query, span.queries, span.head);
  add_row(tiles.bias_sums, m + n - 1, own + span.queries - 1 + j0 - span.place(i0 + m - 1));
}

// What m queries from i0 on and the n loaded keys from j0 on give to the gradients, up to factors
// that are applied when these are narrowed.  For `delta` see grad_scores_tile().
template <typename T>
void add_gradients(const AttentionCall& call, const AttentionGradients& grads, const Span& span,
                   int64_t i0, int64_t m, int64_t j0, int64_t n, const float* delta, Right keys,
                   Result grad_queries, Result grad_keys, Result grad_values, const Tiles& tiles) {
  using E = Operand<T>;
  const int64_t head = span.head, width = call.width;
  const int64_t row = tiles.row, packed = tiles.packed, columns = tiles.columns;
  const float* lse = call.lse + head * call.total_queries + span.query + i0;
  pack_rows<T>(call.q, head, span.query + i0, m, width, tiles.queries, packed);
  pack_rows<T>(grads.out, head, span.query + i0, m, width, tiles.grad_out, packed);
  multiply<E>(m, n, width, {tiles.queries, packed, 1}, {tiles.keys_t, columns},
              {tiles.scores, columns, call.options.softmax_scale});
  add_bias(call, span, i0, m, j0, n, tiles);
  multiply<E>(m, n, width, {tiles.grad_out, packed, 1}, {tiles.values_t, columns},
              {tiles.grad_scores, columns, call.options.dropout.scale});
  const TileFactors factors(call, span, i0, m, j0, n, tiles.factors);
  grad_scores_tile(span, i0, m, j0, n, lse, delta, factors, tiles);
  add_bias_gradients(call, grads, span, i0, m, j0, n, tiles);
  const Right queries = pair_rows<E>(tiles.queries, packed, m, width, tiles.paired_queries, row);
  const Right grad_out = pair_rows<E>(tiles.grad_out, packed, m, width, tiles.paired_grad_out, row);
  const Left grad_scores = round_rows<E>(tiles.grad_scores, columns, m, n, tiles.rounded);
  multiply<E>(n, width, m, round_columns<E>(tiles.scores, columns, m, n), grad_out, grad_values);
  multiply<E>(m, width, n, grad_scores, keys, grad_queries);
  multiply<E>(n, width, m, round_columns<E>(tiles.grad_scores, columns, m, n), queries, grad_keys);
}

template <typename T>
void narrow_key_gradients(const AttentionCall& call, const AttentionGradients& grads,
                          const Span& span, int64_t j0, int64_t n, const Tiles& tiles) {
  const AttentionOptions& options = call.options;
  narrow_rows<T>(tiles.grad_keys, tiles.row, grads.k, span.head, span.key + j0, n, call.width,
                 options.softmax_scale);
  narrow_rows<T>(tiles.grad_values, tiles.row, grads.v, span.head, span.key + j0, n, call.width,
                 options.dropout.scale);
}

template <typename T>
void backward_head(const AttentionCall& call, const AttentionGradients& grads, const Span& span,
                   const Tiles& tiles) {
  const int64_t row = tiles.row;
  const bool one_tile = span.keys <= kKeyBlock;
  const int64_t key_block = span.has_window() && !one_tile ? kQueryBlock : kKeyBlock;
  if (!one_tile) {
    row_products<T>(call, grads, span, tiles.delta);
    fill(tiles.grad_queries, span.queries * row, 0);
  }
  for (int64_t j0 = 0; j0 < span.keys; j0 += key_block) {
    const int64_t n = smaller(key_block, span.keys - j0);
    const Right keys = load_keys<T>(call, span, j0, n, tiles);
    // Without a window sums are those of whole blocks of queries, whoever sees these keys.
    const int64_t seeing = span.first_seeing(j0), end = span.end_seeing(j0 + n);
    const int64_t first = span.has_window() ? seeing : seeing / kQueryBlock * kQueryBlock;
    for (int64_t i0 = first; i0 < end; i0 += kQueryBlock) {
      const int64_t m = smaller(kQueryBlock, end - i0);
      add_gradients<T>(call, grads, span, i0, m, j0, n, one_tile ? nullptr : tiles.delta + i0, keys,
                       {tiles.grad_queries + i0 * row, row, 1, !one_tile},
                       {tiles.grad_keys, row, 1, i0 > first},
                       {tiles.grad_values, row, 1, i0 > first}, tiles);
    }
    narrow_key_gradients<T>(call, grads, span, j0, n, tiles);
  }
  narrow_rows<T>(tiles.grad_queries, row, grads.q, span.head, span.query, span.queries, call.width,
                 call.options.softmax_scale);
}

// Along a narrow window, whose tiles hold all keys of their queries.
template <typename T>
void backward_along_window(const AttentionCall& call, const AttentionGradients& grads,
                           const Span& span, const Tiles& tiles) {
  const int64_t row = tiles.row;
  fill(tiles.grad_keys, span.keys * row, 0);
  fill(tiles.grad_values, span.keys * row, 0);
  for (int64_t i0 = 0; i0 < span.queries; i0 += kNarrowQueryBlock) {
    const int64_t m = smaller(kNarrowQueryBlock, span.queries - i0);
    const int64_t j0 = span.first_seen(i0), n = span.end_seen(i0 + m - 1) - j0;
    const Right keys = load_keys<T>(call, span, j0, n, tiles);
    add_gradients<T>(call, grads, span, i0, m, j0, n, nullptr, keys, {tiles.grad_queries, row},
                     {tiles.grad_keys + j0 * row, row, 1, true},
                     {tiles.grad_values + j0 * row, row, 1, true}, tiles);
    narrow_rows<T>(tiles.grad_queries, row, grads.q, span.head, span.query + i0, m, call.width,
                   call.options.softmax_scale);
  }
  narrow_key_gradients<T>(call, grads, span, 0, span.keys, tiles);
}

void backward(const AttentionCall& call, const AttentionGradients& gradients, int64_t item,
              float* scratch) {
  prefetch_item(call, item + kItemsAhead, &gradients.out);
  const Span span(call, item);
  if (gradients.bias != nullptr) {
    fill(gradients.bias_of(call.heads, span.query, span.queries, span.head), 2 * span.queries, 0);
  }
  with_storage(call.storage, [&]<typename T>(const T* type) {
    const Tiles tiles(type, call, span.queries, span.keys, scratch);
    if (is_narrow(call)) {
      backward_along_window<T>(call, gradients, span, tiles);
    } else {
      backward_head<T>(call, gradients, span, tiles);
    }
    zero_rows<T>(gradients.q, span.head, span.first_query, span.blind, call.width);
    zero_rows<T>(gradients.k, span.head, span.first_key, span.unseen, call.width);
    zero_rows<T>(gradients.v, span.head, span.first_key, span.unseen, call.width);
  });
}

} // namespace

extern const AttentionKernels attention_kernels;
const AttentionKernels attention_kernels = {scratch_floats, forward, backward};

} // namespace superbert::SUPERBERT_ISA

// Attention of query rows to the ragged keys and values of one layer, float32. Compiled by kvzip/backends/native.py.
//
// Query rows stand in the lanes of a vector while logits are made, so that a key is read once for all of them and the
// softmax needs no sum across lanes. While one half of a block is worked on, the other is fetched from memory. Long
// segments are cut into parts, so that all threads are busy whatever the lengths; the parts are joined by their
// log-sum-exp, in an order that does not depend on the number of threads. Quantized pairs become floats a block at a
// time, in the first-level cache.

#include <math.h>
#include <stdint.h>
#include <string.h>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#define BLOCK 32  // keys whose weights are held at a time: keys and values of a block fit the first-level cache
#define PART 512  // most keys of a part; native.py sizes the scratch memory by it
#define MAX_DIM 512
#define LOWEST -1e30f // stands for minus infinity, so that differences stay numbers
#define ALWAYS __attribute__((always_inline))
#define PREFETCH(address) __builtin_prefetch((address), 0, 3)

typedef float wide __attribute__((vector_size(32), aligned(4), may_alias));

// out = out * shrink + the weighted sum of `count` values.  weights: every `stride`th float.  ahead, share: `share`
// floats that are needed next.
static inline ALWAYS void add_values(float *out, const float *weights, int stride, float shrink, const float *v,
                                     const float *ahead, int share, int count, int dim) {
  int d = 0, step = share / (count * (dim < 64 ? 1 : dim / 64));
  for (; d + 64 <= dim; d += 64) {
    wide *o = (wide *)(out + d);
    wide b0 = o[0] * shrink, b1 = o[1] * shrink, b2 = o[2] * shrink, b3 = o[3] * shrink;
    wide b4 = o[4] * shrink, b5 = o[5] * shrink, b6 = o[6] * shrink, b7 = o[7] * shrink;
    for (int j = 0; j < count; j++) {
      const wide *p = (const wide *)(v + (int64_t)j * dim + d);
      float w = weights[j * stride];
      PREFETCH(ahead);
      ahead += step;
      b0 += p[0] * w, b1 += p[1] * w, b2 += p[2] * w, b3 += p[3] * w;
      b4 += p[4] * w, b5 += p[5] * w, b6 += p[6] * w, b7 += p[7] * w;
    }
    o[0] = b0, o[1] = b1, o[2] = b2, o[3] = b3, o[4] = b4, o[5] = b5, o[6] = b6, o[7] = b7;
  }
  if (d == dim) return;
  for (int e = d; e < dim; e++) out[e] *= shrink;
  for (int j = 0; j < count; j++)
    for (int e = d; e < dim; e++) out[e] += weights[j * stride] * v[(int64_t)j * dim + e];
}

// Keys or values: float32 (bits = 32), or codes with float16 scales and zeros. kvzip/ops/quantize.py is the layout.
// widths: bits of each channel [heads, dim] where a row is a string of bits, else null.  end: behind the last code.
// rotated: vectors stand times a Hadamard matrix, in parts of that size; 0 = as they are.
typedef struct {
  const void *data;
  const uint16_t *scales, *zeros;
  const uint8_t *widths, *end;
  int32_t bits, group_size, per_channel, rotated;
} Store;

// Added to the logits of pairs: float32 or float16, or null.
typedef struct {
  const void *data;
  int32_t bits;
} Bias;

// The pairs of one precision, head after head.  bias: [N].  offsets: [heads + 1].
typedef struct {
  Store k, v;
  Bias bias;
  const int32_t *offsets;
} Level;

// The pairs of one head in one level, or its tail.
typedef struct {
  Store k, v;
  Bias bias;
  int count, first_part;
} Segment;

typedef uint8_t bytes16 __attribute__((vector_size(16), aligned(1), may_alias));
typedef uint8_t bytes32 __attribute__((vector_size(32), aligned(1), may_alias));
typedef int32_t eight_ints __attribute__((vector_size(32), aligned(4), may_alias));

// How eight neighbouring channels are taken out of a string of bits: from the 16 bytes at `first`, by a shuffle that
// puts the two bytes that hold a code in front of each number, a shift and a mask.
typedef struct {
  bytes32 shuffle;
  eight_ints shifts, masks;
  int first;
} Cut;

// What reading rows of one segment needs: scales and zeros of a group of pairs, a channel each, and the cuts.
typedef struct {
  float scales[MAX_DIM], zeros[MAX_DIM];
  int group;
  Cut cuts[MAX_DIM / 8];
} Channels;

// A float16 that is not infinite, exactly.
static inline float from_half(uint16_t half) {
#if defined(__F16C__)
  return _cvtsh_ss(half);
#endif
  union {
    uint32_t bits;
    float number;
  } wide = {(uint32_t)(half & 0x7fff) << 13}, sign = {(uint32_t)(half & 0x8000) << 16};
  wide.number *= 0x1p112f;
  wide.bits |= sign.bits;
  return wide.number;
}

static inline float bias_of(Bias bias, int64_t pair) {
  return bias.bits == 16 ? from_half(((const uint16_t *)bias.data)[pair]) : ((const float *)bias.data)[pair];
}

static inline ALWAYS void read_channels(const uint8_t *codes, const Channels *c, int bits, int dim, float *to) {
  int width = dim * bits / 8, mask = (1 << bits) - 1;
  for (int part = 0; part < 8 / bits; part++) {
    const float *scales = c->scales + part * width, *zeros = c->zeros + part * width;
    for (int d = 0; d < width; d++) to[part * width + d] = zeros[d] + scales[d] * (float)(codes[d] >> part * bits & mask);
  }
}

static inline ALWAYS void read_token(const uint8_t *codes, const uint16_t *scales, const uint16_t *zeros, int group_size,
                                     int bits, int dim, float *to) {
  int width = dim * bits / 8, mask = (1 << bits) - 1;
  if (group_size % width == 0) {  // each part of the bytes lies in one group
    for (int part = 0; part < 8 / bits; part++) {
      int group = part * width / group_size;
      float scale = from_half(scales[group]), zero = from_half(zeros[group]);
      for (int d = 0; d < width; d++) to[part * width + d] = zero + scale * (float)(codes[d] >> part * bits & mask);
    }
    return;
  }
  for (int d = 0, end; d < dim; d = end) {  // runs that stay in one group and in one place of the bytes
    int part = d / width, group = d / group_size;
    end = (part + 1) * width < (group + 1) * group_size ? (part + 1) * width : (group + 1) * group_size;
    float scale = from_half(scales[group]), zero = from_half(zeros[group]);
    const uint8_t *from = codes - part * width;
    for (int e = d; e < end; e++) to[e] = zero + scale * (float)(from[e] >> part * bits & mask);
  }
}

static void make_cuts(const uint8_t *widths, int dim, Cut *cuts) {
  for (int d = 0, bit = 0; d < dim; d += 8) {
    Cut *cut = cuts + d / 8;
    memset(cut, 0, sizeof(Cut)), cut->first = bit / 8;
    for (int e = 0; e < 8; bit += widths[d + e], e++) {
      int from = bit - 8 * cut->first;  // at most 7 + 7 * 8
      cut->shuffle[4 * e] = from / 8, cut->shuffle[4 * e + 1] = from / 8 + 1;
      cut->shifts[e] = from % 8, cut->masks[e] = (1 << widths[d + e]) - 1;
    }
  }
}

// Eight codes as floats.
static inline ALWAYS wide cut_out(const uint8_t *codes, const Cut *cut) {
  bytes16 bytes = *(const bytes16 *)(codes + cut->first);
  bytes32 found;
#if defined(__AVX2__)
  found = (bytes32)_mm256_shuffle_epi8(_mm256_broadcastsi128_si256((__m128i)bytes), (__m256i)cut->shuffle);
#else
  for (int i = 0; i < 32; i++) found[i] = bytes[cut->shuffle[i]];
#endif
  return __builtin_convertvector((eight_ints)found >> cut->shifts & cut->masks, wide);
}

// Rows `count` of strings of bits, `width` bytes each, that share scales and zeros channel by channel.
static inline ALWAYS void read_streams(const uint8_t *codes, int count, int width, const Channels *c, int dim, float *to) {
  for (int d = 0; d < dim; d += 8) {
    Cut cut = c->cuts[d / 8];
    wide scales = *(const wide *)(c->scales + d), zeros = *(const wide *)(c->zeros + d);
    for (int j = 0; j < count; j++)
      *(wide *)(to + (int64_t)j * dim + d) = zeros + scales * cut_out(codes + (int64_t)j * width, &cut);
  }
}

// One such row whose neighbouring channels share them.
static inline ALWAYS void read_token_stream(const uint8_t *codes, const Channels *c, const uint16_t *scales,
                                            const uint16_t *zeros, int group_size, int dim, float *to) {
  for (int d = 0; d < dim; d += 8) {
    float scale = from_half(scales[d / group_size]), zero = from_half(zeros[d / group_size]);
    *(wide *)(to + d) = zero + scale * cut_out(codes, c->cuts + d / 8);
  }
}

static inline void use_group(const Store *s, int group, int dim, Channels *channels) {
  if (channels->group == group) return;
  const uint16_t *scales = s->scales + (int64_t)group * dim, *zeros = s->zeros + (int64_t)group * dim;
  for (int d = 0; d < dim; d++) channels->scales[d] = from_half(scales[d]), channels->zeros[d] = from_half(zeros[d]);
  channels->group = group;
}

static inline ALWAYS void read_row(const Store *s, int pair, Channels *channels, int bits, int dim, float *to) {
  const uint8_t *codes = (const uint8_t *)s->data + (int64_t)pair * (dim * bits / 8);
  if (!s->per_channel) {
    int64_t groups = dim / s->group_size;
    return read_token(codes, s->scales + pair * groups, s->zeros + pair * groups, s->group_size, bits, dim, to);
  }
  use_group(s, pair / s->group_size, dim, channels);
  read_channels(codes, channels, bits, dim, to);
}

// `count` rows of strings of bits from `first` on, at most BLOCK.
static inline ALWAYS void read_strings(const Store *s, int first, int count, Channels *channels, int dim, float *to) {
  int width = dim * s->bits / 8;
  const uint8_t *codes = (const uint8_t *)s->data + (int64_t)first * width;
  uint8_t copy[BLOCK * MAX_DIM + 16];
  if (s->end - codes < count * width + 16) codes = memcpy(copy, codes, count * width);  // cuts read beyond a row
  if (s->per_channel) {
    for (int j = 0, n; j < count; j += n) {
      int group = (first + j) / s->group_size, left = (group + 1) * s->group_size - (first + j);
      n = left < count - j ? left : count - j;
      use_group(s, group, dim, channels);
      read_streams(codes + (int64_t)j * width, n, width, channels, dim, to + (int64_t)j * dim);
    }
    return;
  }
  int64_t groups = dim / s->group_size;
  for (int j = 0; j < count; j++) {
    const uint16_t *scales = s->scales + (first + j) * groups, *zeros = s->zeros + (first + j) * groups;
    read_token_stream(codes + (int64_t)j * width, channels, scales, zeros, s->group_size, dim, to + (int64_t)j * dim);
  }
}

// `count` pairs from `first` on as floats [count, dim].
static inline ALWAYS void read_rows(const Store *s, int first, int count, Channels *channels, int dim, float *to) {
  if (s->bits == 32) {
    memcpy(to, (const float *)s->data + (int64_t)first * dim, sizeof(float) * count * dim);
    return;
  }
  if (s->widths) return read_strings(s, first, count, channels, dim, to);
  for (int j = 0; j < count; j++, to += dim) {
    if (s->bits == 8) read_row(s, first + j, channels, 8, dim, to);
    else if (s->bits == 4) read_row(s, first + j, channels, 4, dim, to);
    else read_row(s, first + j, channels, 2, dim, to);
  }
}

// A row in parts of `size`, a power of 2, each times a Hadamard matrix of +-1.
static void rotate(float *row, int size, int dim) {
  for (int half = 1; half < size; half *= 2)
    for (int i = 0; i < dim; i += 2 * half)
      for (int j = i; j < i + half; j++) {
        float a = row[j], b = row[j + half];
        row[j] = a + b, row[j + half] = a - b;
      }
}

#define LANES 4
#define NAME(x) x##_4
#include "ragged_rows.h"

#define LANES 8
#define NAME(x) x##_8
#include "ragged_rows.h"

static inline ALWAYS void attend_rows(const float *q, int rows, const Segment *s, int first, int count, int dim,
                                      float scale, int coded, float *out, float *lse) {
  if (rows <= 4) attend_4(q, rows, s, first, count, dim, scale, coded, out, lse);
  else attend_8(q, rows, s, first, count, dim, scale, coded, out, lse);
}

static void attend_part(const float *q, int rows, const Segment *s, int first, int count, int dim, float scale,
                        float *out, float *lse) {
  int coded = s->k.bits != 32 || s->v.bits != 32;
  if (coded && dim == 64) attend_rows(q, rows, s, first, count, 64, scale, 1, out, lse);
  else if (coded && dim == 128) attend_rows(q, rows, s, first, count, 128, scale, 1, out, lse);
  else if (coded) attend_rows(q, rows, s, first, count, dim, scale, 1, out, lse);
  else if (dim == 64) attend_rows(q, rows, s, first, count, 64, scale, 0, out, lse);
  else if (dim == 128) attend_rows(q, rows, s, first, count, 128, scale, 0, out, lse);
  else attend_rows(q, rows, s, first, count, dim, scale, 0, out, lse);
}

// One row joined from the parts of its head.
static void join_row(const float *part_out, const float *part_lse, int num_parts, int num_rows, int dim, float *out,
                     float *lse) {
  float top = LOWEST, sum = 0;
  memset(out, 0, sizeof(float) * dim);
  *lse = -INFINITY;
  if (num_parts == 0) return;
  for (int i = 0; i < num_parts; i++) top = fmaxf(top, part_lse[(int64_t)i * num_rows]);
  for (int i = 0; i < num_parts; i++) sum += expf(part_lse[(int64_t)i * num_rows] - top);
  for (int i = 0; i < num_parts; i++) {
    float w = expf(part_lse[(int64_t)i * num_rows] - top) / sum;
    const float *from = part_out + (int64_t)i * num_rows * dim;
    for (int d = 0; d < dim; d++) out[d] += w * from[d];
  }
  *lse = top + logf(sum);
}

static int parts_of(int count) { return (count + PART - 1) / PART; }

// `store` from pair `start` on, which is the first of that head and of group `group`.
static Store store_from(Store store, int head, int64_t start, int64_t group, int dim) {
  store.data = (const char *)store.data + start * (dim * store.bits / 8);
  if (store.bits == 32) return store;
  int64_t skip = store.per_channel ? group * dim : start * (dim / store.group_size);
  store.scales += skip, store.zeros += skip;
  if (store.widths) store.widths += head * dim;
  return store;
}

static int groups_before(const Store *store, const int32_t *offsets, int head) {
  int groups = 0;
  if (store->bits != 32)
    for (int h = 0; h < head; h++) groups += (offsets[h + 1] - offsets[h] + store->group_size - 1) / store->group_size;
  return groups;
}

static Bias bias_from(Bias bias, int64_t start) {
  if (bias.data) bias.data = (const char *)bias.data + start * (bias.bits / 8);
  return bias;
}

static Segment segment_of(const Level *level, int head, int dim) {
  int64_t start = level->offsets[head];
  return (Segment){store_from(level->k, head, start, groups_before(&level->k, level->offsets, head), dim),
                   store_from(level->v, head, start, groups_before(&level->v, level->offsets, head), dim),
                   bias_from(level->bias, start), level->offsets[head + 1] - level->offsets[head], 0};
}

// q: [heads, rows, dim].  tail_k, tail_v: tail_count keys of each head, `tail_stride` floats from one head to the next;
// every row sees them.  scratch: [parts, rows, dim + 1] with parts = sum of N / PART over levels
// + heads * (levels + 1 + tail_count / PART).  out: [heads, rows, dim].  lse: [heads, rows].
void kvzip_attend_ragged(const float *q, const Level *levels, int num_levels, const float *tail_k, const float *tail_v,
                         int64_t tail_stride, int tail_count, int heads, int rows, int dim, float scale, float *scratch,
                         float *out, float *lse, int threads) {
  int per_head = num_levels + 1, num_segments = heads * per_head, num_parts = 0;
  Segment segments[num_segments];
  int first_part[heads + 1];
  for (int h = 0; h < heads; h++) {
    Segment *own = segments + h * per_head;
    for (int i = 0; i < num_levels; i++) own[i] = segment_of(levels + i, h, dim);
    own[num_levels] = (Segment){{.data = tail_k + h * tail_stride, .bits = 32}, {.data = tail_v + h * tail_stride, .bits = 32},
                                {0, 0}, tail_count, 0};
    first_part[h] = num_parts;
    for (int i = 0; i < per_head; i++) own[i].first_part = num_parts, num_parts += parts_of(own[i].count);
  }
  first_part[heads] = num_parts;
  float *part_out = scratch, *part_lse = scratch + (int64_t)num_parts * rows * dim;
#pragma omp parallel num_threads(threads)
  {
#pragma omp for schedule(dynamic, 1)
    for (int i = 0; i < num_parts; i++) {
      int which = num_segments - 1;
      while (segments[which].first_part > i || segments[which].count == 0) which--;
      const Segment *s = segments + which;
      int part = i - s->first_part, parts = parts_of(s->count);
      int first = (int)((int64_t)s->count * part / parts), end = (int)((int64_t)s->count * (part + 1) / parts);
      attend_part(q + (int64_t)(which / per_head) * rows * dim, rows, s, first, end - first, dim, scale,
                  part_out + (int64_t)i * rows * dim, part_lse + (int64_t)i * rows);
    }
#pragma omp for schedule(static)
    for (int i = 0; i < heads * rows; i++) {
      int h = i / rows, row = i % rows;
      int64_t first = (int64_t)first_part[h] * rows + row;
      join_row(part_out + first * dim, part_lse + first, first_part[h + 1] - first_part[h], rows, dim,
               out + (int64_t)i * dim, lse + i);
    }
  }
}

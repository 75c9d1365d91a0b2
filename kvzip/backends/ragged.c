// Attention of query rows to the ragged keys and values of one layer, float32. Compiled by kvzip/backends/native.py.
//
// Query rows stand in the lanes of a vector while logits are made, so that a key is read once for all of them and the
// softmax needs no sum across lanes. While one half of a block is worked on, the other is fetched from memory. Long
// segments are cut into parts, so that all threads are busy whatever the lengths; the parts are joined by their
// log-sum-exp, in an order that does not depend on the number of threads.

#include <math.h>
#include <stdint.h>
#include <string.h>

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

#define LANES 4
#define NAME(x) x##_4
#include "ragged_rows.h"

#define LANES 8
#define NAME(x) x##_8
#include "ragged_rows.h"

static void attend_part(const float *q, int rows, const float *k, const float *v, const float *bias, int count, int dim,
                        float scale, float *out, float *lse) {
  if (rows <= 4) {
    if (dim == 64) return attend_4(q, rows, k, v, bias, count, 64, scale, out, lse);
    if (dim == 128) return attend_4(q, rows, k, v, bias, count, 128, scale, out, lse);
    return attend_4(q, rows, k, v, bias, count, dim, scale, out, lse);
  }
  if (dim == 64) return attend_8(q, rows, k, v, bias, count, 64, scale, out, lse);
  if (dim == 128) return attend_8(q, rows, k, v, bias, count, 128, scale, out, lse);
  attend_8(q, rows, k, v, bias, count, dim, scale, out, lse);
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

// Keys and values of one head: its segment of the context, and what a session added behind it.
typedef struct {
  const float *k, *v, *bias, *tail_k, *tail_v;
  int count, tail_count, first_part;
} Head;

static int parts_of(int count) { return (count + PART - 1) / PART; }

static void attend_head_part(const Head *head, int part, const float *q, int rows, int dim, float scale, float *out,
                             float *lse) {
  int parts = parts_of(head->count), count = head->count;
  const float *k = head->k, *v = head->v, *bias = head->bias;
  if (part >= parts) {
    part -= parts, parts = parts_of(head->tail_count), count = head->tail_count;
    k = head->tail_k, v = head->tail_v, bias = 0;
  }
  int64_t start = (int64_t)count * part / parts, end = (int64_t)count * (part + 1) / parts;
  attend_part(q, rows, k + start * dim, v + start * dim, bias ? bias + start : 0, (int)(end - start), dim, scale, out, lse);
}

// q: [heads, rows, dim].  k, v: [N, dim].  bias: [N] or null.  offsets: [heads + 1].
// tail_k, tail_v: tail_count keys of each head, `tail_stride` floats from one head to the next; every row sees them.
// scratch: [parts, rows, dim + 1] with parts = N / PART + heads * (2 + tail_count / PART).
// out: [heads, rows, dim].  lse: [heads, rows].
void kvzip_attend_ragged(const float *q, const float *k, const float *v, const float *bias, const int32_t *offsets,
                         const float *tail_k, const float *tail_v, int64_t tail_stride, int tail_count, int heads,
                         int rows, int dim, float scale, float *scratch, float *out, float *lse, int threads) {
  Head head[heads];
  int num_parts = 0;
  for (int h = 0; h < heads; h++) {
    int64_t start = offsets[h];
    head[h] = (Head){k + start * dim, v + start * dim, bias ? bias + start : 0, tail_k + h * tail_stride,
                     tail_v + h * tail_stride, offsets[h + 1] - offsets[h], tail_count, num_parts};
    num_parts += parts_of(head[h].count) + parts_of(tail_count);
  }
  float *part_out = scratch, *part_lse = scratch + (int64_t)num_parts * rows * dim;
#pragma omp parallel num_threads(threads)
  {
#pragma omp for schedule(dynamic, 1)
    for (int i = 0; i < num_parts; i++) {
      int h = heads - 1;
      while (head[h].first_part > i) h--;
      attend_head_part(&head[h], i - head[h].first_part, q + (int64_t)h * rows * dim, rows, dim, scale,
                       part_out + (int64_t)i * rows * dim, part_lse + (int64_t)i * rows);
    }
#pragma omp for schedule(static)
    for (int i = 0; i < heads * rows; i++) {
      int h = i / rows, row = i % rows;
      int64_t first = (int64_t)head[h].first_part * rows + row;
      join_row(part_out + first * dim, part_lse + first, parts_of(head[h].count) + parts_of(tail_count), rows, dim,
               out + (int64_t)i * dim, lse + i);
    }
  }
}

// Attention of one new token of each request to the tail it has in a paged cache, float32. Compiled by
// kvzip/backends/native.py. A block of a head holds its keys as columns [dim, size] and then its values as rows
// [size, dim], which is how vLLM's CPU cache has them: a column of keys fills the lanes of vectors.

#include <math.h>
#include <stdint.h>
#include <string.h>

#define MAX_DIM 512
#define MAX_SIZE 256  // tokens of a block
#define MAX_GROUP 32  // query heads of a KV head

// Logits of `group` queries [group, dim] for the `count` keys from `first` on: [group, MAX_SIZE].
static void logits_of(const float *query, const float *keys, int group, int dim, int size, int count, int first,
                      float scale, float logits[MAX_GROUP][MAX_SIZE]) {
  for (int g = 0; g < group; g++) memset(logits[g], 0, (size_t)count * sizeof(float));
  for (int d = 0; d < dim; d++) {
    const float *column = keys + (int64_t)d * size + first;
    for (int g = 0; g < group; g++) {
      float q = query[g * dim + d] * scale;
      float *row = logits[g];
      for (int j = 0; j < count; j++) row[j] += q * column[j];
    }
  }
}

// One request and KV head.  out: [group, dim].  lse: [group].  first: the first token of the tail that is seen.
static void attend_tail(const float *query, const float *cache, const int64_t *blocks, int64_t block_stride, int first,
                        int length, int group, int size, int dim, float scale, float *out, float *lse) {
  float logits[MAX_GROUP][MAX_SIZE], most[MAX_GROUP], sum[MAX_GROUP];
  for (int g = 0; g < group; g++) most[g] = -INFINITY, sum[g] = 0;
  memset(out, 0, (size_t)group * dim * sizeof(float));
  for (int start = first / size * size; start < length; start += size) {
    int skip = first > start ? first - start : 0, count = (length - start < size ? length - start : size) - skip;
    const float *keys = cache + blocks[start / size] * block_stride, *values = keys + (int64_t)size * dim;
    logits_of(query, keys, group, dim, size, count, skip, scale, logits);
    for (int g = 0; g < group; g++) {
      float high = most[g], *row = logits[g], *to = out + g * dim;
      for (int j = 0; j < count; j++) high = row[j] > high ? row[j] : high;
      float shrink = expf(most[g] - high), total = 0;
      for (int j = 0; j < count; j++) total += row[j] = expf(row[j] - high);
      for (int d = 0; d < dim; d++) to[d] *= shrink;
      for (int j = 0; j < count; j++) {
        const float *value = values + (int64_t)(skip + j) * dim;
        for (int d = 0; d < dim; d++) to[d] += row[j] * value[d];
      }
      most[g] = high, sum[g] = sum[g] * shrink + total;
    }
  }
  for (int g = 0; g < group; g++) {
    for (int d = 0; d < dim; d++) out[g * dim + d] /= sum[g];
    lse[g] = most[g] + logf(sum[g]);
  }
}

// query, out: [requests, heads * group, dim].  lse: [requests, heads * group].  cache: [N, heads, 2, size * dim].
// blocks: [requests, num_blocks].  lengths: [requests], at least 1.  window: the last tokens that are seen; 0 = all.
void kvzip_attend_paged(const float *query, const float *cache, const int64_t *blocks, const int64_t *lengths,
                        int requests, int num_blocks, int heads, int group, int size, int dim, int window, float scale,
                        float *out, float *lse, int threads) {
  int64_t head_stride = (int64_t)2 * size * dim;
#pragma omp parallel for schedule(dynamic) num_threads(threads)
  for (int task = 0; task < requests * heads; task++) {
    int request = task / heads, head = task % heads, length = (int)lengths[request];
    int64_t row = (int64_t)request * heads * group + (int64_t)head * group;
    int first = window > 0 && length > window ? length - window : 0;
    attend_tail(query + row * dim, cache + head * head_stride, blocks + (int64_t)request * num_blocks,
                heads * head_stride, first, length, group, size, dim, scale, out + row * dim, lse + row);
  }
}

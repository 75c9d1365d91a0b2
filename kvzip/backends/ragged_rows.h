// Attention of LANES query rows to a run of keys. Included by ragged.c once for each number of lanes; NAME(x) tells the
// copies apart.

typedef float NAME(vec) __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t NAME(ivec) __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

// The running softmax of the rows: largest logit, sum of weights.
typedef struct {
  NAME(vec) top, sum;
} NAME(state);

static inline NAME(vec) NAME(splat)(float x) { return x - (NAME(vec)){0}; }

static inline NAME(vec) NAME(max)(NAME(vec) a, NAME(vec) b) {
  NAME(ivec) which = a > b;
  return (NAME(vec))((which & (NAME(ivec))a) | (~which & (NAME(ivec))b));
}

// e^x for x <= 0, to 2e-7 relative: 2^n * p(f) with |f| <= ln(2)/2 (Cephes' polynomial).
static inline NAME(vec) NAME(exp)(NAME(vec) x) {
  x = NAME(max)(x, NAME(splat)(-87.0f));
  NAME(ivec) n = __builtin_convertvector(x * 1.44269504f - 0.5f, NAME(ivec));
  NAME(vec) whole = __builtin_convertvector(n, NAME(vec));
  NAME(vec) f = x - whole * 0.693359375f + whole * 2.12194440e-4f;
  NAME(vec) p = NAME(splat)(1.9875691500e-4f);
  p = p * f + 1.3981999507e-3f;
  p = p * f + 8.3334519073e-3f;
  p = p * f + 4.1665795894e-2f;
  p = p * f + 1.6666665459e-1f;
  p = p * f + 5.0000001201e-1f;
  p = p * f * f + f + 1.0f;
  return (NAME(vec))((NAME(ivec))p + (n << 23));
}

// s[j] = the logits of key j.  q: [dim] rows in lanes.  ahead: the values that are needed next.
static inline ALWAYS void NAME(make_logits)(const NAME(vec) *q, const float *k, const float *ahead, int count, int dim,
                                            NAME(vec) *s) {
  int j = 0;
  for (; j + 8 <= count; j += 8) {
    const float *p = k + (int64_t)j * dim, *fetch = ahead + (int64_t)j * dim;
    NAME(vec) a0 = {0}, a1 = {0}, a2 = {0}, a3 = {0}, a4 = {0}, a5 = {0}, a6 = {0}, a7 = {0};
    for (int d = 0; d < dim; d++) {
      NAME(vec) x = q[d];
      if (d % 2 == 0) PREFETCH(fetch + 8 * d);
      a0 += x * p[d], a1 += x * p[dim + d], a2 += x * p[2 * dim + d], a3 += x * p[3 * dim + d];
      a4 += x * p[4 * dim + d], a5 += x * p[5 * dim + d], a6 += x * p[6 * dim + d], a7 += x * p[7 * dim + d];
    }
    s[j] = a0, s[j + 1] = a1, s[j + 2] = a2, s[j + 3] = a3;
    s[j + 4] = a4, s[j + 5] = a5, s[j + 6] = a6, s[j + 7] = a7;
  }
  for (; j < count; j++) {
    NAME(vec) a = {0};
    for (int d = 0; d < dim; d++) a += q[d] * k[(int64_t)j * dim + d];
    s[j] = a;
  }
}

// Logits become weights relative to the new maximum; returns what the sums so far shrink by.
static inline ALWAYS NAME(vec) NAME(make_weights)(NAME(vec) *s, int count, NAME(state) *state) {
  NAME(vec) top = state->top;
  for (int j = 0; j < count; j++) top = NAME(max)(s[j], top);
  NAME(vec) shrink = NAME(exp)(state->top - top), sum = state->sum * shrink;
  for (int j = 0; j < count; j++) s[j] = NAME(exp)(s[j] - top), sum += s[j];
  state->top = top, state->sum = sum;
  return shrink;
}

// All rows against `count` pairs from `first` on: out [num_rows, dim] normalised, lse [num_rows].  coded: the pairs are
// read into buffers first.  s: weights of BLOCK keys.
static inline ALWAYS void NAME(attend)(const float *q, int num_rows, const Segment *pairs, int first, int count, int dim,
                                       float scale, int coded, float *out, float *lse) {
  NAME(vec) turned[MAX_DIM], s[BLOCK];
  float key_buffer[coded ? BLOCK * dim : 1], value_buffer[coded ? BLOCK * dim : 1];
  Channels key_channels, value_channels;
  if (pairs->k.widths) make_cuts(pairs->k.widths, dim, key_channels.cuts);
  if (pairs->v.widths) make_cuts(pairs->v.widths, dim, value_channels.cuts);
  const float *keys = (const float *)pairs->k.data + (int64_t)first * dim;
  const float *values = (const float *)pairs->v.data + (int64_t)first * dim;
  for (int done = 0; done < num_rows; done += LANES) {
    int rows = num_rows - done < LANES ? num_rows - done : LANES;
    for (int r = 0; r < LANES; r++) {
      const float *row = q + (int64_t)(done + (r < rows ? r : 0)) * dim;  // lanes to spare repeat the first row
      for (int d = 0; d < dim; d++) ((float *)turned)[d * LANES + r] = row[d] * scale;
    }
    NAME(state) state = {NAME(splat)(LOWEST), {0}};
    float *to = out + (int64_t)done * dim;
    memset(to, 0, sizeof(float) * rows * dim);
    key_channels.group = value_channels.group = -1;
    for (int j = 0; j < count; j += BLOCK) {
      int n = count - j < BLOCK ? count - j : BLOCK, share = BLOCK * dim / rows;
      const float *k = keys + (int64_t)j * dim, *v = values + (int64_t)j * dim, *ahead = k + BLOCK * dim;
      if (coded) {
        read_rows(&pairs->k, first + j, n, &key_channels, dim, key_buffer);
        read_rows(&pairs->v, first + j, n, &value_channels, dim, value_buffer);
        k = key_buffer, v = ahead = value_buffer, share = 0;
      }
      NAME(make_logits)(turned, k, v, n, dim, s);
      for (int i = 0; pairs->bias.data && i < n; i++) s[i] += bias_of(pairs->bias, first + j + i);
      NAME(vec) shrink = NAME(make_weights)(s, n, &state);
      for (int r = 0; r < rows; r++)
        add_values(to + r * dim, (const float *)s + r, LANES, shrink[r], v, ahead + r * share, share, n, dim);
    }
    for (int r = 0; r < rows; r++) {
      float share = 1 / state.sum[r];
      if (pairs->v.rotated) rotate(to + r * dim, pairs->v.rotated, dim), share /= sqrtf(pairs->v.rotated);
      for (int d = 0; d < dim; d++) to[r * dim + d] *= share;
      lse[done + r] = state.top[r] + logf(state.sum[r]);
    }
  }
}

#undef NAME
#undef LANES

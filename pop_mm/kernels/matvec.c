/* What a decode step of a few tokens does, at the speed of memory: y = W x for several row-major matrices in one call, and a whole
 * FFN on its first channels, the choice among the candidates included.
 *
 * Products are summed in float. Rows may lie apart (a narrow view of a wider matrix): hardware stops prefetching at the end
 * of each piece, so what comes next is asked for explicitly. The rows of all blocks together are shared out evenly among
 * the threads.
 */
#include <math.h>
#include <omp.h>

#include "elements.h"

#define AHEAD 16384 /* bytes that are asked for ahead of their use, in whole rows */

typedef struct {
    const void *weight; /* [rows, m] */
    int64_t rows;
    int64_t stride; /* elements from one row to the next */
} Block;

/* y[t * y_step + r] = row r of w times token t: a few of each at once, whose sums stay in registers */
static inline __attribute__((always_inline)) void tile(
    const T *w, int64_t stride, const int rows, const float *restrict x, const int tokens, int64_t m, int64_t ahead, T *y,
    int64_t y_step) {
    const int64_t whole = m - m % (2 * LANES);
    Floats total[4][4] = {0};
    for (int64_t i = 0; i < whole; i += 2 * LANES) {
        _Pragma("GCC unroll 4") for (int r = 0; ahead && r < rows; r++)
            __builtin_prefetch(w + r * stride + i + ahead, 0, 2);
        _Pragma("GCC unroll 4") for (int t = 0; t < tokens; t++) {
            Floats u = load(x + t * m + i), v = load(x + t * m + i + LANES);
            _Pragma("GCC unroll 4") for (int r = 0; r < rows; r++)
                total[r][t] = dot(w + r * stride + i, u, v, total[r][t]);
        }
    }
    _Pragma("GCC unroll 4") for (int r = 0; r < rows; r++)
        _Pragma("GCC unroll 4") for (int t = 0; t < tokens; t++) {
            float e = sum(total[r][t]);
            for (int64_t i = whole; i < m; i++) e += from_T(w[r * stride + i]) * x[t * m + i];
            y[t * y_step + r] = to_T(e);
        }
}

/* two rows with all tokens: memory is read by the first four, the rest find it in the cache */
static inline __attribute__((always_inline)) void pair(
    const T *w, int64_t stride, const int rows, const float *restrict x, int64_t tokens, int64_t m, int64_t ahead, T *y,
    int64_t y_step) {
    for (; tokens >= 4; tokens -= 4, x += 4 * m, y += 4 * y_step, ahead = 0)
        tile(w, stride, rows, x, 4, m, ahead, y, y_step);
    if (tokens == 3) tile(w, stride, rows, x, 3, m, ahead, y, y_step);
    if (tokens == 2) tile(w, stride, rows, x, 2, m, ahead, y, y_step);
    if (tokens == 1) tile(w, stride, rows, x, 1, m, ahead, y, y_step);
}

static void some_rows(const T *w, int64_t rows, int64_t stride, const float *restrict x, int64_t tokens, int64_t m, T *y,
                      int64_t y_step) {
    const int64_t bytes = 4 * m * (int64_t)sizeof(T), ahead = 4 * stride * (bytes < AHEAD ? AHEAD / bytes : 1);
    int64_t row = 0;
    for (; tokens == 1 && row + 4 <= rows; row += 4)
        tile(w + row * stride, stride, 4, x, 1, m, ahead, y + row, y_step);
    for (; row + 2 <= rows; row += 2) pair(w + row * stride, stride, 2, x, tokens, m, ahead, y + row, y_step);
    for (; row < rows; row++) pair(w + row * stride, stride, 1, x, tokens, m, 0, y + row, y_step);
}

/* block i takes `tokens` rows of m columns from x + i * x_step on (one, if x_step is not 0); y: of each token all rows, one block
 * behind the other; wide: room for all of x as floats */
void matvec(const Block *blocks, int64_t count, const T *x, int64_t x_step, int64_t tokens, int64_t m, float *wide, T *y,
            int threads) {
    int64_t total = 0;
    for (int64_t i = 0; i < count; i++) total += blocks[i].rows;
    if ((const void *)wide != (const void *)x)
        for (int64_t i = 0; i < (x_step ? count : tokens); i++) widen(x + i * m, m, wide + i * m);
    _Pragma("omp parallel num_threads(threads)") {
        int64_t me = omp_get_thread_num(), all = omp_get_num_threads();
        int64_t from = total * me / all, to = total * (me + 1) / all, start = 0;
        for (int64_t i = 0; i < count && start < to; start += blocks[i].rows, i++) {
            int64_t a = from > start ? from - start : 0;
            int64_t b = to - start < blocks[i].rows ? to - start : blocks[i].rows;
            if (a < b)
                some_rows((const T *)blocks[i].weight + a * blocks[i].stride, b - a, blocks[i].stride, wide + i * x_step, tokens,
                          m, y + start + a, total);
        }
    }
}

/* activations, in the order of pop_mm.kernels.ffn.ACTIVATIONS */
static inline float activate(int64_t kind, float x) {
    switch (kind) {
    case 0: return x / (1 + expf(-x));                                                                   /* silu */
    case 1: return x * 0.5f * (1 + erff(x * (float)M_SQRT1_2));                                          /* gelu */
    case 2: return x * 0.5f * (1 + tanhf((float)M_2_SQRTPI * (float)M_SQRT1_2 * (x + 0.044715f * x * x * x))); /* gelu_tanh */
    case 3: return x < 0 ? 0 : x;                                                                        /* relu */
    default: return x < 0 ? 0 : x * x;                                                                   /* relu2 */
    }
}

/* A candidate as an integer: lower for a lower score, and of equal scores for a later candidate. A score that is not finite is the
 * lowest. */
static inline uint64_t to_key(float score, int64_t index) {
    union { float value; uint32_t bits; } v = {.value = score};
    return (uint64_t)(score <= __FLT_MAX__ ? v.bits + 1 : 0) << 32 | (uint32_t)~index;
}
static inline int64_t from_key(uint64_t key) { return (uint32_t)~key; }

/* Move the `dropped` lowest of `count` keys to the front. */
static void lowest(uint64_t *key, int64_t count, int64_t dropped) {
    for (int64_t from = 0, to = count - 1; from < to;) { /* quickselect around the middle element */
        int64_t i = from, j = to;
        uint64_t middle = key[from + (to - from) / 2];
        while (i <= j) {
            while (key[i] < middle) i++;
            while (middle < key[j]) j--;
            if (i <= j) {
                uint64_t kept = key[i];
                key[i++] = key[j], key[j--] = kept;
            }
        }
        if (dropped <= j) to = j;
        else if (dropped >= i) from = i;
        else break;
    }
}

typedef struct {
    const float *weight; /* [count], of each candidate */
    int64_t retained, count, dropped;
} Choice;

static inline float score(const T *h, int64_t tokens, int64_t step, const uint8_t *valid, float weight) {
    if (tokens == 1) return fabsf(from_T(*h)) * weight;
    float squares = 0;
    for (int64_t t = 0; t < tokens; t++, h += step)
        if (!valid || valid[t]) squares += from_T(*h) * from_T(*h);
    return sqrtf(squares) * weight;
}

static void leave_out(T *h, int64_t tokens, int64_t step, uint64_t *key, int64_t count, int64_t dropped, int64_t *out) {
    lowest(key, count, dropped);
    for (int64_t i = 0; i < dropped; i++) {
        out[i] = from_key(key[i]);
        for (int64_t t = 0; t < tokens; t++) h[t * step + out[i]] = 0;
    }
}

/* Zero the candidates that a step leaves out of h: [tokens, retained + count]; valid: null, or which tokens have a say
 * (one alone always has); out: [dropped], which they are */
void choose(const Choice *c, T *h, int64_t tokens, const uint8_t *valid, int64_t *out) {
    const int64_t step = c->retained + c->count;
    uint64_t key[c->count + 1]; /* on the stack, which is in the cache */
    h += c->retained;
    for (int64_t i = 0; i < c->count; i++) key[i] = to_key(score(h + i, tokens, step, valid, c->weight[i]), i);
    leave_out(h, tokens, step, key, c->count, c->dropped, out);
}

/* An FFN on its first `width` channels, of which those from `retained` on are candidates. gate is null if there is none. */
typedef struct {
    const void *gate, *up, *down;
    const void *gate_bias, *up_bias, *down_bias; /* or null */
    int64_t gate_stride, up_stride, down_stride;
    int64_t hidden, width, retained, dropped, activation;
} FFN;

static void biased(T *y, int64_t tokens, int64_t step, const T *bias, int64_t n) {
    for (int64_t t = 0; bias && t < tokens; t++)
        for (int64_t i = 0; i < n; i++) y[t * step + i] = to_T(from_T(y[t * step + i]) + from_T(bias[i]));
}

/* x: [tokens, hidden]; weight: [width - retained] of the candidates; valid: as of choose; wide, narrow: room for
 * tokens * max(hidden, width) floats and 2 * tokens * width elements; key: room for the candidates; out: [dropped], what was left out;
 * y: [tokens, hidden]. Adds the seconds that the choice took to `seconds`. */
void ffn(const FFN *f, const T *x, int64_t tokens, const float *weight, const uint8_t *valid, float *wide, T *narrow,
         uint64_t *key, int64_t *out, T *y, double *seconds, int threads) {
    const int64_t candidates = f->width - f->retained, width = f->width, hidden = f->hidden;
    T *h = narrow, *u = narrow + tokens * width;
    for (int64_t t = 0; t < tokens; t++) widen(x + t * hidden, hidden, wide + t * hidden);
    _Pragma("omp parallel num_threads(threads)") {
        int64_t me = omp_get_thread_num(), all = omp_get_num_threads();
        int64_t a = width * me / all, n = width * (me + 1) / all - a;
        const T *gate = f->gate, *up = f->up, *down = f->down;
        const T *gate_bias = f->gate_bias, *up_bias = f->up_bias, *down_bias = f->down_bias;
        some_rows(up + a * f->up_stride, n, f->up_stride, wide, tokens, hidden, u + a, width);
        biased(u + a, tokens, width, up_bias ? up_bias + a : 0, n);
        if (gate) {
            some_rows(gate + a * f->gate_stride, n, f->gate_stride, wide, tokens, hidden, h + a, width);
            biased(h + a, tokens, width, gate_bias ? gate_bias + a : 0, n);
        }
        for (int64_t t = 0; t < tokens; t++)
            for (int64_t i = t * width + a; i < t * width + a + n; i++) {
                T active = to_T(activate(f->activation, from_T(gate ? h[i] : u[i])));
                h[i] = gate ? to_T(from_T(active) * from_T(u[i])) : active;
            }
        for (int64_t i = a > f->retained ? a : f->retained; i < a + n; i++)
            key[i - f->retained] = to_key(score(h + i, tokens, width, valid, weight[i - f->retained]), i - f->retained);
        _Pragma("omp barrier")
        _Pragma("omp single") {
            if (f->dropped) {
                double started = omp_get_wtime();
                leave_out(h + f->retained, tokens, width, key, candidates, f->dropped, out);
                *seconds += omp_get_wtime() - started;
            }
            for (int64_t t = 0; t < tokens; t++) widen(h + t * width, width, wide + t * width);
        }
        a = hidden * me / all, n = hidden * (me + 1) / all - a;
        some_rows(down + a * f->down_stride, n, f->down_stride, wide, tokens, width, y + a, hidden);
        biased(y + a, tokens, hidden, down_bias ? down_bias + a : 0, n);
    }
}

/* What a decode step at batch 1 does, at the speed of memory: y = W x for several row-major matrices in one call, and a whole FFN
 * on its first channels, the choice among the candidates included.
 *
 * Products are summed in float. Rows may lie apart (a narrow view of a wider matrix): hardware stops prefetching at the end
 * of each piece, so what comes next is asked for explicitly. The rows of all blocks together are shared out evenly among
 * the threads.
 */
#include <math.h>
#include <omp.h>

#include "vectors.h"

#define AHEAD 16384 /* bytes that are asked for ahead of their use, in whole rows */

typedef struct {
    const void *weight; /* [rows, m] */
    int64_t rows;
    int64_t stride; /* elements from one row to the next */
} Block;

/* block i takes x + i * x_step, m columns; y: all rows, one block behind the other; wide: room for all of x as floats */
#define DEFINE(NAME, T)                                                                                                  \
    static void rows_##NAME(const T *w, int64_t rows, int64_t stride, const float *restrict x, int64_t m, T *y) {         \
        const int64_t whole = m - m % (2 * LANES), bytes = 4 * m * (int64_t)sizeof(T);                                      \
        const int64_t ahead = 4 * stride * (bytes < AHEAD ? AHEAD / bytes : 1);                                             \
        int64_t row = 0;                                                                                                 \
        for (; row + 4 <= rows; row += 4) {                                                                              \
            const T *a = w + row * stride, *b = a + stride, *c = b + stride, *d = c + stride;                            \
            Floats p = {0}, q = {0}, r = {0}, s = {0};                                                                   \
            for (int64_t i = 0; i < whole; i += 2 * LANES) {                                                             \
                Floats u = load(x + i), v = load(x + i + LANES);                                                         \
                __builtin_prefetch(a + i + ahead, 0, 2), __builtin_prefetch(b + i + ahead, 0, 2);                           \
                __builtin_prefetch(c + i + ahead, 0, 2), __builtin_prefetch(d + i + ahead, 0, 2);                           \
                p = dot_##NAME(a + i, u, v, p), q = dot_##NAME(b + i, u, v, q);                                          \
                r = dot_##NAME(c + i, u, v, r), s = dot_##NAME(d + i, u, v, s);                                          \
            }                                                                                                            \
            float e = sum(p), f = sum(q), g = sum(r), h = sum(s);                                                        \
            for (int64_t i = whole; i < m; i++) {                                                                        \
                e += from_##NAME(a[i]) * x[i], f += from_##NAME(b[i]) * x[i];                                            \
                g += from_##NAME(c[i]) * x[i], h += from_##NAME(d[i]) * x[i];                                            \
            }                                                                                                            \
            y[row] = to_##NAME(e), y[row + 1] = to_##NAME(f), y[row + 2] = to_##NAME(g), y[row + 3] = to_##NAME(h);      \
        }                                                                                                                \
        for (; row < rows; row++) {                                                                                      \
            const T *a = w + row * stride;                                                                               \
            Floats p = {0};                                                                                              \
            for (int64_t i = 0; i < whole; i += 2 * LANES) p = dot_##NAME(a + i, load(x + i), load(x + i + LANES), p);   \
            float e = sum(p);                                                                                            \
            for (int64_t i = whole; i < m; i++) e += from_##NAME(a[i]) * x[i];                                           \
            y[row] = to_##NAME(e);                                                                                       \
        }                                                                                                                \
    }                                                                                                                    \
    void matvec_##NAME(const Block *blocks, int64_t count, const T *x, int64_t x_step, int64_t m, float *wide, T *y,     \
                       int threads) {                                                                                    \
        int64_t total = 0;                                                                                               \
        for (int64_t i = 0; i < count; i++) total += blocks[i].rows;                                                     \
        if ((const void *)wide != (const void *)x)                                                                       \
            for (int64_t i = 0; i < (x_step ? count : 1); i++) widen_##NAME(x + i * x_step, m, wide + i * x_step);       \
        _Pragma("omp parallel num_threads(threads)") {                                                                   \
            int64_t me = omp_get_thread_num(), all = omp_get_num_threads();                                              \
            int64_t from = total * me / all, to = total * (me + 1) / all, start = 0;                                     \
            for (int64_t i = 0; i < count && start < to; start += blocks[i].rows, i++) {                                 \
                int64_t a = from > start ? from - start : 0;                                                             \
                int64_t b = to - start < blocks[i].rows ? to - start : blocks[i].rows;                                   \
                if (a < b)                                                                                               \
                    rows_##NAME((const T *)blocks[i].weight + a * blocks[i].stride, b - a, blocks[i].stride,             \
                                wide + i * x_step, m, y + start + a);                                                    \
            }                                                                                                            \
        }                                                                                                                \
    }

DEFINE(float, float)
DEFINE(bfloat16, uint16_t)

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
    uint64_t *key;       /* room for count */
    int64_t retained, count, dropped;
} Choice;

/* Zero the candidates that a step leaves out of h: [retained + count]; out: [dropped], which they are */
#define DEFINE_CHOOSE(NAME, T)                                                                                           \
    void choose_##NAME(const Choice *c, T *h, int64_t *out) {                                                            \
        h += c->retained;                                                                                                \
        for (int64_t i = 0; i < c->count; i++) c->key[i] = to_key(fabsf(from_##NAME(h[i])) * c->weight[i], i);           \
        lowest(c->key, c->count, c->dropped);                                                                            \
        for (int64_t i = 0; i < c->dropped; i++) h[out[i] = from_key(c->key[i])] = 0;                                    \
    }

DEFINE_CHOOSE(float, float)
DEFINE_CHOOSE(bfloat16, uint16_t)

/* An FFN on its first `width` channels, of which those from `retained` on are candidates. gate is null if there is none. */
typedef struct {
    const void *gate, *up, *down;
    const void *gate_bias, *up_bias, *down_bias; /* or null */
    int64_t gate_stride, up_stride, down_stride;
    int64_t hidden, width, retained, dropped, activation;
} FFN;

/* x: [hidden]; weight: [width - retained] of the candidates; wide, narrow: room for max(hidden, width) floats and
 * 2 * width elements; key: room for the candidates; out: [dropped], what was left out; y: [hidden]. Adds the seconds that the
 * choice took to `seconds`. */
#define DEFINE_FFN(NAME, T)                                                                                              \
    static void biased_##NAME(T *y, const T *bias, int64_t n) {                                                          \
        for (int64_t i = 0; bias && i < n; i++) y[i] = to_##NAME(from_##NAME(y[i]) + from_##NAME(bias[i]));              \
    }                                                                                                                    \
    void ffn_##NAME(const FFN *f, const T *x, const float *weight, float *wide, T *narrow, uint64_t *key, int64_t *out,  \
                    T *y, double *seconds, int threads) {                                                                \
        const int64_t candidates = f->width - f->retained;                                                               \
        T *h = narrow, *u = narrow + f->width;                                                                           \
        widen_##NAME(x, f->hidden, wide);                                                                                \
        _Pragma("omp parallel num_threads(threads)") {                                                                   \
            int64_t me = omp_get_thread_num(), all = omp_get_num_threads();                                              \
            int64_t a = f->width * me / all, n = f->width * (me + 1) / all - a;                                          \
            const T *gate = f->gate, *up = f->up, *down = f->down;                                                       \
            const T *gate_bias = f->gate_bias, *up_bias = f->up_bias, *down_bias = f->down_bias;                         \
            rows_##NAME(up + a * f->up_stride, n, f->up_stride, wide, f->hidden, u + a);                                 \
            biased_##NAME(u + a, up_bias ? up_bias + a : 0, n);                                                          \
            if (gate) {                                                                                                  \
                rows_##NAME(gate + a * f->gate_stride, n, f->gate_stride, wide, f->hidden, h + a);                       \
                biased_##NAME(h + a, gate_bias ? gate_bias + a : 0, n);                                                  \
            }                                                                                                            \
            for (int64_t i = a; i < a + n; i++) {                                                                        \
                T active = to_##NAME(activate(f->activation, from_##NAME(gate ? h[i] : u[i])));                          \
                h[i] = gate ? to_##NAME(from_##NAME(active) * from_##NAME(u[i])) : active;                               \
                int64_t c = i - f->retained;                                                                             \
                if (c >= 0) key[c] = to_key(fabsf(from_##NAME(h[i])) * weight[c], c);                                    \
            }                                                                                                            \
            _Pragma("omp barrier")                                                                                       \
            _Pragma("omp single") {                                                                                      \
                if (f->dropped) {                                                                                        \
                    double started = omp_get_wtime();                                                                    \
                    lowest(key, candidates, f->dropped);                                                                 \
                    for (int64_t i = 0; i < f->dropped; i++) h[f->retained + (out[i] = from_key(key[i]))] = 0;           \
                    *seconds += omp_get_wtime() - started;                                                               \
                }                                                                                                        \
                widen_##NAME(h, f->width, wide);                                                                         \
            }                                                                                                            \
            a = f->hidden * me / all, n = f->hidden * (me + 1) / all - a;                                                \
            rows_##NAME(down + a * f->down_stride, n, f->down_stride, wide, f->width, y + a);                            \
            biased_##NAME(y + a, down_bias ? down_bias + a : 0, n);                                                      \
        }                                                                                                                \
    }

DEFINE_FFN(float, float)
DEFINE_FFN(bfloat16, uint16_t)

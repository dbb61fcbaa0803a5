/* y = W x for several row-major matrices in one call: what a decode step at batch 1 does, at the speed of memory.
 *
 * Products are summed in float. Rows may lie apart (a narrow view of a wider matrix): hardware stops prefetching at the end
 * of each piece, so what comes next is asked for explicitly. The rows of all blocks together are shared out evenly among
 * the threads. Written with the vector extensions of GCC and Clang, so it is not tied to one instruction set.
 */
#include <omp.h>
#include <stdint.h>
#include <string.h>

#ifdef __AVX512F__
#define LANES 16
#else
#define LANES 8
#endif
#define AHEAD 16384 /* bytes that are asked for ahead of their use, in whole rows */

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * LANES)));

typedef struct {
    const void *weight; /* [rows, m] */
    int64_t rows;
    int64_t stride; /* elements from one row to the next */
} Block;

static inline Floats load(const void *from) {
    Floats v;
    memcpy(&v, from, sizeof v);
    return v;
}

static inline float sum(Floats v) {
    float s = 0;
    for (int i = 0; i < LANES; i++) s += v[i];
    return s;
}

static inline float bits_to_float(uint32_t bits) {
    union { uint32_t bits; float value; } v = {.bits = bits};
    return v.value;
}

/* float: a step is two vectors of weights, and x lies as it is */
static inline float from_float(float value) { return value; }
static inline float to_float(float value) { return value; }
static inline Floats dot_float(const float *w, Floats x, Floats y, Floats total) {
    return total + load(w) * x + load(w + LANES) * y;
}

/* bfloat16: a step is one vector of pairs; the low halves meet the first vector of x, the high halves the second */
static inline float from_bfloat16(uint16_t value) { return bits_to_float((uint32_t)value << 16); }
static inline uint16_t to_bfloat16(float value) { /* to nearest, ties to even */
    union { float value; uint32_t bits; } v = {.value = value};
    if (value != value) return 0x7fc0;
    return (uint16_t)((v.bits + 0x7fff + ((v.bits >> 16) & 1)) >> 16);
}
static inline Floats dot_bfloat16(const uint16_t *w, Floats x, Floats y, Floats total) {
    Words pairs = (Words)load(w);
    return total + (Floats)(pairs << 16) * x + (Floats)(pairs & 0xffff0000u) * y;
}
#define INTERLEAVED_float 0
#define INTERLEAVED_bfloat16 1

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
    static void widen_##NAME(const T *x, int64_t m, float *wide) {                                                       \
        const int64_t whole = INTERLEAVED_##NAME ? m - m % (2 * LANES) : 0;                                              \
        for (int64_t i = 0; i < whole; i += 2 * LANES)                                                                   \
            for (int64_t j = 0; j < LANES; j++) {                                                                        \
                wide[i + j] = from_##NAME(x[i + 2 * j]);                                                                 \
                wide[i + LANES + j] = from_##NAME(x[i + 2 * j + 1]);                                                     \
            }                                                                                                            \
        for (int64_t i = whole; i < m; i++) wide[i] = from_##NAME(x[i]);                                                 \
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

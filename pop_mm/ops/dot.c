/* A decode step of one token on row-major matrices: y = W x, as checkpoints store W, of several matrices of one input. */
#include <omp.h>

#include "scalar.h"

#define AT_ONCE 4 /* rows whose sums are in registers */

typedef struct {
    const W *weight;    /* [outputs, inputs], its rows contiguous */
    const T *bias;      /* [outputs] or null */
    const float *scale; /* likewise */
    int64_t stride, outputs;
} Matrix;

static inline S total_of(Sums v) {
    S s = 0;
    for (int i = 0; i < WIDTH; i++) s += v[i];
    return s;
}

/* y[r] = row r of w times x, for `rows` of them; the same columns of the next ones are asked for on the way */
static inline __attribute__((always_inline)) void some_rows(const W *w, int64_t stride, const int rows, int64_t ahead,
                                                            const S *restrict x, int64_t n, S *y) {
    Sums total[AT_ONCE] = {0};
    int64_t i = 0;
    for (; i + STEP <= n; i += STEP)
        _Pragma("GCC unroll 4") for (int r = 0; r < rows; r++) {
            _Pragma("GCC unroll 4") for (int v = 0; v < VECTORS; v++)
                total[r] += widen_weights(w + r * stride + i + v * WIDTH) * load_sums(x + i + v * WIDTH);
            if (ahead) __builtin_prefetch(w + r * stride + i + ahead, 0, 2);
        }
    for (int r = 0; r < rows; r++) y[r] = total_of(total[r]);
    for (; i < n; i++)
        for (int r = 0; r < rows; r++) y[r] += from_W(w[r * stride + i]) * x[i];
}

/* x: [inputs]; wide: room for x as sums, if they are of another dtype; y: the outputs of all matrices, one behind the other */
void dot(const Matrix *matrices, int64_t count, const T *x, int64_t inputs, S *wide, T *y, int threads) {
    int64_t total = 0;
    for (int64_t i = 0; i < count; i++) total += matrices[i].outputs;
    for (int64_t i = 0; i < inputs; i++) wide[i] = from_T(x[i]);
    _Pragma("omp parallel num_threads(threads)") {
        const int64_t me = omp_get_thread_num(), all = omp_get_num_threads();
        const int64_t from = total * me / all, to = total * (me + 1) / all;
        for (int64_t i = 0, start = 0; i < count && start < to; start += matrices[i].outputs, i++) {
            const Matrix m = matrices[i];
            const int64_t end = to - start < m.outputs ? to - start : m.outputs;
            for (int64_t r = from > start ? from - start : 0, some; r < end; r += some) {
                S sums[AT_ONCE];
                some = end - r >= AT_ONCE ? AT_ONCE : 1;
                if (some == AT_ONCE) some_rows(m.weight + r * m.stride, m.stride, AT_ONCE, AT_ONCE * m.stride, wide, inputs, sums);
                else some_rows(m.weight + r * m.stride, m.stride, 1, 0, wide, inputs, sums);
                for (int64_t o = 0; o < some; o++)
                    y[start + r + o] = to_T(finish(sums[o], m.scale, m.bias, r + o));
            }
        }
    }
}

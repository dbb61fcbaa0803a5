/* How many magnitudes lie in each bin: the floats that agree in their first 12 bits behind the sign. */
#include <omp.h>

#include "scalar.h"

#define BINS 4096
#define BIN_SHIFT 19
#define TABLES 2 /* counted into in turn: the next number often has the bin of the last one */
#define PIECE 1024
#define MOST (1LL << 31) /* numbers that a table of 32 bits counts before it is emptied; a row has fewer */
#define ALONE 16384 /* numbers that one thread counts sooner than two would begin */

static inline uint16_t bin_of(float magnitude) {
    union { float value; uint32_t bits; } v = {.value = magnitude};
    return magnitude != magnitude ? BINS - 1 : v.bits << 1 >> (BIN_SHIFT + 1);
}

/* First the bins of some numbers, by vectors; then they are counted: a number just written in a vector is slow to read alone. */
static void count_row(const T *x, int64_t n, const float *norms, uint32_t (*table)[BINS]) {
    for (int64_t start = 0; start < n; start += PIECE) {
        const int64_t some = n - start < PIECE ? n - start : PIECE;
        uint16_t bin[PIECE];
        if (norms) for (int64_t i = 0; i < some; i++) bin[i] = bin_of(fabsf((float)from_T(x[start + i])) * norms[start + i]);
        else for (int64_t i = 0; i < some; i++) bin[i] = bin_of(fabsf((float)from_T(x[start + i])));
        int64_t i = 0;
        for (; i + TABLES <= some; i += TABLES)
            for (int64_t j = 0; j < TABLES; j++) table[j][bin[i + j]]++;
        for (; i < some; i++) table[0][bin[i]]++;
    }
}

static void add(uint32_t (*table)[BINS], int64_t *counts) {
    _Pragma("omp critical(histogram)")
    for (int64_t j = 0; j < TABLES; j++)
        for (int64_t i = 0; i < BINS; i++) counts[i] += table[j][i];
}

/* x: [tokens, n], rows `stride` elements apart; norms: null, or [n] factors of the magnitudes, which are rounded to float
 * before; valid: null, or which tokens count; counts: [BINS], added to. */
void histogram(const T *x, int64_t tokens, int64_t n, int64_t stride, const float *norms, const uint8_t *valid, int64_t *counts,
               int threads) {
    _Pragma("omp parallel num_threads(tokens * n < ALONE ? 1 : threads)") {
        uint32_t table[TABLES][BINS] = {{0}};
        int64_t room = MOST;
        _Pragma("omp for schedule(static) nowait")
        for (int64_t t = 0; t < tokens; t++) {
            if (valid && !valid[t]) continue;
            if (room < n) {
                add(table, counts);
                memset(table, 0, sizeof table);
                room = MOST;
            }
            count_row(x + t * stride, n, norms, table);
            room -= n;
        }
        add(table, counts);
    }
}

/* Transposes matrices by tiles: whole cache lines are read and written, and every bit pattern survives. */
#include <omp.h>
#ifdef __linux__
#include <sys/mman.h>
#endif

#include "scalar.h"

#define TILE 64 /* elements */
#define LINE (64 / (int64_t)sizeof(W))

static void tile(const W *restrict from, int64_t from_stride, const W *next, W *restrict to,
                 int64_t to_stride, int64_t rows, int64_t columns) {
    W kept[TILE][TILE];
    if (rows == TILE && columns == TILE) {
        for (int64_t i = 0; i < TILE; i++) {
            for (int64_t j = 0; j < TILE; j += LINE) __builtin_prefetch(next + i * from_stride + j);
            for (int64_t j = 0; j < TILE; j++) kept[j][i] = from[i * from_stride + j];
        }
        for (int64_t j = 0; j < TILE; j++) memcpy(to + j * to_stride, kept[j], sizeof kept[j]);
        return;
    }
    for (int64_t i = 0; i < rows; i++)
        for (int64_t j = 0; j < columns; j++) to[j * to_stride + i] = from[i * from_stride + j];
}

/* to[m][j][i] = from[m][i][j]: `count` matrices of [rows, columns], their steps and strides in elements */
void transpose(const W *from, int64_t from_step, int64_t from_stride, W *to, int64_t to_step, int64_t to_stride, int64_t count,
               int64_t rows, int64_t columns, int threads) {
    const int64_t down = (rows + TILE - 1) / TILE, across = (columns + TILE - 1) / TILE;
    _Pragma("omp parallel for num_threads(threads) schedule(static)")
    for (int64_t t = 0; t < count * across; t++) { /* a thread writes whole rows */
        const W *source = from + t / across * from_step + t % across * TILE;
        W *target = to + t / across * to_step + t % across * TILE * to_stride;
        const int64_t left = columns - t % across * TILE;
        for (int64_t i = 0; i < down; i++) {
            const W *here = source + i * TILE * from_stride, *next = i + 2 < down ? here + TILE * from_stride : here;
            tile(here, from_stride, next, target + i * TILE, to_stride, rows - i * TILE < TILE ? rows - i * TILE : TILE,
                 left < TILE ? left : TILE);
        }
    }
}

/* Ask for large pages where memory that nobody has touched yet lies: fewer faults now, fewer misses when it is read. */
void want_large_pages(char *memory, int64_t bytes) {
#ifdef MADV_HUGEPAGE
    const uintptr_t large = 1 << 21, from = ((uintptr_t)memory + large - 1) / large * large;
    const uintptr_t to = ((uintptr_t)memory + bytes) / large * large;
    if (from < to) madvise((void *)from, to - from, MADV_HUGEPAGE); /* advice: that it fails does no harm */
#else
    (void)memory, (void)bytes;
#endif
}

/* Let go of pages that nobody needs for now: of a file they are read again when they are touched, others stay. */
void page_out(char *memory, int64_t bytes) {
#if defined MADV_PAGEOUT
    const uintptr_t page = 1 << 12, from = ((uintptr_t)memory + page - 1) / page * page;
    const uintptr_t to = ((uintptr_t)memory + bytes) / page * page;
    if (from < to) madvise((void *)from, to - from, MADV_PAGEOUT);
#else
    (void)memory, (void)bytes;
#endif
}

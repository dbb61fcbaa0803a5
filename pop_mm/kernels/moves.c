/* Exchange rows or columns of a matrix in place, at the speed of memory: how channels of an FFN change their places.
 *
 * Channel i begins step * i elements behind data and has `length` elements, `stride` apart: rows of a row-major matrix have
 * stride 1, columns have step 1. Elements are moved as integers of their size, so every bit pattern survives.
 */
#include <stdint.h>
#include <string.h>

#define PIECE 256         /* bytes that are exchanged at once */
#define LINE 64           /* of the cache */
#define ROWS 32           /* of columns, a thread exchanges in so many rows at a time */
#define ALONE (64 * 1024) /* bytes that one thread exchanges sooner than two would begin */

/* Ask for the next pair's bytes meanwhile, which lie next_a and next_b further on: rows are too short for hardware to see it. */
static void exchange_bytes(char *restrict a, char *restrict b, int64_t bytes, int64_t next_a, int64_t next_b) {
    char kept[PIECE];
    for (; bytes >= PIECE; bytes -= PIECE, a += PIECE, b += PIECE) {
        for (int64_t i = 0; i < PIECE; i += LINE) __builtin_prefetch(a + next_a + i), __builtin_prefetch(b + next_b + i);
        memcpy(kept, a, PIECE), memcpy(a, b, PIECE), memcpy(b, kept, PIECE);
    }
    memcpy(kept, a, bytes), memcpy(a, b, bytes), memcpy(b, kept, bytes);
}

/* one row of the matrix after the other, each with all exchanges: it stays in the cache meanwhile */
#define DEFINE(T)                                                                                                        \
    static void exchange_##T(T *row, int64_t rows, int64_t stride, int64_t step, const int64_t *first,                   \
                             const int64_t *second, int64_t count) {                                                     \
        for (; rows > 0; rows--, row += stride)                                                                          \
            for (int64_t i = 0; i < count; i++) {                                                                        \
                T *a = row + step * first[i], *b = row + step * second[i], kept = *a;                                    \
                *a = *b, *b = kept;                                                                                      \
            }                                                                                                            \
    }

DEFINE(uint8_t)
DEFINE(uint16_t)
DEFINE(uint32_t)
DEFINE(uint64_t)

/* channels first[i] and second[i], `count` disjoint pairs; size: bytes of an element, 1, 2, 4 or 8 */
void exchange(char *data, int64_t size, int64_t length, int64_t stride, int64_t step, const int64_t *first,
              const int64_t *second, int64_t count, int threads) {
#pragma omp parallel num_threads(count * length * size < ALONE ? 1 : threads)
    if (stride == 1) {
#pragma omp for schedule(dynamic, 16)
        for (int64_t i = 0; i < count; i++) {
            int64_t next = i + 1 < count ? i + 1 : i, bytes = size * step;
            exchange_bytes(data + bytes * first[i], data + bytes * second[i], size * length,
                           bytes * (first[next] - first[i]), bytes * (second[next] - second[i]));
        }
    } else {
#pragma omp for schedule(dynamic, 1)
        for (int64_t from = 0; from < length; from += ROWS) {
            int64_t rows = length - from < ROWS ? length - from : ROWS;
            void *row = data + size * stride * from;
            switch (size) {
            case 1: exchange_uint8_t(row, rows, stride, step, first, second, count); break;
            case 2: exchange_uint16_t(row, rows, stride, step, first, second, count); break;
            case 4: exchange_uint32_t(row, rows, stride, step, first, second, count); break;
            case 8: exchange_uint64_t(row, rows, stride, step, first, second, count); break;
            }
        }
    }
}

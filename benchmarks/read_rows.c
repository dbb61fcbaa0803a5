/* Reads rows of memory and does nothing with them but add up one word a cache line: what a decode step could do at best. */
#include <omp.h>
#include <stdint.h>

typedef struct {
    const void *weight;
    int64_t rows;
    int64_t stride; /* elements of two bytes from one row to the next */
} Block;

int64_t read_rows(const Block *blocks, int64_t count, int64_t bytes, int threads) {
    int64_t total = 0;
#pragma omp parallel for num_threads(threads) reduction(+ : total) schedule(static)
    for (int64_t i = 0; i < count; i++) {
        const char *row = blocks[i].weight;
        for (int64_t r = 0; r < blocks[i].rows; r++, row += 2 * blocks[i].stride)
            for (int64_t at = 0; at < bytes; at += 64) {
                __builtin_prefetch(row + at + 16 * blocks[i].stride, 0, 2);
                total += *(const int64_t *)(row + at);
            }
    }
    return total;
}

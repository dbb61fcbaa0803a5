/* Sums of squared activations by channel, [tokens, channels] to [channels], in one pass and without any scratch.
 *
 * Threads share out the channels, so that every sum is made in the order of the tokens, whatever the number of threads.
 */
#include <omp.h>

#include "elements.h"

#define CHANNELS 2048 /* sums that stay in the first cache */
#define TOKENS 4      /* added at once */

static void energy_of(const T *h, int64_t tokens, int64_t channels, int64_t stride, const uint8_t *counted,
                      float *restrict sums) {
    const T *rows[TOKENS];
    int found = 0;
    for (int64_t token = 0; token < tokens; token++) {
        if (!counted || counted[token]) rows[found++] = h + token * stride;
        if (found < TOKENS && token < tokens - 1) continue;
        if (found == TOKENS) {
            const T *restrict a = rows[0], *restrict b = rows[1], *restrict c = rows[2], *restrict d = rows[3];
            for (int64_t i = 0; i < channels; i++) {
                float p = from_T(a[i]), q = from_T(b[i]), r = from_T(c[i]), s = from_T(d[i]);
                sums[i] += p * p + q * q + r * r + s * s;
            }
        } else
            for (int row = 0; row < found; row++)
                for (int64_t i = 0; i < channels; i++) {
                    float p = from_T(rows[row][i]);
                    sums[i] += p * p;
                }
        found = 0;
    }
}

/* stride: elements from one token to the next; counted: one byte a token, or none where all count; sums begin as they are */
void energy(const T *h, int64_t tokens, int64_t channels, int64_t stride, const uint8_t *counted, float *sums, int threads) {
    _Pragma("omp parallel num_threads(threads)") {
        int64_t blocks = (channels + 63) / 64, me = omp_get_thread_num(), all = omp_get_num_threads();
        int64_t from = 64 * (blocks * me / all), to = 64 * (blocks * (me + 1) / all);
        if (to > channels) to = channels;
        for (; from < to; from += CHANNELS)
            energy_of(h + from, tokens, to - from < CHANNELS ? to - from : CHANNELS, stride, counted, sums + from);
    }
}

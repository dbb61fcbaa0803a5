/* Numbers of weights, one of every channel, added up times odd factors: which numbers they are, and where they stand. */
#include <omp.h>

#include "scalar.h"

#define AHEAD 24 /* numbers that are asked for before they are needed; each lies in a line of its own */

#ifdef FLOAT64
typedef int64_t Bits;
#elif defined FLOAT32
typedef int32_t Bits;
#else
typedef int16_t Bits;
#endif

/* Number k of a matrix [units, channels, width] is of unit k / channels and of the channel that is k % channels there, and
 * stands at k % width in it. */
typedef struct {
    const Bits *first;
    const int64_t *places; /* null, or [units, channels]: where each channel stands */
    int64_t units, channels, width, unit_step, channel_step, step; /* steps in elements */
} Sampled;

/* Where the numbers of a matrix stand, one after the other. */
typedef struct {
    const Sampled *of;
    int64_t unit, channel, k, turn;
} Walk;

static const Bits *next(Walk *walk) {
    const Sampled *of = walk->of;
    const int64_t place = of->places ? of->places[walk->k] : walk->channel;
    const Bits *found = of->first + walk->unit * of->unit_step + place * of->channel_step + walk->turn * of->step;
    walk->k++;
    if (++walk->turn == of->width) walk->turn = 0;
    if (++walk->channel == of->channels) walk->channel = 0, walk->unit++;
    return found;
}

static int64_t sum_of(const Sampled *of) {
    const int64_t all = of->units * of->channels;
    Walk here = {.of = of}, ahead = {.of = of};
    uint64_t sum = 0;
    for (int64_t k = -AHEAD; k < all; k++) {
        if (k + AHEAD < all) __builtin_prefetch(next(&ahead));
        if (k >= 0) sum += (uint64_t)(2 * k + 1) * (uint64_t)(int64_t)*next(&here);
    }
    return (int64_t)sum;
}

/* sums: [count], of each matrix */
void sample(const Sampled *of, int64_t count, int64_t *sums, int threads) {
    _Pragma("omp parallel for num_threads(threads) schedule(dynamic)")
    for (int64_t m = 0; m < count; m++) sums[m] = sum_of(of + m);
}

/* The dtype of a model, T: float32 or bfloat16, summed in float. A source that includes this is compiled once for each, with
 * -DFLOAT32 or -DBFLOAT16. A step of a product takes 2 * LANES elements of T.
 */
#include "vectors.h"

#ifdef FLOAT32 /* a step is two vectors of weights, and x lies as it is */
typedef float T;
#define INTERLEAVED 0
static inline float from_T(T value) { return value; }
static inline T to_T(float value) { return value; }
static inline Floats dot(const T *w, Floats x, Floats y, Floats total) { return total + load(w) * x + load(w + LANES) * y; }

#else /* a step is one vector of pairs; the low halves meet the first vector of x, the high halves the second */
typedef uint16_t T;
#define INTERLEAVED 1
static inline float from_T(T value) { return from_bfloat16(value); }
static inline T to_T(float value) { return to_bfloat16(value); }
static inline Floats dot(const T *w, Floats x, Floats y, Floats total) {
    Words pairs = (Words)load(w);
    return total + (Floats)(pairs << 16) * x + (Floats)(pairs & 0xffff0000u) * y;
}
#endif

/* x as floats, in the order in which a step of dot wants them */
static inline void widen(const T *x, int64_t m, float *wide) {
    const int64_t whole = INTERLEAVED ? m - m % (2 * LANES) : 0;
    for (int64_t i = 0; i < whole; i += 2 * LANES)
        for (int64_t j = 0; j < LANES; j++) {
            wide[i + j] = from_T(x[i + 2 * j]);
            wide[i + LANES + j] = from_T(x[i + 2 * j + 1]);
        }
    for (int64_t i = whole; i < m; i++) wide[i] = from_T(x[i]);
}

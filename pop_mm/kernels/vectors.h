/* Floats and bfloat16 by vectors of floats: written with the vector extensions of GCC and Clang, so it is not tied to one
 * instruction set.
 */
#include <stdint.h>
#include <string.h>

#ifdef __AVX512F__
#define LANES 16
#else
#define LANES 8
#endif

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * LANES)));

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

/* x as floats, in the order in which a step of dot_NAME wants them */
#define DEFINE_WIDEN(NAME, T)                                                                                            \
    static inline void widen_##NAME(const T *x, int64_t m, float *wide) {                                                \
        const int64_t whole = INTERLEAVED_##NAME ? m - m % (2 * LANES) : 0;                                              \
        for (int64_t i = 0; i < whole; i += 2 * LANES)                                                                   \
            for (int64_t j = 0; j < LANES; j++) {                                                                        \
                wide[i + j] = from_##NAME(x[i + 2 * j]);                                                                 \
                wide[i + LANES + j] = from_##NAME(x[i + 2 * j + 1]);                                                     \
            }                                                                                                            \
        for (int64_t i = whole; i < m; i++) wide[i] = from_##NAME(x[i]);                                                 \
    }

DEFINE_WIDEN(float, float)
DEFINE_WIDEN(bfloat16, uint16_t)

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

/* to nearest, ties to even */
static inline uint16_t to_bfloat16(float value) {
    union { float value; uint32_t bits; } v = {.value = value};
    if (value != value) return 0x7fc0;
    return (uint16_t)((v.bits + 0x7fff + ((v.bits >> 16) & 1)) >> 16);
}
static inline float from_bfloat16(uint16_t value) { return bits_to_float((uint32_t)value << 16); }

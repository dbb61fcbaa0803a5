/* The dtype of a model, T, that of its sums, S, and that of its weights, W: float32, bfloat16 and float16 are summed in float,
 * float64 in double. Weights are of the model's dtype, or int8 with a float for each output, which its sum is multiplied with.
 *
 * A source that includes this is compiled once for each dtype, with -DFLOAT32, -DBFLOAT16, -DFLOAT16 or -DFLOAT64, and once
 * more with -DINT8 for each but the last.
 */
#pragma once
#include <math.h>
#ifdef __x86_64__
#include <immintrin.h>
#endif

#include "../kernels/vectors.h"

#ifdef FLOAT64
typedef double T, S;
typedef double Sums __attribute__((vector_size(4 * LANES)));
#else
typedef float S;
typedef Floats Sums;
#endif
enum { WIDTH = sizeof(Sums) / sizeof(S) }; /* sums in a vector */

static inline Sums load_sums(const S *from) {
    Sums v;
    memcpy(&v, from, sizeof v);
    return v;
}
static inline void store_sums(S *to, Sums v) { memcpy(to, &v, sizeof v); }

#if defined FLOAT64
static inline S from_T(T value) { return value; }
static inline T to_T(S value) { return value; }
static inline Sums widen(const T *from) { return load_sums(from); }

#elif defined FLOAT32
typedef float T;
static inline S from_T(T value) { return value; }
static inline T to_T(S value) { return value; }
static inline Sums widen(const T *from) { return load_sums(from); }

#else
typedef uint16_t T;
typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));
static inline Words words(const T *from) {
    Halves v;
    memcpy(&v, from, sizeof v);
    return __builtin_convertvector(v, Words);
}

#ifdef BFLOAT16
static inline S from_T(T value) { return from_bfloat16(value); }
static inline T to_T(S value) { return to_bfloat16(value); }
static inline Sums widen(const T *from) { return (Sums)(words(from) << 16); }

#else /* float16: exponents are moved by a product, which makes subnormals right too */
static inline S from_T(T value) {
    const uint32_t magnitude = value & 0x7fff, special = magnitude >= 0x7c00 ? 0x7f800000u : 0;
    union { float value; uint32_t bits; } v = {.value = bits_to_float(magnitude << 13) * 0x1p112f};
    return bits_to_float(v.bits | special | (uint32_t)(value & 0x8000) << 16);
}
static inline T to_T(S value) { /* to nearest, ties to even */
    union { float value; uint32_t bits; } v = {.value = value};
    const uint32_t sign = v.bits >> 16 & 0x8000, magnitude = v.bits & 0x7fffffff;
    if (magnitude > 0x7f800000) return sign | 0x7e00;
    if (magnitude >= 0x477ff000) return sign | 0x7c00; /* 65520 and more */
    if (magnitude < 0x38800000) { /* subnormal: the sum's last bit is the smallest float16 */
        union { float value; uint32_t bits; } small = {.value = bits_to_float(magnitude) + 0.5f};
        return sign | (small.bits - 0x3f000000);
    }
    return sign | ((magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13);
}
#if defined __AVX512F__
static inline Sums widen(const T *from) { return (Sums)_mm512_cvtph_ps(_mm256_loadu_si256((const void *)from)); }
#elif defined __F16C__
static inline Sums widen(const T *from) { return (Sums)_mm256_cvtph_ps(_mm_loadu_si128((const void *)from)); }
#else
static inline Sums widen(const T *from) {
    const Words value = words(from), magnitude = value & 0x7fff;
    const Words special = (Words)(magnitude >= 0x7c00) & 0x7f800000u;
    return (Sums)((Words)((Floats)(magnitude << 13) * 0x1p112f) | special | (value & 0x8000) << 16);
}
#endif
#endif
#endif

/* The next 2 * WIDTH elements by two vectors; of bfloat16 those with even numbers first, which saves half the loads. */
static inline __attribute__((always_inline)) void widen_pair(const T *from, Sums *to) {
#ifdef BFLOAT16
    const Words pairs = (Words)load(from);
    to[0] = (Sums)(pairs << 16), to[1] = (Sums)(pairs & 0xffff0000u);
#else
    to[0] = widen(from), to[1] = widen(from + WIDTH);
#endif
}

/* Weights come by STEP, in VECTORS vectors: by pairs, but for int8. INTERLEAVED: those with even numbers first. */
#if defined BFLOAT16 && !defined INT8
#define INTERLEAVED 1
#else
#define INTERLEAVED 0
#endif
#ifdef INT8
typedef int8_t W;
#define VECTORS 4 /* with AVX-512 a cache line */
static inline S from_W(W value) { return value; }
#if defined __AVX512F__
static inline Sums widen_weights(const W *from) {
    return (Sums)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const void *)from)));
}
#elif defined __AVX2__
static inline Sums widen_weights(const W *from) {
    return (Sums)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const void *)from)));
}
#else
typedef int8_t Bytes __attribute__((vector_size(LANES)));
static inline Sums widen_weights(const W *from) {
    Bytes v;
    memcpy(&v, from, sizeof v);
    return __builtin_convertvector(v, Sums);
}
#endif
#else
typedef T W;
#define VECTORS 2
static inline S from_W(W value) { return from_T(value); }
static inline Sums widen_weights(const W *from) { return widen(from); }
#endif
enum { STEP = VECTORS * WIDTH };

static inline __attribute__((always_inline)) void widen_step(const W *from, Sums *to) {
#ifdef INT8
    _Pragma("GCC unroll 4") for (int i = 0; i < VECTORS; i++) to[i] = widen_weights(from + i * WIDTH);
#else
    widen_pair(from, to);
#endif
}

/* Multiply with the output's scale, add a bias (each may be null) and round, as a linear module does */
static inline S finish(S sum, const float *scale, const T *bias, int64_t i) {
    if (scale) sum *= scale[i];
    return from_T(to_T(bias ? sum + from_T(bias[i]) : sum));
}

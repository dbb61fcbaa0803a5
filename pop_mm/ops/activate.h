/* The activations of pop_mm.kernels.activations.ACTIVATIONS, in that order; each in place for n sums. */
enum { SILU, GELU, GELU_TANH, RELU, RELU2 };

#ifdef FLOAT64
#if defined __x86_64__ && defined __GLIBC__
__asm__(".symver exp, exp@GLIBC_2.2.5"); /* the same function; a shipped library then needs no glibc later than 2.28 */
#endif
static inline double minus_exp(double x) { return exp(-x); }
static inline double tangent(double x) { return tanh(x); }
#define ACTIVATION_WIDTH 1
typedef double Active;
#define LOAD_ACTIVE(from) (*(from))
#define STORE_ACTIVE(to, v) (*(to) = (v))
#define ERF erf
#else
/* exp(-x) within two units of the last place; overflow is infinite, underflow zero, NaN stays */
static inline Floats minus_exp(Floats x) {
    const float shift = 0x1.8p23f; /* adding it rounds to a whole number, which then stands in the lowest bits */
    Floats y = -x;
    const Words high = (Words)(y > 105.0f), low = (Words)(y < -105.0f), limit = (Words)((Floats){0} + 105.0f);
    y = (Floats)((high & limit) | (low & (limit | 0x80000000u)) | (~(high | low) & (Words)y));
    const Floats shifted = y * (float)M_LOG2E + shift, whole = shifted - shift;
    const Floats r = (y - whole * 0x1.62e4p-1f) - whole * 0x1.7f7d1cp-20f; /* ln 2 in two parts */
    Floats p = r * 1.9875691500e-4f + 1.3981999507e-3f; /* Cephes */
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1;
    typedef int32_t Integers __attribute__((vector_size(4 * LANES)));
    const Integers power = (Integers)shifted - 0x4b400000, half = power >> 1; /* by two factors: it may be out of range */
    return p * (Floats)((half + 127) << 23) * (Floats)((power - half + 127) << 23);
}
static inline Floats tangent(Floats x) { return 1 - 2 / (minus_exp(-2 * x) + 1); }
#define ACTIVATION_WIDTH LANES
typedef Floats Active;
#define LOAD_ACTIVE(from) load(from)
#define STORE_ACTIVE(to, v) store_sums(to, v)
#define ERF erff
#endif

static inline Active silu(Active x) { return x / (1 + minus_exp(x)); }
static inline Active gelu_tanh(Active x) {
    return x * (S)0.5 * (1 + tangent((S)(M_2_SQRTPI * M_SQRT1_2) * (x + (S)0.044715 * x * x * x)));
}

/* room for n sums, rounded up to whole vectors */
static void activate(int64_t kind, S *x, int64_t n) {
    if (kind == GELU) {
        for (int64_t i = 0; i < n; i++) x[i] = x[i] * (S)0.5 * (1 + ERF(x[i] * (S)M_SQRT1_2));
    } else if (kind == RELU || kind == RELU2) {
        for (int64_t i = 0; i < n; i++) x[i] = x[i] < 0 ? 0 : kind == RELU ? x[i] : x[i] * x[i];
    } else if (kind == SILU) {
        for (int64_t i = 0; i < n; i += ACTIVATION_WIDTH) STORE_ACTIVE(x + i, silu(LOAD_ACTIVE(x + i)));
    } else {
        for (int64_t i = 0; i < n; i += ACTIVATION_WIDTH) STORE_ACTIVE(x + i, gelu_tanh(LOAD_ACTIVE(x + i)));
    }
}

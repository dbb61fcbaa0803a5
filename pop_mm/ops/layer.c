/* What a decoder layer computes for one token besides its matrices: norms, the rotation of query and key, and attention. */
#include "layer.h"

#include "activate.h"

#define PAIR (2 * WIDTH)
#ifdef FLOAT64
#define ROOT sqrt
#else
#define ROOT sqrtf
#endif
#define ALONE (1 << 18) /* products that one thread does alone: waking others takes longer */
#define SHORT (1 << 14) /* numbers of norms, likewise */

static S sum_of(Sums v) {
    S total = 0;
    for (int i = 0; i < (int)WIDTH; i++) total += v[i];
    return total;
}

/* p[t] = exp(p[t] - highest); their sum */
static S exponentials(S *p, int64_t n, S highest) {
    enum { AT_ONCE = sizeof(Active) / sizeof(S) };
    S total = 0;
    for (int64_t t = 0; t < n; t += AT_ONCE) {
        Active v = {0};
        const int64_t left = n - t < AT_ONCE ? n - t : AT_ONCE;
        memcpy(&v, p + t, left * sizeof(S));
        v = minus_exp(highest - v);
        memcpy(p + t, &v, left * sizeof(S));
        for (int64_t i = 0; i < left; i++) total += p[t + i];
    }
    return total;
}

/* room: size + length + value_size sums */
static void attend_head(const Shape *s, const T *query, const T *keys, const T *values, S *room, T *out) {
    const int64_t size = s->size, wide = s->value_size, steps = size - size % PAIR;
    S *q = room, *restrict p = q + size, *restrict sums = p + s->length, highest = -INFINITY, total = 0;
    for (int64_t i = 0; i < steps; i += PAIR) {
        Sums pair[2];
        widen_pair(query + i, pair);
        store_sums(q + i, pair[0]), store_sums(q + i + WIDTH, pair[1]);
    }
    for (int64_t i = steps; i < size; i++) q[i] = from_T(query[i]);
    for (int64_t t = 0; t < s->length; t++) {
        const T *key = keys + t * s->key_token;
        Sums dots = {0};
        for (int64_t i = 0; i < steps; i += PAIR) {
            Sums pair[2];
            widen_pair(key + i, pair);
            dots += pair[0] * load_sums(q + i) + pair[1] * load_sums(q + i + WIDTH);
        }
        S score = sum_of(dots);
        for (int64_t i = steps; i < size; i++) score += from_T(key[i]) * q[i];
        p[t] = score * (S)s->scale;
        if (!(p[t] <= highest)) highest = p[t];
    }
    total = exponentials(p, s->length, highest);
    for (int64_t i = 0; i < wide; i++) sums[i] = 0;
    for (int64_t t = 0; t < s->length; t++) {
        const T *restrict value = values + t * s->value_token;
        int64_t i = 0;
        for (; i + WIDTH <= wide; i += WIDTH) store_sums(sums + i, load_sums(sums + i) + p[t] * widen(value + i));
        for (; i < wide; i++) sums[i] += p[t] * from_T(value[i]);
    }
    for (int64_t i = 0; i < wide; i++) out[i] = to_T(sums[i] / total);
}

/* query: [heads, size]; out: [heads, value_size]; room: for every head */
void attend(const Shape *s, const T *query, const T *keys, const T *values, S *room, T *out, int threads) {
    const int64_t group = s->heads / s->kv_heads, each = s->size + s->length + s->value_size;
    if (s->heads * s->length * (s->size + s->value_size) < ALONE) threads = 1;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t head = 0; head < s->heads; head++)
        attend_head(s, query + head * s->size, keys + head / group * s->key_head, values + head / group * s->value_head,
                    room + head * each, out + head * s->value_size);
}

/* x * cos + (-x2, x1) * sin for each head, x = (x1, x2): in place, every product and sum rounded to T */
void rotate(T *x, const T *cosine, const T *sine, int64_t heads, int64_t size) {
    const int64_t half = size / 2;
    for (; heads > 0; heads--, x += size)
        for (int64_t i = 0; i < half; i++) {
            const S a = from_T(x[i]), b = from_T(x[i + half]);
            const S first = from_T(to_T(a * from_T(cosine[i]))), second = from_T(to_T(-b * from_T(sine[i])));
            const S third = from_T(to_T(b * from_T(cosine[i + half]))), last = from_T(to_T(a * from_T(sine[i + half])));
            x[i] = to_T(first + second), x[i + half] = to_T(third + last);
        }
}

static void norm_row(const T *restrict x, const T *restrict weight, T *restrict out, int64_t size, S eps, int kind) {
    Sums squares = {0};
    int64_t i = 0;
    for (; i + WIDTH <= size; i += WIDTH) squares += widen(x + i) * widen(x + i);
    S total = sum_of(squares);
    for (; i < size; i++) total += from_T(x[i]) * from_T(x[i]);
    const S scale = 1 / ROOT(total / size + eps);
    if (kind == 0)
        for (i = 0; i < size; i++) out[i] = to_T(from_T(to_T(from_T(x[i]) * scale)) * from_T(weight[i]));
    else
        for (i = 0; i < size; i++) out[i] = to_T(from_T(x[i]) * scale * ((kind == 2) + from_T(weight[i])));
}

/* Root mean square norms of rows, as transformers' modules compute them: in sums, rounded where they round.
 * x, out: [rows, size]; weight: [size]; kind: in the order of pop_mm.ops.layer.KINDS */
void rms_norm(const T *x, const T *weight, T *out, int64_t rows, int64_t size, double eps, int kind, int threads) {
    if (rows * size < SHORT) threads = 1;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t row = 0; row < rows; row++) norm_row(x + row * size, weight, out + row * size, size, eps, kind);
}

/* Attention of one token over all keys and values of its cache, in bfloat16; torch is as fast in float32, and several times slower
 * in bfloat16 where the machine has no arithmetic for it.
 *
 * Scores and sums are floats. Threads share out the query heads; those of a group read the same keys one after the other.
 */
#include <math.h>

#include "vectors.h"

#define TOKENS 4 /* whose values are added at once */

/* `heads` query heads share `kv_heads` heads of keys and values; strides in elements, from one head or token to the next */
typedef struct {
    int64_t heads, kv_heads, length, size, value_size;
    int64_t key_head, key_token, value_head, value_token;
    float scale;
} Shape;

/* room: size + length + value_size floats */
static void attend_head(const Shape *s, const uint16_t *query, const uint16_t *keys, const uint16_t *values, float *room,
                        uint16_t *out) {
    const int64_t size = s->size, wide = s->value_size, whole = size - size % (2 * LANES);
    float *q = room, *restrict p = q + size, *restrict sums = p + s->length, highest = -INFINITY, total = 0;
    widen_bfloat16(query, size, q);
    for (int64_t t = 0; t < s->length; t++) {
        const uint16_t *key = keys + t * s->key_token;
        Floats dots = {0};
        for (int64_t i = 0; i < whole; i += 2 * LANES)
            dots = dot_bfloat16(key + i, load(q + i), load(q + i + LANES), dots);
        float score = sum(dots);
        for (int64_t i = whole; i < size; i++) score += from_bfloat16(key[i]) * q[i];
        p[t] = score * s->scale;
        if (!(p[t] <= highest)) highest = p[t];
    }
    for (int64_t t = 0; t < s->length; t++) total += p[t] = expf(p[t] - highest);
    for (int64_t i = 0; i < wide; i++) sums[i] = 0;
    int64_t t = 0;
    for (; t + TOKENS <= s->length; t += TOKENS) {
        const uint16_t *restrict a = values + t * s->value_token, *restrict b = a + s->value_token;
        const uint16_t *restrict c = b + s->value_token, *restrict d = c + s->value_token;
        for (int64_t i = 0; i < wide; i++)
            sums[i] += p[t] * from_bfloat16(a[i]) + p[t + 1] * from_bfloat16(b[i]) + p[t + 2] * from_bfloat16(c[i]) +
                       p[t + 3] * from_bfloat16(d[i]);
    }
    for (; t < s->length; t++)
        for (int64_t i = 0; i < wide; i++) sums[i] += p[t] * from_bfloat16(values[t * s->value_token + i]);
    for (int64_t i = 0; i < wide; i++) out[i] = to_bfloat16(sums[i] / total);
}

/* query: [heads, size]; out: [heads, value_size]; room: for every head */
void attend_bfloat16(const Shape *s, const uint16_t *query, const uint16_t *keys, const uint16_t *values, float *room,
                     uint16_t *out, int threads) {
    const int64_t group = s->heads / s->kv_heads, each = s->size + s->length + s->value_size;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t head = 0; head < s->heads; head++)
        attend_head(s, query + head * s->size, keys + head / group * s->key_head, values + head / group * s->value_head,
                    room + head * each, out + head * s->value_size);
}

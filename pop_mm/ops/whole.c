/* A decoder layer of one token by rows in two calls: up to where its cache takes the token, and from there on. Norms, projections
 * and residuals are those of layer.c and rows.c, rounded between them as the modules round. */
#include "layer.h"
#include "rows.h"

typedef struct {
    Matrix inward[3], outward; /* q, k and v; o */
    FFN ffn;
    const float *inward_threshold, *outward_threshold, *x_threshold, *h_threshold;
    int64_t *inward_kept, *outward_kept, *ffn_kept; /* numbers of entries kept are added to them */
    int64_t head;                                   /* entries of one */
} Layer;

/* weight: null where a head has no norm; kind: as rms_norm() takes it */
typedef struct {
    const T *weight;
    double eps;
    int64_t kind;
} Norm;

enum { BEFORE, OF_QUERY, OF_KEY, BEHIND }; /* numbers of norms */

static int64_t lines(int64_t bytes) { return (bytes + 63) / 64 * 64; }
static int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
static int64_t inward_outputs(const Layer *l) { return l->inward[0].outputs + l->inward[1].outputs + l->inward[2].outputs; }
static int64_t attention_bytes(const Shape *s) {
    return lines(s->heads * (s->size + s->length + s->value_size) * (int64_t)sizeof(S));
}

static void normed(const Norm *norm, const T *x, int64_t rows, int64_t size, T *out) {
    rms_norm(x, norm->weight, out, rows, size, norm->eps, (int)norm->kind, 1);
}

static void add(const T *a, const T *b, int64_t n, T *out) {
    for (int64_t i = 0; i < n; i++) out[i] = to_T(from_T(a[i]) + from_T(b[i]));
}

int64_t begin_room(const Layer *l, int64_t hidden, int64_t threads) {
    const int64_t outputs = inward_outputs(l);
    return lines((hidden + outputs) * (int64_t)sizeof(T)) + rows_room(1, hidden, outputs, threads);
}

/* hidden: [H]; cosine, sine: [head]; out: query, key and value, one behind the other, the first two rotated;
 * room: begin_room() bytes, aligned to a cache line. */
void begin_layer(const Layer *l, const Norm *norms, const T *hidden, int64_t size, const T *cosine, const T *sine, T *out, char *room,
                 int threads) {
    const int64_t query = l->inward[0].outputs, key = l->inward[1].outputs, outputs = inward_outputs(l);
    T *x = (T *)room, *found = norms[OF_QUERY].weight ? x + size : out;
    normed(norms + BEFORE, hidden, 1, size, x);
    rows(l->inward, 3, 1, x, size, 0, l->inward_threshold, found, l->inward_kept,
         room + lines((size + outputs) * (int64_t)sizeof(T)), threads);
    if (found != out) {
        normed(norms + OF_QUERY, found, query / l->head, l->head, out);
        normed(norms + OF_KEY, found + query, key / l->head, l->head, out + query);
        memcpy(out + query + key, found + query + key, l->inward[2].outputs * sizeof(T));
    }
    rotate(out, cosine, sine, (query + key) / l->head, l->head);
}

int64_t end_room(const Layer *l, const Shape *s, int64_t threads) {
    const int64_t attended = s->heads * s->value_size, hidden = l->outward.outputs;
    const int64_t products = rows_room(1, attended, hidden, threads);
    const int64_t ffns = l->ffn.size ? ffn_room(hidden, l->ffn.size, 1, threads) : 0;
    return lines((attended + 2 * hidden) * (int64_t)sizeof(T)) + most(attention_bytes(s), most(products, ffns));
}

/* query: [heads, size]; keys, values: those of the cache; hidden: [H], what the layer was given; out: [H], what it returns, without
 * its FFN if the layer has none here (ffn.size = 0); room: end_room() bytes, aligned to a cache line. */
void end_layer(const Layer *l, const Norm *norms, const Shape *s, const T *query, const T *keys, const T *values, const T *hidden,
               T *out, char *room, int threads) {
    const int64_t inputs = s->heads * s->value_size, size = l->outward.outputs;
    T *attended = (T *)room, *x = attended + inputs, *part = x + size;
    room += lines((inputs + 2 * size) * (int64_t)sizeof(T));
    attend(s, query, keys, values, (S *)room, attended, threads);
    rows(&l->outward, 1, 1, attended, inputs, 0, l->outward_threshold, part, l->outward_kept, room, threads);
    add(hidden, part, size, out);
    if (!l->ffn.size) return;
    normed(norms + BEHIND, out, 1, size, x);
    ffn(&l->ffn, 1, 0, 0, 0, x, l->x_threshold, l->h_threshold, part, l->ffn_kept, room, threads);
    add(out, part, size, out);
}

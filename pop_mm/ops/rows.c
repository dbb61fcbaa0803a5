/* A decode step of one token that reads chosen rows of input-major matrices: y = sum of x[i] * M[i], where |x[i]| is above a
 * threshold. M is [inputs, outputs], its rows contiguous.
 *
 * The kept rows of all matrices of a stage, one matrix behind the other, are cut into pieces of equal bytes, one for each
 * thread, so that a thread reads whole rows: of a few matrices where there are many (the experts of a token), of a part of
 * one where there is one. Each thread has sums of its own, which are added up in the order of the threads.
 */
#include <omp.h>

#include "rows.h"

#include "activate.h"

#define AT_ONCE 8                          /* rows that are read at once */
#define BLOCK (32768 / (int64_t)sizeof(S)) /* sums that stay in the first cache while they are */
#define PIECE 512                          /* channels or outputs that are finished at once */
#define LINE 64                            /* bytes */

/* What is kept: magnitudes above the threshold, and NaN, which has to stay visible. Of scalars and of vectors. */
#define KEPT(magnitude, threshold) (((magnitude) <= (threshold)) == 0)

/* The rows to read of x: [n] and their values, both with room for a vector more. norms: null, or factors of the magnitudes.
 * Magnitudes are rounded to float before they are multiplied and compared. Returns how many there are. */
static int64_t choose(const T *x, int64_t n, const float *norms, float threshold, int64_t first, int32_t *row, S *value) {
    int64_t kept = 0, i = 0;
#if defined __AVX512F__ && !defined FLOAT64
    Words number = (Words){0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15} + (uint32_t)first;
    for (; i + LANES <= n; i += LANES, number += LANES) {
        const Floats v = widen(x + i);
        Floats magnitude = (Floats)((Words)v & 0x7fffffff);
        if (norms) magnitude *= load(norms + i);
        const __m512i chosen = (__m512i)KEPT(magnitude, threshold);
        const __mmask16 mask = _mm512_test_epi32_mask(chosen, chosen);
        _mm512_storeu_si512(row + kept, _mm512_maskz_compress_epi32(mask, (__m512i)number));
        _mm512_storeu_ps(value + kept, _mm512_maskz_compress_ps(mask, (__m512)v));
        kept += __builtin_popcount(mask);
    }
#endif
    for (; i < n; i++) {
        const S v = from_T(x[i]);
        float magnitude = fabsf((float)v);
        if (norms) magnitude *= norms[i];
        row[kept] = (int32_t)(first + i), value[kept] = v;
        kept += KEPT(magnitude, threshold);
    }
    return kept;
}

/* Rows to read of one matrix; their sums stand at `slot`. Jobs with the same slot follow each other. */
typedef struct {
    const W *weight;
    int64_t stride, outputs;
    const int32_t *row;
    const S *value;
    int64_t rows, slot;
} Job;

/* sums[o] += value[t] * r[t][o], t = 0, 1 ...; whole steps as widen_step() orders them. What comes next is asked for on the way,
 * into the second cache: the first one has fewer requests under way at once, and needs its room for the sums. */
static inline __attribute__((always_inline)) void add_some(
    const W *const *r, const W *const *next, const S *value, const int count, int64_t n, S *restrict sums) {
    int64_t o = 0;
    for (; o + STEP <= n; o += STEP) {
        Sums a[VECTORS];
        _Pragma("GCC unroll 4") for (int i = 0; i < VECTORS; i++) a[i] = load_sums(sums + o + i * WIDTH);
        _Pragma("GCC unroll 16") for (int t = 0; t < count; t++) {
            Sums v[VECTORS];
            widen_step(r[t] + o, v);
            _Pragma("GCC unroll 4") for (int i = 0; i < VECTORS; i++) a[i] += v[i] * value[t];
        }
        _Pragma("GCC unroll 4") for (int i = 0; i < VECTORS; i++) store_sums(sums + o + i * WIDTH, a[i]);
        _Pragma("GCC unroll 16") for (int t = 0; next && t < count; t++)
            for (int64_t line = 0; line < STEP * (int64_t)sizeof(W); line += LINE)
                __builtin_prefetch((const char *)(next[t] + o) + line, 0, 2);
    }
    for (; o < n; o++) {
        S v = sums[o];
        for (int t = 0; t < count; t++) v += from_W(r[t][o]) * value[t];
        sums[o] = v;
    }
}

/* Sums as their outputs are numbered */
static void put_in_order(S *sums, int64_t n) {
    for (int64_t o = 0; INTERLEAVED && o + STEP <= n; o += STEP) {
        S kept[STEP];
        memcpy(kept, sums + o, sizeof kept);
        for (int64_t i = 0; i < WIDTH; i++) sums[o + 2 * i] = kept[i], sums[o + 2 * i + 1] = kept[WIDTH + i];
    }
}

static void add_rows(const Job *job, int64_t from, int64_t to, S *restrict sums) {
    for (int64_t first = 0; first < job->outputs; first += BLOCK) {
        const int64_t n = job->outputs - first < BLOCK ? job->outputs - first : BLOCK;
        const W *r[AT_ONCE], *next[AT_ONCE];
        for (int64_t j = from, some; j < to; j += some) {
            some = to - j >= AT_ONCE ? AT_ONCE : to - j >= 4 ? 4 : 1;
            for (int64_t t = 0; t < some; t++) {
                const int64_t later = j + AT_ONCE + t < to ? j + AT_ONCE + t : to - 1;
                r[t] = job->weight + job->row[j + t] * job->stride + first;
                next[t] = job->weight + job->row[later] * job->stride + first;
            }
            if (some == AT_ONCE) add_some(r, next, job->value + j, AT_ONCE, n, sums + first);
            else if (some == 4) add_some(r, 0, job->value + j, 4, n, sums + first);
            else add_some(r, 0, job->value + j, 1, n, sums + first);
        }
    }
}

/* How many of some rows lie in front of element `at`, if their first one begins at 0 */
static inline int64_t rows_before(int64_t at, int64_t rows, int64_t outputs) {
    return at <= 0 ? 0 : at >= rows * outputs ? rows : at / outputs;
}
/* The element at which thread `me` of `all` begins */
static inline int64_t share(int64_t total, int64_t me, int64_t all) { return total / all * me + total % all * me / all; }
static int64_t elements(const Job *jobs, int64_t count) {
    int64_t total = 0;
    for (int64_t i = 0; i < count; i++) total += jobs[i].rows * jobs[i].outputs;
    return total;
}

/* What a thread has to do of all jobs */
static void multiply(const Job *jobs, int64_t count, int64_t me, int64_t all, S *sums) {
    const int64_t total = elements(jobs, count), start = share(total, me, all), end = share(total, me + 1, all);
    int64_t before = 0, slot = -1, outputs = 0;
    for (int64_t i = 0; i < count && before < end; before += jobs[i].rows * jobs[i].outputs, i++) {
        const int64_t from = rows_before(start - before, jobs[i].rows, jobs[i].outputs);
        const int64_t to = rows_before(end - before, jobs[i].rows, jobs[i].outputs);
        if (from == to) continue;
        if (slot != jobs[i].slot) {
            if (slot >= 0) put_in_order(sums + slot, outputs);
            slot = jobs[i].slot, outputs = jobs[i].outputs;
            memset(sums + slot, 0, outputs * sizeof(S));
        }
        add_rows(jobs + i, from, to, sums + slot);
    }
    if (slot >= 0) put_in_order(sums + slot, outputs);
}

/* out[i] = the sums of all threads at slot + from + i, for i < n; step: from one thread's sums to the next one's */
static void collect(const Job *jobs, int64_t count, int64_t all, const S *sums, int64_t step, int64_t slot, int64_t from,
                    int64_t n, S *restrict out) {
    const int64_t total = elements(jobs, count);
    int64_t before = 0, rows = 0, outputs = 1, found = 0;
    for (int64_t i = 0; i < count; i++)
        if (jobs[i].slot == slot) rows += jobs[i].rows, outputs = jobs[i].outputs;
        else if (!rows) before += jobs[i].rows * jobs[i].outputs;
    for (int64_t t = total ? before * all / total : all; rows && t < all && share(total, t, all) < before + rows * outputs; t++) {
        const S *restrict part = sums + t * step + slot + from;
        if (rows_before(share(total, t, all) - before, rows, outputs) ==
            rows_before(share(total, t + 1, all) - before, rows, outputs))
            continue;
        if (found++) for (int64_t i = 0; i < n; i++) out[i] += part[i];
        else memcpy(out, part, n * sizeof(S));
    }
    if (!found) memset(out, 0, n * sizeof(S));
}

static inline int64_t padded(int64_t n) { return (n + 31) / 16 * 16; } /* with a vector more, in whole cache lines */

/* Memory of a call. Of each thread: rows and values of its inputs, sums. Of all: those of the channels, counts. */
typedef struct {
    int32_t *row;
    S *value, *sums;
} Own;
static int64_t own_bytes(int64_t inputs, int64_t sums) { return padded(inputs) * (4 + sizeof(S)) + padded(sums) * sizeof(S); }
static Own own(char *room, int64_t me, int64_t inputs, int64_t sums) {
    room += me * own_bytes(inputs, sums);
    return (Own){(int32_t *)room, (S *)(room + 4 * padded(inputs)), (S *)(room + (4 + sizeof(S)) * padded(inputs))};
}

int64_t rows_room(int64_t lists, int64_t inputs, int64_t outputs, int64_t threads) {
    return threads * own_bytes(lists * padded(inputs), outputs);
}

/* Products of several matrices with one x: [inputs] (lists = 1), or with one each (lists = count).
 *
 * norms: null, or [lists, inputs]; threshold: [lists]; y: the outputs of all matrices, one behind the other; kept: null, or
 * the number of entries kept is added to it; room: rows_room() bytes, aligned to a cache line. */
void rows(const Matrix *matrices, int64_t count, int64_t lists, const T *x, int64_t inputs, const float *norms,
          const float *threshold, T *y, int64_t *kept, char *room, int threads) {
    int64_t outputs = 0;
    for (int64_t i = 0; i < count; i++) outputs += matrices[i].outputs;
    const int64_t list = padded(inputs), all_lists = lists * list, step = own_bytes(all_lists, outputs) / sizeof(S);
    _Pragma("omp parallel num_threads(threads)") {
        const int64_t me = omp_get_thread_num(), all = omp_get_num_threads();
        const Own my = own(room, me, all_lists, outputs);
        Job jobs[count];
        int64_t chosen = 0, n = 0;
        for (int64_t i = 0, slot = 0; i < count; slot += matrices[i].outputs, i++) {
            const int64_t l = i < lists ? i : 0;
            if (i < lists)
                chosen += n = choose(x + l * inputs, inputs, norms ? norms + l * inputs : 0, threshold[l], 0,
                                     my.row + l * list, my.value + l * list);
            jobs[i] = (Job){matrices[i].weight, matrices[i].stride, matrices[i].outputs, my.row + l * list,
                            my.value + l * list, n, slot};
        }
        if (!me && kept) *kept += chosen;
        multiply(jobs, count, me, all, my.sums);
        _Pragma("omp barrier");
        const int64_t from = outputs * me / all, to = outputs * (me + 1) / all;
        for (int64_t i = 0, slot = 0; i < count; slot += matrices[i].outputs, i++)
            for (int64_t a = from > slot ? from : slot; a < to && a < slot + matrices[i].outputs;) {
                S sums[PIECE];
                int64_t n = (to < slot + matrices[i].outputs ? to : slot + matrices[i].outputs) - a;
                n = n < PIECE ? n : PIECE;
                collect(jobs, count, all, own(room, 0, all_lists, outputs).sums, step, slot, a - slot, n, sums);
                for (int64_t o = 0; o < n; o++) y[a + o] = to_T(finish(sums[o], matrices[i].scale, matrices[i].bias, a - slot + o));
                a += n;
            }
    }
}

static int64_t ffn_sums(int64_t hidden, int64_t size, int64_t count) { return count * (2 * size > hidden ? 2 * size : hidden); }
static int64_t ffn_shared(int64_t size, int64_t count, int64_t threads) {
    return padded(count * size) * (4 + sizeof(S)) + padded(count * threads) * sizeof(int64_t);
}
int64_t ffn_room(int64_t hidden, int64_t size, int64_t count, int64_t threads) {
    return ffn_shared(size, count, threads) + threads * own_bytes(hidden, ffn_sums(hidden, size, count));
}

/* Where the channels of a thread begin */
static inline int64_t channels_before(int64_t channels, int64_t me, int64_t all) {
    return me == all ? channels : channels * me / all / 16 * 16;
}

/* y = sum over c < count of weight[c] * FFN number ids[c] of x, both [hidden]; without ids and weights that of the first.
 *
 * An id that is none of an expert's adds nothing. threshold_x: [1], of x; threshold_h: [experts], of h times norms. weights:
 * of the sums' dtype if `wide`, else of the model's. kept: null, or the number of entries kept is added to: of x, of h. */
void ffn(const FFN *f, int64_t count, const int64_t *ids, const void *weights, int wide, const T *x, const float *threshold_x,
         const float *threshold_h, T *y, int64_t *kept, char *room, int threads) {
    const int64_t H = f->hidden, D = f->size, inward = f->gate ? 2 : 1, space = ffn_sums(H, D, count), channels = count * D;
    int32_t *row = (int32_t *)room;
    S *value = (S *)(row + padded(channels));
    int64_t *found = (int64_t *)(value + padded(channels)); /* [count, threads] */
    room += ffn_shared(D, count, threads);
    const S *first = own(room, 0, H, space).sums;
    const int64_t step = own_bytes(H, space) / sizeof(S);
    _Pragma("omp parallel num_threads(threads)") {
        const int64_t me = omp_get_thread_num(), all = omp_get_num_threads();
        const Own my = own(room, me, H, space);
        Job jobs[2 * count], down[count * all];
        int64_t number[count], rows = choose(x, H, 0, *threshold_x, 0, my.row, my.value), segments = 0, chosen = 0;
        for (int64_t c = 0; c < count; c++) {
            const int64_t e = number[c] = ids ? ids[c] : 0, n = e >= 0 && e < f->experts ? rows : 0;
            if (f->gate)
                jobs[inward * c] = (Job){f->gate + (n ? e : 0) * f->gate_step, f->gate_stride, D, my.row, my.value, n, 2 * c * D};
            jobs[inward * (c + 1) - 1] =
                (Job){f->up + (n ? e : 0) * f->up_step, f->up_stride, D, my.row, my.value, n, (2 * c + 1) * D};
        }
        multiply(jobs, inward * count, me, all, my.sums);
        _Pragma("omp barrier");
        for (int64_t c = 0; c < count; c++) { /* h of some channels, and which of them are kept */
            const int64_t e = number[c];
            const int64_t before = channels_before(channels, me, all), after = channels_before(channels, me + 1, all);
            int64_t a = before > c * D ? before - c * D : 0, to = after < (c + 1) * D ? after - c * D : D;
            int64_t *n = found + c * all + me, at = c * D + a;
            *n = 0;
            if (e < 0 || e >= f->experts) continue;
            const T *gate_bias = f->gate_bias ? f->gate_bias + e * f->gate_bias_step : 0;
            const T *up_bias = f->up_bias ? f->up_bias + e * f->up_bias_step : 0;
            const float *gate_scale = f->gate_scale ? f->gate_scale + e * D : 0;
            const float *up_scale = f->up_scale ? f->up_scale + e * D : 0;
            for (int64_t piece; a < to; a += piece) {
                S g[PIECE + LANES], u[PIECE + LANES];
                T h[PIECE];
                piece = to - a < PIECE ? to - a : PIECE;
                collect(jobs, inward * count, all, first, step, (2 * c + 1) * D, a, piece, u);
                for (int64_t i = 0; i < piece; i++) u[i] = finish(u[i], up_scale, up_bias, a + i);
                if (f->gate) {
                    collect(jobs, inward * count, all, first, step, 2 * c * D, a, piece, g);
                    for (int64_t i = 0; i < piece; i++) g[i] = finish(g[i], gate_scale, gate_bias, a + i);
                    activate(f->activation, g, piece);
                    for (int64_t i = 0; i < piece; i++) h[i] = to_T(from_T(to_T(g[i])) * u[i]);
                } else {
                    activate(f->activation, u, piece);
                    for (int64_t i = 0; i < piece; i++) h[i] = to_T(u[i]);
                }
                /* what does not fit behind the channels of this thread is scratch of the next: so not into them */
                int32_t some_rows[PIECE + LANES];
                S some_values[PIECE + LANES];
                const float *norms = f->norms ? f->norms + e * D + a : 0;
                const int64_t k = choose(h, piece, norms, threshold_h[e], a, some_rows, some_values);
                memcpy(row + at + *n, some_rows, k * sizeof *some_rows);
                memcpy(value + at + *n, some_values, k * sizeof *some_values);
                *n += k;
            }
        }
        _Pragma("omp barrier");
        for (int64_t c = 0; c < count; c++)
            for (int64_t t = 0; t < all; t++) {
                const int64_t n = found[c * all + t], before = channels_before(channels, t, all);
                const int64_t at = before > c * D ? before : c * D;
                if (!n) continue;
                down[segments++] =
                    (Job){f->down + number[c] * f->down_step, f->down_stride, H, row + at, value + at, n, c * H};
                chosen += n;
            }
        if (!me && kept) kept[0] += rows, kept[1] += chosen;
        multiply(down, segments, me, all, my.sums);
        _Pragma("omp barrier");
        for (int64_t a = H * me / all, n; a < H * (me + 1) / all; a += n) {
            S sums[PIECE], total[PIECE] = {0};
            n = H * (me + 1) / all - a < PIECE ? H * (me + 1) / all - a : PIECE;
            for (int64_t c = 0; c < count; c++) {
                if (number[c] < 0 || number[c] >= f->experts) continue;
                const T *bias = f->down_bias ? f->down_bias + number[c] * f->down_bias_step : 0;
                const float *scale = f->down_scale ? f->down_scale + number[c] * H : 0;
                collect(down, segments, all, first, step, c * H, a, n, sums);
                if (!weights)
                    for (int64_t i = 0; i < n; i++) total[i] = finish(sums[i], scale, bias, a + i);
                else if (wide)
                    for (int64_t i = 0; i < n; i++) total[i] += finish(sums[i], scale, bias, a + i) * ((const S *)weights)[c];
                else
                    for (int64_t i = 0; i < n; i++)
                        total[i] += from_T(to_T(finish(sums[i], scale, bias, a + i) * from_T(((const T *)weights)[c])));
            }
            for (int64_t i = 0; i < n; i++) y[a + i] = to_T(total[i]);
        }
    }
}

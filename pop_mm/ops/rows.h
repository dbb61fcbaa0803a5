/* The functions of rows.c, and what they are told of matrices. */
#pragma once
#include "scalar.h"

typedef struct {
    const W *weight; /* [inputs, outputs] */
    const T *bias;   /* [outputs] or null */
    const float *scale; /* likewise */
    int64_t stride, outputs;
} Matrix;

/* FFNs of one shape at equal distances: the experts of a layer, or one FFN (experts = 1). */
typedef struct {
    const W *gate, *up, *down;                   /* [H, D], or null; [H, D]; [D, H]: of the first */
    const T *gate_bias, *up_bias, *down_bias;    /* or null */
    const float *gate_scale, *up_scale, *down_scale; /* or null; [experts, D], [experts, D], [experts, H] */
    const float *norms;                          /* null, or [experts, D] */
    int64_t gate_stride, up_stride, down_stride; /* elements from row to row */
    int64_t gate_step, up_step, down_step;       /* from expert to expert */
    int64_t gate_bias_step, up_bias_step, down_bias_step;
    int64_t hidden, size, experts, activation;
} FFN;

int64_t rows_room(int64_t lists, int64_t inputs, int64_t outputs, int64_t threads);
void rows(const Matrix *matrices, int64_t count, int64_t lists, const T *x, int64_t inputs, const float *norms,
          const float *threshold, T *y, int64_t *kept, char *room, int threads);
int64_t ffn_room(int64_t hidden, int64_t size, int64_t count, int64_t threads);
void ffn(const FFN *f, int64_t count, const int64_t *ids, const void *weights, int wide, const T *x, const float *threshold_x,
         const float *threshold_h, T *y, int64_t *kept, char *room, int threads);

/* The functions of layer.c. */
#pragma once
#include "scalar.h"

/* `heads` query heads share `kv_heads` heads of keys and values; strides in elements, from one head or token to the next */
typedef struct {
    int64_t heads, kv_heads, length, size, value_size;
    int64_t key_head, key_token, value_head, value_token;
    double scale;
} Shape;

void attend(const Shape *s, const T *query, const T *keys, const T *values, S *room, T *out, int threads);
void rotate(T *x, const T *cosine, const T *sine, int64_t heads, int64_t size);
void rms_norm(const T *x, const T *weight, T *out, int64_t rows, int64_t size, double eps, int kind, int threads);

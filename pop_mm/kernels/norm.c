/* Root mean square norms of a few rows, as transformers' modules compute them: in float, rounded where they round. */
#include <math.h>

#include "vectors.h"

#define PARTS 16 /* sums at once */

/* x, out: [rows, size]; weight: [size]; kind: in the order of pop_mm.kernels.norm.KINDS */
#define DEFINE(NAME, T)                                                                                                  \
    void rms_norm_##NAME(const T *restrict x, const T *restrict weight, T *restrict out, int64_t rows, int64_t size,     \
                         float eps, int kind) {                                                                          \
        for (; rows > 0; rows--, x += size, out += size) {                                                               \
            float parts[PARTS] = {0}, total = 0;                                                                         \
            int64_t i = 0;                                                                                               \
            for (; i + PARTS <= size; i += PARTS)                                                                        \
                for (int64_t j = 0; j < PARTS; j++) parts[j] += from_##NAME(x[i + j]) * from_##NAME(x[i + j]);           \
            for (; i < size; i++) total += from_##NAME(x[i]) * from_##NAME(x[i]);                                        \
            for (int64_t j = 0; j < PARTS; j++) total += parts[j];                                                       \
            const float scale = 1 / sqrtf(total / size + eps);                                                           \
            if (kind == 0)                                                                                               \
                for (i = 0; i < size; i++)                                                                               \
                    out[i] = to_##NAME(from_##NAME(to_##NAME(from_##NAME(x[i]) * scale)) * from_##NAME(weight[i]));      \
            else                                                                                                         \
                for (i = 0; i < size; i++)                                                                               \
                    out[i] = to_##NAME(from_##NAME(x[i]) * scale * ((kind == 2) + from_##NAME(weight[i])));              \
        }                                                                                                                \
    }

DEFINE(float, float)
DEFINE(bfloat16, uint16_t)

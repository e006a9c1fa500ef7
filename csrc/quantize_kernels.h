/* Weights to few bits: the search for each block's scale, and the bytes in the order of the file.
 *
 * A search tries some ten scales a block, so this decides how long the export of a large model takes. Plain C whose
 * inner loops over lanes every compiler vectorizes; with GCC once per instruction set, chosen at load time. Sums keep
 * one order (16 lanes, then halves onto halves) and products are never contracted, so that every machine writes the same
 * bytes; `cpmbee.export.plain_quantize` is the readable specification, bit for bit. */
#ifndef CPMBEE_QUANTIZE_KERNELS_H
#define CPMBEE_QUANTIZE_KERNELS_H

#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__GNUC__) && !defined(__clang__) && defined(__x86_64__) && defined(__linux__)
#define CPMBEE_QUANTIZE_CLONES __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#else
#define CPMBEE_QUANTIZE_CLONES
#endif
#if defined(__GNUC__)
#define CPMBEE_ALWAYS_INLINE static inline __attribute__((always_inline))
#else
#define CPMBEE_ALWAYS_INLINE static inline
#endif

enum { CPMBEE_SUM_LANES = 16, CPMBEE_OUTPUT_LANES = 16, CPMBEE_LANE_BYTES = 4 };

/* What one scale does to a block: with q the rounded w / scale and d what rounding left over, the importance-weighted
 * sums of d * d, d * q and q * q. */
typedef struct {
    float left, cross, whole;
} cpmbee_fit;

CPMBEE_ALWAYS_INLINE float cpmbee_half_value(uint16_t half) {
    const uint32_t exponent = (uint32_t)(half & 0x7c00) << 13;
    uint32_t bits = ((uint32_t)(half & 0x7fff) << 13) + (112u << 23);
    float value;
    if (exponent == 0x7c00u << 13) bits += 112u << 23;
    if (exponent == 0) { /* subnormal: its bits count units of 2^-24 */
        value = (float)(half & 0x3ff) * 5.9604644775390625e-8f;
    } else {
        memcpy(&value, &bits, sizeof value);
    }
    return half & 0x8000 ? -value : value;
}

/* Round to nearest even; infinite beyond the range of fp16. */
CPMBEE_ALWAYS_INLINE uint16_t cpmbee_half_bits(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    const uint16_t sign = (uint16_t)(bits >> 16 & 0x8000);
    bits &= 0x7fffffffu;
    if (bits >= 143u << 23) return (uint16_t)(sign | 0x7c00);
    if (bits < 113u << 23) { /* subnormal: adding 0.5 leaves units of 2^-24 in the low bits */
        float magnitude;
        memcpy(&magnitude, &bits, sizeof magnitude);
        magnitude += 0.5f;
        memcpy(&bits, &magnitude, sizeof bits);
        return (uint16_t)(sign | (bits - (126u << 23)));
    }
    bits += 0xfffu + (bits >> 13 & 1) - (112u << 23);
    return (uint16_t)(sign | bits >> 13);
}

/* Finite fp16 numbers as fp32, times a factor. */
CPMBEE_QUANTIZE_CLONES static void cpmbee_widen(const uint16_t *half, long n, float factor, float *out) {
    for (long i = 0; i < n; ++i) {
        const uint32_t bits = (uint32_t)(half[i] & 0x7fff) << 13; /* 2^112 too small: the bias of exponents differs */
        const uint32_t sign = (uint32_t)(half[i] & 0x8000) << 16;
        float value;
        memcpy(&value, &bits, sizeof value);
        value *= 5192296858534827628530496329220096.0f;
        uint32_t wide;
        memcpy(&wide, &value, sizeof wide);
        wide |= sign;
        memcpy(&value, &wide, sizeof value);
        out[i] = value * factor;
    }
}

CPMBEE_ALWAYS_INLINE float cpmbee_round(float value, float low, float high) {
    const float magic = 12582912.0f; /* 1.5 * 2^23: adding it rounds to an integer */
    value = value > low ? value : low; /* of NaN, too, so that what comes out is always a number */
    value = value > high ? high : value;
    return (value + magic) - magic;
}

/* The sum of the lanes, halves onto halves. */
CPMBEE_ALWAYS_INLINE float cpmbee_fold(float *lanes) {
    for (int lane = 0; lane < 8; ++lane) lanes[lane] += lanes[lane + 8];
    for (int lane = 0; lane < 4; ++lane) lanes[lane] += lanes[lane + 4];
    return (lanes[0] + lanes[2]) + (lanes[1] + lanes[3]);
}

CPMBEE_ALWAYS_INLINE cpmbee_fit cpmbee_try(const float *w, const float *importance, int n, float inverse, float low,
                                           float high) {
    float left[CPMBEE_SUM_LANES] = {0}, cross[CPMBEE_SUM_LANES] = {0}, whole[CPMBEE_SUM_LANES] = {0};
    for (int k = 0; k < n; k += CPMBEE_SUM_LANES) {
        for (int lane = 0; lane < CPMBEE_SUM_LANES; ++lane) {
            const float exact = w[k + lane] * inverse;
            const float q = cpmbee_round(exact, low, high);
            const float d = exact - q;
            left[lane] += importance[k + lane] * d * d;
            cross[lane] += importance[k + lane] * d * q;
            whole[lane] += importance[k + lane] * q * q;
        }
    }
    const cpmbee_fit fit = {cpmbee_fold(left), cpmbee_fold(cross), cpmbee_fold(whole)};
    return fit;
}

/* The largest magnitude of a block, with its sign. */
CPMBEE_ALWAYS_INLINE float cpmbee_extreme(const float *w, int n) {
    float low = 0, high = 0;
    for (int k = 0; k < n; ++k) {
        low = w[k] < low ? w[k] : low;
        high = w[k] > high ? w[k] : high;
    }
    return -low > high ? low : high;
}

/* The scale of one block as fp16 bits; 0 where the block is zero, or too small for fp16.
 *
 * Candidates map the block's extreme to each of `levels`: a positive level stands for a positive scale that reaches
 * it with either sign, a negative one for the scale that gives the extreme this very number. With `refine` each
 * candidate's rounded numbers get their least-squares scale, too. The first of the best wins. */
CPMBEE_ALWAYS_INLINE uint16_t cpmbee_block_scale(const float *w, const float *importance, int n, float zero_point,
                                                 const float *levels, int num_levels, int refine) {
    const float extreme = cpmbee_extreme(w, n);
    uint16_t best = 0;
    float least = INFINITY;
    for (int i = 0; i < num_levels; ++i) {
        const float wanted = (levels[i] > 0 ? fabsf(extreme) : extreme) / levels[i];
        const uint16_t bits = cpmbee_half_bits(wanted);
        if (!(bits & 0x7fff) || (bits & 0x7c00) == 0x7c00) continue;
        if (num_levels == 1 && !refine) return bits;
        const float scale = cpmbee_half_value(bits);
        const cpmbee_fit fit = cpmbee_try(w, importance, n, 1.0f / scale, -zero_point, zero_point - 1.0f);
        float error = scale * scale * fit.left;
        if (error < least) {
            least = error;
            best = bits;
        }
        if (!refine || !(fit.whole > 0)) continue;
        const uint16_t fitted = cpmbee_half_bits(scale * (1.0f + fit.cross / fit.whole));
        if (!(fitted & 0x7fff) || (fitted & 0x7c00) == 0x7c00) continue;
        const float change = cpmbee_half_value(fitted) / scale - 1.0f;
        error = scale * scale * (fit.left - 2.0f * change * fit.cross + change * change * fit.whole);
        if (error < least) {
            least = error;
            best = fitted;
        }
    }
    return best;
}

/* Quantize `groups` times 16 rows of `columns` values, both padded, into the bytes and scales of the file.
 *
 * `numbers` is room for 16 * columns bytes. Adds the importance-weighted sums of squared errors and of squared weights
 * to sums[0] and sums[1]. Returns 0, or -1 when fp16 scales cannot reach a value. */
CPMBEE_QUANTIZE_CLONES static int cpmbee_quantize(const float *rows, const float *importance, long groups,
                                                  long columns, int block, int bits, const float *levels,
                                                  int num_levels, int refine, uint8_t *numbers, uint8_t *packed,
                                                  uint16_t *scales, double *sums) {
    const float zero_point = (float)(1 << (bits - 1));
    const long blocks = columns / block, size = bits == 4 ? columns / 2 : columns;
    for (long g = 0; g < groups; ++g) {
        for (long lane = 0; lane < CPMBEE_OUTPUT_LANES; ++lane) {
            const float *row = rows + (g * CPMBEE_OUTPUT_LANES + lane) * columns;
            for (long b = 0; b < blocks; ++b) {
                const float *w = row + b * block, *weight = importance + b * block;
                const uint16_t half = cpmbee_block_scale(w, weight, block, zero_point, levels, num_levels, refine);
                const float scale = cpmbee_half_value(half);
                const float inverse = scale != 0 ? 1.0f / scale : 0.0f;
                float error[CPMBEE_SUM_LANES] = {0}, power[CPMBEE_SUM_LANES] = {0};
                uint8_t *q = numbers + lane * columns + b * block;
                if (scale == 0 && fabsf(cpmbee_extreme(w, block)) > 1.0f) return -1;
                for (int k = 0; k < block; k += CPMBEE_SUM_LANES) {
                    for (int j = 0; j < CPMBEE_SUM_LANES; ++j) {
                        const float rounded = cpmbee_round(w[k + j] * inverse, -zero_point, zero_point - 1.0f);
                        const float d = w[k + j] - rounded * scale;
                        error[j] += weight[k + j] * d * d;
                        power[j] += weight[k + j] * w[k + j] * w[k + j];
                        q[k + j] = (uint8_t)(int)(rounded + zero_point);
                    }
                }
                sums[0] += cpmbee_fold(error);
                sums[1] += cpmbee_fold(power);
                scales[(g * blocks + b) * CPMBEE_OUTPUT_LANES + lane] = half;
            }
        }
        uint8_t *out = packed + g * CPMBEE_OUTPUT_LANES * size;
        for (long i = 0; i < size; i += CPMBEE_LANE_BYTES) {
            for (long lane = 0; lane < CPMBEE_OUTPUT_LANES; ++lane, out += CPMBEE_LANE_BYTES) {
                if (bits == 8) {
                    memcpy(out, numbers + lane * columns + i, CPMBEE_LANE_BYTES);
                } else {
                    const uint8_t *q = numbers + lane * columns + 2 * i;
                    for (int j = 0; j < CPMBEE_LANE_BYTES; ++j) out[j] = (uint8_t)(q[2 * j] | q[2 * j + 1] << 4);
                }
            }
        }
    }
    return 0;
}

/* What stored numbers mean: `rows` outputs from the first of their group on, of which `columns` inputs are wanted. */
CPMBEE_QUANTIZE_CLONES static void cpmbee_expand(const uint8_t *packed, const uint16_t *scales, long vectors,
                                                 long blocks, int bits, long rows, long columns, float *out) {
    const long per_vector = 32 / bits, per_block = vectors * per_vector / blocks;
    const float zero_point = (float)(1 << (bits - 1));
    for (long row = 0; row < rows; ++row) {
        const long group = row / CPMBEE_OUTPUT_LANES, lane = row % CPMBEE_OUTPUT_LANES;
        const uint8_t *bytes = packed + (group * vectors * CPMBEE_OUTPUT_LANES + lane) * CPMBEE_LANE_BYTES;
        float *values = out + row * columns;
        for (long b = 0; b < blocks; ++b) {
            const float scale = cpmbee_half_value(scales[(group * blocks + b) * CPMBEE_OUTPUT_LANES + lane]);
            const long begin = b * per_block, end = begin + per_block < columns ? begin + per_block : columns;
            for (long k = begin; k < end; k += per_vector) {
                const uint8_t *four = bytes + k / per_vector * CPMBEE_OUTPUT_LANES * CPMBEE_LANE_BYTES;
                const uint32_t word = four[0] | four[1] << 8 | four[2] << 16 | (uint32_t)four[3] << 24;
                const int count = (int)(end - k < per_vector ? end - k : per_vector);
                if (bits == 4 && count == 8) {
                    for (int i = 0; i < 8; ++i) values[k + i] = ((float)(int)(word >> 4 * i & 15) - zero_point) * scale;
                } else {
                    const uint32_t mask = bits == 4 ? 15 : 255;
                    for (int i = 0; i < count; ++i) {
                        values[k + i] = ((float)(int)(word >> bits * i & mask) - zero_point) * scale;
                    }
                }
            }
        }
    }
}

#endif

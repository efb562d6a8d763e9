// SPDX-License-Identifier: Apache-2.0
// AdaRound's pass over its weights for processors with AVX-512, with the results of the Swift code.

#include "vector_kernels.h"

#if defined(__x86_64__) && defined(__GNUC__)

#include <immintrin.h>

#define AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq")))

// Products are rounded before they are added, as in the Swift code.
#pragma clang fp contract(off)

// 1.5 * 2^23: adding it leaves no fraction bits, so the addition rounds, ties to even.
static const float magic = 12582912.0f;
static const int magic_bits = 0x4b400000;

static inline AVX512 __m512 all(float value) { return _mm512_set1_ps(value); }

// sum * factor + next
static inline AVX512 __m512 step_of(__m512 sum, __m512 factor, float next) {
  return _mm512_add_ps(_mm512_mul_ps(sum, factor), all(next));
}

// See SIMD16.exponentialBase2.
static inline AVX512 __m512 exponential_base_2(__m512 value) {
  __m512 x = _mm512_min_ps(_mm512_max_ps(value, all(-126)), all(126));
  __m512 sum = _mm512_add_ps(x, all(magic));
  __m512 fraction = _mm512_sub_ps(x, _mm512_sub_ps(sum, all(magic)));
  __m512 power = step_of(all(1.525273e-5f), fraction, 1.540353e-4f);
  power = step_of(power, fraction, 1.333356e-3f);
  power = step_of(power, fraction, 9.618129e-3f);
  power = step_of(power, fraction, 5.550411e-2f);
  power = step_of(power, fraction, 0.2402265f);
  power = step_of(power, fraction, 0.6931472f);
  power = step_of(power, fraction, 1);
  __m512i bits = _mm512_castps_si512(sum);
  __m512i exponent =
      _mm512_slli_epi32(_mm512_sub_epi32(bits, _mm512_set1_epi32(magic_bits - 127)), 23);
  return _mm512_mul_ps(power, _mm512_castsi512_ps(exponent));
}

// See SIMD16.logarithmBase2.
static inline AVX512 __m512 logarithm_base_2(__m512 value) {
  __m512i bits = _mm512_castps_si512(value);
  __m512i exponent = _mm512_srai_epi32(_mm512_sub_epi32(bits, _mm512_set1_epi32(0x3f3504f3)), 23);
  __m512 mantissa = _mm512_castsi512_ps(_mm512_sub_epi32(bits, _mm512_slli_epi32(exponent, 23)));
  __m512 ratio = _mm512_div_ps(_mm512_sub_ps(mantissa, all(1)), _mm512_add_ps(mantissa, all(1)));
  __m512 square = _mm512_mul_ps(ratio, ratio);
  __m512 series = step_of(all(0.3205989f), square, 0.4121986f);
  series = step_of(series, square, 0.577078f);
  series = step_of(series, square, 0.9617967f);
  series = step_of(series, square, 2.8853901f);
  __m512 integer = _mm512_sub_ps(
      _mm512_castsi512_ps(_mm512_add_epi32(exponent, _mm512_set1_epi32(magic_bits))), all(magic));
  return _mm512_add_ps(_mm512_mul_ps(series, ratio), integer);
}

static inline AVX512 __m512 logistic_of(__m512 value) {
  __m512 power = exponential_base_2(_mm512_mul_ps(value, all(-1.442695f)));
  return _mm512_div_ps(all(1), _mm512_add_ps(all(1), power));
}

// The stretched sigmoid before it is clamped.
static inline AVX512 __m512 stretched(__m512 logistic) {
  return _mm512_sub_ps(_mm512_mul_ps(logistic, all(1.2f)), all(0.1f));
}

static inline AVX512 __m512 clamped(__m512 height) {
  return _mm512_min_ps(_mm512_max_ps(height, _mm512_setzero_ps()), all(1));
}

// See softGradient.
static inline AVX512 __m512 gradient_of(__m512 variables, __m512 step, __m512 upstream,
                                        hsk_soft_constants constants) {
  __m512 logistic = logistic_of(variables), open = stretched(logistic), height = clamped(open);
  __mmask16 moves = _mm512_cmp_ps_mask(open, height, _CMP_EQ_OQ);
  // Where the sigmoid is cut off it is flat: late on, nearly everywhere.
  if (moves == 0) return _mm512_setzero_ps();
  __m512 gradient = _mm512_mul_ps(step, upstream);
  if (constants.factor != 0) {
    __m512 centered = _mm512_sub_ps(_mm512_mul_ps(height, all(2)), all(1));
    const __m512 sign = all(-0.0f);
    __m512 magnitude = _mm512_max_ps(_mm512_andnot_ps(sign, centered), all(1e-30f));
    __m512 power =
        exponential_base_2(_mm512_mul_ps(logarithm_base_2(magnitude), all(constants.exponent)));
    __m512 push = _mm512_mul_ps(power, all(constants.factor));
    push = _mm512_or_ps(_mm512_and_ps(sign, centered), _mm512_andnot_ps(sign, push));
    gradient = _mm512_sub_ps(gradient, push);
  }
  __m512 slope = _mm512_mul_ps(_mm512_mul_ps(logistic, _mm512_sub_ps(all(1), logistic)), all(1.2f));
  return _mm512_maskz_mul_ps(moves, gradient, slope);
}

AVX512 void hsk_update_soft_rounding(hsk_soft_planes planes, const float *upstream, size_t count,
                                     hsk_soft_constants constants) {
  for (size_t index = 0; index < count; index += 16) {
    __m512 variables = _mm512_loadu_ps(planes.variables + index);
    __m512 step = _mm512_loadu_ps(planes.step + index);
    __m512 gradient = gradient_of(variables, step, _mm512_loadu_ps(upstream + index), constants);
    __m512 first = _mm512_add_ps(_mm512_mul_ps(_mm512_loadu_ps(planes.first + index), all(0.9f)),
                                 _mm512_mul_ps(gradient, all(0.1f)));
    __m512 second =
        _mm512_add_ps(_mm512_mul_ps(_mm512_loadu_ps(planes.second + index), all(0.999f)),
                      _mm512_mul_ps(_mm512_mul_ps(gradient, gradient), all(0.001f)));
    __m512 root = step_of(_mm512_sqrt_ps(second), all(constants.inverse_root), 1e-8f);
    __m512 moved =
        _mm512_sub_ps(variables, _mm512_div_ps(_mm512_mul_ps(first, all(constants.rate)), root));
    _mm512_storeu_ps(planes.first + index, first);
    _mm512_storeu_ps(planes.second + index, second);
    _mm512_storeu_ps(planes.variables + index, moved);
    __m512 height = clamped(stretched(logistic_of(moved)));
    __m512 weights =
        _mm512_add_ps(_mm512_loadu_ps(planes.start + index), _mm512_mul_ps(step, height));
    _mm512_storeu_ps(planes.weights + index, weights);
  }
}

#else

void hsk_update_soft_rounding(hsk_soft_planes planes, const float *upstream, size_t count,
                              hsk_soft_constants constants) {
  (void)planes, (void)upstream, (void)count, (void)constants;
}

#endif

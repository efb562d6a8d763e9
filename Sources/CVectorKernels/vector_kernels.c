// SPDX-License-Identifier: Apache-2.0
// Loops for processors with AVX-512; chosen at run time, with the same results as the Swift code.

#include "vector_kernels.h"

#if defined(__x86_64__) && defined(__GNUC__)

#include <cpuid.h>
#include <immintrin.h>
#include <math.h>

#define AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,popcnt")))

static int detect(void) {
  unsigned a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & bit_OSXSAVE) || !(c & bit_POPCNT)) return 0;
  unsigned low, high;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  // Registers that the operating system saves: SSE, AVX, masks, upper halves, upper sixteen.
  if ((low & 0xe6) != 0xe6) return 0;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return 0;
  const unsigned wanted = bit_AVX512F | bit_AVX512BW | bit_AVX512VL | bit_AVX512DQ;
  return (b & wanted) == wanted;
}

int hsk_has_avx512(void) {
  // 0 unknown, 1 no, 2 yes; threads that race store the same.
  static int known = 0;
  int state = __atomic_load_n(&known, __ATOMIC_RELAXED);
  if (state == 0) {
    state = detect() ? 2 : 1;
    __atomic_store_n(&known, state, __ATOMIC_RELAXED);
  }
  return state == 2;
}

static inline AVX512 hsk_extremes extremes_of_all(const float *values, size_t count) {
  __m512 low[4], high[4];
  for (int k = 0; k < 4; k++) {
    low[k] = _mm512_set1_ps(INFINITY);
    high[k] = _mm512_set1_ps(-INFINITY);
  }
  __mmask16 nan[4] = {0, 0, 0, 0};
  size_t index = 0;
  for (; index + 64 <= count; index += 64) {
#pragma clang loop unroll(full)
    for (int k = 0; k < 4; k++) {
      __m512 x = _mm512_loadu_ps(values + index + 16 * k);
      // The second operand wins where the first is NaN.
      low[k] = _mm512_min_ps(x, low[k]);
      high[k] = _mm512_max_ps(x, high[k]);
      nan[k] |= _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    }
  }
  for (; index < count; index += 16) {
    __mmask16 some = count - index < 16 ? (__mmask16)((1u << (count - index)) - 1) : 0xffff;
    __m512 x = _mm512_maskz_loadu_ps(some, values + index);
    low[0] = _mm512_mask_min_ps(low[0], some, x, low[0]);
    high[0] = _mm512_mask_max_ps(high[0], some, x, high[0]);
    nan[0] |= _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  }
  __m512 least = _mm512_min_ps(_mm512_min_ps(low[0], low[1]), _mm512_min_ps(low[2], low[3]));
  __m512 most = _mm512_max_ps(_mm512_max_ps(high[0], high[1]), _mm512_max_ps(high[2], high[3]));
  hsk_extremes result = {_mm512_reduce_min_ps(least), _mm512_reduce_max_ps(most), 0,
                         (nan[0] | nan[1] | nan[2] | nan[3]) != 0};
  return result;
}

static inline AVX512 hsk_extremes extremes_of_nonzeros(const float *values, size_t count) {
  __m512 low = _mm512_set1_ps(INFINITY), high = _mm512_set1_ps(-INFINITY);
  __mmask16 nan = 0;
  uint64_t nonzeros = 0;
  for (size_t index = 0; index < count; index += 16) {
    __mmask16 some = count - index < 16 ? (__mmask16)((1u << (count - index)) - 1) : 0xffff;
    __m512 x = _mm512_maskz_loadu_ps(some, values + index);
    // Lanes beyond the end are zeros and drop out, too.
    __mmask16 nonzero = _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_NEQ_UQ);
    nonzeros += (uint64_t)__builtin_popcount(nonzero);
    low = _mm512_mask_min_ps(low, nonzero, x, low);
    high = _mm512_mask_max_ps(high, nonzero, x, high);
    nan |= _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  }
  hsk_extremes result = {_mm512_reduce_min_ps(low), _mm512_reduce_max_ps(high), count - nonzeros,
                         nan != 0};
  return result;
}

AVX512 hsk_extremes hsk_find_extremes(const float *values, size_t count, int skips_zeros) {
  return skips_zeros ? extremes_of_nonzeros(values, count) : extremes_of_all(values, count);
}

enum { HALF = 4096, BINS = 2 * HALF, BLOCK = 256 };

AVX512 void hsk_count_bins(
    const float *values, size_t count, float reciprocal_width, uint32_t *counters) {
  const __m512 reciprocal = _mm512_set1_ps(reciprocal_width);
  const __m512i half = _mm512_set1_epi32(HALF);
  // A vector is stored whole and the next one over its unused end.
  uint16_t slots[BLOCK + 16];
  uint32_t *second = counters + BINS, *third = second + BINS, *fourth = third + BINS;
  uint64_t zeros = 0;
  for (size_t start = 0; start < count; start += BLOCK) {
    size_t block = count - start < BLOCK ? count - start : BLOCK;
    size_t filled = 0;
    for (size_t index = 0; index < block; index += 16) {
      size_t left = block - index;
      __mmask16 some = left < 16 ? (__mmask16)((1u << left) - 1) : 0xffff;
      __m512 x = _mm512_maskz_loadu_ps(some, values + start + index);
      // Half of what follows a ReLU is zero: those are counted together.
      __mmask16 nonzero = _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_NEQ_UQ);
      // Rounding down twice is exact even where the product is too small for a float.
      __m512 scaled = _mm512_mul_round_ps(x, reciprocal, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
      __m512i bin = _mm512_cvt_roundps_epi32(scaled, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
      __m512i slot = _mm512_maskz_compress_epi32(nonzero, _mm512_add_epi32(bin, half));
      _mm256_storeu_si256((__m256i *)(slots + filled), _mm512_cvtepi32_epi16(slot));
      filled += (size_t)__builtin_popcount(nonzero);
    }
    zeros += block - filled;
    // Neighbors go to different histograms, so that equal values do not wait for each other.
    size_t k = 0;
    for (; k + 4 <= filled; k += 4) {
      counters[slots[k]]++;
      second[slots[k + 1]]++;
      third[slots[k + 2]]++;
      fourth[slots[k + 3]]++;
    }
    for (; k < filled; k++) counters[slots[k]]++;
  }
  counters[HALF] += (uint32_t)zeros;
}

AVX512 void hsk_grid_noise(
    const float *values, size_t count, hsk_noise_grid grid, float total[16], float clipped[16]) {
// Products are rounded before they are added, as in the Swift code.
#pragma clang fp contract(off)
  const __m512 reciprocal = _mm512_set1_ps(grid.reciprocal);
  const __m512 low = _mm512_set1_ps(grid.low), high = _mm512_set1_ps(grid.high);
  // 1.5 * 2^23: adding it leaves no fraction bits, so the addition rounds, ties to even.
  const __m512 magic = _mm512_set1_ps(12582912.0f);
  __m512 all = _mm512_setzero_ps(), outside = _mm512_setzero_ps();
  for (size_t index = 0; index < count; index += 16) {
    __m512 scaled = _mm512_mul_ps(_mm512_loadu_ps(values + index), reciprocal);
    __m512 inside = _mm512_min_ps(_mm512_max_ps(scaled, low), high);
    __m512 rounded = _mm512_sub_ps(_mm512_add_ps(inside, magic), magic);
    __m512 error = _mm512_sub_ps(scaled, rounded), beyond = _mm512_sub_ps(scaled, inside);
    all = _mm512_add_ps(all, _mm512_mul_ps(error, error));
    outside = _mm512_add_ps(outside, _mm512_mul_ps(beyond, beyond));
  }
  _mm512_storeu_ps(total, all);
  _mm512_storeu_ps(clipped, outside);
}

#else

int hsk_has_avx512(void) { return 0; }

hsk_extremes hsk_find_extremes(const float *values, size_t count, int skips_zeros) {
  (void)values, (void)count, (void)skips_zeros;
  hsk_extremes nothing = {0, 0, 0, 1};
  return nothing;
}

void hsk_count_bins(
    const float *values, size_t count, float reciprocal_width, uint32_t *counters) {
  (void)values, (void)count, (void)reciprocal_width, (void)counters;
}

void hsk_grid_noise(
    const float *values, size_t count, hsk_noise_grid grid, float total[16], float clipped[16]) {
  (void)values, (void)count, (void)grid, (void)total, (void)clipped;
}

#endif

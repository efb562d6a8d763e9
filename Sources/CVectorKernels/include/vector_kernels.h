// SPDX-License-Identifier: Apache-2.0
// Loops for processors with AVX-512, which Swift cannot compile beside the baseline.
#pragma once

#include <stddef.h>
#include <stdint.h>

// Whether this processor and its operating system run the functions below; they must not be called
// elsewhere.
int hsk_has_avx512(void);

typedef struct {
  // Smallest and largest value, NaN left out; (inf, -inf) if there is none.
  float minimum, maximum;
  // Zeros that were left out on request.
  uint64_t zeros;
  // Whether a NaN was seen.
  int has_nan;
} hsk_extremes;

// Extremes of `count` values; with `skips_zeros`, of those that are not zero.
hsk_extremes hsk_find_extremes(const float *values, size_t count, int skips_zeros);

// Counts finite values x in bins floor(x * reciprocal_width), which lie in -4096...4095.
//
// `reciprocal_width` is a power of two. `counters` holds four histograms of 8192 bins, one after the
// other; which of them counts a value is unspecified.
void hsk_count_bins(const float *values, size_t count, float reciprocal_width, uint32_t *counters);

// The grid of hsk_grid_noise: codes from `low` to `high` relative to the zero point.
typedef struct {
  float reciprocal, low, high;
} hsk_noise_grid;

// Sums the squared errors of values on a grid, in steps squared, lane by lane.
//
// `count` is a multiple of 16; lane k gets the values at k, k + 16, ... in this order. `total[k]` is
// what rounding and clipping cost, `clipped[k]` the distances to the grid's ends alone.
void hsk_grid_noise(
    const float *values, size_t count, hsk_noise_grid grid, float total[16], float clipped[16]);

// The arrays of a soft rounding; see SoftPlanes.
typedef struct {
  float *variables, *first, *second, *weights;
  const float *step, *start;
} hsk_soft_planes;

// What a step is computed from; see RegularizerConstants and UpdateConstants.
typedef struct {
  float factor, exponent, rate, inverse_root;
} hsk_soft_constants;

// One step of Adam on the variables of a soft rounding, and the weights that follow from them.
//
// `count` is a multiple of 16; `upstream` is the gradient of the loss with respect to the weights.
void hsk_update_soft_rounding(
    hsk_soft_planes planes, const float *upstream, size_t count, hsk_soft_constants constants);

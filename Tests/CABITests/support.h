// SPDX-License-Identifier: Apache-2.0
// Checks and fixtures that the unit tests share.
#ifndef HALFSTEP_TESTS_SUPPORT_H
#define HALFSTEP_TESTS_SUPPORT_H

#include <halfstep.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

extern int checks;
extern int failures;

/// Counts a check; prints it if it fails.
#define CHECK(condition)                                                      \
  do {                                                                        \
    ++checks;                                                                 \
    if (!(condition)) {                                                       \
      ++failures;                                                             \
      fprintf(stderr, "%s:%d: failed: %s\n", __FILE__, __LINE__, #condition); \
    }                                                                         \
  } while (0)

/// Checks a status; prints the one that came and the message.
#define CHECK_STATUS(expected, call)                                                         \
  do {                                                                                       \
    hs_status status_ = (call);                                                              \
    ++checks;                                                                                \
    if (status_ != (expected)) {                                                             \
      ++failures;                                                                            \
      fprintf(stderr, "%s:%d: expected %s, got %s from %s: %s\n", __FILE__, __LINE__,        \
              hs_status_name(expected), hs_status_name(status_), #call, last_error.message); \
    }                                                                                        \
  } while (0)

#define CHECK_OK(call) CHECK_STATUS(HS_OK, call)

/// Where the tests' calls report.
extern hs_error last_error;

/// The fixture: model bytes and calibration data.
extern const char *model_path;
extern const char *data_path;
extern const char *output_folder;

/// A fresh model, opened from the fixture; exits if that fails.
hs_model *open_model(void);
/// The fixture's 20 pictures, float32 [20, 3, 8, 8].
hs_tensors *open_data(hs_tensor_view *out_view);
/// A calibrated simulation of the folded and equalized model.
hs_simulation *open_simulation(void);

void test_layout(void);
void test_nulls(void);
void test_views(void);
void test_jobs(void);
void test_pruning(void);
void test_rounding(void);

#endif

// SPDX-License-Identifier: Apache-2.0
// Rounding through the C interface: widths of single layers, constants, progress within layers.

#include "support.h"

/// What a progress callback saw, and when it is to cancel.
typedef struct seen {
  size_t calls;
  size_t limit;
  size_t completed;
  int is_odd;
} seen;

static int32_t watch(const hs_rounding_progress *progress, void *user_data) {
  seen *all = user_data;
  all->is_odd |= progress->layer == NULL || progress->completed > progress->total ||
                 progress->completed < all->completed ||
                 !(progress->fraction >= 0 && progress->fraction <= 1) ||
                 progress->seconds_left != progress->seconds_left;
  all->completed = progress->completed;
  return ++all->calls == all->limit;
}

static hs_status round_with(const hs_rounding_options *options, hs_rounding_report **report) {
  hs_model *model = open_model();
  hs_tensor_view view;
  hs_tensors *data = open_data(&view);
  const char *name = "input";
  hs_status status = hs_model_adaround(model, &name, &view, 1, options, report, &last_error);
  hs_tensors_free(data);
  hs_model_free(model);
  return status;
}

static void test_widths(void) {
  hs_rounding_options options;
  hs_rounding_options_init(&options);
  const char *layers[] = {"stem", "project"};
  int32_t widths[] = {8, 3};
  options.width_layers = layers;
  options.widths = widths;
  options.width_count = 2;
  hs_rounding_report *report = NULL;
  CHECK_OK(round_with(&options, &report));
  size_t count = 0;
  CHECK_OK(hs_rounding_report_count(report, &count, &last_error));
  CHECK(count > 2);
  for (size_t i = 0; i < count; ++i) {
    hs_rounded_layer layer;
    CHECK_OK(hs_rounding_report_get(report, i, &layer, &last_error));
    int32_t bits = 4;
    if (strcmp(layer.layer, "stem") == 0) bits = 8;
    if (strcmp(layer.layer, "project") == 0) bits = 3;
    CHECK(layer.bits == bits);
  }
  hs_rounding_report_free(report);

  widths[1] = 17;
  CHECK_STATUS(HS_ERR_INVALID_ARGUMENT, round_with(&options, &report));
  CHECK(report == NULL);
  widths[1] = 3;
  layers[1] = "nobody";
  CHECK_STATUS(HS_ERR_UNKNOWN_NAME, round_with(&options, &report));
  CHECK(strstr(last_error.message, "'nobody'") != NULL);
  layers[1] = "stem";
  CHECK_STATUS(HS_ERR_INVALID_ARGUMENT, round_with(&options, &report));
  CHECK(strstr(last_error.message, "twice") != NULL);
  options.widths = NULL;
  CHECK_STATUS(HS_ERR_INVALID_ARGUMENT, round_with(&options, &report));
  options.widths = widths;
  layers[1] = "project";
  options.excluded_layers = &layers[1];
  options.excluded_layer_count = 1;
  CHECK_STATUS(HS_ERR_INVALID_ARGUMENT, round_with(&options, &report));
  CHECK(strstr(last_error.message, "'project' is excluded") != NULL);
  CHECK(report == NULL);
}

static void test_constants(void) {
  hs_rounding_options options;
  hs_rounding_options_init(&options);
  options.method = HS_ROUNDING_GRADIENT;
  options.iterations = 5;
  options.regularization = -1;  // none
  options.warm_start = -1;      // none
  CHECK_OK(round_with(&options, NULL));
  options.warm_start = 1;
  CHECK_STATUS(HS_ERR_INVALID_ARGUMENT, round_with(&options, NULL));
  options.warm_start = 0;
  options.beta_end = 0.5;
  CHECK_STATUS(HS_ERR_INVALID_ARGUMENT, round_with(&options, NULL));
  options.beta_end = 0;
  options.beta_start = 2000;
  CHECK_STATUS(HS_ERR_INVALID_ARGUMENT, round_with(&options, NULL));
  options.method = HS_ROUNDING_SEQUENTIAL_MSE;
  options.candidates = 3;
  CHECK_OK(round_with(&options, NULL));
  options.candidates = -1;
  CHECK_STATUS(HS_ERR_INVALID_ARGUMENT, round_with(&options, NULL));
}

static void test_details(void) {
  hs_rounding_options options;
  hs_rounding_options_init(&options);
  seen all = {0, 0, 0, 0};
  options.details = watch;
  options.user_data = &all;
  CHECK_OK(round_with(&options, NULL));
  CHECK(all.calls > 4 && !all.is_odd && all.completed > 2);
  seen some = {0, 3, 0, 0};
  options.user_data = &some;
  CHECK_STATUS(HS_ERR_CANCELLED, round_with(&options, NULL));
  CHECK(some.calls == 3);
}

void test_rounding(void) {
  test_widths();
  test_constants();
  test_details();
}

// SPDX-License-Identifier: Apache-2.0
// Channel pruning through the C interface: names, numbers, what stays, what is refused.

#include <math.h>

#include "support.h"

static hs_compressor *pruner(hs_compression_options *options) {
  hs_model *model = open_model();
  hs_compressor *compressor = NULL;
  options->scheme = HS_COMPRESSION_CHANNEL_PRUNING;
  CHECK_OK(hs_compressor_create(model, options, &compressor, &last_error));
  hs_model_free(model);
  return compressor;
}

static hs_compression_options by_magnitude(void) {
  hs_compression_options options;
  hs_compression_options_init(&options);
  options.importance = HS_CHANNELS_BY_MAGNITUDE;
  options.without_reconstruction = 1;
  return options;
}

// The stem and the projection are added, and the depthwise layer between them is coupled as well:
// one choice, which the projection and the classifier read.
static void test_names(void) {
  hs_compression_options options = by_magnitude();
  hs_compressor *compressor = pruner(&options);
  size_t count = 0;
  size_t found[4] = {9, 9, 9, 9};
  hs_compressible_layer layer;
  CHECK_OK(hs_compressor_layer_count(compressor, &count, &last_error));
  CHECK(count == 1);
  CHECK_OK(hs_compressor_layer(compressor, 0, &layer, &last_error));
  CHECK(strcmp(layer.name, "stem") == 0 && layer.maximum_units == 8);
  const char *readers[] = {"project", "classifier", "classifier.weight"};
  for (size_t i = 0; i < 3; ++i) {
    CHECK_OK(hs_compressor_find_read(compressor, readers[i], found, 4, &count, &last_error));
    CHECK(count == 1 && found[0] == 0);
  }
  CHECK_STATUS(HS_ERR_UNSUPPORTED_OPERATOR,
               hs_compressor_find_read(compressor, "stem", found, 4, &count, &last_error));
  CHECK(count == 0 && strstr(last_error.message, "'stem'") != NULL);
  CHECK_STATUS(HS_ERR_UNSUPPORTED_OPERATOR,
               hs_compressor_find_read(compressor, "depthwise", found, 4, &count, &last_error));
  CHECK(strstr(last_error.message, "groups") != NULL);
  CHECK_STATUS(HS_ERR_UNKNOWN_NAME,
               hs_compressor_find_read(compressor, "nothing", found, 4, &count, &last_error));
  const hs_channel_role roles[] = {HS_CHANNELS_WRITTEN, HS_CHANNELS_READ};
  const char *names[2][2] = {{"stem", "project"}, {"project", "classifier"}};
  for (size_t role = 0; role < 2; ++role) {
    CHECK_OK(hs_compressor_members(compressor, 0, roles[role], NULL, 0, &count, &last_error));
    CHECK(count == 2);
    CHECK_OK(hs_compressor_members(compressor, 0, roles[role], found, 2, &count, &last_error));
    for (size_t i = 0; i < 2; ++i) {
      hs_layer_cost cost;
      CHECK_OK(hs_compressor_cost(compressor, found[i], &cost, &last_error));
      CHECK(strcmp(cost.name, names[role][i]) == 0);
    }
  }
  CHECK_STATUS(HS_ERR_INVALID_ARGUMENT, hs_compressor_members(compressor, 0, HS_CHANNELS_READ,
                                                              found, 1, &count, &last_error));
  CHECK_STATUS(HS_ERR_INVALID_ARGUMENT,
               hs_compressor_members(compressor, 0, 2, found, 4, &count, &last_error));
  CHECK_STATUS(HS_ERR_INVALID_ARGUMENT,
               hs_compressor_members(compressor, 1, 0, found, 4, &count, &last_error));
  CHECK_STATUS(HS_ERR_INVALID_ARGUMENT,
               hs_compressor_members(compressor, SIZE_MAX, 0, found, 4, &count, &last_error));
  hs_compressor_free(compressor);
}

static void run(hs_model *model, float *out) {
  const char *name = "input";
  hs_tensor_view view;
  hs_tensors *data = open_data(&view);
  hs_tensors *outputs = NULL;
  CHECK_OK(hs_model_run(model, &name, &view, 1, NULL, &outputs, &last_error));
  hs_tensor_view result;
  CHECK_OK(hs_tensors_get(outputs, 0, NULL, &result, &last_error));
  memcpy(out, result.data, 80 * sizeof *out);
  hs_tensors_free(outputs);
  hs_tensors_free(data);
}

static void test_result(void) {
  hs_compression_options options = by_magnitude();
  hs_compressor *compressor = pruner(&options);
  hs_model *smaller = NULL;
  hs_compression_report *report = NULL;
  int64_t units = 0;
  CHECK_OK(hs_compressor_units(compressor, 0, 0.6, &units, &last_error));
  CHECK(units == 4);  // of 8, rounded down as AIMET does
  CHECK_OK(
      hs_compressor_compress(compressor, &units, 1, NULL, NULL, &smaller, &report, &last_error));
  hs_compressed_layer layer;
  CHECK_OK(hs_compression_report_total(report, &layer, &last_error));
  // Stem 27·4·16, depthwise 9·4·16, projection 4·4·16, classifier 4·4; by the number of positions.
  CHECK(layer.macs_before == 3456 + 1152 + 1024 + 32);
  CHECK(layer.macs_after == 1728 + 576 + 256 + 16);
  size_t count = 0;
  CHECK_OK(hs_compression_report_constant_count(report, &count, &last_error));
  CHECK(count >= 6);
  int seen = 0;
  int64_t kept[4] = {-1, -1, -1, -1};
  for (size_t i = 0; i < count; ++i) {
    hs_pruned_constant constant;
    CHECK_OK(hs_compression_report_constant(report, i, &constant, &last_error));
    CHECK(constant.kept_count == 4 && strcmp(constant.name, constant.result) == 0);
    // All are the same channels, in rising order.
    for (size_t j = 0; j < 4; ++j) {
      if (i == 0) kept[j] = constant.kept[j];
      CHECK(constant.kept[j] == kept[j] && kept[j] < 8 && (j == 0 || kept[j] > kept[j - 1]));
    }
    if (strcmp(constant.name, "project.weight") == 0) seen |= 1 << constant.axis;
    if (strcmp(constant.name, "classifier.weight") == 0) seen |= 4 << constant.axis;
  }
  CHECK((seen & 3) == 3 && (seen & 12) != 0);
  hs_pruned_constant none;
  CHECK_STATUS(HS_ERR_INVALID_ARGUMENT,
               hs_compression_report_constant(report, count, &none, &last_error));
  CHECK_STATUS(HS_ERR_INVALID_ARGUMENT,
               hs_compression_report_constant(report, SIZE_MAX, &none, &last_error));
  float values[80];
  run(smaller, values);
  for (size_t i = 0; i < 80; ++i) CHECK(isfinite(values[i]));
  hs_compression_report_free(report);
  hs_model_free(smaller);
  hs_compressor_free(compressor);
}

// With data, what is kept is at least as close to the network as what falls out of the weights.
static void test_data(void) {
  hs_compression_options options;
  hs_compression_options_init(&options);
  hs_compressor *compressor = pruner(&options);
  hs_model *smaller = NULL;
  hs_compression_report *report = NULL;
  int64_t units = 6;
  CHECK_STATUS(HS_ERR_EMPTY_STATISTICS, hs_compressor_compress(compressor, &units, 1, NULL, NULL,
                                                               &smaller, &report, &last_error));
  CHECK(smaller == NULL && report == NULL);
  const char *name = "input";
  hs_tensor_view view;
  hs_tensors *data = open_data(&view);
  CHECK_OK(hs_compressor_calibrate(compressor, &name, &view, 1, &last_error));
  hs_tensors_free(data);  // the compressor has a copy
  CHECK_OK(
      hs_compressor_compress(compressor, &units, 1, NULL, NULL, &smaller, &report, &last_error));
  size_t count = 0;
  size_t fitted = 0;
  CHECK_OK(hs_compression_report_count(report, &count, &last_error));
  for (size_t i = 0; i < count; ++i) {
    hs_compressed_layer layer;
    CHECK_OK(hs_compression_report_get(report, i, &layer, &last_error));
    CHECK(layer.first_weight == NULL && layer.second_weight == NULL);
    if (layer.noise_plain < 0) continue;
    ++fitted;
    CHECK(layer.noise_kept <= layer.noise_plain);
  }
  CHECK(fitted == 2);
  hs_compression_report_free(report);
  hs_model_free(smaller);
  hs_compressor_free(compressor);
}

static void test_keepers(void) {
  const char *keeper = "classifier";
  hs_compression_options options = by_magnitude();
  options.input_keepers = &keeper;
  options.input_keeper_count = 1;
  hs_compressor *compressor = pruner(&options);
  size_t count = 1;
  CHECK_OK(hs_compressor_layer_count(compressor, &count, &last_error));
  CHECK(count == 0);
  hs_compressor_free(compressor);
  hs_model *model = open_model();
  compressor = NULL;
  keeper = "nothing";
  CHECK_STATUS(HS_ERR_UNKNOWN_NAME,
               hs_compressor_create(model, &options, &compressor, &last_error));
  options.input_keepers = NULL;
  CHECK_STATUS(HS_ERR_INVALID_ARGUMENT,
               hs_compressor_create(model, &options, &compressor, &last_error));
  // A caller that was built before the options grew.
  keeper = "classifier";
  options.input_keepers = &keeper;
  options.struct_size = offsetof(hs_compression_options, input_keepers);
  CHECK_OK(hs_compressor_create(model, &options, &compressor, &last_error));
  CHECK_OK(hs_compressor_layer_count(compressor, &count, &last_error));
  CHECK(count == 1);
  hs_compressor_free(compressor);
  hs_model_free(model);
}

void test_pruning(void) {
  test_names();
  test_result();
  test_data();
  test_keepers();
}

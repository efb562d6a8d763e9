// SPDX-License-Identifier: Apache-2.0
// The main job through the C interface, its cancellation, and what must stay as it was.

#include <math.h>
#include <unistd.h>

#include "support.h"

static unsigned char *read_file(const char *path, size_t *size) {
  FILE *file = fopen(path, "rb");
  if (file == NULL) return NULL;
  fseek(file, 0, SEEK_END);
  *size = (size_t)ftell(file);
  rewind(file);
  unsigned char *bytes = malloc(*size + 1);
  *size = fread(bytes, 1, *size, file);
  fclose(file);
  return bytes;
}

// The encodings of a simulation, to be freed.
static char *encodings(hs_simulation *simulation, const char *version, size_t *size) {
  char *json = NULL;
  *size = 0;
  CHECK_OK(hs_simulation_encodings_size(simulation, version, size, &last_error));
  json = malloc(*size + 1);
  CHECK_OK(hs_simulation_encodings_json(simulation, version, json, *size, size, &last_error));
  json[*size] = 0;
  return json;
}

// The bytes of a model, to be freed.
static unsigned char *serialized(hs_model *model, size_t *size) {
  *size = 0;
  CHECK_OK(hs_model_serialized_size(model, size, &last_error));
  unsigned char *bytes = malloc(*size + 1);
  CHECK_OK(hs_model_serialize(model, bytes, *size, size, &last_error));
  return bytes;
}

typedef struct {
  size_t calls;
  size_t last;
  size_t total;
  size_t stop_after;
} progress_log;

static int32_t log_progress(size_t completed, size_t total, void *user_data) {
  progress_log *log = user_data;
  ++log->calls;
  log->last = completed;
  log->total = total;
  return log->stop_after != 0 && completed >= log->stop_after ? 7 : 0;
}

static void test_files(void) {
  size_t size = 0;
  unsigned char *bytes = read_file(model_path, &size);
  hs_model *model = NULL;
  CHECK_OK(hs_model_open_memory(bytes, size, NULL, &model, &last_error));

  hs_value_info info;
  size_t count = 0;
  CHECK_OK(hs_model_input_count(model, &count, &last_error));
  CHECK(count == 1);
  CHECK_OK(hs_model_input(model, 0, &info, &last_error));
  CHECK(strcmp(info.name, "input") == 0 && info.dtype == HS_DATA_TYPE_FLOAT32 && info.rank == 4);
  CHECK(info.shape[0] == -1 && info.shape[1] == 3 && info.shape[2] == 8 && info.shape[3] == 8);
  CHECK_OK(hs_model_output(model, 0, &info, &last_error));
  CHECK(strcmp(info.name, "output") == 0 && info.rank == 2 && info.shape[1] == 4);

  // Written and read again, it says the same; a buffer that is too small stays as it was.
  size_t written = 0;
  CHECK_OK(hs_model_serialized_size(model, &written, &last_error));
  unsigned char *copy = malloc(written);
  copy[0] = 0xA5;
  size_t got = 1;
  CHECK_STATUS(HS_ERR_INVALID_ARGUMENT,
               hs_model_serialize(model, copy, written - 1, &got, &last_error));
  CHECK(got == 0 && copy[0] == 0xA5);
  CHECK_OK(hs_model_serialize(model, copy, written, &got, &last_error));
  CHECK(got == written);
  hs_model *second = NULL;
  CHECK_OK(hs_model_open_memory(copy, written, NULL, &second, &last_error));
  size_t again = 0;
  CHECK_OK(hs_model_serialized_size(second, &again, &last_error));
  CHECK(again == written);
  free(copy);
  hs_model_free(second);

  // Cut anywhere, it is refused.
  for (size_t cut = 0; cut < size; cut += 97) {
    CHECK(hs_model_open_memory(bytes, cut, NULL, &second, &last_error) != HS_OK || cut == 0);
    if (second != NULL) hs_model_free(second);
  }
  free(bytes);

  CHECK_STATUS(HS_ERR_FILE_ACCESS, hs_model_open("/no/such/file", NULL, &second, &last_error));
  CHECK(strstr(last_error.message, "/no/such/file") != NULL);
  CHECK_STATUS(HS_ERR_FILE_ACCESS,
               hs_model_save(model, "/no/such/folder/x.onnx", NULL, &last_error));
  hs_model_free(model);
}

static void test_algorithms(void) {
  hs_model *model = open_model();
  hs_model *original = NULL;
  hs_tensor_view images;
  hs_tensors *data = open_data(&images);
  const char *name = "input";
  CHECK_OK(hs_model_clone(model, &original, &last_error));

  hs_inspection *inspection = NULL;
  size_t count = 0;
  CHECK_OK(hs_model_inspect(model, &inspection, &last_error));
  CHECK_OK(hs_inspection_layer_count(inspection, &count, &last_error));
  CHECK(count == 4);
  hs_layer layer;
  CHECK_OK(hs_inspection_layer(inspection, 1, &layer, &last_error));
  CHECK(strcmp(layer.name, "depthwise") == 0 && strcmp(layer.op_type, "Conv") == 0);
  CHECK(strcmp(layer.weight, "depthwise.weight") == 0);
  CHECK(layer.channel_count == 8 && layer.weight_count == 72);
  for (size_t channel = 0; channel < layer.channel_count; ++channel) {
    CHECK(layer.channel_minimum[channel] < layer.channel_maximum[channel]);
  }
  hs_inspection_free(inspection);

  hs_fold_report *folds = NULL;
  CHECK_OK(hs_model_fold_batch_norms(model, &folds, &last_error));
  CHECK_OK(hs_fold_report_count(folds, &count, &last_error));
  CHECK(count == 3);
  hs_fold fold;
  CHECK_OK(hs_fold_report_get(folds, 0, &fold, &last_error));
  CHECK(strcmp(fold.layer, "stem") == 0 && strcmp(fold.batch_norm, "stem_bn") == 0);
  CHECK(fold.is_forward == 0);
  hs_fold_report_free(folds);

  // Cancelled after the first pass: the model is as it was.
  progress_log log = {.stop_after = 1};
  hs_equalization_options how;
  hs_equalization_options_init(&how);
  how.progress = log_progress;
  how.user_data = &log;
  hs_equalization_report *report = NULL;
  size_t size = 0;
  unsigned char *folded = serialized(model, &size);
  CHECK_STATUS(HS_ERR_CANCELLED, hs_model_equalize(model, &how, &report, &last_error));
  CHECK(report == NULL && log.calls == 1 && log.total == 50);
  size_t after_size = 0;
  unsigned char *unchanged = serialized(model, &after_size);
  CHECK(after_size == size && memcmp(folded, unchanged, size) == 0);
  free(unchanged);
  free(folded);

  log = (progress_log){0};
  CHECK_OK(hs_model_equalize(model, &how, &report, &last_error));
  size_t passes = 0;
  CHECK_OK(hs_equalization_report_iterations(report, &passes, &last_error));
  CHECK(passes >= 1 && log.calls == passes && log.last == passes);
  CHECK_OK(hs_equalization_report_count(report, &count, &last_error));
  CHECK(count >= 1);
  hs_equalized_set set;
  CHECK_OK(hs_equalization_report_get(report, 0, &set, &last_error));
  CHECK(set.layer_count >= 2 && set.factor_count == set.layer_count - 1);
  for (size_t list = 0; list < set.factor_count; ++list) {
    CHECK(set.channel_counts[list] == 8);
    for (size_t channel = 0; channel < set.channel_counts[list]; ++channel) {
      CHECK(set.factors[list][channel] > 0 && isfinite(set.factors[list][channel]));
    }
  }
  hs_equalization_report_free(report);

  // The function is the same up to float rounding: each of the four layers sums at most 27
  // products, and folding and scaling round every weight twice, so 4 layers * (27 + 2) * 2^-24 of
  // the largest intermediate value (below 100 times the output's range here) is 7e-4 of the range.
  hs_tensors *before = NULL;
  hs_tensors *after = NULL;
  hs_tensor_view expected;
  hs_tensor_view actual;
  CHECK_OK(hs_model_run(original, &name, &images, 1, NULL, &before, &last_error));
  CHECK_OK(hs_model_run(model, &name, &images, 1, NULL, &after, &last_error));
  CHECK_OK(hs_tensors_find(before, "output", &expected, &last_error));
  CHECK_OK(hs_tensors_find(after, "output", &actual, &last_error));
  CHECK(actual.rank == 2 && actual.shape[0] == 20 && actual.shape[1] == 4);
  if (expected.data != NULL && actual.data != NULL) {
    float low = INFINITY, high = -INFINITY, worst = 0;
    for (int index = 0; index < 80; ++index) {
      float value = ((const float *)expected.data)[index];
      low = fminf(low, value);
      high = fmaxf(high, value);
      worst = fmaxf(worst, fabsf(value - ((const float *)actual.data)[index]));
    }
    CHECK(high > low);
    CHECK(worst <= 7e-4f * (high - low));
  }
  hs_tensors_free(before);
  hs_tensors_free(after);

  // Extra outputs come after the outputs; unknown ones are named.
  const char *extra[] = {"stem_act"};
  hs_run_options options;
  hs_run_options_init(&options);
  options.extra_outputs = extra;
  options.extra_output_count = 1;
  CHECK_OK(hs_model_run(model, &name, &images, 1, &options, &after, &last_error));
  CHECK_OK(hs_tensors_count(after, &count, &last_error));
  CHECK(count == 2);
  const char *second = NULL;
  CHECK_OK(hs_tensors_get(after, 1, &second, &actual, &last_error));
  CHECK(second != NULL && strcmp(second, "stem_act") == 0 && actual.rank == 4);
  hs_tensors_free(after);
  extra[0] = "nowhere";
  CHECK_STATUS(HS_ERR_UNKNOWN_NAME,
               hs_model_run(model, &name, &images, 1, &options, &after, &last_error));
  CHECK(after == NULL && strstr(last_error.message, "nowhere") != NULL);

  // Wrong name, shape, type; the same name twice.
  const char *wrong = "inputs";
  CHECK(hs_model_run(model, &wrong, &images, 1, NULL, &after, &last_error) != HS_OK);
  hs_tensor_view bad = images;
  const int64_t shape[4] = {1, 4, 8, 8};
  bad.shape = shape;
  CHECK_STATUS(HS_ERR_SHAPE_MISMATCH,
               hs_model_run(model, &name, &bad, 1, NULL, &after, &last_error));
  bad = images;
  bad.dtype = HS_DATA_TYPE_INT32;
  CHECK_STATUS(HS_ERR_TYPE_MISMATCH,
               hs_model_run(model, &name, &bad, 1, NULL, &after, &last_error));
  const char *twice[] = {"input", "input"};
  const hs_tensor_view both[] = {images, images};
  CHECK_STATUS(HS_ERR_INVALID_ARGUMENT,
               hs_model_run(model, twice, both, 2, NULL, &after, &last_error));
  CHECK(after == NULL);

  hs_tensors_free(data);
  hs_model_free(original);
  hs_model_free(model);
}

static void test_simulation(void) {
  const char *name = "input";
  hs_tensor_view images;
  hs_tensors *data = open_data(&images);
  hs_simulation *simulation = open_simulation();
  size_t size = 0;
  char *first = encodings(simulation, NULL, &size);
  CHECK(strstr(first, "\"1.0.0\"") != NULL && strstr(first, "depthwise.weight") != NULL);

  // Versions: NULL is 1.0.0, others differ, unknown ones are refused.
  const char *versions[] = {"0.6.1", "2.0.0"};
  for (int index = 0; index < 2; ++index) {
    size_t other = 0;
    char *json = encodings(simulation, versions[index], &other);
    CHECK(strstr(json, versions[index]) != NULL);
    free(json);
  }
  CHECK_STATUS(HS_ERR_UNSUPPORTED_VERSION,
               hs_simulation_encodings_size(simulation, "9.9", &size, &last_error));

  // Batch size, number of threads and progress do not change a byte.
  progress_log log = {0};
  hs_calibration_options options;
  hs_calibration_options_init(&options);
  options.batch_size = 3;
  options.progress = log_progress;
  options.user_data = &log;
  CHECK_OK(hs_set_thread_count(1, &last_error));
  CHECK_OK(hs_simulation_calibrate(simulation, &name, &images, 1, &options, &last_error));
  CHECK_OK(hs_set_thread_count(0, &last_error));
  CHECK(log.calls == 7 && log.last == 7 && log.total == 7);
  char *second = encodings(simulation, NULL, &size);
  CHECK(strcmp(first, second) == 0);
  free(second);

  // Cancelled: statistics and encodings as before, and so after bad data in a later batch.
  size_t statistics_size = 0;
  CHECK_OK(hs_simulation_statistics_size(simulation, &statistics_size, &last_error));
  unsigned char *statistics = malloc(statistics_size);
  CHECK_OK(hs_simulation_serialize_statistics(simulation, statistics, statistics_size,
                                              &statistics_size, &last_error));
  log = (progress_log){0};
  log.stop_after = 2;
  CHECK_STATUS(HS_ERR_CANCELLED,
               hs_simulation_calibrate(simulation, &name, &images, 1, &options, &last_error));
  CHECK(log.calls == 2);
  float *poisoned = malloc(20 * 192 * sizeof(float));
  memcpy(poisoned, images.data, 20 * 192 * sizeof(float));
  poisoned[19 * 192] = NAN;
  hs_tensor_view bad = images;
  bad.data = poisoned;
  CHECK_STATUS(HS_ERR_NON_FINITE_VALUE,
               hs_simulation_calibrate(simulation, &name, &bad, 1, NULL, &last_error));
  CHECK_STATUS(HS_ERR_NON_FINITE_VALUE,
               hs_simulation_observe(simulation, &name, &bad, 1, &last_error));
  free(poisoned);
  size_t after_size = 0;
  CHECK_OK(hs_simulation_statistics_size(simulation, &after_size, &last_error));
  CHECK(after_size == statistics_size);
  unsigned char *after = malloc(after_size);
  CHECK_OK(
      hs_simulation_serialize_statistics(simulation, after, after_size, &after_size, &last_error));
  CHECK(after_size == statistics_size && memcmp(after, statistics, after_size) == 0);
  free(after);
  second = encodings(simulation, NULL, &size);
  CHECK(strcmp(first, second) == 0);
  free(second);

  // Observed in two halves by two simulations and merged: the same bytes.
  hs_simulation *half = open_simulation();
  const int64_t rows[4] = {10, 3, 8, 8};
  hs_tensor_view upper = images;
  hs_tensor_view lower = images;
  upper.shape = rows;
  lower.shape = rows;
  lower.data = (const float *)images.data + 10 * 192;
  CHECK_OK(hs_simulation_reset_statistics(half, &last_error));
  CHECK_OK(hs_simulation_reset_statistics(simulation, &last_error));
  CHECK_STATUS(HS_ERR_EMPTY_STATISTICS, hs_simulation_compute_encodings(half, &last_error));
  CHECK_OK(hs_simulation_observe(half, &name, &lower, 1, &last_error));
  CHECK_OK(hs_simulation_observe(simulation, &name, &upper, 1, &last_error));
  CHECK_OK(hs_simulation_statistics_size(half, &after_size, &last_error));
  after = malloc(after_size);
  CHECK_OK(hs_simulation_serialize_statistics(half, after, after_size, &after_size, &last_error));
  CHECK_OK(hs_simulation_merge_statistics(simulation, after, after_size, &last_error));
  CHECK(hs_simulation_merge_statistics(simulation, after, after_size / 2, &last_error) != HS_OK);
  free(after);
  CHECK_OK(hs_simulation_compute_encodings(simulation, &last_error));
  second = encodings(simulation, NULL, &size);
  CHECK(strcmp(first, second) == 0);
  free(second);
  free(statistics);
  hs_simulation_free(half);

  // The values of a tensor may come from elsewhere.
  const float span[2] = {-1, 3};
  const int64_t two[1] = {2};
  hs_tensor_view value = {.data = span, .shape = two, .dtype = HS_DATA_TYPE_FLOAT32, .rank = 1};
  hs_simulation *told = open_simulation();
  CHECK_OK(hs_simulation_reset_statistics(told, &last_error));
  size_t quantizers = 0;
  CHECK_OK(hs_simulation_quantizer_count(told, &quantizers, &last_error));
  for (size_t i = 0; i < quantizers; i++) {
    hs_quantizer one;
    CHECK_OK(hs_simulation_quantizer(told, i, &one, &last_error));
    CHECK_STATUS(one.role ? HS_ERR_INVALID_ARGUMENT : HS_OK,
                 hs_simulation_observe_value(told, one.tensor, &value, &last_error));
  }
  CHECK_OK(hs_simulation_compute_encodings(told, &last_error));
  hs_encoding told_grid;
  CHECK_OK(hs_simulation_encoding(told, "input", &told_grid, &last_error));
  CHECK(told_grid.scales[0] == 4.0f / 255 && told_grid.zero_points[0] == 64);
  CHECK_STATUS(HS_ERR_UNKNOWN_NAME, hs_simulation_observe_value(told, "no", &value, &last_error));
  const float poison[2] = {0, NAN};
  value.data = poison;
  CHECK_STATUS(HS_ERR_NON_FINITE_VALUE,
               hs_simulation_observe_value(told, "input", &value, &last_error));
  value.dtype = HS_DATA_TYPE_INT32;
  CHECK_STATUS(HS_ERR_TYPE_MISMATCH,
               hs_simulation_observe_value(told, "input", &value, &last_error));
  hs_simulation_free(told);

  // Runs round to grids: the output has few values.
  hs_tensors *outputs = NULL;
  hs_tensor_view output;
  CHECK_OK(hs_simulation_run(simulation, &name, &images, 1, NULL, &outputs, &last_error));
  CHECK_OK(hs_tensors_find(outputs, "output", &output, &last_error));
  hs_encoding grid;
  CHECK_OK(hs_simulation_encoding(simulation, "output", &grid, &last_error));
  CHECK(grid.count == 1 && grid.bits == 8);
  if (output.data != NULL && grid.scales != NULL) {
    for (int index = 0; index < 80; ++index) {
      // A grid value is a code times the scale, rounded once.
      float value = ((const float *)output.data)[index];
      CHECK(value == nearbyintf(value / grid.scales[0]) * grid.scales[0]);
    }
  }
  hs_tensors_free(outputs);
  free(first);
  hs_tensors_free(data);
  hs_simulation_free(simulation);
}

static void test_control(void) {
  hs_simulation *simulation = open_simulation();
  size_t count = 0;
  hs_quantizer quantizer;
  CHECK_OK(hs_simulation_quantizer_count(simulation, &count, &last_error));
  CHECK(count > 8);
  CHECK_OK(hs_simulation_quantizer(simulation, 0, &quantizer, &last_error));
  CHECK(quantizer.is_enabled && !quantizer.is_frozen && quantizer.has_encoding);

  hs_encoding encoding;
  CHECK_OK(hs_simulation_set_precision(simulation, "depthwise.weight", 4, -1, &last_error));
  CHECK_OK(hs_simulation_encoding(simulation, "depthwise.weight", &encoding, &last_error));
  CHECK(encoding.bits == 4 && encoding.count == 8);
  CHECK(encoding.granularity == HS_GRANULARITY_PER_CHANNEL && encoding.axis == 0);
  CHECK_STATUS(HS_ERR_INVALID_ARGUMENT,
               hs_simulation_set_precision(simulation, "depthwise.weight", 33, -1, &last_error));
  CHECK_STATUS(HS_ERR_INVALID_ARGUMENT,
               hs_simulation_set_precision(simulation, "depthwise.weight", 0, 2, &last_error));
  CHECK_STATUS(HS_ERR_UNKNOWN_NAME,
               hs_simulation_set_precision(simulation, "no", 4, -1, &last_error));

  // Other values of a constant: 8 channels of 9 values with 7 steps of 0.5 on either side.
  float weights[72];
  for (int i = 0; i < 72; i++) weights[i] = i % 2 ? 3.5f : -1;
  const int64_t weight_shape[4] = {8, 1, 3, 3};
  hs_tensor_view values = {.data = weights, .shape = weight_shape, .dtype = 1, .rank = 4};
  CHECK_OK(hs_simulation_parameter_encoding(simulation, "depthwise.weight", &values, &encoding,
                                            &last_error));
  CHECK(encoding.bits == 4 && encoding.count == 8 && encoding.scales[7] == 0.5f);
  CHECK_STATUS(HS_ERR_INVALID_ARGUMENT, hs_simulation_parameter_encoding(
                                            simulation, "input", &values, &encoding, &last_error));
  CHECK_STATUS(HS_ERR_UNKNOWN_NAME,
               hs_simulation_parameter_encoding(simulation, "no", &values, &encoding, &last_error));
  values.rank = 1;
  CHECK_STATUS(HS_ERR_SHAPE_MISMATCH,
               hs_simulation_parameter_encoding(simulation, "depthwise.weight", &values, &encoding,
                                                &last_error));

  // A tensor's own encoding, given back, changes nothing.
  CHECK_OK(hs_simulation_encoding(simulation, "input", &encoding, &last_error));
  float scale = encoding.scales[0];
  CHECK_OK(hs_simulation_set_encoding(simulation, "input", &encoding, &last_error));
  CHECK_OK(hs_simulation_encoding(simulation, "input", &encoding, &last_error));
  CHECK(encoding.scales[0] == scale);

  // Held to [-1, 1]: 255 steps of 2/255, asymmetric, from the data's zero.
  CHECK_OK(hs_simulation_set_range(simulation, "input", -1, 1, &last_error));
  CHECK_OK(hs_simulation_encoding(simulation, "input", &encoding, &last_error));
  CHECK(fabsf(encoding.scales[0] - 2.0f / 255) <= 2.0f / 255 * 0x1p-22f);
  CHECK(hs_simulation_set_range(simulation, "input", INFINITY, 1, &last_error) != HS_OK);
  CHECK(hs_simulation_set_range(simulation, "input", 1, -1, &last_error) != HS_OK);

  CHECK_OK(hs_simulation_set_frozen(simulation, "input", 1, &last_error));
  CHECK_STATUS(HS_ERR_INVALID_STATE,
               hs_simulation_set_range(simulation, "input", -2, 2, &last_error));
  CHECK_OK(hs_simulation_set_frozen(simulation, "input", 0, &last_error));
  CHECK_OK(hs_simulation_set_enabled(simulation, "input", 0, &last_error));
  size_t size = 0;
  char *json = encodings(simulation, NULL, &size);
  CHECK(strstr(json, "\"input\"") == NULL);
  CHECK_OK(hs_simulation_set_enabled(simulation, "input", 1, &last_error));
  free(json);
  json = encodings(simulation, NULL, &size);
  CHECK(strstr(json, "\"input\"") != NULL);

  // Loading: strictly back into the same, leniently from a text that lacks all.
  hs_load_report *report = NULL;
  CHECK_OK(hs_simulation_load_encodings(simulation, json, size, 1, &report, &last_error));
  for (hs_load_mismatch kind = 0; kind < 3; ++kind) {
    CHECK_OK(hs_load_report_count(report, kind, &count, &last_error));
    CHECK(count == 0);
  }
  hs_load_report_free(report);
  const char *empty =
      "{\"version\":\"1.0.0\",\"activation_encodings\":[{\"name\":\"ghost\",\"enc_type\":"
      "\"PER_TENSOR\",\"dtype\":\"INT\",\"bw\":8,\"is_sym\":false,\"scale\":[1],\"offset\":[0]}],"
      "\"param_encodings\":[]}";
  CHECK_OK(hs_simulation_load_encodings(simulation, empty, strlen(empty), 0, &report, &last_error));
  CHECK_OK(hs_load_report_count(report, HS_LOAD_MISMATCH_UNKNOWN, &count, &last_error));
  CHECK(count == 1);
  const char *text = NULL;
  CHECK_OK(hs_load_report_get(report, HS_LOAD_MISMATCH_UNKNOWN, 0, &text, &last_error));
  CHECK(text != NULL && strcmp(text, "ghost") == 0);
  CHECK_OK(hs_load_report_count(report, HS_LOAD_MISMATCH_MISSING, &count, &last_error));
  CHECK(count > 8);
  hs_load_report_free(report);
  CHECK_STATUS(
      HS_ERR_ENCODING_MISMATCH,
      hs_simulation_load_encodings(simulation, empty, strlen(empty), 1, NULL, &last_error));
  CHECK_STATUS(HS_ERR_MALFORMED_FILE,
               hs_simulation_load_encodings(simulation, "{", 1, 0, NULL, &last_error));
  free(json);
  hs_simulation_free(simulation);
}

static void test_export(void) {
  hs_simulation *simulation = open_simulation();
  char folder[4096];
  char path[8192];
  snprintf(folder, sizeof folder, "%s/export", output_folder);
  CHECK_OK(hs_simulation_export(simulation, folder, "net", "0.6.1", &last_error));
  size_t size = 0;
  size_t expected_size = 0;
  char *expected = encodings(simulation, "0.6.1", &expected_size);
  snprintf(path, sizeof path, "%s/net.encodings", folder);
  unsigned char *written = read_file(path, &size);
  CHECK(written != NULL && size == expected_size && memcmp(written, expected, size) == 0);
  free(written);
  free(expected);
  snprintf(path, sizeof path, "%s/net.onnx", folder);
  hs_model *model = NULL;
  CHECK_OK(hs_model_open(path, NULL, &model, &last_error));
  hs_model_free(model);
  snprintf(path, sizeof path, "%s/net_qdq.onnx", folder);
  CHECK_OK(hs_simulation_export_qdq(simulation, path, NULL, &last_error));
  CHECK_OK(hs_model_open(path, NULL, &model, &last_error));
  hs_model_free(model);

  CHECK_STATUS(HS_ERR_INVALID_ARGUMENT,
               hs_simulation_export(simulation, folder, "../net", NULL, &last_error));
  CHECK_STATUS(HS_ERR_INVALID_ARGUMENT,
               hs_simulation_export(simulation, folder, "", NULL, &last_error));
  CHECK_STATUS(HS_ERR_FILE_ACCESS,
               hs_simulation_export(simulation, "/proc/no/folder", "net", NULL, &last_error));
  // /proc takes no files, whoever asks.
  CHECK_STATUS(HS_ERR_FILE_ACCESS,
               hs_simulation_export(simulation, "/proc", "net", NULL, &last_error));
  hs_simulation_free(simulation);

  // Before calibration there is nothing to export.
  model = open_model();
  hs_simulation *fresh = NULL;
  CHECK_OK(hs_simulation_create(model, NULL, &fresh, &last_error));
  CHECK_STATUS(HS_ERR_INVALID_STATE,
               hs_simulation_export(fresh, folder, "fresh", NULL, &last_error));
  snprintf(path, sizeof path, "%s/fresh.onnx", folder);
  CHECK(access(path, F_OK) != 0);
  hs_simulation_free(fresh);

  hs_simulation_options options;
  hs_simulation_options_init(&options);
  options.configuration = "no_such_configuration";
  CHECK(hs_simulation_create(model, &options, &fresh, &last_error) != HS_OK);
  CHECK(strstr(last_error.message, "no_such_configuration") != NULL && fresh == NULL);
  hs_simulation_options_init(&options);
  options.scheme = 99;
  CHECK_STATUS(HS_ERR_UNKNOWN_NAME, hs_simulation_create(model, &options, &fresh, &last_error));
  hs_simulation_options_init(&options);
  options.scheme = HS_RANGE_SCHEME_PERCENTILE;
  options.percentile = NAN;
  CHECK_STATUS(HS_ERR_INVALID_ARGUMENT, hs_simulation_create(model, &options, &fresh, &last_error));
  hs_simulation_options_init(&options);
  options.parameter_bits = INT32_MIN;
  CHECK_STATUS(HS_ERR_INVALID_ARGUMENT, hs_simulation_create(model, &options, &fresh, &last_error));
  hs_simulation_options_init(&options);
  options.block_size = -1;
  CHECK_STATUS(HS_ERR_INVALID_ARGUMENT, hs_simulation_create(model, &options, &fresh, &last_error));
  hs_model_free(model);
}

void test_jobs(void) {
  test_files();
  test_algorithms();
  test_simulation();
  test_control();
  test_export();
}

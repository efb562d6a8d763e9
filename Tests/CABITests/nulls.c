// SPDX-License-Identifier: Apache-2.0
// NULL for each argument of each function: an error where it is not documented, never a crash.

#include "support.h"

// A call that must fail with HS_ERR_INVALID_ARGUMENT, with and without an error to fill.
#define REFUSED(function, ...)                                                                 \
  do {                                                                                         \
    CHECK_STATUS(HS_ERR_INVALID_ARGUMENT, function(__VA_ARGS__, &last_error));                 \
    CHECK(last_error.status == HS_ERR_INVALID_ARGUMENT && strstr(last_error.message, "NULL")); \
    CHECK(function(__VA_ARGS__, NULL) == HS_ERR_INVALID_ARGUMENT);                             \
  } while (0)

// As REFUSED, and the out-parameter, set to garbage before, is 0 afterwards.
#define REFUSED_OUT(out, function, ...)                    \
  do {                                                     \
    memset(&(out), 0xA5, sizeof(out));                     \
    REFUSED(function, __VA_ARGS__);                        \
    size_t set_ = 0;                                       \
    for (size_t byte_ = 0; byte_ < sizeof(out); ++byte_) { \
      set_ += ((unsigned char *)&(out))[byte_] != 0;       \
    }                                                      \
    CHECK(set_ == 0);                                      \
  } while (0)

static void free_nothing(void) {
  hs_tensors_free(NULL);
  hs_model_free(NULL);
  hs_inspection_free(NULL);
  hs_fold_report_free(NULL);
  hs_equalization_report_free(NULL);
  hs_simulation_free(NULL);
  hs_load_report_free(NULL);
  hs_compressor_free(NULL);
  hs_compression_report_free(NULL);
}

static void test_compression(void) {
  hs_model *model = open_model();
  hs_compressor *compressor = NULL;
  hs_compressor *none = NULL;
  REFUSED_OUT(none, hs_compressor_create, NULL, NULL, &none);
  REFUSED(hs_compressor_create, model, NULL, NULL);
  CHECK_OK(hs_compressor_create(model, NULL, &compressor, &last_error));
  hs_model_free(model);
  size_t count = 0;
  size_t index = 0;
  hs_layer_cost cost;
  hs_compressible_layer layer;
  hs_compression_refusal refusal;
  int64_t units[16] = {0};
  REFUSED_OUT(count, hs_compressor_cost_count, NULL, &count);
  REFUSED(hs_compressor_cost_count, compressor, NULL);
  REFUSED_OUT(cost, hs_compressor_cost, NULL, 0, &cost);
  REFUSED(hs_compressor_cost, compressor, 0, NULL);
  REFUSED_OUT(count, hs_compressor_refusal_count, NULL, &count);
  REFUSED(hs_compressor_refusal_count, compressor, NULL);
  REFUSED_OUT(refusal, hs_compressor_refusal, NULL, 0, &refusal);
  REFUSED_OUT(layer, hs_compressor_layer, NULL, 0, &layer);
  REFUSED(hs_compressor_layer, compressor, 0, NULL);
  REFUSED(hs_compressor_find, compressor, NULL, &index);
  REFUSED(hs_compressor_find, NULL, "a", &index);
  REFUSED_OUT(count, hs_compressor_find_read, NULL, "a", NULL, 0, &count);
  REFUSED_OUT(count, hs_compressor_find_read, compressor, NULL, NULL, 0, &count);
  REFUSED(hs_compressor_find_read, compressor, "a", NULL, 0, NULL);
  REFUSED_OUT(count, hs_compressor_members, NULL, 0, HS_CHANNELS_READ, NULL, 0, &count);
  REFUSED(hs_compressor_members, compressor, 0, HS_CHANNELS_READ, NULL, 0, NULL);
  REFUSED(hs_compressor_calibrate, NULL, NULL, NULL, 0);
  REFUSED(hs_compressor_calibrate, compressor, NULL, NULL, 1);
  REFUSED_OUT(count, hs_compressor_errors, NULL, 0, NULL, NULL, NULL, 0, &count);
  REFUSED(hs_compressor_errors, compressor, 0, NULL, NULL, NULL, 0, NULL);
  double share = 0;
  REFUSED_OUT(share, hs_compressor_ratio, NULL, 0, 1, &share);
  REFUSED(hs_compressor_ratio, compressor, 0, 1, NULL);
  // A size and a layer that do not exist.
  CHECK_STATUS(HS_ERR_INVALID_ARGUMENT, hs_compressor_ratio(compressor, 0, 0, &share, &last_error));
  CHECK_STATUS(HS_ERR_INVALID_ARGUMENT,
               hs_compressor_ratio(compressor, SIZE_MAX, 1, &share, &last_error));
  REFUSED(hs_compressor_units, NULL, 0, 0.5, units);
  REFUSED(hs_compressor_units, compressor, 0, 0.5, NULL);
  REFUSED(hs_compressor_select, NULL, 0.5, NULL, NULL, units, 16);
  REFUSED(hs_compressor_select, compressor, 0.5, NULL, NULL, NULL, 16);
  double ratio = 0.5;
  double scores[16] = {0};
  REFUSED(hs_compressor_select_greedy, compressor, 0.5, NULL, scores, 1, 0, units, 16);
  REFUSED(hs_compressor_select_greedy, compressor, 0.5, &ratio, NULL, 1, 0, units, 16);
  REFUSED(hs_compressor_select_greedy, compressor, 0.5, &ratio, scores, 1, 0, NULL, 16);
  CHECK_OK(hs_compressor_layer_count(compressor, &count, &last_error));
  CHECK(count >= 1 && count <= 16);
  CHECK_OK(
      hs_compressor_select_greedy(compressor, 0.5, &ratio, scores, 1, 0, units, 16, &last_error));
  CHECK_STATUS(HS_ERR_INVALID_ARGUMENT,
               hs_compressor_select(compressor, 1.0, NULL, NULL, units, count - 1, &last_error));
  CHECK_STATUS(HS_ERR_INVALID_ARGUMENT,
               hs_compressor_units(compressor, SIZE_MAX, 0.5, units, &last_error));
  hs_compression_report *report = NULL;
  hs_model *smaller = NULL;
  REFUSED_OUT(smaller, hs_compressor_compress, compressor, NULL, count, NULL, NULL, &smaller,
              &report);
  REFUSED(hs_compressor_compress, compressor, units, count, NULL, NULL, NULL, &report);
  CHECK_OK(hs_compressor_layer(compressor, 0, &layer, &last_error));
  CHECK_OK(hs_compressor_find(compressor, layer.weight, &index, &last_error));
  CHECK(index == 0 && layer.maximum_units >= 1 && layer.macs >= layer.parameters);
  memset(units, 0, sizeof units);
  CHECK_OK(hs_compressor_units(compressor, 0, 0.5, units, &last_error));
  CHECK(units[0] >= 1);
  CHECK_OK(
      hs_compressor_compress(compressor, units, count, NULL, NULL, &smaller, &report, &last_error));
  hs_compressed_layer total;
  REFUSED_OUT(total, hs_compression_report_total, NULL, &total);
  REFUSED(hs_compression_report_total, report, NULL);
  REFUSED(hs_compression_report_count, report, NULL);
  REFUSED_OUT(total, hs_compression_report_get, NULL, 0, &total);
  CHECK_OK(hs_compression_report_total(report, &total, &last_error));
  CHECK(total.macs_after < total.macs_before && total.name == NULL);
  CHECK_OK(hs_compression_report_count(report, &count, &last_error));
  CHECK_OK(hs_compression_report_get(report, 0, &total, &last_error));
  CHECK(total.name != NULL && total.macs_before > 0);
  hs_pruned_constant constant;
  REFUSED_OUT(count, hs_compression_report_constant_count, NULL, &count);
  REFUSED(hs_compression_report_constant_count, report, NULL);
  REFUSED_OUT(constant, hs_compression_report_constant, NULL, 0, &constant);
  REFUSED(hs_compression_report_constant, report, 0, NULL);
  // Nothing is pruned where layers are split.
  CHECK_OK(hs_compression_report_constant_count(report, &count, &last_error));
  CHECK(count == 0);
  hs_compression_report_free(report);
  hs_model_free(smaller);
  hs_compressor_free(compressor);
}

static void test_tensors(void) {
  hs_tensor_view view;
  hs_tensors *data = open_data(&view);
  hs_tensors *out = NULL;
  size_t count;
  const char *name;
  REFUSED_OUT(out, hs_tensors_open_numpy, NULL, &out);
  REFUSED(hs_tensors_open_numpy, data_path, NULL);
  REFUSED_OUT(count, hs_tensors_count, NULL, &count);
  REFUSED(hs_tensors_count, data, NULL);
  REFUSED_OUT(view, hs_tensors_get, NULL, 0, &name, &view);
  REFUSED_OUT(name, hs_tensors_get, data, 0, &name, NULL);
  CHECK_OK(hs_tensors_get(data, 0, NULL, &view, NULL));
  REFUSED_OUT(view, hs_tensors_find, NULL, "", &view);
  REFUSED_OUT(view, hs_tensors_find, data, NULL, &view);
  REFUSED(hs_tensors_find, data, "", NULL);
  CHECK_STATUS(HS_ERR_INVALID_ARGUMENT, hs_tensors_get(data, 1, &name, &view, &last_error));
  CHECK_STATUS(HS_ERR_INVALID_ARGUMENT, hs_tensors_get(data, SIZE_MAX, &name, &view, &last_error));
  CHECK_STATUS(HS_ERR_UNKNOWN_NAME, hs_tensors_find(data, "no", &view, &last_error));
  void *memory;
  REFUSED_OUT(memory, hs_tensors_get_mutable, NULL, 0, &memory);
  REFUSED(hs_tensors_get_mutable, data, 0, NULL);
  CHECK_STATUS(HS_ERR_INVALID_ARGUMENT, hs_tensors_get_mutable(data, 1, &memory, &last_error));
  hs_tensors_free(data);
}

static void test_model(void) {
  hs_model *model = open_model();
  hs_model *out = NULL;
  size_t size;
  unsigned char buffer[8];
  REFUSED_OUT(out, hs_model_open, NULL, NULL, &out);
  REFUSED(hs_model_open, model_path, NULL, NULL);
  REFUSED_OUT(out, hs_model_open_memory, NULL, 8, NULL, &out);
  REFUSED(hs_model_open_memory, buffer, sizeof buffer, NULL, NULL);
  REFUSED_OUT(out, hs_model_clone, NULL, &out);
  REFUSED(hs_model_clone, model, NULL);
  REFUSED(hs_model_save, NULL, "x", NULL);
  REFUSED(hs_model_save, model, NULL, NULL);
  REFUSED_OUT(size, hs_model_serialized_size, NULL, &size);
  REFUSED(hs_model_serialized_size, model, NULL);
  REFUSED_OUT(size, hs_model_serialize, NULL, buffer, sizeof buffer, &size);
  REFUSED_OUT(size, hs_model_serialize, model, NULL, sizeof buffer, &size);
  REFUSED(hs_model_serialize, model, buffer, sizeof buffer, NULL);

  hs_value_info info;
  REFUSED_OUT(size, hs_model_input_count, NULL, &size);
  REFUSED(hs_model_input_count, model, NULL);
  REFUSED_OUT(info, hs_model_input, NULL, 0, &info);
  REFUSED(hs_model_input, model, 0, NULL);
  REFUSED_OUT(size, hs_model_output_count, NULL, &size);
  REFUSED(hs_model_output_count, model, NULL);
  REFUSED_OUT(info, hs_model_output, NULL, 0, &info);
  REFUSED(hs_model_output, model, 0, NULL);
  CHECK_STATUS(HS_ERR_INVALID_ARGUMENT, hs_model_input(model, 1, &info, &last_error));
  CHECK_STATUS(HS_ERR_INVALID_ARGUMENT, hs_model_output(model, SIZE_MAX, &info, &last_error));

  hs_tensors *tensors;
  REFUSED_OUT(tensors, hs_model_initializers, NULL, &tensors);
  REFUSED(hs_model_initializers, model, NULL);

  hs_tensor_view view;
  hs_tensors *data = open_data(&view);
  REFUSED(hs_model_set_initializer, NULL, "input", &view);
  REFUSED(hs_model_set_initializer, model, NULL, &view);
  REFUSED(hs_model_set_initializer, model, "input", NULL);
  REFUSED_OUT(tensors, hs_model_take_initializer, NULL, "classifier.bias", &tensors);
  REFUSED_OUT(tensors, hs_model_take_initializer, model, NULL, &tensors);
  REFUSED(hs_model_take_initializer, model, "classifier.bias", NULL);
  REFUSED(hs_model_set_initializer_borrowed, NULL, "input", &view, NULL, NULL);
  REFUSED(hs_model_set_initializer_borrowed, model, NULL, &view, NULL, NULL);
  REFUSED(hs_model_set_initializer_borrowed, model, "input", NULL, NULL, NULL);
  REFUSED(hs_model_set_initializer_lent, NULL, "input", &view, NULL, NULL);
  REFUSED(hs_model_set_initializer_lent, model, NULL, &view, NULL, NULL);
  REFUSED(hs_model_set_initializer_lent, model, "input", NULL, NULL, NULL);

  const char *name = "input";
  const char *no_name = NULL;
  REFUSED_OUT(tensors, hs_model_run, NULL, &name, &view, 1, NULL, &tensors);
  REFUSED_OUT(tensors, hs_model_run, model, NULL, &view, 1, NULL, &tensors);
  REFUSED_OUT(tensors, hs_model_run, model, &no_name, &view, 1, NULL, &tensors);
  REFUSED_OUT(tensors, hs_model_run, model, &name, NULL, 1, NULL, &tensors);
  REFUSED(hs_model_run, model, &name, &view, 1, NULL, NULL);
  hs_run_options options;
  hs_run_options_init(&options);
  options.extra_output_count = 1;
  REFUSED_OUT(tensors, hs_model_run, model, &name, &view, 1, &options, &tensors);
  options.extra_outputs = &no_name;
  REFUSED_OUT(tensors, hs_model_run, model, &name, &view, 1, &options, &tensors);
  // No inputs at all: names and values may be NULL, but the network wants one.
  CHECK(hs_model_run(model, NULL, NULL, 0, NULL, &tensors, &last_error) != HS_OK);
  CHECK(tensors == NULL && strstr(last_error.message, "input") != NULL);
  hs_tensors_free(data);
  hs_model_free(model);
}

static void test_algorithms(void) {
  hs_model *model = open_model();
  size_t count;

  hs_inspection *inspection;
  hs_layer layer;
  REFUSED_OUT(inspection, hs_model_inspect, NULL, &inspection);
  REFUSED(hs_model_inspect, model, NULL);
  CHECK_OK(hs_model_inspect(model, &inspection, &last_error));
  REFUSED_OUT(count, hs_inspection_layer_count, NULL, &count);
  REFUSED(hs_inspection_layer_count, inspection, NULL);
  REFUSED_OUT(layer, hs_inspection_layer, NULL, 0, &layer);
  REFUSED(hs_inspection_layer, inspection, 0, NULL);
  CHECK_STATUS(HS_ERR_INVALID_ARGUMENT, hs_inspection_layer(inspection, 99, &layer, &last_error));
  hs_inspection_free(inspection);

  hs_fold_report *folds;
  hs_fold fold;
  REFUSED_OUT(folds, hs_model_fold_batch_norms, NULL, &folds);
  CHECK_OK(hs_model_fold_batch_norms(model, &folds, NULL));
  REFUSED_OUT(count, hs_fold_report_count, NULL, &count);
  REFUSED(hs_fold_report_count, folds, NULL);
  REFUSED_OUT(fold, hs_fold_report_get, NULL, 0, &fold);
  REFUSED(hs_fold_report_get, folds, 0, NULL);
  CHECK_STATUS(HS_ERR_INVALID_ARGUMENT, hs_fold_report_get(folds, 99, &fold, &last_error));
  hs_fold_report_free(folds);

  hs_equalization_report *report;
  hs_equalized_set set;
  REFUSED_OUT(report, hs_model_equalize, NULL, NULL, &report);
  CHECK_OK(hs_model_equalize(model, NULL, &report, NULL));
  REFUSED_OUT(count, hs_equalization_report_iterations, NULL, &count);
  REFUSED(hs_equalization_report_iterations, report, NULL);
  REFUSED_OUT(count, hs_equalization_report_count, NULL, &count);
  REFUSED(hs_equalization_report_count, report, NULL);
  REFUSED_OUT(set, hs_equalization_report_get, NULL, 0, &set);
  REFUSED(hs_equalization_report_get, report, 0, NULL);
  CHECK_STATUS(HS_ERR_INVALID_ARGUMENT, hs_equalization_report_get(report, 99, &set, &last_error));
  hs_equalization_report_free(report);

  hs_rounding_report *rounding;
  hs_rounded_layer layer_report;
  const char *input_name = "input";
  hs_tensor_view data_view;
  hs_tensors *data = open_data(&data_view);
  REFUSED_OUT(rounding, hs_model_adaround, NULL, &input_name, &data_view, 1, NULL, &rounding);
  REFUSED_OUT(rounding, hs_model_adaround, model, NULL, &data_view, 1, NULL, &rounding);
  REFUSED_OUT(rounding, hs_model_adaround, model, &input_name, NULL, 1, NULL, &rounding);
  REFUSED_OUT(rounding, hs_model_correct_biases, NULL, &input_name, &data_view, 1, NULL, &rounding);
  CHECK_OK(hs_model_correct_biases(model, NULL, NULL, 0, NULL, NULL, NULL));  // without data
  CHECK_OK(hs_model_correct_biases(model, &input_name, &data_view, 1, NULL, NULL, NULL));
  CHECK_OK(hs_model_adaround(model, &input_name, &data_view, 1, NULL, &rounding, NULL));
  hs_tensors_free(data);
  REFUSED_OUT(count, hs_rounding_report_count, NULL, &count);
  REFUSED(hs_rounding_report_count, rounding, NULL);
  REFUSED_OUT(layer_report, hs_rounding_report_get, NULL, 0, &layer_report);
  REFUSED(hs_rounding_report_get, rounding, 0, NULL);
  CHECK_STATUS(HS_ERR_INVALID_ARGUMENT,
               hs_rounding_report_get(rounding, 99, &layer_report, &last_error));
  hs_rounding_report_free(rounding);
  hs_rounding_report_free(NULL);
  hs_rounding_options_init(NULL);

  hs_equalization_options options;
  hs_equalization_options_init(&options);
  options.maximum_iterations = -1;
  CHECK_STATUS(HS_ERR_INVALID_ARGUMENT, hs_model_equalize(model, &options, NULL, &last_error));
  hs_model_free(model);
}

static void test_simulation(void) {
  hs_model *model = open_model();
  hs_simulation *simulation;
  hs_tensor_view view;
  hs_tensors *data = open_data(&view);
  const char *name = "input";
  REFUSED_OUT(simulation, hs_simulation_create, NULL, NULL, &simulation);
  REFUSED(hs_simulation_create, model, NULL, NULL);
  hs_model_free(model);
  simulation = open_simulation();

  REFUSED(hs_simulation_observe, NULL, &name, &view, 1);
  REFUSED(hs_simulation_observe, simulation, NULL, &view, 1);
  REFUSED(hs_simulation_observe, simulation, &name, NULL, 1);
  REFUSED(hs_simulation_observe_value, NULL, "input", &view);
  REFUSED(hs_simulation_observe_value, simulation, NULL, &view);
  REFUSED(hs_simulation_observe_value, simulation, "input", NULL);
  CHECK(hs_simulation_reset_statistics(NULL, &last_error) == HS_ERR_INVALID_ARGUMENT);
  CHECK(hs_simulation_reset_statistics(NULL, NULL) == HS_ERR_INVALID_ARGUMENT);
  CHECK(hs_simulation_compute_encodings(NULL, &last_error) == HS_ERR_INVALID_ARGUMENT);
  CHECK(hs_simulation_compute_encodings(NULL, NULL) == HS_ERR_INVALID_ARGUMENT);
  REFUSED(hs_simulation_calibrate, NULL, &name, &view, 1, NULL);
  REFUSED(hs_simulation_calibrate, simulation, NULL, &view, 1, NULL);
  REFUSED(hs_simulation_calibrate, simulation, &name, NULL, 1, NULL);

  hs_tensors *tensors;
  REFUSED_OUT(tensors, hs_simulation_run, NULL, &name, &view, 1, NULL, &tensors);
  REFUSED_OUT(tensors, hs_simulation_run, simulation, NULL, &view, 1, NULL, &tensors);
  REFUSED_OUT(tensors, hs_simulation_run, simulation, &name, NULL, 1, NULL, &tensors);
  REFUSED(hs_simulation_run, simulation, &name, &view, 1, NULL, NULL);

  size_t size;
  unsigned char buffer[8] = {0};
  REFUSED_OUT(size, hs_simulation_statistics_size, NULL, &size);
  REFUSED(hs_simulation_statistics_size, simulation, NULL);
  REFUSED_OUT(size, hs_simulation_serialize_statistics, NULL, buffer, sizeof buffer, &size);
  REFUSED_OUT(size, hs_simulation_serialize_statistics, simulation, NULL, 8, &size);
  REFUSED(hs_simulation_serialize_statistics, simulation, buffer, sizeof buffer, NULL);
  REFUSED(hs_simulation_merge_statistics, NULL, buffer, sizeof buffer);
  REFUSED(hs_simulation_merge_statistics, simulation, NULL, sizeof buffer);

  hs_quantizer quantizer;
  hs_encoding encoding;
  REFUSED_OUT(size, hs_simulation_quantizer_count, NULL, &size);
  REFUSED(hs_simulation_quantizer_count, simulation, NULL);
  REFUSED_OUT(quantizer, hs_simulation_quantizer, NULL, 0, &quantizer);
  REFUSED(hs_simulation_quantizer, simulation, 0, NULL);
  REFUSED_OUT(encoding, hs_simulation_encoding, NULL, "input", &encoding);
  REFUSED_OUT(encoding, hs_simulation_encoding, simulation, NULL, &encoding);
  REFUSED(hs_simulation_encoding, simulation, "input", NULL);
  REFUSED_OUT(encoding, hs_simulation_parameter_encoding, NULL, "depthwise.weight", &view,
              &encoding);
  REFUSED_OUT(encoding, hs_simulation_parameter_encoding, simulation, NULL, &view, &encoding);
  REFUSED_OUT(encoding, hs_simulation_parameter_encoding, simulation, "depthwise.weight", NULL,
              &encoding);
  REFUSED(hs_simulation_parameter_encoding, simulation, "depthwise.weight", &view, NULL);
  CHECK_STATUS(HS_ERR_INVALID_ARGUMENT,
               hs_simulation_quantizer(simulation, 9999, &quantizer, &last_error));
  CHECK_STATUS(HS_ERR_UNKNOWN_NAME,
               hs_simulation_encoding(simulation, "no", &encoding, &last_error));

  REFUSED(hs_simulation_set_enabled, NULL, "input", 1);
  REFUSED(hs_simulation_set_enabled, simulation, NULL, 1);
  REFUSED(hs_simulation_set_frozen, NULL, "input", 0);
  REFUSED(hs_simulation_set_frozen, simulation, NULL, 0);
  REFUSED(hs_simulation_set_precision, NULL, "input", 8, 0);
  REFUSED(hs_simulation_set_precision, simulation, NULL, 8, 0);
  REFUSED(hs_simulation_set_range, NULL, "input", 0, 1);
  REFUSED(hs_simulation_set_range, simulation, NULL, 0, 1);
  CHECK_OK(hs_simulation_encoding(simulation, "input", &encoding, &last_error));
  REFUSED(hs_simulation_set_encoding, NULL, "input", &encoding);
  REFUSED(hs_simulation_set_encoding, simulation, NULL, &encoding);
  REFUSED(hs_simulation_set_encoding, simulation, "input", NULL);

  REFUSED_OUT(size, hs_simulation_encodings_size, NULL, "1.0.0", &size);
  REFUSED(hs_simulation_encodings_size, simulation, "1.0.0", NULL);
  REFUSED_OUT(size, hs_simulation_encodings_json, NULL, NULL, buffer, 8, &size);
  REFUSED_OUT(size, hs_simulation_encodings_json, simulation, NULL, NULL, 8, &size);
  REFUSED(hs_simulation_encodings_json, simulation, NULL, buffer, 8, NULL);
  REFUSED(hs_simulation_export, NULL, output_folder, "x", NULL);
  REFUSED(hs_simulation_export, simulation, NULL, "x", NULL);
  REFUSED(hs_simulation_export, simulation, output_folder, NULL, NULL);
  REFUSED(hs_simulation_export_qdq, NULL, "x", NULL);
  REFUSED(hs_simulation_export_qdq, simulation, NULL, NULL);

  hs_load_report *report;
  REFUSED_OUT(report, hs_simulation_load_encodings, NULL, "{}", 2, 0, &report);
  REFUSED_OUT(report, hs_simulation_load_encodings, simulation, NULL, 2, 0, &report);
  CHECK_OK(hs_simulation_encodings_size(simulation, NULL, &size, &last_error));
  char *json = malloc(size);
  CHECK_OK(hs_simulation_encodings_json(simulation, NULL, json, size, &size, &last_error));
  CHECK_OK(hs_simulation_load_encodings(simulation, json, size, 1, &report, &last_error));
  free(json);
  const char *text;
  REFUSED_OUT(size, hs_load_report_count, NULL, HS_LOAD_MISMATCH_UNKNOWN, &size);
  REFUSED(hs_load_report_count, report, HS_LOAD_MISMATCH_UNKNOWN, NULL);
  REFUSED_OUT(text, hs_load_report_get, NULL, HS_LOAD_MISMATCH_UNKNOWN, 0, &text);
  CHECK_STATUS(HS_ERR_INVALID_ARGUMENT, hs_load_report_count(report, 3, &size, &last_error));
  CHECK_STATUS(HS_ERR_INVALID_ARGUMENT, hs_load_report_count(report, -1, &size, &last_error));
  CHECK_STATUS(HS_ERR_INVALID_ARGUMENT, hs_load_report_get(report, 0, 0, &text, &last_error));
  hs_load_report_free(report);

  // Loading ended the loan of the encoding.
  float number = 0;
  CHECK_OK(hs_simulation_encoding(simulation, "input", &encoding, &last_error));
  REFUSED(hs_fake_quantize, NULL, &encoding, &number, 1);
  REFUSED(hs_fake_quantize, &view, NULL, &number, 1);
  REFUSED(hs_fake_quantize, &view, &encoding, NULL, 1);
  REFUSED(hs_fake_quantize_backward, NULL, &encoding, NULL, &view, &number, 1, NULL, NULL);
  REFUSED(hs_fake_quantize_backward, &view, NULL, NULL, &view, &number, 1, NULL, NULL);
  REFUSED(hs_fake_quantize_backward, &view, &encoding, NULL, NULL, &number, 1, NULL, NULL);
  REFUSED(hs_fake_quantize_backward, &view, &encoding, NULL, &view, NULL, 1, NULL, NULL);
  int32_t zero = 0;
  REFUSED(hs_encoding_from_range, NULL, &number, 1, 8, 0, 0, 0, &number, &zero);
  REFUSED(hs_encoding_from_range, &number, NULL, 1, 8, 0, 0, 0, &number, &zero);
  REFUSED(hs_encoding_from_range, &number, &number, 1, 8, 0, 0, 0, NULL, &zero);
  REFUSED(hs_encoding_from_range, &number, &number, 1, 8, 0, 0, 0, &number, NULL);
  REFUSED(hs_encoding_to_range, NULL, &number, &number);
  REFUSED(hs_encoding_to_range, &encoding, NULL, &number);
  REFUSED(hs_encoding_to_range, &encoding, &number, NULL);

  hs_tensors_free(data);
  hs_simulation_free(simulation);
}

void test_nulls(void) {
  test_compression();
  free_nothing();
  test_tensors();
  test_model();
  test_algorithms();
  test_simulation();
}

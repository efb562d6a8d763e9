// SPDX-License-Identifier: Apache-2.0
// Sizes and offsets that shipped programs rely on, older option structs, error texts.

#include <stddef.h>

#include "support.h"

#define SIZE(type, size) _Static_assert(sizeof(type) == (size), "size of " #type)
#define AT(type, field, offset) \
  _Static_assert(offsetof(type, field) == (offset), "offset of " #type "." #field)

SIZE(hs_error, 1024);
AT(hs_error, status, 0);
AT(hs_error, message, 4);

SIZE(hs_tensor_view, 32);
AT(hs_tensor_view, data, 0);
AT(hs_tensor_view, shape, 8);
AT(hs_tensor_view, strides, 16);
AT(hs_tensor_view, dtype, 24);
AT(hs_tensor_view, rank, 28);

SIZE(hs_open_options, 16);
AT(hs_open_options, struct_size, 0);
AT(hs_open_options, external_data_folder, 8);

SIZE(hs_save_options, 16);
AT(hs_save_options, struct_size, 0);
AT(hs_save_options, external_data, 8);

SIZE(hs_value_info, 24);
AT(hs_value_info, name, 0);
AT(hs_value_info, shape, 8);
AT(hs_value_info, dtype, 16);
AT(hs_value_info, rank, 20);

SIZE(hs_run_options, 24);
AT(hs_run_options, struct_size, 0);
AT(hs_run_options, extra_outputs, 8);
AT(hs_run_options, extra_output_count, 16);

SIZE(hs_layer, 56);
AT(hs_layer, name, 0);
AT(hs_layer, op_type, 8);
AT(hs_layer, weight, 16);
AT(hs_layer, channel_minimum, 24);
AT(hs_layer, channel_maximum, 32);
AT(hs_layer, channel_count, 40);
AT(hs_layer, weight_count, 48);

SIZE(hs_fold, 24);
AT(hs_fold, layer, 0);
AT(hs_fold, batch_norm, 8);
AT(hs_fold, is_forward, 16);

SIZE(hs_equalization_options, 32);
AT(hs_equalization_options, struct_size, 0);
AT(hs_equalization_options, absorbs_high_biases, 8);
AT(hs_equalization_options, maximum_iterations, 12);
AT(hs_equalization_options, progress, 16);
AT(hs_equalization_options, user_data, 24);

SIZE(hs_equalized_set, 40);
AT(hs_equalized_set, layers, 0);
AT(hs_equalized_set, factors, 8);
AT(hs_equalized_set, channel_counts, 16);
AT(hs_equalized_set, layer_count, 24);
AT(hs_equalized_set, factor_count, 32);

SIZE(hs_rounding_progress, 40);
AT(hs_rounding_progress, layer, 0);
AT(hs_rounding_progress, completed, 8);
AT(hs_rounding_progress, total, 16);
AT(hs_rounding_progress, fraction, 24);
AT(hs_rounding_progress, seconds_left, 32);

SIZE(hs_rounding_options, 184);
AT(hs_rounding_options, struct_size, 0);
AT(hs_rounding_options, method, 8);
AT(hs_rounding_options, parameter_bits, 12);
AT(hs_rounding_options, activation_bits, 16);
AT(hs_rounding_options, scheme, 20);
AT(hs_rounding_options, percentile, 24);
AT(hs_rounding_options, configuration, 32);
AT(hs_rounding_options, excluded_layers, 40);
AT(hs_rounding_options, excluded_layer_count, 48);
AT(hs_rounding_options, maximum_rows, 56);
AT(hs_rounding_options, maximum_bytes, 64);
AT(hs_rounding_options, seed, 72);
AT(hs_rounding_options, floor_or_ceil, 80);
AT(hs_rounding_options, iterations, 84);
AT(hs_rounding_options, progress, 88);
AT(hs_rounding_options, user_data, 96);
AT(hs_rounding_options, cache, 104);
AT(hs_rounding_options, block_size, 112);
AT(hs_rounding_options, candidates, 116);
AT(hs_rounding_options, regularization, 120);
AT(hs_rounding_options, beta_start, 128);
AT(hs_rounding_options, beta_end, 136);
AT(hs_rounding_options, warm_start, 144);
AT(hs_rounding_options, width_layers, 152);
AT(hs_rounding_options, widths, 160);
AT(hs_rounding_options, width_count, 168);
AT(hs_rounding_options, details, 176);

SIZE(hs_rounded_layer, 48);
AT(hs_rounded_layer, layer, 0);
AT(hs_rounded_layer, weight, 8);
AT(hs_rounded_layer, kept, 16);
AT(hs_rounded_layer, noise_before, 24);
AT(hs_rounded_layer, noise_after, 32);
AT(hs_rounded_layer, bits, 40);

SIZE(hs_encoding, 64);
AT(hs_encoding, scales, 0);
AT(hs_encoding, zero_points, 8);
AT(hs_encoding, count, 16);
AT(hs_encoding, block_size, 24);
AT(hs_encoding, granularity, 32);
AT(hs_encoding, axis, 36);
AT(hs_encoding, block_axis, 40);
AT(hs_encoding, bits, 44);
AT(hs_encoding, is_signed, 48);
AT(hs_encoding, is_symmetric, 52);
AT(hs_encoding, is_strict, 56);

SIZE(hs_simulation_options, 56);
AT(hs_simulation_options, struct_size, 0);
AT(hs_simulation_options, configuration, 8);
AT(hs_simulation_options, percentile, 16);
AT(hs_simulation_options, scheme, 24);
AT(hs_simulation_options, parameter_bits, 28);
AT(hs_simulation_options, activation_bits, 32);
AT(hs_simulation_options, block_size, 36);
AT(hs_simulation_options, excluded_layers, 40);
AT(hs_simulation_options, excluded_layer_count, 48);

SIZE(hs_calibration_options, 32);
AT(hs_calibration_options, struct_size, 0);
AT(hs_calibration_options, batch_size, 8);
AT(hs_calibration_options, progress, 16);
AT(hs_calibration_options, user_data, 24);

SIZE(hs_quantizer, 40);
AT(hs_quantizer, tensor, 0);
AT(hs_quantizer, tied_to, 8);
AT(hs_quantizer, role, 16);
AT(hs_quantizer, bits, 20);
AT(hs_quantizer, is_symmetric, 24);
AT(hs_quantizer, is_enabled, 28);
AT(hs_quantizer, is_frozen, 32);
AT(hs_quantizer, has_encoding, 36);

SIZE(hs_qdq_options, 16);
AT(hs_qdq_options, struct_size, 0);
AT(hs_qdq_options, prequantizes_constants, 8);
AT(hs_qdq_options, exports_int32_bias, 12);

SIZE(hs_compression_options, 104);
AT(hs_compression_options, struct_size, 0);
AT(hs_compression_options, scheme, 8);
AT(hs_compression_options, metric, 12);
AT(hs_compression_options, multiplicity, 16);
AT(hs_compression_options, ignored_layers, 24);
AT(hs_compression_options, ignored_layer_count, 32);
AT(hs_compression_options, input_names, 40);
AT(hs_compression_options, input_shapes, 48);
AT(hs_compression_options, input_ranks, 56);
AT(hs_compression_options, input_count, 64);
AT(hs_compression_options, importance, 72);
AT(hs_compression_options, without_reconstruction, 76);
AT(hs_compression_options, input_keepers, 80);
AT(hs_compression_options, input_keeper_count, 88);
AT(hs_compression_options, keeps_positions, 96);

SIZE(hs_layer_cost, 40);
AT(hs_layer_cost, macs, 24);
AT(hs_layer_cost, parameters, 32);

SIZE(hs_compressible_layer, 48);
AT(hs_compressible_layer, macs, 24);
AT(hs_compressible_layer, parameters, 32);
AT(hs_compressible_layer, maximum_units, 40);

SIZE(hs_compression_refusal, 16);
AT(hs_compression_refusal, reason, 8);

SIZE(hs_compressed_layer, 112);
AT(hs_compressed_layer, units, 16);
AT(hs_compressed_layer, maximum_units, 24);
AT(hs_compressed_layer, macs_before, 32);
AT(hs_compressed_layer, macs_after, 40);
AT(hs_compressed_layer, parameters_before, 48);
AT(hs_compressed_layer, parameters_after, 56);
AT(hs_compressed_layer, weight, 64);
AT(hs_compressed_layer, first_weight, 72);
AT(hs_compressed_layer, second_weight, 80);
AT(hs_compressed_layer, bias, 88);
AT(hs_compressed_layer, noise_plain, 96);
AT(hs_compressed_layer, noise_kept, 104);

SIZE(hs_pruned_constant, 40);
AT(hs_pruned_constant, result, 8);
AT(hs_pruned_constant, axis, 16);
AT(hs_pruned_constant, kept, 24);
AT(hs_pruned_constant, kept_count, 32);

// Fills with garbage, initializes, and checks that every byte but struct_size is 0.
#define CHECK_INIT(type)                                                \
  do {                                                                  \
    type options;                                                       \
    memset(&options, 0xA5, sizeof options);                             \
    type##_init(&options);                                              \
    CHECK(options.struct_size == sizeof options);                       \
    size_t set = 0;                                                     \
    for (size_t byte = sizeof(size_t); byte < sizeof options; ++byte) { \
      set += ((unsigned char *)&options)[byte] != 0;                    \
    }                                                                   \
    CHECK(set == 0);                                                    \
    type##_init(NULL);                                                  \
  } while (0)

static void test_option_sizes(void) {
  hs_model *model = open_model();
  hs_simulation *simulation = NULL;

  // An older program's struct ends after `scheme` and `parameter_bits`; what follows must not be
  // read: the bytes there would be refused.
  hs_simulation_options older;
  memset(&older, 0xA5, sizeof older);
  older.struct_size = offsetof(hs_simulation_options, activation_bits);
  older.configuration = "default";
  older.percentile = 0;
  older.scheme = HS_RANGE_SCHEME_MIN_MAX;
  older.parameter_bits = 4;
  CHECK_OK(hs_simulation_create(model, &older, &simulation, &last_error));
  size_t count = 0;
  CHECK_OK(hs_simulation_quantizer_count(simulation, &count, &last_error));
  int parameters = 0;
  int activations = 0;
  for (size_t index = 0; index < count; ++index) {
    hs_quantizer quantizer;
    CHECK_OK(hs_simulation_quantizer(simulation, index, &quantizer, &last_error));
    if (quantizer.role == HS_QUANTIZER_ROLE_PARAMETER) {
      ++parameters;
      // The placement may hold other constants to 8 bits.
      if (strcmp(quantizer.tensor, "project.weight") == 0) CHECK(quantizer.bits == 4);
    } else {
      ++activations;
      CHECK(quantizer.bits == 8);
    }
  }
  CHECK(parameters > 0 && activations > 0);
  hs_simulation_free(simulation);

  // A newer program's struct is longer: fine while what this library does not know is 0.
  struct {
    hs_simulation_options known;
    int64_t unknown;
  } newer;
  memset(&newer, 0, sizeof newer);
  newer.known.struct_size = sizeof newer;
  CHECK_OK(hs_simulation_create(model, &newer.known, &simulation, &last_error));
  hs_simulation_free(simulation);
  newer.unknown = 1;
  CHECK_STATUS(HS_ERR_INVALID_ARGUMENT,
               hs_simulation_create(model, &newer.known, &simulation, &last_error));
  CHECK(simulation == NULL);

  // Sizes that no program has.
  const size_t wrong[] = {0, 7, 12, SIZE_MAX, (size_t)1 << 40};
  for (size_t index = 0; index < sizeof wrong / sizeof *wrong; ++index) {
    hs_simulation_options options;
    hs_simulation_options_init(&options);
    options.struct_size = wrong[index];
    CHECK_STATUS(HS_ERR_INVALID_ARGUMENT,
                 hs_simulation_create(model, &options, &simulation, &last_error));
    CHECK(strstr(last_error.message, "struct_size") != NULL);
  }
  hs_model_free(model);
}

static void test_error_text(void) {
  // A name of 3-byte characters: the message is cut, between characters, and ends with NUL. One to
  // three letters before them move the cut through a character.
  enum { CHARACTERS = 2000 };
  char *path = malloc(CHARACTERS * 3 + 4);
  hs_model *model = NULL;
  for (int letters = 1; letters <= 3; ++letters) {
    memset(path, 'x', 3);
    for (int index = 0; index < CHARACTERS; ++index) {
      memcpy(path + letters + index * 3, "\xE2\x82\xAC", 3);
    }
    path[letters + CHARACTERS * 3] = 0;
    memset(&last_error, 0xA5, sizeof last_error);
    hs_status status = hs_model_open(path, NULL, &model, &last_error);
    CHECK(status == HS_ERR_FILE_ACCESS);
    CHECK(last_error.status == status);
    CHECK(model == NULL);
    const char *end = memchr(last_error.message, 0, sizeof last_error.message);
    CHECK(end != NULL);
    size_t length = end == NULL ? 0 : (size_t)(end - last_error.message);
    CHECK(length >= sizeof last_error.message - 3);
    CHECK(length >= 3 && memcmp(end - 3, "\xE2\x82\xAC", 3) == 0);
  }
  free(path);

  // Not UTF-8.
  CHECK_STATUS(HS_ERR_INVALID_ARGUMENT, hs_model_open("\xFF\xFE", NULL, &model, &last_error));
  // A success leaves the error alone.
  hs_error untouched;
  memset(&untouched, 0x5A, sizeof untouched);
  hs_error copy = untouched;
  CHECK(hs_set_thread_count(0, &untouched) == HS_OK);
  CHECK(memcmp(&copy, &untouched, sizeof copy) == 0);
}

static void test_library(void) {
  CHECK(strncmp(hs_version(), "0.", 2) == 0);
  CHECK(strcmp(hs_status_name(HS_OK), "HS_OK") == 0);
  CHECK(strcmp(hs_status_name(HS_ERR_CANCELLED), "HS_ERR_CANCELLED") == 0);
  CHECK(strcmp(hs_status_name(HS_ERR_INTERNAL), "HS_ERR_INTERNAL") == 0);
  CHECK(strcmp(hs_status_name(12345), "unknown status") == 0);
  CHECK(strcmp(hs_status_name(-1), "unknown status") == 0);

  int32_t before = hs_thread_count();
  CHECK(before >= 1);
  CHECK_OK(hs_set_thread_count(1, &last_error));
  CHECK(hs_thread_count() == 1);
  CHECK_STATUS(HS_ERR_INVALID_ARGUMENT, hs_set_thread_count(-1, &last_error));
  CHECK_STATUS(HS_ERR_INVALID_ARGUMENT, hs_set_thread_count(1025, &last_error));
  CHECK(hs_thread_count() == 1);
  CHECK_OK(hs_set_thread_count(0, &last_error));
  CHECK(hs_thread_count() == before);
}

void test_layout(void) {
  CHECK_INIT(hs_open_options);
  CHECK_INIT(hs_save_options);
  CHECK_INIT(hs_run_options);
  CHECK_INIT(hs_equalization_options);
  CHECK_INIT(hs_simulation_options);
  CHECK_INIT(hs_calibration_options);
  CHECK_INIT(hs_qdq_options);
  CHECK_INIT(hs_compression_options);
  test_library();
  test_error_text();
  test_option_sizes();
}

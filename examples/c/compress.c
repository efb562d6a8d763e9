// SPDX-License-Identifier: Apache-2.0
// Takes channels out of an ONNX model in C, by what unlabeled data shows, and quantizes the result.
//
//   cc compress.c -o compress $(pkg-config --cflags --libs halfstep)
//   ./compress model.onnx calibration.npy output-folder

#include <halfstep.h>
#include <stdio.h>
#include <stdlib.h>

// Share of the multiply-accumulates that stays.
#define TARGET 0.7

// Says what failed; every call returns a status and fills `error`.
static int failed(const char *step, const hs_error *error) {
  fprintf(stderr, "%s: %s: %s\n", step, hs_status_name(error->status), error->message);
  return 1;
}

// Prints what stays of the network, and what could not be pruned.
static int print_report(const hs_compressor *compressor, const hs_compression_report *report) {
  hs_error error;
  size_t count = 0;
  hs_compressed_layer layer;
  if (hs_compression_report_total(report, &layer, &error)) return failed("report", &error);
  printf("multiply-accumulates: %lld of %lld\n", (long long)layer.macs_after,
         (long long)layer.macs_before);
  if (hs_compression_report_count(report, &count, &error)) return failed("report", &error);
  for (size_t i = 0; i < count; ++i) {
    if (hs_compression_report_get(report, i, &layer, &error)) return failed("report", &error);
    if (layer.units == 0) continue;
    printf("%s: %lld of %lld channels\n", layer.name, (long long)layer.units,
           (long long)layer.maximum_units);
  }
  if (hs_compressor_refusal_count(compressor, &count, &error)) return failed("report", &error);
  for (size_t i = 0; i < count; ++i) {
    hs_compression_refusal refusal;
    if (hs_compressor_refusal(compressor, i, &refusal, &error)) return failed("report", &error);
    printf("stays: %s\n", refusal.reason);
  }
  return 0;
}

typedef struct handles {
  hs_model *model;
  hs_tensors *data;
  hs_compressor *compressor;
  hs_model *smaller;
  hs_compression_report *report;
  hs_simulation *simulation;
  int64_t *channels;
} handles;

static int compress(const char *model_path, const char *data_path, const char *folder, handles *h) {
  hs_error error;
  hs_value_info input;
  hs_tensor_view images;
  if (hs_model_open(model_path, NULL, &h->model, &error)) return failed("open", &error);
  // What belongs to layers is fitted with them.
  if (hs_model_fold_batch_norms(h->model, NULL, &error)) return failed("fold", &error);
  if (hs_tensors_open_numpy(data_path, &h->data, &error)) return failed("read data", &error);
  if (hs_tensors_get(h->data, 0, NULL, &images, &error)) return failed("read data", &error);
  if (hs_model_input(h->model, 0, &input, &error)) return failed("model input", &error);

  hs_compression_options options;
  hs_compression_options_init(&options);
  options.scheme = HS_COMPRESSION_CHANNEL_PRUNING;
  if (hs_compressor_create(h->model, &options, &h->compressor, &error)) {
    return failed("compressor", &error);
  }
  if (hs_compressor_calibrate(h->compressor, &input.name, &images, 1, &error)) {
    return failed("calibrate", &error);
  }

  // How many channels each layer keeps, such that the layers' errors are least.
  size_t count = 0;
  if (hs_compressor_layer_count(h->compressor, &count, &error)) return failed("layers", &error);
  h->channels = calloc(count + 1, sizeof *h->channels);
  if (h->channels == NULL) return 1;
  if (hs_compressor_select(h->compressor, TARGET, NULL, NULL, h->channels, count, &error)) {
    return failed("select", &error);
  }
  if (hs_compressor_compress(h->compressor, h->channels, count, NULL, NULL, &h->smaller, &h->report,
                             &error)) {
    return failed("compress", &error);
  }
  if (print_report(h->compressor, h->report)) return 1;

  // The smaller network is one like any other.
  if (hs_simulation_create(h->smaller, NULL, &h->simulation, &error)) {
    return failed("simulate", &error);
  }
  if (hs_simulation_calibrate(h->simulation, &input.name, &images, 1, NULL, &error)) {
    return failed("calibrate", &error);
  }
  if (hs_simulation_export(h->simulation, folder, "smaller", NULL, &error)) {
    return failed("export", &error);
  }
  return 0;
}

int main(int argc, char **argv) {
  if (argc != 4) {
    fprintf(stderr, "usage: %s model.onnx calibration.npy output-folder\n", argv[0]);
    return 2;
  }
  handles h = {0};
  int result = compress(argv[1], argv[2], argv[3], &h);
  free(h.channels);
  hs_simulation_free(h.simulation);
  hs_compression_report_free(h.report);
  hs_model_free(h.smaller);
  hs_compressor_free(h.compressor);
  hs_tensors_free(h.data);
  hs_model_free(h.model);
  return result;
}

// SPDX-License-Identifier: Apache-2.0
// Quantizes an ONNX model in C: fold, equalize, calibrate, export.
//
//   cc main.c -o quantize $(pkg-config --cflags --libs halfstep)
//   ./quantize model.onnx calibration.npy output-folder

#include <halfstep.h>
#include <stdio.h>

// Says what failed; every call returns a status and fills `error`.
static int failed(const char *step, const hs_error *error) {
  fprintf(stderr, "%s: %s: %s\n", step, hs_status_name(error->status), error->message);
  return 1;
}

// Called after each batch; returning 1 would cancel.
static int32_t show_progress(size_t completed, size_t total, void *user_data) {
  (void)user_data;
  fprintf(stderr, "calibrating: batch %zu of %zu\n", completed, total);
  return 0;
}

static int quantize(const char *model_path, const char *data_path, const char *folder,
                    hs_model **model, hs_tensors **data, hs_simulation **simulation) {
  hs_error error;
  size_t folds = 0;
  size_t sets = 0;
  hs_fold_report *fold_report = NULL;
  hs_equalization_report *equalization_report = NULL;

  if (hs_model_open(model_path, NULL, model, &error)) return failed("open", &error);

  if (hs_model_fold_batch_norms(*model, &fold_report, &error)) return failed("fold", &error);
  hs_fold_report_count(fold_report, &folds, NULL);
  hs_fold_report_free(fold_report);

  if (hs_model_equalize(*model, NULL, &equalization_report, &error)) {
    return failed("equalize", &error);
  }
  hs_equalization_report_count(equalization_report, &sets, NULL);
  hs_equalization_report_free(equalization_report);
  printf("folded %zu batch norms, equalized %zu sets of layers\n", folds, sets);

  // The calibration data is one array [N, ...]; the library runs it batch by batch.
  hs_value_info input;
  hs_tensor_view images;
  if (hs_tensors_open_numpy(data_path, data, &error)) return failed("read data", &error);
  if (hs_tensors_get(*data, 0, NULL, &images, &error)) return failed("read data", &error);
  if (hs_model_input(*model, 0, &input, &error)) return failed("model input", &error);

  // NULL options: 8 bits, min-max ranges, one scale for each output channel.
  if (hs_simulation_create(*model, NULL, simulation, &error)) return failed("simulate", &error);

  hs_calibration_options options;
  hs_calibration_options_init(&options);
  options.progress = show_progress;
  if (hs_simulation_calibrate(*simulation, &input.name, &images, 1, &options, &error)) {
    return failed("calibrate", &error);
  }

  // model.onnx and model.encodings, then one file with QuantizeLinear/DequantizeLinear.
  char qdq_path[4096];
  snprintf(qdq_path, sizeof qdq_path, "%s/model_qdq.onnx", folder);
  if (hs_simulation_export(*simulation, folder, "model", NULL, &error)) {
    return failed("export", &error);
  }
  if (hs_simulation_export_qdq(*simulation, qdq_path, NULL, &error)) {
    return failed("export QDQ", &error);
  }
  return 0;
}

int main(int argc, char **argv) {
  if (argc != 4) {
    fprintf(stderr, "usage: %s model.onnx calibration.npy output-folder\n", argv[0]);
    return 2;
  }
  hs_model *model = NULL;
  hs_tensors *data = NULL;
  hs_simulation *simulation = NULL;
  int result = quantize(argv[1], argv[2], argv[3], &model, &data, &simulation);
  hs_simulation_free(simulation);
  hs_tensors_free(data);
  hs_model_free(model);
  return result;
}

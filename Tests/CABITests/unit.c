// SPDX-License-Identifier: Apache-2.0
// Runs the unit tests of the C interface: unit MODEL DATA OUTPUT-FOLDER.

#include "support.h"

int checks = 0;
int failures = 0;
hs_error last_error;
const char *model_path;
const char *data_path;
const char *output_folder;

static void need(hs_status status, const char *what) {
  if (status == HS_OK) return;
  fprintf(stderr, "%s: %s: %s\n", what, hs_status_name(status), last_error.message);
  exit(1);
}

hs_model *open_model(void) {
  hs_model *model = NULL;
  need(hs_model_open(model_path, NULL, &model, &last_error), "fixture model");
  return model;
}

hs_tensors *open_data(hs_tensor_view *out_view) {
  hs_tensors *data = NULL;
  need(hs_tensors_open_numpy(data_path, &data, &last_error), "fixture data");
  need(hs_tensors_get(data, 0, NULL, out_view, &last_error), "fixture data");
  return data;
}

hs_simulation *open_simulation(void) {
  const char *name = "input";
  hs_tensor_view view;
  hs_model *model = open_model();
  hs_tensors *data = open_data(&view);
  hs_simulation *simulation = NULL;
  need(hs_model_fold_batch_norms(model, NULL, &last_error), "fold");
  need(hs_model_equalize(model, NULL, NULL, &last_error), "equalize");
  need(hs_simulation_create(model, NULL, &simulation, &last_error), "simulate");
  need(hs_simulation_calibrate(simulation, &name, &view, 1, NULL, &last_error), "calibrate");
  hs_tensors_free(data);
  hs_model_free(model);
  return simulation;
}

int main(int argc, char **argv) {
  if (argc != 4) return 2;
  model_path = argv[1];
  data_path = argv[2];
  output_folder = argv[3];
  struct {
    const char *name;
    void (*run)(void);
  } tests[] = {{"layout", test_layout}, {"nulls", test_nulls},     {"views", test_views},
               {"jobs", test_jobs},     {"pruning", test_pruning}, {"rounding", test_rounding}};
  for (size_t index = 0; index < sizeof tests / sizeof *tests; ++index) {
    int before = checks;
    int failed = failures;
    tests[index].run();
    printf("%s: %d checks, %d failed\n", tests[index].name, checks - before, failures - failed);
  }
  return failures == 0 ? 0 : 1;
}

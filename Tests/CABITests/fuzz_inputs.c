// SPDX-License-Identifier: Apache-2.0
// Mutates everything but models that the library reads: encodings, statistics, configurations,
// arrays.
//
//   fuzz_inputs MODEL DATA FOLDER COUNT SEED
//
// The mutations run in one child process; dying by a signal is the failure.

#include <halfstep.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include "mutate.h"

static const char configuration_text[] =
    "{\"defaults\":{\"ops\":{\"is_output_quantized\":\"True\"},\"params\":{\"is_quantized\":"
    "\"True\","
    "\"is_symmetric\":\"True\"},\"per_channel_quantization\":\"True\",\"strict_symmetric\":"
    "\"False\"},"
    "\"params\":{\"bias\":{\"is_quantized\":\"False\"}},\"op_type\":{\"Relu\":{\"encoding_"
    "constraints\":"
    "{\"min\":0.0,\"max\":6.0}}},\"supergroups\":[{\"op_list\":[\"Conv\",\"Relu\"]}],"
    "\"model_input\":{\"is_input_quantized\":\"True\"},\"model_output\":{}}";

enum { KINDS = 6 };
static const char *kind_names[KINDS] = {"encodings 0.6.1", "encodings 1.0.0", "encodings 2.0.0",
                                        "statistics",      "configuration",   "array"};

// The mutation at work; shared with the child.
static long *current;

typedef struct {
  unsigned char *bytes;
  size_t size;
} blob;

static void need(hs_status status) {
  if (status != HS_OK) {
    fprintf(stderr, "preparing: %s\n", hs_status_name(status));
    exit(2);
  }
}

static void write_file(const char *path, const unsigned char *bytes, size_t size) {
  FILE *file = fopen(path, "wb");
  if (file == NULL || fwrite(bytes, 1, size, file) != size) exit(2);
  fclose(file);
}

static int child(char **argv, long count, uint64_t seed) {
  struct rlimit limit = {(rlim_t)6 << 30, (rlim_t)6 << 30};
  setrlimit(RLIMIT_AS, &limit);
  hs_set_thread_count(1, NULL);
  const char *name = "input";
  hs_tensor_view view;
  hs_tensors *data = NULL;
  hs_model *model = NULL;
  hs_simulation *simulation = NULL;
  need(hs_model_open(argv[1], NULL, &model, NULL));
  need(hs_tensors_open_numpy(argv[2], &data, NULL));
  need(hs_tensors_get(data, 0, NULL, &view, NULL));
  need(hs_simulation_create(model, NULL, &simulation, NULL));
  need(hs_simulation_calibrate(simulation, &name, &view, 1, NULL, NULL));

  blob sources[KINDS];
  const char *versions[] = {"0.6.1", "1.0.0", "2.0.0"};
  for (int kind = 0; kind < 3; ++kind) {
    blob *source = &sources[kind];
    need(hs_simulation_encodings_size(simulation, versions[kind], &source->size, NULL));
    source->bytes = malloc(source->size);
    need(hs_simulation_encodings_json(simulation, versions[kind], source->bytes, source->size,
                                      &source->size, NULL));
  }
  need(hs_simulation_statistics_size(simulation, &sources[3].size, NULL));
  sources[3].bytes = malloc(sources[3].size);
  need(hs_simulation_serialize_statistics(simulation, sources[3].bytes, sources[3].size,
                                          &sources[3].size, NULL));
  sources[4].bytes = (unsigned char *)configuration_text;
  sources[4].size = sizeof configuration_text - 1;
  static unsigned char array[1 << 16];
  FILE *file = fopen(argv[2], "rb");
  if (file == NULL) return 2;
  sources[5].bytes = array;
  sources[5].size = fread(array, 1, sizeof array, file);
  fclose(file);

  char path[4096];
  snprintf(path, sizeof path, "%s/mutation", argv[3]);
  long taken[KINDS] = {0};
  long refused[KINDS] = {0};
  for (long index = 0; index < count; ++index) {
    int kind = (int)(index % KINDS);
    unsigned char *bytes = malloc(sources[kind].size + MUTATION_EXTRA + 64);
    size_t size = mutate(sources[kind].bytes, sources[kind].size, seed, index, bytes);
    *current = index;
    hs_error error = {0};
    hs_status status = HS_OK;
    hs_tensors *outputs = NULL;
    hs_simulation *fresh = NULL;
    if (kind < 3) {
      status = hs_simulation_load_encodings(simulation, bytes, size, 0, NULL, &error);
      // What was taken must also run and be written.
      if (status == HS_OK && index % 5 == 0) {
        if (hs_simulation_run(simulation, &name, &view, 1, NULL, &outputs, NULL) == HS_OK) {
          hs_tensors_free(outputs);
        }
        hs_simulation_export_qdq(simulation, path, NULL, NULL);
        size_t needed = 0;
        hs_simulation_encodings_size(simulation, versions[kind], &needed, NULL);
      }
    } else if (kind == 3) {
      need(hs_simulation_create(model, NULL, &fresh, NULL));
      status = hs_simulation_merge_statistics(fresh, bytes, size, &error);
      hs_simulation_compute_encodings(fresh, NULL);
    } else if (kind == 4) {
      write_file(path, bytes, size);
      hs_simulation_options options;
      hs_simulation_options_init(&options);
      options.configuration = path;
      status = hs_simulation_create(model, &options, &fresh, &error);
      if (status == HS_OK) {
        hs_simulation_calibrate(fresh, &name, &view, 1, NULL, NULL);
      }
    } else {
      write_file(path, bytes, size);
      status = hs_tensors_open_numpy(path, &outputs, &error);
      hs_tensors_free(outputs);
    }
    hs_simulation_free(fresh);
    if (status != HS_OK && (error.status != status || error.message[0] == 0)) abort();
    ++*(status == HS_OK ? &taken[kind] : &refused[kind]);
    free(bytes);
  }
  for (int kind = 0; kind < KINDS; ++kind) {
    printf("fuzz: %s: %ld taken, %ld refused\n", kind_names[kind], taken[kind], refused[kind]);
    // All or nothing would mean that the mutations test nothing.
    if (taken[kind] == 0 || refused[kind] == 0) return 1;
    if (kind < 4) free(sources[kind].bytes);
  }
  hs_simulation_free(simulation);
  hs_tensors_free(data);
  hs_model_free(model);
  return 0;
}

int main(int argc, char **argv) {
  if (argc != 6) return 2;
  current = mmap(NULL, sizeof *current, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  if (current == MAP_FAILED) return 2;
  pid_t pid = fork();
  if (pid < 0) return 2;
  if (pid == 0) return child(argv, atol(argv[4]), strtoull(argv[5], NULL, 10));
  int status = 0;
  if (waitpid(pid, &status, 0) != pid) return 2;
  if (WIFSIGNALED(status)) {
    fprintf(stderr, "fuzz: died by signal %d at mutation %ld (%s)\n", WTERMSIG(status), *current,
            kind_names[*current % KINDS]);
    return 1;
  }
  return WEXITSTATUS(status);
}

// SPDX-License-Identifier: Apache-2.0
// Mutates a valid model and runs the whole job on what still opens, in child processes.
//
//   fuzz MODEL COUNT SEED          all mutations, in child processes
//   fuzz MODEL INDEX SEED only     one mutation, in this process, for a debugger
//
// A child that dies by a signal is a failure; its mutation is written to a file and the next child
// goes on behind it. So it does behind a mutation that asks for more than a minute's work (a
// convolution padded by millions is valid); such are counted, and a few are allowed.

#include <halfstep.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/time.h>
#include <sys/wait.h>
#include <unistd.h>

#include "mutate.h"

enum { SECONDS_FOR_ONE = 60, SLOW_ALLOWED = 10, EXTRA = MUTATION_EXTRA };
// Mutated shapes may ask for much; the library has to notice that it does not get it.
static const rlim_t MEMORY = (rlim_t)6 << 30;

// Shared with the children.
typedef struct {
  long done;
  long opened, folded, equalized, ran, simulated, calibrated, exported;
  long refused[100];
  char step[32];
} progress;

static unsigned char *original;
static size_t original_size;
static progress *shared;

static size_t mutation(uint64_t seed, long index, unsigned char *bytes) {
  return mutate(original, original_size, seed, index, bytes);
}

static void step(const char *name) { snprintf(shared->step, sizeof shared->step, "%s", name); }

// Counts a refusal; the error must be filled.
static int refused(hs_status status, const hs_error *error) {
  if (status == HS_OK) return 0;
  if (status < 0 || status > 99 || error->status != status || error->message[0] == 0) abort();
  ++shared->refused[status];
  return 1;
}

static void job(const unsigned char *bytes, size_t size) {
  static const float values[2 * 3 * 8 * 8] = {0.5f, -0.25f, 1.0f};
  hs_error error = {0};
  hs_model *model = NULL;
  step("open");
  if (refused(hs_model_open_memory(bytes, size, NULL, &model, &error), &error)) return;
  ++shared->opened;

  // A tiny input of the declared shape, if it is small; the fixture's otherwise.
  int64_t shape[HS_RANK_MAX] = {2, 3, 8, 8};
  hs_tensor_view view = {values, shape, NULL, HS_DATA_TYPE_FLOAT32, 4};
  const char *name = "input";
  hs_value_info info;
  char name_copy[256];
  if (hs_model_input(model, 0, &info, NULL) == HS_OK) {
    snprintf(name_copy, sizeof name_copy, "%s", info.name);
    name = name_copy;
    int64_t count = 1;
    for (int32_t axis = 0; axis < info.rank && count <= 384; ++axis) {
      int64_t extent = info.shape[axis] < 0 ? 2 : info.shape[axis];
      count = extent > 384 ? 385 : count * extent;
    }
    if (info.rank >= 0 && info.rank <= HS_RANK_MAX && count <= 384) {
      view.rank = info.rank;
      for (int32_t axis = 0; axis < info.rank; ++axis) {
        shape[axis] = info.shape[axis] < 0 ? 2 : info.shape[axis];
      }
    }
  }

  hs_tensors *tensors = NULL;
  hs_inspection *inspection = NULL;
  step("inspect");
  if (!refused(hs_model_inspect(model, &inspection, &error), &error)) {
    hs_inspection_free(inspection);
  }
  step("run");
  if (!refused(hs_model_run(model, &name, &view, 1, NULL, &tensors, &error), &error)) {
    ++shared->ran;
    hs_tensors_free(tensors);
  }
  step("fold");
  if (!refused(hs_model_fold_batch_norms(model, NULL, &error), &error)) ++shared->folded;
  step("equalize");
  if (!refused(hs_model_equalize(model, NULL, NULL, &error), &error)) ++shared->equalized;
  step("serialize");
  size_t bytes_needed = 0;
  refused(hs_model_serialized_size(model, &bytes_needed, &error), &error);

  hs_simulation_options options;
  hs_simulation_options_init(&options);
  options.scheme = (hs_range_scheme)below(5);
  options.percentile = 99;
  if (below(2) == 0) options.configuration = "default";
  hs_simulation *simulation = NULL;
  step("simulate");
  if (!refused(hs_simulation_create(model, &options, &simulation, &error), &error)) {
    ++shared->simulated;
    step("calibrate");
    if (!refused(hs_simulation_calibrate(simulation, &name, &view, 1, NULL, &error), &error)) {
      ++shared->calibrated;
      step("run simulation");
      if (!refused(hs_simulation_run(simulation, &name, &view, 1, NULL, &tensors, &error),
                   &error)) {
        hs_tensors_free(tensors);
      }
      step("encodings");
      if (!refused(hs_simulation_encodings_size(simulation, "2.0.0", &bytes_needed, &error),
                   &error)) {
        ++shared->exported;
      }
      step("export QDQ");
      refused(hs_simulation_export_qdq(simulation, "/dev/null/x.onnx", NULL, &error), &error);
    }
    hs_simulation_free(simulation);
  }
  hs_model_free(model);
}

static void child(uint64_t seed, long first, long count) {
  struct rlimit limit = {MEMORY, MEMORY};
  setrlimit(RLIMIT_AS, &limit);
  struct rlimit no_core = {0, 0};
  setrlimit(RLIMIT_CORE, &no_core);
  hs_set_thread_count(1, NULL);
  unsigned char *bytes = malloc(original_size + EXTRA + 64);
  for (long index = first; index < count; ++index) {
    size_t size = mutation(seed, index, bytes);
    // Processor time, so that a busy machine does not count.
    struct itimerval limit_one = {{0, 0}, {SECONDS_FOR_ONE, 0}};
    setitimer(ITIMER_PROF, &limit_one, NULL);
    // Copied to its exact size, so that a sanitizer sees reads past the end.
    unsigned char *exact = malloc(size + 1);
    memcpy(exact, bytes, size);
    job(exact, size);
    free(exact);
    shared->done = index + 1;
  }
  _exit(0);
}

static void write_mutation(uint64_t seed, long index) {
  unsigned char *bytes = malloc(original_size + EXTRA + 64);
  size_t size = mutation(seed, index, bytes);
  char path[64];
  snprintf(path, sizeof path, "/tmp/halfstep-fuzz-%ld.onnx", index);
  FILE *out = fopen(path, "wb");
  if (out != NULL) {
    fwrite(bytes, 1, size, out);
    fclose(out);
    fprintf(stderr, "  written to %s\n", path);
  }
  free(bytes);
}

int main(int argc, char **argv) {
  if (argc != 4 && argc != 5) return 2;
  FILE *file = fopen(argv[1], "rb");
  if (file == NULL) return 2;
  original = malloc(1 << 20);
  original_size = fread(original, 1, 1 << 20, file);
  fclose(file);
  long count = atol(argv[2]);
  uint64_t seed = strtoull(argv[3], NULL, 10);
  shared = mmap(NULL, sizeof *shared, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  if (shared == MAP_FAILED) return 2;
  if (argc == 5) {
    write_mutation(seed, count);
    child(seed, count, count + 1);
  }

  long deaths = 0;
  long slow = 0;
  long first = 0;
  while (first < count) {
    fflush(NULL);
    pid_t pid = fork();
    if (pid < 0) return 2;
    if (pid == 0) child(seed, first, count);
    int status = 0;
    if (waitpid(pid, &status, 0) != pid) return 2;
    if (WIFEXITED(status) && WEXITSTATUS(status) == 0) break;
    // The mutation behind the last finished one ended the child.
    long culprit = shared->done > first ? shared->done : first;
    int is_slow = WIFSIGNALED(status) && WTERMSIG(status) == SIGPROF;
    ++*(is_slow ? &slow : &deaths);
    if (is_slow) {
      fprintf(stderr, "mutation %ld of seed %llu: more than %d s in '%s'\n", culprit,
              (unsigned long long)seed, SECONDS_FOR_ONE, shared->step);
    } else if (WIFSIGNALED(status)) {
      fprintf(stderr, "mutation %ld of seed %llu: signal %d (%s) in '%s'\n", culprit,
              (unsigned long long)seed, WTERMSIG(status), strsignal(WTERMSIG(status)),
              shared->step);
    } else {
      fprintf(stderr, "mutation %ld of seed %llu: the process ended in '%s'\n", culprit,
              (unsigned long long)seed, shared->step);
    }
    write_mutation(seed, culprit);
    first = culprit + 1;
    shared->done = first;
    if (deaths + slow >= 50) break;
  }

  printf(
      "fuzz: %ld mutations, seed %llu: %ld opened, %ld ran, %ld folded, %ld equalized, "
      "%ld simulated, %ld calibrated, %ld exported\n",
      shared->done, (unsigned long long)seed, shared->opened, shared->ran, shared->folded,
      shared->equalized, shared->simulated, shared->calibrated, shared->exported);
  for (int status = 0; status < 100; ++status) {
    if (shared->refused[status] > 0) {
      printf("fuzz: %ld times %s\n", shared->refused[status], hs_status_name(status));
    }
  }
  printf("fuzz: %ld deaths, %ld too slow\n", deaths, slow);
  // A run in which nothing opens or nothing is refused tests nothing.
  return deaths == 0 && slow <= SLOW_ALLOWED && shared->done == count && shared->exported > 0 &&
                 shared->opened < count
             ? 0
             : 1;
}

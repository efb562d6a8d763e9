// SPDX-License-Identifier: Apache-2.0
// The C++ interface: cpp MODEL DATA.

#include <cstring>
#include <halfstep.hpp>
#include <iostream>
#include <utility>

static int failures = 0;

#define CHECK(condition)                                                           \
  do {                                                                             \
    if (!(condition)) {                                                            \
      ++failures;                                                                  \
      std::cerr << __FILE__ << ":" << __LINE__ << ": failed: " #condition << "\n"; \
    }                                                                              \
  } while (0)

int main(int, char **arguments) {
  using namespace halfstep;
  // Errors carry the status.
  try {
    Model::open("/no/such/file");
    CHECK(false);
  } catch (const Error &error) {
    CHECK(error.status() == HS_ERR_FILE_ACCESS);
    CHECK(std::string(error.what()).find("/no/such/file") != std::string::npos);
  }

  Model model = Model::open(arguments[1]);
  Model copy = model.clone();
  Model moved = std::move(copy);
  CHECK(moved.get() != nullptr && copy.get() == nullptr);
  CHECK(moved.fold_batch_norms().size() == 3);
  try {
    moved.equalize({}, [](std::size_t, std::size_t) -> bool { throw 7; });
    CHECK(false);
  } catch (int value) {
    CHECK(value == 7);
  }
  std::size_t passes = 0;
  const auto report = moved.equalize({}, [&](std::size_t completed, std::size_t) {
    passes = completed;
    return true;
  });
  CHECK(passes >= 1 && passes == report.iterations);
  CHECK(!report.sets.empty() && report.sets[0].layers.size() == report.sets[0].factors.size() + 1);
  CHECK(moved.layers().size() == 4 && moved.layers()[0].channel_minimum.size() == 8);
  CHECK(model.initializers()["stem.weight"].shape() == (std::vector<int64_t>{8, 3, 3, 3}));

  {
    const Tensors pictures = Tensors::open_numpy(arguments[2]);
    const Inputs some = {{"input", pictures[0]}};
    Model rounded = moved.clone();
    RoundingOptions four;
    four.excluded_layers = {"no such layer"};
    try {
      rounded.adaround(some, four);
      CHECK(false);
    } catch (const Error &error) {
      CHECK(error.status() == HS_ERR_UNKNOWN_NAME);
    }
    four.excluded_layers.clear();
    std::size_t done = 0;
    const auto layers = rounded.adaround(some, four, [&](std::size_t completed, std::size_t) {
      done = completed;
      return true;
    });
    CHECK(layers.size() == 4 && done == 4 && layers[0].bits == 4 && layers[0].layer == "stem");
    for (const auto &layer : layers) CHECK(layer.noise_after <= layer.noise_before);
    CHECK(rounded.correct_biases(some).size() == 4);
    CHECK(rounded.correct_biases().size() == 4);
    CHECK(rounded.adaround(four).front().kept == "gram, data-free");
    for (const auto &[method, kept] :
         {std::pair(HS_ROUNDING_GRADIENT, "adaround"), {HS_ROUNDING_SEQUENTIAL_MSE, "seq-mse"}}) {
      Model other = moved.clone();
      four.method = method;
      four.iterations = 300;
      bool found = false;
      for (const auto &layer : other.adaround(some, four)) {
        CHECK(layer.noise_after <= layer.noise_before);
        found = found || layer.kept == kept;
      }
      CHECK(found);
    }
    four.method = HS_ROUNDING_GRADIENT;
    four.iterations = -1;
    try {
      rounded.adaround(some, four);
      CHECK(false);
    } catch (const Error &error) {
      CHECK(error.status() == HS_ERR_INVALID_ARGUMENT);
    }
  }

  const auto bytes = moved.serialize();
  Model reopened = Model::open_memory(bytes.data(), bytes.size());
  CHECK(reopened.inputs().size() == 1 && reopened.inputs()[0].shape[0] == -1);
  CHECK(reopened.outputs()[0].name == "output");

  const Tensors data = Tensors::open_numpy(arguments[2]);
  const Inputs inputs = {{"input", data[0]}};
  const Tensors outputs = reopened.run(inputs, {"stem_act"});
  CHECK(outputs.size() == 2 && outputs.name(1) == "stem_act");
  CHECK(outputs["output"].count() == 80 && outputs["output"].as<float>() != nullptr);
  try {
    outputs["output"].as<int32_t>();
    CHECK(false);
  } catch (const std::invalid_argument &) {
  }

  Compressor compressor(moved);
  std::vector<int64_t> sizes(compressor.layers().size(), 0);
  CHECK(!sizes.empty());
  sizes[0] = compressor.units(0, 0.5);
  const Compressed smaller = compressor.compress(sizes);
  CHECK(smaller.macs_after < smaller.macs_before);
  CHECK(smaller.parameters_after < smaller.parameters_before);
  CHECK(compressor.select(1.0) == std::vector<int64_t>(sizes.size(), 0));
  CHECK(compressor.ratio(0, sizes[0]) > 0 && compressor.ratio(0, sizes[0]) <= 0.5);
  const std::vector<double> plain = compressor.errors(0);
  compressor.calibrate(inputs);
  const std::vector<double> errors = compressor.errors(0);
  CHECK(plain.size() >= errors.size() && errors.size() >= 2 && errors[0] == 1 && errors != plain);
  CHECK(compressor.compress(sizes).macs_after == smaller.macs_after);
  try {
    compressor.errors(sizes.size());
    CHECK(false);
  } catch (const Error &error) {
    CHECK(error.status() == HS_ERR_INVALID_ARGUMENT);
  }

  CompressionOptions pruning;
  pruning.scheme = HS_COMPRESSION_CHANNEL_PRUNING;
  Compressor pruner(moved, pruning);
  CHECK(pruner.layers() == std::vector<std::string>{"stem"});
  CHECK(pruner.read_by("classifier") == std::vector<std::size_t>{0});
  CHECK((pruner.members(0, HS_CHANNELS_READ) == std::vector<std::string>{"project", "classifier"}));
  try {
    pruner.compress({4});
    CHECK(false);
  } catch (const Error &error) {
    CHECK(error.status() == HS_ERR_EMPTY_STATISTICS);
  }
  pruner.calibrate(inputs);
  Compressed thinner = pruner.compress({4});
  CHECK(thinner.macs_after * 2 < thinner.macs_before && !thinner.constants.empty());
  for (const auto &constant : thinner.constants) {
    CHECK(constant.kept.size() == 4 && constant.kept == thinner.constants[0].kept);
  }
  CHECK(thinner.model.run(inputs)["output"].count() == 80);
  pruning.input_keepers = {"classifier"};
  CHECK(Compressor(moved, pruning).layers().empty());

  SimulationOptions options;
  options.scheme = HS_RANGE_SCHEME_SQNR;
  Simulation simulation(moved, options);
  // What a callback throws comes out of calibrate, and a false cancels.
  try {
    simulation.calibrate(inputs, 4, [](std::size_t, std::size_t) -> bool { throw 42; });
    CHECK(false);
  } catch (int value) {
    CHECK(value == 42);
  }
  try {
    simulation.calibrate(inputs, 4, [](std::size_t, std::size_t) { return false; });
    CHECK(false);
  } catch (const Error &error) {
    CHECK(error.status() == HS_ERR_CANCELLED);
  }
  std::size_t batches = 0;
  simulation.calibrate(inputs, 4, [&](std::size_t completed, std::size_t) {
    batches = completed;
    return true;
  });
  CHECK(batches == 5);
  const std::string json = simulation.encodings("0.6.1");
  CHECK(json.find("\"0.6.1\"") != std::string::npos);
  CHECK(simulation.load_encodings(json).missing.empty());

  Simulation other(moved, options);
  other.merge_statistics(simulation.serialize_statistics());
  other.compute_encodings();
  CHECK(other.encodings("0.6.1") == json);
  CHECK(simulation.run(inputs)["output"].count() == 80);

  std::cout << "cpp: " << (failures == 0 ? "passed" : "failed") << "\n";
  return failures == 0 ? 0 : 1;
}

// SPDX-License-Identifier: Apache-2.0
// Takes channels out of an ONNX model in C++, by what unlabeled data shows, and quantizes the
// result.
//
//   cmake -B build && cmake --build build
//   build/compress model.onnx calibration.npy output-folder

#include <halfstep.hpp>
#include <iostream>

int main(int argc, char **argv) {
  if (argc != 4) {
    std::cerr << "usage: " << argv[0] << " model.onnx calibration.npy output-folder\n";
    return 2;
  }
  try {
    auto model = halfstep::Model::open(argv[1]);
    model.fold_batch_norms();
    const auto data = halfstep::Tensors::open_numpy(argv[2]);
    const halfstep::Inputs inputs = {{model.inputs().at(0).name, data[0]}};

    halfstep::CompressionOptions options;
    options.scheme = HS_COMPRESSION_CHANNEL_PRUNING;
    halfstep::Compressor compressor(model, options);
    compressor.calibrate(inputs);
    // How many channels each layer keeps, such that the layers' errors are least.
    const auto channels = compressor.select(0.7);
    const auto result = compressor.compress(channels);
    std::cout << "multiply-accumulates: " << result.macs_after << " of " << result.macs_before
              << "\n";
    for (const auto &constant : result.constants) {
      std::cout << constant.name << ": " << constant.kept.size() << " stay along axis "
                << constant.axis << "\n";
    }

    // The smaller network is one like any other.
    halfstep::Simulation simulation(result.model);
    simulation.calibrate(inputs);
    simulation.export_to(argv[3], "smaller");
  } catch (const halfstep::Error &error) {
    std::cerr << hs_status_name(error.status()) << ": " << error.what() << "\n";
    return 1;
  }
}

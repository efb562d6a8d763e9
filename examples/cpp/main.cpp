// SPDX-License-Identifier: Apache-2.0
// Quantizes an ONNX model in C++: fold, equalize, calibrate, export.
//
//   cmake -B build && cmake --build build        (or the line of examples/c with c++ -std=c++17)
//   build/quantize model.onnx calibration.npy output-folder

#include <halfstep.hpp>
#include <iostream>
#include <string>

int main(int argc, char **argv) {
  if (argc != 4) {
    std::cerr << "usage: " << argv[0] << " model.onnx calibration.npy output-folder\n";
    return 2;
  }
  const std::string folder = argv[3];
  try {
    auto model = halfstep::Model::open(argv[1]);
    const auto folds = model.fold_batch_norms();
    const auto report = model.equalize();
    std::cout << "folded " << folds.size() << " batch norms, equalized " << report.sets.size()
              << " sets of layers\n";

    const auto data = halfstep::Tensors::open_numpy(argv[2]);
    halfstep::Simulation simulation(model);
    simulation.calibrate(
        {{model.inputs().at(0).name, data[0]}}, 8, [](std::size_t completed, std::size_t total) {
          std::cerr << "calibrating: batch " << completed << " of " << total << "\n";
          return true;
        });
    simulation.export_to(folder, "model");
    simulation.export_qdq(folder + "/model_qdq.onnx");
  } catch (const halfstep::Error &error) {
    std::cerr << hs_status_name(error.status()) << ": " << error.what() << "\n";
    return 1;
  }
}

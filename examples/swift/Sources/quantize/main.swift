// SPDX-License-Identifier: Apache-2.0
// Quantizes an ONNX model in Swift: fold, equalize, calibrate, export.
//
//   swift run -c release quantize model.onnx calibration.npy output-folder

import Halfstep

#if canImport(Glibc)
  import Glibc
#elseif canImport(Darwin)
  import Darwin
#endif

func quantize(_ modelPath: String, _ dataPath: String, into folder: String) throws {
  var model = try Model(contentsOf: modelPath)
  let folds = try model.foldBatchNorms()
  let report = try model.equalize()
  print("folded \(folds.count) batch norms, equalized \(report.sets.count) sets of layers")

  // The calibration data is one array [N, …]; it runs through batch by batch.
  let data = try NamedTensors(contentsOfNumPyFile: dataPath)
  let simulation = try QuantizationSimModel(model)
  try simulation.computeEncodings(data: [model.inputs[0].name: data[0].tensor]) {
    completed, total in
    print("calibrating: batch \(completed) of \(total)")
    return true
  }
  try simulation.export(to: folder, prefix: "model")
  try simulation.exportQDQ(to: folder + "/model_qdq.onnx")
}

let arguments = CommandLine.arguments
guard arguments.count == 4 else {
  print("usage: quantize model.onnx calibration.npy output-folder")
  exit(2)
}
do {
  try quantize(arguments[1], arguments[2], into: arguments[3])
} catch {
  print(error)
  exit(1)
}

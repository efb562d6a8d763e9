// SPDX-License-Identifier: Apache-2.0
// Takes channels out of an ONNX model in Swift, by what unlabeled data shows, and quantizes the result.
//
//   swift run -c release compress model.onnx calibration.npy output-folder

import Halfstep

#if canImport(Glibc)
  import Glibc
#elseif canImport(Darwin)
  import Darwin
#endif

func compress(_ modelPath: String, _ dataPath: String, into folder: String) throws {
  var model = try Model(contentsOf: modelPath)
  _ = try model.foldBatchNorms()
  let arrays = try NamedTensors(contentsOfNumPyFile: dataPath)
  let data = [model.inputs[0].name: arrays[0].tensor]

  var options = CompressionOptions()
  options.scheme = .channelPruning
  var compressor = try ModelCompressor(model, options)
  try compressor.calibrate(data)
  // How many channels each layer keeps, such that the layers' errors are least.
  let (smaller, stats) = try compressor.compress(try compressor.select(target: 0.7))
  print("multiply-accumulates: \(stats.after.macs) of \(stats.before.macs)")
  for layer in stats.layers {
    if let channels = layer.units { print("\(layer.name): \(channels) of \(layer.maximumUnits)") }
  }
  for refusal in stats.refusals { print("stays: \(refusal.reason)") }

  // The smaller network is one like any other.
  let simulation = try QuantizationSimModel(smaller)
  try simulation.computeEncodings(data: data)
  try simulation.export(to: folder, prefix: "smaller")
}

let arguments = CommandLine.arguments
guard arguments.count == 4 else {
  print("usage: compress model.onnx calibration.npy output-folder")
  exit(2)
}
do {
  try compress(arguments[1], arguments[2], into: arguments[3])
} catch {
  print(error)
  exit(1)
}

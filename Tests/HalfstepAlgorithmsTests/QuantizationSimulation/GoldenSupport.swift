// SPDX-License-Identifier: Apache-2.0
// Reads AIMET's recorded encodings and the nets they belong to.

import Foundation
import HalfstepAlgorithms
import HalfstepFormats
import HalfstepGraph
import HalfstepNumerics
import Testing

/// One entry of a recorded encodings file, version 1.0.0.
struct GoldenEncoding {
  let isParameter: Bool
  let bits: Int
  let isSymmetric: Bool
  let scales: [Double]
  let offsets: [Int]
}

/// A recorded run of AIMET: net, configuration, encodings, inputs.
struct GoldenRun: Sendable, CustomTestStringConvertible {
  let net: String
  let encodings: String
  let inputs: String
  let configuration: String
  let parameterBits: Int
  let activationBits: Int

  var testDescription: String {
    encodings.split(separator: "/").suffix(2).joined(separator: "/")
  }

  /// The shared folder, or nil with a printed reason.
  static let root: String? = {
    let given = ProcessInfo.processInfo.environment["HALFSTEP_SHARED"]
    let repository = URL(filePath: #filePath).deletingLastPathComponent()
      .deletingLastPathComponent().deletingLastPathComponent().deletingLastPathComponent()
    let beside = repository.appending(path: "../shared").standardized.path(percentEncoded: false)
    for path in [given, beside] {
      if let path, FileManager.default.fileExists(atPath: path + "/reference/golden") {
        return path + "/reference/golden"
      }
    }
    print("skipped: neither HALFSTEP_SHARED nor ../shared holds the golden files")
    return nil
  }()

  /// AIMET names of the configurations and ours.
  private static let configurations = [
    "default_config": "default", "default_config_per_channel": "default_per_channel",
    "htp_quantsim_config_v73": "htp_v73",
  ]

  /// Runs with the min-max scheme.
  static let minMax: [GoldenRun] = {
    guard let root else { return [] }
    var runs: [GoldenRun] = []
    for (theirs, ours) in configurations.sorted(by: { $0.key < $1.key }) {
      for net in ["cbrc", "dwsep"] {
        for (bits, name) in [((8, 8), "w8a8_minmax"), ((4, 16), "w4a16_minmax")] {
          let folder = "\(root)/onnx_export/\(net)_\(theirs)_\(name)"
          runs.append(
            GoldenRun(
              net: "\(root)/net_\(net).onnx", encodings: "\(folder)/v1.0.0.encodings",
              inputs: "\(folder)/io.npz", configuration: ours, parameterBits: bits.0,
              activationBits: bits.1))
        }
      }
      for model in ["mobilenet_v2_w0.1", "tiny_resnet"] {
        let folder = "\(root)/model_\(model)"
        runs.append(
          GoldenRun(
            net: "\(folder)/net.onnx",
            encodings: "\(folder)/onnx_\(theirs)_min_max_v1.0.0.encodings.gz",
            inputs: "\(folder)/io.npz", configuration: ours, parameterBits: 8, activationBits: 8))
      }
    }
    return runs
  }()

  /// The folded net, and the names that AIMET gives to tensors that folding renames here.
  func foldedNet() throws -> (graph: Graph, renamed: [String: String]) {
    var graph = try ONNXFile.load(path: net)
    // AIMET drops the batch norm's output name, we drop the layer's.
    var renamed: [String: String] = [:]
    for node in graph.nodes where node.opType == "BatchNormalization" {
      renamed[node.inputs[0]] = node.outputs[0]
    }
    try BatchNormFolding().apply(to: &graph)
    return (graph, renamed)
  }

  func simulation(_ graph: Graph) throws -> QuantizationSimulation {
    var options = QuantizationSimulation.Options()
    options.parameterBits = parameterBits
    options.activationBits = activationBits
    return try QuantizationSimulation(
      graph: graph, configuration: RuntimeConfigurationFile.load(nameOrPath: configuration),
      options: options)
  }

  /// The recorded encodings by the names that tensors have here.
  func recorded(renamed: [String: String]) throws -> [String: GoldenEncoding] {
    var data = try Data(contentsOf: URL(filePath: encodings))
    if encodings.hasSuffix(".gz") {
      let process = Process()
      process.executableURL = URL(filePath: "/bin/sh")
      process.arguments = ["-c", "gzip -dc \"$0\"", encodings]
      let pipe = Pipe()
      process.standardOutput = pipe
      try process.run()
      data = pipe.fileHandleForReading.readDataToEndOfFile()
      process.waitUntilExit()
    }
    let json = try #require(try JSONSerialization.jsonObject(with: data) as? [String: Any])
    var result: [String: GoldenEncoding] = [:]
    for (key, isParameter) in [("activation_encodings", false), ("param_encodings", true)] {
      for entry in try #require(json[key] as? [[String: Any]]) {
        let name = try #require(entry["name"] as? String)
        result[renamed[name] ?? name] = GoldenEncoding(
          isParameter: isParameter, bits: try #require(entry["bw"] as? Int),
          isSymmetric: try #require(entry["is_sym"] as? Bool),
          scales: try #require(entry["scale"] as? [Double]),
          offsets: try #require(entry["offset"] as? [Double]).map { Int($0) })
      }
    }
    return result
  }
}

// SPDX-License-Identifier: Apache-2.0
// `halfstep quantize`: from a trained network to the network and its encodings.

import ArgumentParser
import Halfstep

struct QuantizeCommand: ParsableCommand {
  static let configuration = CommandConfiguration(
    commandName: "quantize",
    abstract: "Calibrates a network; writes the float network and its encodings.",
    discussion: """
      Folds batch norms, equalizes layers, places quantizers, chooses their ranges from data, and \
      writes NAME.onnx, NAME.encodings and, with --qdq, NAME_qdq.onnx, where NAME is the model's \
      file name. Prints the paths of what it wrote. The data's first dimension is cut into batches; \
      the result does not depend on how.

      Examples:
        halfstep quantize net.onnx --calibration images.npy -o out
        halfstep quantize net.onnx --calibration photos.npz --array calib --scheme sqnr -o out
        halfstep quantize net.onnx --calibration images.npy --weights 4 --round auto -o out
        halfstep quantize net.onnx --calibration images.npy --weights 4 --config htp_v73 --qdq -o out
        halfstep quantize net.onnx --calibration images.npy --weights 4 --round adaround \
          --rounding-iterations 2000 -o out
      """)

  @Argument(help: ArgumentHelp("ONNX file.", valueName: "model"), completion: .file())
  var model: String

  @Option(
    help: ArgumentHelp("NumPy file with inputs.", valueName: "npy|npz"), completion: .file())
  var calibration: String

  @OptionGroup var data: DataOptions
  @OptionGroup var simulation: SimulationOptions

  @Flag(inversion: .prefixedNo, help: "Fold batch norms into the layers beside them.")
  var foldBatchNorms: Bool = true

  @Flag(inversion: .prefixedNo, help: "Balance the weights of consecutive layers.")
  var equalize: Bool = true

  /// How weights are rounded.
  enum Rounding: String, CaseIterable, ExpressibleByArgument {
    case nearest
    case gram
    case adaround
    case seqMSE = "seq-mse"
    case auto
  }

  @Option(help: "How weights are rounded, with the calibration data.")
  var round: Rounding = .nearest

  @Flag(help: "Correct biases for what rounding to nearest does to the means of outputs.")
  var correctBiases: Bool = false

  @Flag(help: "Round, or correct biases, by what batch norms let expect instead of the data.")
  var dataFree: Bool = false

  @Option(
    help: ArgumentHelp(
      "Folder that keeps what rounding made of each layer, so that a later run resumes.",
      valueName: "folder"), completion: .directory)
  var roundingCache: String?

  @OptionGroup(title: "Constants of rounding") var constants: RoundingConstants

  @Option(help: ArgumentHelp("Version of the encodings: 0.6.1, 1.0.0 or 2.0.0."))
  var encodings: String = EncodingsVersion.v1_0_0.rawValue

  @Flag(help: "Write an ONNX model with QuantizeLinear and DequantizeLinear as well.")
  var qdq: Bool = false

  @Flag(help: "Say nothing but results and errors.")
  var quiet: Bool = false

  @Option(
    name: .shortAndLong, help: ArgumentHelp("Folder for the results.", valueName: "folder"),
    completion: .directory)
  var output: String

  func run() throws {
    Interruption.listen()
    if round != .nearest && correctBiases {
      throw usage(
        "--correct-biases is for --round nearest; other methods correct biases themselves")
    }
    if dataFree && round == .nearest && !correctBiases {
      throw usage("--data-free is for --round and --correct-biases")
    }
    if dataFree && (round == .adaround || round == .seqMSE) {
      throw usage("--data-free is for --round gram and auto; other methods need the data")
    }
    try constants.check(for: round)
    if round != .nearest {
      try attempt(.configuring) { () throws(HalfstepError) in try roundingOptions.validate() }
    }
    let version = try attempt(.configuring) { () throws(HalfstepError) in
      try EncodingsVersion(text: encodings)
    }
    var network = try attempt(.reading) { () throws(HalfstepError) in
      try Model(contentsOf: model)
    }
    let arrays = try attempt(.reading) { () throws(HalfstepError) in
      try NamedTensors(contentsOfNumPyFile: calibration)
    }
    let inputs = try data.inputs(of: network, in: arrays, path: calibration)
    try Interruption.check()
    if foldBatchNorms {
      let folds = try attempt(.reading) { () throws(HalfstepError) in
        try network.foldBatchNorms()
      }
      note("folded \(folds.count) batch norms")
    }
    try Interruption.check()
    if equalize {
      let report = try attempt(.reading) { () throws(HalfstepError) in
        try network.equalize { _, _ in !Interruption.isRequested }
      }
      note("equalized \(report.sets.count) sets of layers")
    }
    try Interruption.check()
    if round != .nearest || correctBiases { try rounded(&network, inputs) }
    try Interruption.check()
    let sim = try simulation.makeSimulation(of: network)
    note("placed \(sim.quantizers.count) quantizers")
    try attempt(.reading) { () throws(HalfstepError) in
      try sim.computeEncodings(data: inputs, batchSize: data.batchSize) { completed, total in
        if !quiet { Terminal.bar("calibrating", completed, of: total) }
        return !Interruption.isRequested
      }
    }
    try Interruption.check()
    try write(sim, version)
  }

  private var roundingOptions: RoundingOptions {
    var options = simulation.roundingOptions
    switch round {
    case .nearest, .auto: break
    case .gram: options.method = .gram
    case .adaround: options.method = .gradient
    case .seqMSE: options.method = .sequentialMSE
    }
    options.cacheFolder = roundingCache
    constants.set(in: &options)
    return options
  }

  private func rounded(_ network: inout Model, _ inputs: [String: Tensor]) throws {
    let options = roundingOptions
    let data = dataFree ? nil : inputs
    let report = try attempt(.reading) { () throws(HalfstepError) in
      let tell = { (state: RoundingProgress) in
        if !quiet {
          let rest = state.secondsLeft.map { ", about \(Int($0.rounded(.up))) s left" } ?? ""
          Terminal.bar(
            round == .nearest ? "correcting biases" : "rounding", state.completed, of: state.total,
            rest)
        }
        return !Interruption.isRequested
      }
      return round == .nearest
        ? try network.correctBiases(data: data, options: options, details: tell)
        : try network.adaround(data: data, options: options, details: tell)
    }
    if !quiet { Terminal.clearLine() }
    let better = report.layers.count { $0.noiseAfter < $0.noiseBefore }
    note("rounded \(report.layers.count) layers, \(better) better than to nearest")
  }

  private func write(_ sim: QuantizationSimModel, _ version: EncodingsVersion) throws {
    let name = Self.stem(of: model)
    let folder = output.hasSuffix("/") ? output : output + "/"
    try attempt(.writing) { () throws(HalfstepError) in
      try sim.export(to: output, prefix: name, version: version)
    }
    Terminal.result("\(folder)\(name).onnx")
    Terminal.result("\(folder)\(name).encodings")
    if qdq {
      let path = "\(folder)\(name)_qdq.onnx"
      try attempt(.writing) { () throws(HalfstepError) in try sim.exportQDQ(to: path) }
      Terminal.result(path)
    }
  }

  private func note(_ line: String) {
    if !quiet { Terminal.note(line) }
  }

  /// File name without folders and extension.
  static func stem(of path: String) -> String {
    let file = path.split(separator: "/").last.map(String.init) ?? path
    guard let dot = file.lastIndex(of: "."), dot != file.startIndex else { return file }
    return String(file[..<dot])
  }
}

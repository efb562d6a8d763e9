// SPDX-License-Identifier: Apache-2.0
// `halfstep evaluate`: how good a network is, in float or on integers.

import ArgumentParser
import Halfstep

struct EvaluateCommand: ParsableCommand {
  static let configuration = CommandConfiguration(
    commandName: "evaluate",
    abstract: "Measures a network, in float or simulated with encodings.",
    discussion: """
      With --labels, the share of rows whose largest output is at the label. With --encodings, the \
      network is simulated with them and compared with float: the share of rows with the same \
      largest output, and the signal-to-noise ratio of the first output. Give at least one of them.

      Examples:
        halfstep evaluate net.onnx test.npz --array images --labels labels
        halfstep evaluate out/net.onnx test.npz --encodings out/net.encodings --labels labels --json
      """)

  @Argument(help: ArgumentHelp("ONNX file.", valueName: "model"), completion: .file())
  var model: String

  @Argument(help: ArgumentHelp("NumPy file.", valueName: "npy|npz"), completion: .file())
  var dataPath: String

  @Option(
    help: ArgumentHelp("Encodings of any version; without, float.", valueName: "file"),
    completion: .file())
  var encodings: String?

  @Option(help: ArgumentHelp("Array of the .npz with the rows' classes.", valueName: "name"))
  var labels: String?

  @Option(
    help: ArgumentHelp(
      "Runtime configuration that the encodings were made with: a built-in name or a JSON file.",
      valueName: "name|file"))
  var config: String?

  @Flag(help: "Take what fits of the encodings, and say what did not.")
  var lenient: Bool = false

  @Flag(help: "List each quantized tensor's signal-to-noise ratio over the first batch.")
  var layers: Bool = false

  @OptionGroup var data: DataOptions

  @Flag(help: "Print JSON.")
  var json: Bool = false

  @Flag(help: "Say nothing but results and errors.")
  var quiet: Bool = false

  func validate() throws {
    if labels == nil && encodings == nil {
      throw ValidationError("nothing to measure: give --labels, --encodings or both")
    }
    if layers && encodings == nil { throw ValidationError("--layers needs --encodings") }
  }

  func run() throws {
    Interruption.listen()
    let network = try attempt(.reading) { () throws(HalfstepError) in
      try Model(contentsOf: model)
    }
    let arrays = try attempt(.reading) { () throws(HalfstepError) in
      try NamedTensors(contentsOfNumPyFile: dataPath)
    }
    let inputs = try data.inputs(of: network, in: arrays, path: dataPath)
    guard let rows = inputs.values.map({ $0.shape.dimensions.first ?? 0 }).min(), rows > 0,
      inputs.values.allSatisfy({ $0.shape.dimensions.first == rows })
    else { throw badData("'\(dataPath)': the inputs need the same number of rows, 1 or more") }
    var classes: [Int]?
    if let labels {
      guard let tensor = arrays[labels] else {
        throw badData("'\(dataPath)' has no array '\(labels)'")
      }
      let values = try attempt(.reading) { () throws(HalfstepError) in try tensor.wholeNumbers() }
      guard values.count == rows else {
        throw badData("labels '\(labels)': expected \(rows), got \(values.count)")
      }
      classes = values
    }
    let sim = try encodings.map { try simulation(of: network, path: $0) }
    let result = try measure(network, sim, inputs, rows, classes)
    report(result, try layers ? noise(sim, inputs, rows) : [])
  }

  private func noise(
    _ sim: QuantizationSimModel?, _ inputs: [String: Tensor], _ rows: Int
  ) throws -> [LayerNoise] {
    try attempt(.reading) { () throws(HalfstepError) in
      var feed: [String: Tensor] = [:]
      for (name, tensor) in inputs { feed[name] = try tensor.rows(0..<min(data.batchSize, rows)) }
      return try sim?.analyzeLayers([feed]) ?? []
    }
  }

  private func simulation(of network: Model, path: String) throws -> QuantizationSimModel {
    let sim = try attempt(.configuring) { () throws(HalfstepError) in
      try QuantizationSimModel(network, configuration: config)
    }
    // The file says how wide and symmetric each tensor is; only what it names or lacks is an error.
    let report = try attempt(.reading) { () throws(HalfstepError) in
      try sim.loadEncodings(contentsOf: path, isStrict: false)
    }
    let problems =
      report.unknown.map { "'\($0)' has no quantizer here" }
      + report.missing.map { "'\($0)' is not in the file" }
    if let first = problems.first, !lenient {
      throw badData(
        "'\(path)' does not fit '\(model)': \(first)"
          + (problems.count > 1 ? " (and \(problems.count - 1) more)" : "")
          + "; see --config and --lenient")
    }
    if !quiet { for problem in problems { Terminal.note("\(path): \(problem)") } }
    return sim
  }

  private func measure(
    _ network: Model, _ sim: QuantizationSimModel?, _ inputs: [String: Tensor], _ rows: Int,
    _ classes: [Int]?
  ) throws -> Measurement {
    guard let output = network.outputs.first?.name else {
      throw badData("'\(model)' has no output")
    }
    var result = Measurement(rows: rows, isSimulated: sim != nil, hasLabels: classes != nil)
    let batches = (rows - 1) / data.batchSize + 1
    for batch in 0..<batches {
      try Interruption.check()
      let range = (batch * data.batchSize)..<min((batch + 1) * data.batchSize, rows)
      try attempt(.reading) { () throws(HalfstepError) in
        var feed: [String: Tensor] = [:]
        for (name, tensor) in inputs { feed[name] = try tensor.rows(range) }
        let float = try Scores(try network.run(feed)[output])
        let simulated = try Scores(try sim?.run(feed)[output])
        try result.add(float: float, simulated: simulated, classes: classes.map { $0[range] })
      }
      if !quiet { Terminal.bar("evaluating", batch + 1, of: batches) }
    }
    return result
  }

  private func report(_ result: Measurement, _ layers: [LayerNoise]) {
    var members: [(String, JSONValue)] = [("model", .string(model))]
    if let encodings { members.append(("encodings", .string(encodings))) }
    members += result.members
    if json {
      if self.layers {
        members.append(
          (
            "layers",
            .array(
              layers.map {
                .object([
                  ("tensor", .string($0.tensor)), ("node", .string($0.node)),
                  ("bits", .integer($0.bits)), ("sqnr_db", .number($0.simulated)),
                  ("alone_db", .number($0.alone)),
                ])
              })
          ))
      }
      Terminal.result(JSONValue.object(members).text())
      return
    }
    for (name, value) in members {
      let text: String
      switch value {
      case .string(let value): text = value
      case .number(let value): text = fixed(value, 4)
      default: text = value.text()
      }
      Terminal.result(padded(name, 14) + text)
    }
    if layers.isEmpty { return }
    Terminal.result("\nSQNR dB  alone  bits  tensor")
    for layer in layers {
      Terminal.result(
        padded(fixed(layer.simulated, 2), 9) + padded(fixed(layer.alone, 2), 7)
          + padded("\(layer.bits)", 6) + layer.tensor)
    }
  }
}

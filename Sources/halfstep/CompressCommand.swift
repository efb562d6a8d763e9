// SPDX-License-Identifier: Apache-2.0
// `halfstep compress`: from a trained network to a smaller one.

import ArgumentParser
import Halfstep

struct CompressCommand: ParsableCommand {
  static let configuration = CommandConfiguration(
    commandName: "compress",
    abstract: "Makes a network smaller; writes it as ONNX.",
    discussion: """
      Splits layers into pairs of thinner ones, or prunes their channels. A ratio is compressed cost \
      over original cost; of a layer whose channels are pruned, the share that stays. \
      Give --target for the whole network, and sizes are chosen for it such that the layers' \
      relative errors are least; or give --ratio for all layers, --layer for single ones, or both. \
      With --calibration, a NumPy file with unlabeled inputs, errors are those of the layers' \
      outputs, which the new layers keep as close as they can; channel pruning needs it unless \
      channels go --by magnitude and layers --keep-weights. \
      Prints the path of what it wrote; the table of layers goes to standard error.

      Examples:
        halfstep compress net.onnx --target 0.5 -o smaller.onnx
        halfstep compress net.onnx --target 0.5 --calibration images.npy -o smaller.onnx
        halfstep compress net.onnx --scheme channel-pruning --calibration images.npy --target 0.5 -o smaller.onnx
        halfstep compress net.onnx --scheme weight-svd --metric memory --target 0.7 -o smaller.onnx
        halfstep compress net.onnx --layer conv2=0.5 --layer layer1.0.conv1=0.6 -o smaller.onnx
        halfstep compress net.onnx --ratio 0.5 --ignore conv1 --json -o smaller.onnx | jq .mac_ratio
      """)

  /// How layers are made smaller.
  enum Scheme: String, CaseIterable, ExpressibleByArgument {
    case weightSVD = "weight-svd"
    case spatialSVD = "spatial-svd"
    case channelPruning = "channel-pruning"

    var scheme: CompressionScheme {
      switch self {
      case .weightSVD: .weightSVD
      case .spatialSVD: .spatialSVD
      case .channelPruning: .channelPruning
      }
    }
  }

  /// Which channels go first.
  enum Importance: String, CaseIterable, ExpressibleByArgument {
    case reconstruction
    case magnitude
  }

  /// What ratios speak of.
  enum Metric: String, CaseIterable, ExpressibleByArgument {
    case mac
    case memory
  }

  @Argument(help: ArgumentHelp("ONNX file.", valueName: "model"), completion: .file())
  var model: String

  @Option(help: "How layers are made smaller.")
  var scheme: Scheme = .spatialSVD

  @Option(
    help: "Which channels go first: those that are missed least, or of the smallest weights.")
  var by: Importance = .reconstruction

  @Flag(help: "Do not fit layers to the channels that are left.")
  var keepWeights: Bool = false

  @Option(help: "What ratios speak of: multiply-accumulates, or weights in memory.")
  var metric: Metric = .mac

  @Option(help: ArgumentHelp("Ratio of the whole network, above 0 to 1.", valueName: "ratio"))
  var target: Double?

  @Option(help: ArgumentHelp("Ratio of every layer; 1 leaves layers as they are."))
  var ratio: Double?

  @Option(
    name: .customLong("layer"),
    help: ArgumentHelp(
      "Ratio of one layer, by node name, weight, or weight without .weight. May be repeated.",
      valueName: "name=ratio"))
  var layerRatios: [String] = []

  @Option(
    help: ArgumentHelp("Layer that stays as it is; may be repeated.", valueName: "name"))
  var ignore: [String] = []

  @Option(
    help: ArgumentHelp(
      "Layer that keeps all channels that it reads, when channels are pruned; may be repeated.",
      valueName: "name"))
  var keepInputs: [String] = []

  @Option(help: "Sizes are rounded up to multiples of this.")
  var multiplicity: Int = 1

  @Option(
    help: ArgumentHelp(
      "Shape of an input whose extents are open, as in x=1x3x224x224. May be repeated.",
      valueName: "name=shape"))
  var inputShape: [String] = []

  @Option(
    help: ArgumentHelp("NumPy file with unlabeled inputs.", valueName: "npy|npz"),
    completion: .file())
  var calibration: String?

  @Option(
    help: ArgumentHelp(
      "Array of the .npz for a network with one input; by default the one of the input's name.",
      valueName: "name"))
  var array: String?

  @Flag(help: "Print JSON: the layers, their sizes and costs.")
  var json: Bool = false

  @Flag(help: "Say nothing but results and errors.")
  var quiet: Bool = false

  @Option(
    name: .shortAndLong, help: ArgumentHelp("File for the smaller network.", valueName: "file"),
    completion: .file())
  var output: String

  func validate() throws {
    if target != nil && (ratio != nil || !layerRatios.isEmpty) {
      throw ValidationError("--target and --ratio or --layer exclude each other")
    }
    if array != nil && calibration == nil {
      throw ValidationError("--array is for --calibration")
    }
    if scheme != .channelPruning && (by != .reconstruction || keepWeights) {
      throw ValidationError("--by and --keep-weights are for --scheme channel-pruning")
    }
    if target == nil && ratio == nil && layerRatios.isEmpty {
      throw ValidationError("nothing to do: give --target, --ratio or --layer")
    }
    for text in layerRatios where Self.assignment(text).flatMap({ Double($0.value) }) == nil {
      throw ValidationError("--layer: expected name=ratio, got '\(text)'")
    }
    for text in inputShape where Self.assignment(text).flatMap({ Self.extents($0.value) }) == nil {
      throw ValidationError("--input-shape: expected name=1x3x224x224, got '\(text)'")
    }
  }

  func run() throws {
    Interruption.listen()
    let network = try attempt(.reading) { () throws(HalfstepError) in
      try Model(contentsOf: model)
    }
    var compressor = try makeCompressor(network)
    if let calibration {
      let arrays = try attempt(.reading) { () throws(HalfstepError) in
        try NamedTensors(contentsOfNumPyFile: calibration)
      }
      let inputs = try DataOptions.inputs(of: network, in: arrays, path: calibration, array: array)
      try attempt(.reading) { () throws(HalfstepError) in try compressor.calibrate(inputs) }
    }
    try Interruption.check()
    let sizes = try chosenSizes(compressor)
    try Interruption.check()
    let (smaller, stats) = try attempt(.reading) { () throws(HalfstepError) in
      try compressor.compress(sizes) { bar("compressing", $0) }
    }
    try Interruption.check()
    try attempt(.writing) { () throws(HalfstepError) in try smaller.save(to: output) }
    if !quiet { table(stats) }
    Terminal.result(json ? document(stats).text() : output)
  }

  private func makeCompressor(_ network: Model) throws -> ModelCompressor {
    try attempt(.configuring) { () throws(HalfstepError) in
      var options = CompressionOptions()
      options.scheme = scheme.scheme
      options.importance = by == .magnitude ? .magnitude : .reconstruction
      options.reconstructs = !keepWeights
      options.metric = metric == .mac ? .macs : .memory
      options.multiplicity = multiplicity
      options.ignoredLayers = ignore
      options.inputKeepers = keepInputs
      for text in inputShape {
        guard let (name, value) = Self.assignment(text), let extents = Self.extents(value) else {
          continue
        }
        options.inputShapes[name] = try Shape(extents)
      }
      return try ModelCompressor(network, options)
    }
  }

  private func chosenSizes(_ compressor: ModelCompressor) throws -> [Int?] {
    try attempt(.configuring) { () throws(HalfstepError) in
      if let target { return try compressor.select(target: target) { bar("choosing sizes", $0) } }
      var ratios = [Double?](repeating: ratio, count: compressor.layers.count)
      for text in layerRatios {
        guard let (name, value) = Self.assignment(text) else { continue }
        ratios[try compressor.position(of: name)] = Double(value)
      }
      var sizes: [Int?] = []
      for (position, ratio) in ratios.enumerated() {
        sizes.append(
          try ratio.flatMap { (ratio) throws(HalfstepError) in
            try compressor.units(position, ratio: ratio)
          })
      }
      return sizes
    }
  }

  private func bar(_ what: String, _ share: Double) -> Bool {
    if !quiet { Terminal.bar(what, Int((share * 100).rounded()), of: 100) }
    return !Interruption.isRequested
  }

  /// Name and value of `name=value`; a name may hold equals signs.
  private static func assignment(_ text: String) -> (name: String, value: String)? {
    guard let sign = text.lastIndex(of: "="), sign != text.startIndex else { return nil }
    return (String(text[..<sign]), String(text[text.index(after: sign)...]))
  }

  private static func extents(_ text: String) -> [Int]? {
    let parts = text.split(separator: "x", omittingEmptySubsequences: false)
    let extents = parts.compactMap { Int($0) }
    return extents.count == parts.count ? extents : nil
  }

  // MARK: Output

  private func table(_ stats: CompressionStats) {
    let rows = stats.layers.map { layer in
      [
        layer.name, layer.units.map { "\($0)/\(layer.maximumUnits)" } ?? "-",
        String(layer.before.macs), String(layer.after.macs), String(layer.before.parameters),
        String(layer.after.parameters),
      ] + (calibration == nil ? [] : [layer.noise.map { fixed($0.kept, 6) } ?? "-"])
    }
    let header =
      ["layer", "size", "macs", "after", "weights", "after"] + (calibration == nil ? [] : ["noise"])
    var widths = header.map(\.count)
    for row in rows {
      for (column, cell) in row.enumerated() { widths[column] = max(widths[column], cell.count) }
    }
    for row in [header] + rows {
      var line = zip(row, widths).map { padded($0, $1 + 2) }.joined()
      while line.last == " " { line.removeLast() }
      Terminal.note(line)
    }
    for refusal in stats.refusals { Terminal.note("stays: \(refusal.reason)") }
    Terminal.note(
      "macs \(fixed(stats.macRatio, 4)), memory \(fixed(stats.memoryRatio, 4)) of before")
  }

  private func document(_ stats: CompressionStats) -> JSONValue {
    .object([
      ("model", .string(model)), ("output", .string(output)), ("scheme", .string(scheme.rawValue)),
      ("mac_ratio", .number(stats.macRatio)), ("memory_ratio", .number(stats.memoryRatio)),
      ("macs", .array([.integer(stats.before.macs), .integer(stats.after.macs)])),
      (
        "parameters",
        .array([.integer(stats.before.parameters), .integer(stats.after.parameters)])
      ),
      (
        "layers",
        .array(
          stats.layers.map { layer in
            .object([
              ("name", .string(layer.name)), ("operator", .string(layer.operatorType)),
              ("size", layer.units.map { .integer($0) } ?? .null),
              ("maximum_size", .integer(layer.maximumUnits)),
              ("macs", .array([.integer(layer.before.macs), .integer(layer.after.macs)])),
              (
                "parameters",
                .array([.integer(layer.before.parameters), .integer(layer.after.parameters)])
              ),
              (
                "noise",
                layer.noise.map { .array([.number($0.plain), .number($0.kept)]) } ?? .null
              ),
            ])
          })
      ),
      (
        "refusals",
        .object(stats.refusals.map { ($0.layer, .string($0.reason)) })
      ),
    ])
  }
}

// SPDX-License-Identifier: Apache-2.0
// `halfstep inspect`: layers, weight ranges, what folds and equalizes with what.

import ArgumentParser
import Halfstep

struct InspectCommand: ParsableCommand {
  static let configuration = CommandConfiguration(
    commandName: "inspect",
    abstract: "Shows layers, weight ranges, and what folds and equalizes with what.",
    discussion: """
      The spread is the widest channel's largest magnitude over the narrowest's: what per-tensor \
      scales would have to bridge. Channels of zeros do not count. Layers of the same set \
      would be balanced together by equalization after folding.

      Examples:
        halfstep inspect net.onnx
        halfstep inspect net.onnx --json | jq '.layers[] | select(.spread > 100) | .name'
      """)

  @Argument(help: ArgumentHelp("ONNX file.", valueName: "model"), completion: .file())
  var model: String

  @Flag(help: "Print JSON.")
  var json: Bool = false

  func run() throws {
    let network = try attempt(.reading) { () throws(HalfstepError) in
      try Model(contentsOf: model)
    }
    let inspection = try attempt(.reading) { () throws(HalfstepError) in try network.inspect() }
    if json {
      Terminal.result(document(network, inspection).text())
    } else {
      table(network, inspection)
    }
  }

  private func table(_ network: Model, _ inspection: Inspection) {
    for (what, infos) in [("input", network.inputs), ("output", network.outputs)] {
      for info in infos {
        Terminal.result("\(padded(what, 8))\(info.name)  \(info.typeText) \(info.shapeText)")
      }
    }
    var sets: [String: [String]] = [:]
    for (index, set) in inspection.equalizedSets.enumerated() {
      for layer in set.layers { sets[layer, default: []].append(String(index + 1)) }
    }
    let folds = Dictionary(grouping: inspection.folds, by: \.layer)
    let rows = inspection.layers.map { layer in
      [
        layer.name, layer.operatorType,
        layer.weightShape.dimensions.map(String.init).joined(separator: "x"),
        brief(layer.minimum), brief(layer.maximum), layer.spread.map(brief) ?? "-",
        sets[layer.name]?.joined(separator: ", ") ?? "-",
        folds[layer.name]?.map(\.batchNorm).joined(separator: ", ") ?? "-",
      ]
    }
    let header = ["layer", "operator", "weight", "least", "largest", "spread", "sets", "folds in"]
    var widths = header.map(\.count)
    for row in rows {
      for (column, cell) in row.enumerated() { widths[column] = max(widths[column], cell.count) }
    }
    for row in [header] + rows {
      var line = zip(row, widths).map { padded($0, $1 + 2) }.joined()
      while line.last == " " { line.removeLast() }
      Terminal.result(line)
    }
  }

  private func document(_ network: Model, _ inspection: Inspection) -> JSONValue {
    .object([
      ("model", .string(model)),
      ("inputs", .array(network.inputs.map(\.json))),
      ("outputs", .array(network.outputs.map(\.json))),
      (
        "layers",
        .array(
          inspection.layers.map { layer in
            .object([
              ("name", .string(layer.name)), ("operator", .string(layer.operatorType)),
              ("weight", .string(layer.weight)),
              ("weight_shape", .array(layer.weightShape.dimensions.map { .integer($0) })),
              ("channel_axis", .integer(layer.channelAxis)),
              ("minimum", .number(Double(layer.minimum))),
              ("maximum", .number(Double(layer.maximum))),
              ("spread", layer.spread.map { .number(Double($0)) } ?? .null),
              ("channel_minimum", .array(layer.channelMinimums.map { .number(Double($0)) })),
              ("channel_maximum", .array(layer.channelMaximums.map { .number(Double($0)) })),
            ])
          })
      ),
      (
        "folds",
        .array(
          inspection.folds.map {
            .object([
              ("layer", .string($0.layer)), ("batch_norm", .string($0.batchNorm)),
              ("is_forward", .bool($0.isForward)),
            ])
          })
      ),
      (
        "equalized_sets",
        .array(
          inspection.equalizedSets.map { set in
            .object([("layers", .array(set.layers.map { .string($0) }))])
          })
      ),
    ])
  }

  private func brief(_ value: Float) -> String {
    abs(value) >= 1e5 || (value != 0 && abs(value) < 1e-3)
      ? scientific(Double(value)) : fixed(Double(value), abs(value) >= 100 ? 1 : 4)
  }

  private func scientific(_ value: Double) -> String {
    var exponent = 0
    var digits = abs(value)
    while digits >= 10 && exponent < 400 { (digits, exponent) = (digits / 10, exponent + 1) }
    while digits < 1 && exponent > -400 { (digits, exponent) = (digits * 10, exponent - 1) }
    return value.isFinite ? "\(value < 0 ? "-" : "")\(fixed(digits, 2))e\(exponent)" : "\(value)"
  }
}

extension Layer {
  /// Largest magnitude of the widest channel over that of the narrowest that is not all zeros.
  fileprivate var spread: Float? {
    let widths = zip(channelMinimums, channelMaximums).map { max(abs($0), abs($1)) }
      .filter { $0 > 0 }
    guard let least = widths.min(), let largest = widths.max() else { return nil }
    return largest / least
  }
}

extension TensorInfo {
  fileprivate var typeText: String { dataType.map { "\($0)" } ?? "?" }

  fileprivate var shapeText: String {
    guard let dimensions else { return "?" }
    let extents = dimensions.map {
      switch $0 {
      case .fixed(let extent): String(extent)
      case .symbolic(let name): name
      case .unknown: "?"
      }
    }
    return "[" + extents.joined(separator: ", ") + "]"
  }

  fileprivate var json: JSONValue {
    let shape = dimensions.map { dimensions in
      JSONValue.array(
        dimensions.map {
          switch $0 {
          case .fixed(let extent): .integer(extent)
          case .symbolic(let name): .string(name)
          case .unknown: .null
          }
        })
    }
    return .object([
      ("name", .string(name)), ("type", .string(typeText)), ("shape", shape ?? .null),
    ])
  }
}

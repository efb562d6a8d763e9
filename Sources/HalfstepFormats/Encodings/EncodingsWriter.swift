// SPDX-License-Identifier: Apache-2.0
// Turns a table of encodings into the JSON tree of each version.

import HalfstepGraph
import HalfstepNumerics
import OrderedCollections

/// Turns a table of encodings into the JSON tree of each version.
enum EncodingsWriter {
  /// What the files name as their producer.
  static let producerVersion: String = "0.1.0"

  // MARK: 0.6.1

  /// Objects by name, one entry for each scale.
  ///
  /// - Throws: `HalfstepError.unsupportedVersion` for per-block entries, which this version lacks.
  static func legacy(_ table: EncodingTable) throws(HalfstepError) -> JSONText {
    for (name, encoding) in table.parameters {
      guard case .perBlock = encoding.granularity else { continue }
      throw HalfstepError(
        .unsupportedVersion, "encodings version 0.6.1 cannot hold the blocks of '\(name)'")
    }
    func section(_ entries: OrderedDictionary<String, Encoding>, floats: Bool) -> JSONText {
      var members = entries.map { ($0.key, legacyEntries($0.value)) }
      if floats {
        members += table.floatBits.map { name, bits in
          (name, .array([.object([("bitwidth", .integer(bits)), ("dtype", .string("float"))])]))
        }
      }
      return .object(members)
    }
    return .object(
      [
        ("version", .string("0.6.1")),
        ("activation_encodings", section(table.activations, floats: true)),
        ("param_encodings", section(table.parameters, floats: false)),
      ] + trailer(table))
  }

  private static func legacyEntries(_ encoding: Encoding) -> JSONText {
    .array(
      encoding.scales.indices.map { group in
        .object([
          ("bitwidth", .integer(encoding.bits)),
          ("dtype", .string("int")),
          ("is_symmetric", .string(encoding.isSymmetric ? "True" : "False")),
          ("max", .double(encoding.maximum(group: group))),
          ("min", .double(encoding.minimum(group: group))),
          ("offset", .integer(offset(encoding, group))),
          ("scale", .float(encoding.scales[group])),
        ])
      })
  }

  /// The negated zero point of a grid whose codes count from 0.
  private static func offset(_ encoding: Encoding, _ group: Int) -> Int {
    encoding.minimumCode - Int(encoding.zeroPoints[group])
  }

  // MARK: 1.0.0

  /// Lists of entries with their names inside.
  static func listed(_ table: EncodingTable) -> JSONText {
    let activations = table.activations.map { listedEntry($0.key, $0.value) }
    let floats = table.floatBits.map { name, bits in
      JSONText.object([
        ("name", .string(name)), ("enc_type", .string("PER_TENSOR")), ("dtype", .string("FLOAT")),
        ("bw", .integer(bits)),
      ])
    }
    return .object(
      [
        ("version", .string("1.0.0")),
        ("activation_encodings", .array(activations + floats)),
        ("param_encodings", .array(table.parameters.map { listedEntry($0.key, $0.value) })),
      ] + trailer(table))
  }

  private static func listedEntry(_ name: String, _ encoding: Encoding) -> JSONText {
    let kind: String
    var block: [(String, JSONText)] = []
    switch encoding.granularity {
    case .perTensor: kind = "PER_TENSOR"
    case .perChannel: kind = "PER_CHANNEL"
    case .perBlock(_, _, let size):
      kind = "PER_BLOCK"
      block = [("block_size", .integer(size))]
    }
    return .object(
      [
        ("name", .string(name)), ("enc_type", .string(kind)), ("dtype", .string("INT")),
        ("bw", .integer(encoding.bits)), ("is_sym", .boolean(encoding.isSymmetric)),
      ] + block + [
        ("scale", .array(encoding.scales.map { .float($0) })),
        ("offset", .array(encoding.scales.indices.map { .integer(offset(encoding, $0)) })),
      ])
  }

  /// What versions before 2 record beside the entries.
  private static func trailer(_ table: EncodingTable) -> [(String, JSONText)] {
    var result: [(String, JSONText)] = [
      ("excluded_layers", .array(table.excludedLayers.map { .string($0) })), producer,
    ]
    if let arguments = table.arguments {
      result.append(
        (
          "quantizer_args",
          .object([
            ("activation_bitwidth", .integer(arguments.activationBits)),
            ("dtype", .string("int")),
            ("is_symmetric", .boolean(arguments.isSymmetric)),
            ("param_bitwidth", .integer(arguments.parameterBits)),
            ("per_channel_quantization", .boolean(arguments.isPerChannel)),
            ("quant_scheme", .string(arguments.scheme)),
          ])
        ))
    }
    return result
  }

  private static var producer: (String, JSONText) {
    (
      "producer",
      .object([("package", .string("halfstep")), ("version", .string(producerVersion))])
    )
  }

  // MARK: 2.0.0

  /// One list, with the names of QuantizeLinear's operands.
  ///
  /// - Throws: `HalfstepError.invalidArgument` for a per-block entry whose constant is not in the graph.
  static func operatorStyle(
    _ table: EncodingTable, _ graph: Graph?
  ) throws(HalfstepError) -> JSONText {
    var entries: [JSONText] = []
    for (name, encoding) in table.activations {
      entries.append(try operatorEntry(name, encoding, nil))
    }
    for (name, encoding) in table.parameters {
      entries.append(try operatorEntry(name, encoding, graph?.initializers[name]?.shape))
    }
    let floats = table.floatBits.map { name, bits in
      JSONText.object([("name", .string(name)), ("output_dtype", .string("float\(bits)"))])
    }
    return .object([
      ("version", .string("2.0.0")), producer, ("encodings", .array(entries + floats)),
    ])
  }

  private static func operatorEntry(
    _ name: String, _ encoding: Encoding, _ shape: Shape?
  ) throws(HalfstepError) -> JSONText {
    var members: [(String, JSONText)] = [
      ("name", .string(name)),
      ("output_dtype", .string("\(encoding.isSigned ? "int" : "uint")\(encoding.bits)")),
    ]
    switch encoding.granularity {
    case .perTensor: break
    case .perChannel(let axis): members.append(("axis", .integer(axis)))
    case .perBlock(_, let axis, let size):
      members += [("axis", .integer(axis)), ("block_size", .integer(size))]
      guard let shape, try encoding.granularity.groupCount(for: shape) == encoding.scales.count
      else {
        throw HalfstepError(
          .invalidArgument,
          "encoding of '\(name)': version 2.0.0 needs the graph's constant to lay out its blocks")
      }
    }
    members.append(("y_scale", nested(encoding.scales.map { .float($0) }, encoding, shape)))
    if encoding.zeroPoints.contains(where: { $0 != 0 }) {
      let zeroPoints = encoding.zeroPoints.map { JSONText.integer(Int($0)) }
      members.append(("y_zero_point", nested(zeroPoints, encoding, shape)))
    }
    return .object(members)
  }

  /// Values nested as the scales of an encoding are: channels along one axis, blocks along another,
  /// one element along the rest.
  private static func nested(
    _ values: [JSONText], _ encoding: Encoding, _ shape: Shape?
  ) -> JSONText {
    switch encoding.granularity {
    case .perTensor: return values[0]
    case .perChannel: return .array(values)
    case .perBlock(let channelAxis, let axis, let size):
      guard let shape else { return .array(values) }
      let blocks = Granularity.blockCount(extent: shape[axis], size: size)
      func level(_ depth: Int, _ channel: Int, _ block: Int) -> JSONText {
        if depth == shape.rank { return values[channel * blocks + block] }
        if depth == channelAxis {
          return .array((0..<shape[channelAxis]).map { level(depth + 1, $0, block) })
        }
        if depth == axis { return .array((0..<blocks).map { level(depth + 1, channel, $0) }) }
        return .array([level(depth + 1, channel, block)])
      }
      return level(0, 0, 0)
    }
  }
}

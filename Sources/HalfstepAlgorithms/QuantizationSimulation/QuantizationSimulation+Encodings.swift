// SPDX-License-Identifier: Apache-2.0
// The encodings as a table, and taking them from one.

import HalfstepGraph
import HalfstepNumerics
import OrderedCollections

extension QuantizationSimulation {
  /// The encodings; `.invalidState` before they were computed or loaded.
  ///
  /// - Parameter includingPropagated: Whether to list tensors that have no quantizer but carry the
  ///   grid of another through operators that only move values, as version 2.0.0 of the file does.
  /// - Returns: The encodings of enabled quantizers in graph order.
  /// - Throws: `HalfstepError.invalidState` naming a quantizer without an encoding.
  package func encodings(
    includingPropagated: Bool = false
  ) throws(HalfstepError) -> EncodingTable {
    try checkComplete()
    var table = EncodingTable()
    table.arguments = arguments
    table.excludedLayers = options.excludedLayers
    for (name, quantizer) in quantizers where quantizer.isEnabled {
      guard let encoding = quantizer.encoding else { continue }
      switch quantizer.site.role {
      case .activation: table.activations[name] = encoding
      case .parameter: table.parameters[name] = encoding
      }
    }
    guard includingPropagated else { return table }
    var extended: OrderedDictionary<String, Encoding> = [:]
    for name in graph.tensorNamesInOrder(constants: Set(constants.keys)) {
      if let encoding = table.activations[name] {
        extended[name] = encoding
      } else if let source = placement.propagated[name], let encoding = table.activations[source] {
        extended[name] = encoding
      }
    }
    table.activations = extended
    return table
  }

  /// What did not match when encodings were loaded.
  package struct LoadReport: Sendable {
    /// Names in the file that have no quantizer here.
    package var unknown: [String] = []
    /// Quantizers here that the file does not name.
    package var missing: [String] = []
    /// Tensor, property, expected, got.
    package var different: [String] = []
    /// Names in the file that say nothing new: tensors on another's grid, bounds of a Clip, and other
    /// operands that have no quantizer in Halfstep.
    package var ignored: [String] = []
    package init() {}
  }

  /// Takes encodings from a table.
  ///
  /// Lenient loading takes the file's word for widths and symmetry, and turns off quantizers that
  /// the file does not name or keeps in floating point. In both modes an encoding that cannot belong to its tensor is refused.
  ///
  /// - Parameters:
  ///   - table: Encodings by tensor name.
  ///   - strict: Whether any mismatch throws.
  /// - Throws: `HalfstepError.encodingMismatch` listing what differs; nothing changes then.
  @discardableResult
  package func load(_ table: EncodingTable, strict: Bool) throws(HalfstepError) -> LoadReport {
    var report = LoadReport()
    var accepted: OrderedDictionary<String, Encoding> = [:]
    let operands = operandNames()
    let entries = Array(table.activations) + Array(table.parameters)
    for (name, encoding) in entries {
      if let quantizer = quantizers[name] {
        accepted[name] = try fitted(encoding, to: quantizer)
        report.different += differences(encoding, quantizer)
      } else if placement.propagated[name] != nil || operands.contains(name) {
        report.ignored.append(name)
      } else {
        report.unknown.append(name)
      }
    }
    for (name, bits) in table.floatBits {
      // A tensor that stays floating-point passes through unchanged.
      if let quantizer = quantizers[name] {
        if quantizer.isEnabled {
          report.different.append("'\(name)', type: expected int, got float\(bits)")
        }
      } else if placement.propagated[name] != nil || operands.contains(name) {
        report.ignored.append(name)
      } else {
        report.unknown.append(name)
      }
    }
    report.missing = quantizers.filter {
      $1.isEnabled && accepted[$0] == nil && table.floatBits[$0] == nil
    }.map(\.key)
    // One grid for a tie group: entries that contradict each other cannot be simulated together.
    for (leader, members) in tieGroups() {
      let grids = Set(members.compactMap { accepted[$0] })
      guard grids.count <= 1 else {
        throw HalfstepError(
          .encodingMismatch,
          "encodings: tensors that share the quantizer of '\(leader)' have different encodings: "
            + members.joined(separator: ", "))
      }
    }
    let problems =
      report.unknown.map { "'\($0)' has no quantizer here" }
      + report.missing.map { "'\($0)' is not in the file" } + report.different
    if strict, let first = problems.first {
      throw HalfstepError(
        .encodingMismatch,
        "encodings do not match the model: \(first)"
          + (problems.count > 1 ? " (and \(problems.count - 1) more)" : ""))
    }
    try take(accepted)
    return report
  }

  private func take(_ accepted: OrderedDictionary<String, Encoding>) throws(HalfstepError) {
    for (name, encoding) in accepted where quantizers[name]?.site.role == .parameter {
      if let value = constants[name] { _ = try encoding.layout(for: value.shape) }
    }
    for name in quantizers.keys where !(quantizers[name]?.isFrozen ?? true) {
      let encoding = accepted[name]
      if encoding == nil && !(quantizers[name]?.isEnabled ?? false) { continue }
      quantizers[name]?.isEnabled = encoding != nil
      quantizers[name]?.encoding = encoding
      if let encoding { quantizers[name]?.site.spec.adopt(encoding) }
      if quantizers[name]?.site.role == .parameter { roundedParameters[name] = nil }
    }
    invalidate(calibration: true)
  }

  /// Operands that other tools quantize and Halfstep does not.
  private func operandNames() -> Set<String> {
    var names: Set<String> = []
    for node in graph.nodes { names.formUnion(OperatorTraits.settingInputs(of: node)) }
    return names
  }

  /// The encoding with the granularity that its tensor has here; files do not record the axis.
  private func fitted(
    _ encoding: Encoding, to quantizer: Quantizer
  ) throws(HalfstepError) -> Encoding {
    let name = quantizer.site.tensor
    if case .perTensor = encoding.granularity { return encoding }
    guard quantizer.site.role == .parameter, let shape = constants[name]?.shape else {
      throw HalfstepError(
        .encodingMismatch,
        "encodings: tensor '\(name)' takes one scale, got \(encoding.scales.count)")
    }
    var candidates = [quantizer.site.spec.granularity, encoding.granularity]
    if case .perChannel = encoding.granularity {
      candidates += (0..<shape.rank).map { .perChannel(axis: $0) }
    }
    for granularity in candidates where granularity.isSameKind(as: encoding.granularity) {
      guard let count = try? granularity.groupCount(for: shape), count == encoding.scales.count
      else { continue }
      return try Encoding(
        bits: encoding.bits, isSigned: encoding.isSigned, isSymmetric: encoding.isSymmetric,
        isStrict: encoding.isStrict, granularity: granularity, scales: encoding.scales,
        zeroPoints: encoding.zeroPoints)
    }
    throw HalfstepError(
      .encodingMismatch,
      "encodings: '\(name)' \(shape) cannot have \(encoding.scales.count) scales")
  }

  private func differences(_ encoding: Encoding, _ quantizer: Quantizer) -> [String] {
    let spec = quantizer.site.spec
    var found: [String] = []
    func compare<Value: Equatable>(_ what: String, _ expected: Value, _ got: Value) {
      if expected != got {
        found.append("'\(quantizer.site.tensor)', \(what): expected \(expected), got \(got)")
      }
    }
    compare("enabled", quantizer.isEnabled, true)
    compare("bits", spec.bits, encoding.bits)
    compare("symmetric", spec.isSymmetric, encoding.isSymmetric)
    compare("granularity", spec.granularity.kind, encoding.granularity.kind)
    return found
  }
}

extension QuantizerSpec {
  /// Becomes what an encoding was made for.
  mutating func adopt(_ encoding: Encoding) {
    bits = encoding.bits
    isSymmetric = encoding.isSymmetric
    granularity = encoding.granularity
  }
}

extension Granularity {
  /// What messages call it.
  var kind: String {
    switch self {
    case .perTensor: "per tensor"
    case .perChannel: "per channel"
    case .perBlock: "per block"
    }
  }

  func isSameKind(as other: Granularity) -> Bool { kind == other.kind }
}

extension Graph {
  /// Names of graph inputs, constants where they are first read, and node outputs, in order.
  func tensorNamesInOrder(constants: Set<String>) -> OrderedSet<String> {
    var names = OrderedSet(inputs.map(\.name))
    for node in nodes {
      for name in node.inputs where constants.contains(name) { names.append(name) }
      for name in node.outputs where !name.isEmpty { names.append(name) }
    }
    return names
  }
}

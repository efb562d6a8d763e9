// SPDX-License-Identifier: Apache-2.0
// Which tensors a simulation costs how much.

import HalfstepGraph
import HalfstepNumerics
import HalfstepRuntime
import OrderedCollections

#if canImport(Glibc)
  import Glibc
#elseif canImport(Darwin)
  import Darwin
#endif

/// Signal-to-quantization-noise ratios of a simulation, tensor by tensor.
package struct LayerAnalysis: Sendable {
  /// One quantized tensor.
  package struct Row: Sendable {
    /// Name of the tensor.
    package let tensor: String
    package let role: QuantizerSite.Role
    /// Node that writes the tensor, or reads the parameter; "input" for a graph input.
    package let node: String
    package let bits: Int
    /// Ratio of the float tensor to the error of the simulated one, with everything upstream
    /// quantized, in dB; for a parameter, its own rounding error. Infinite without any error.
    package let simulated: Double
    /// Ratio with nothing but this tensor quantized, in dB.
    package let alone: Double
  }

  /// Rows in graph order.
  package let rows: [Row]
}

extension QuantizationSimulation {
  /// Compares the simulation with the float network, tensor by tensor.
  ///
  /// All quantized tensors of a batch are held at the same time, so use small batches.
  ///
  /// - Parameter batches: Inputs by name, one dictionary a batch; at least one.
  /// - Throws: `HalfstepError.invalidArgument` without a batch, `.invalidState` without encodings;
  ///   what `Session` throws.
  package func analyzeLayers(
    _ batches: [[String: Tensor]]
  ) throws(HalfstepError) -> LayerAnalysis {
    guard !batches.isEmpty else {
      throw HalfstepError(.invalidArgument, "layer analysis: expected at least one batch")
    }
    try checkComplete()
    let outputs = Set(graph.outputs.map(\.name))
    let computed = quantizers.filter {
      $1.isEnabled && $1.site.role == .activation && !$1.isConstant
    }.map(\.key)
    let produced = computed.filter { !outputs.contains($0) }
    let float = try Session(graph: graph, extraOutputs: produced)
    let simulated = try makeSimulation(extraOutputs: produced)
    var powers: [String: (signal: Double, simulated: Double, alone: Double)] = [:]
    for batch in batches {
      let reference = try float.run(batch)
      let result = try simulated.run(batch)
      for tensor in computed {
        guard let wanted = reference[tensor], let got = result[tensor],
          let encoding = quantizers[tensor]?.encoding
        else { continue }
        let alone = try encoding.fakeQuantize(wanted)
        let sums = powers[tensor] ?? (0, 0, 0)
        powers[tensor] = (
          sums.signal + (try Self.squaredDistance(wanted, nil)),
          sums.simulated + (try Self.squaredDistance(wanted, got)),
          sums.alone + (try Self.squaredDistance(wanted, alone))
        )
      }
    }
    for (name, constant) in constants where quantizers[name]?.isEnabled ?? false {
      guard let encoding = quantizers[name]?.encoding else { continue }
      let noise = try Self.squaredDistance(constant, try encoding.fakeQuantize(constant))
      powers[name] = (try Self.squaredDistance(constant, nil), noise, noise)
    }
    let owners = ownerLabels()
    return LayerAnalysis(
      rows: quantizers.compactMap { name, quantizer in
        guard let power = powers[name], let encoding = quantizer.encoding else { return nil }
        return LayerAnalysis.Row(
          tensor: name, role: quantizer.site.role, node: owners[name] ?? "input",
          bits: encoding.bits, simulated: Self.decibels(power.signal, power.simulated),
          alone: Self.decibels(power.signal, power.alone))
      })
  }

  private func ownerLabels() -> [String: String] {
    var labels: [String: String] = [:]
    for node in graph.nodes {
      for name in node.outputs { labels[name] = node.label }
      for name in node.inputs where constants[name] != nil && labels[name] == nil {
        labels[name] = node.label
      }
    }
    return labels
  }

  /// Sum of squared differences, or of squares; accumulated in `Double`.
  private static func squaredDistance(
    _ a: Tensor, _ b: Tensor?
  ) throws(HalfstepError) -> Double {
    try a.withFloats { (left) throws(HalfstepError) in
      guard let b else { return left.reduce(0) { $0 + Double($1) * Double($1) } }
      return try b.withFloats { (right) throws(HalfstepError) in
        guard left.count == right.count else {
          throw HalfstepError(.shapeMismatch, "layer analysis: \(a.shape) and \(b.shape)")
        }
        var sum = 0.0
        for index in left.indices {
          let difference = Double(left[index]) - Double(right[index])
          sum += difference * difference
        }
        return sum
      }
    }
  }

  private static func decibels(_ signal: Double, _ noise: Double) -> Double {
    noise > 0 ? 10 * log10(signal / noise) : .infinity
  }
}

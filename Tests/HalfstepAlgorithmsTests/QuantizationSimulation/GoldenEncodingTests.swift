// SPDX-License-Identifier: Apache-2.0
import HalfstepAlgorithms
import HalfstepFormats
import HalfstepGraph
import HalfstepNumerics
import OrderedCollections
import Testing

/// Placement and encodings against AIMET's recorded ones; skipped without the shared folder.
@Suite(.enabled(if: GoldenRun.root != nil)) struct GoldenEncodingTests {
  @Test(arguments: GoldenRun.minMax) func quantizedTensorsEqualAIMETs(_ run: GoldenRun) throws {
    let (graph, renamed) = try run.foldedNet()
    let simulation = try run.simulation(graph)
    let recorded = try run.recorded(renamed: renamed)
    // AIMET quantizes the bounds of Clip; we do not (docs/aimet-differences.md).
    let bounds = Set(
      graph.nodes.filter { $0.opType == "Clip" }.flatMap { $0.inputs.dropFirst() })
    #expect(Set(recorded.keys).subtracting(bounds) == Set(simulation.quantizers.keys))
    for (name, quantizer) in simulation.quantizers {
      guard let wanted = recorded[name] else { continue }
      #expect(wanted.isParameter == (quantizer.site.role == .parameter), "\(name)")
      #expect(wanted.bits == quantizer.site.spec.bits, "\(name)")
      #expect(wanted.isSymmetric == quantizer.site.spec.isSymmetric, "\(name)")
    }
  }

  @Test(arguments: GoldenRun.minMax) func parameterGridsEqualAIMETs(_ run: GoldenRun) throws {
    let (graph, renamed) = try run.foldedNet()
    let simulation = try run.simulation(graph)
    for (name, wanted) in try run.recorded(renamed: renamed) where wanted.isParameter {
      let encoding = try #require(simulation.quantizers[name]?.encoding, "\(name)")
      // Folding multiplies a weight by γ/σ in another order than AIMET, which costs a rounding or
      // two of 2⁻²⁴; 1e-6 is 16 of them.
      try compare(encoding, wanted, name, relative: 1e-6)
    }
  }

  @Test(arguments: GoldenRun.minMax) func activationGridsEqualAIMETs(_ run: GoldenRun) throws {
    let (graph, renamed) = try run.foldedNet()
    let simulation = try run.simulation(graph)
    let data = try NumPyFile.load(path: run.inputs)
    let input = try #require(data["x"])
    try simulation.observe([graph.inputs[0].name: input])
    try simulation.computeEncodings()
    let table = try simulation.encodings()
    for (name, wanted) in try run.recorded(renamed: renamed) {
      guard !wanted.isParameter, let encoding = table.activations[name] else { continue }
      try compare(encoding, wanted, name, relative: Self.activationTolerance)
    }
  }

  /// Relative difference of activation scales between our runtime and onnxruntime.
  ///
  /// An output is a sum of up to 1,152 float products, in another order here than there: each sum
  /// is off by about √1152·2⁻²⁴ = 2e-6 of the range, and 53 layers in a row add up to √53 times
  /// that, 1.5e-5. A weight that falls on a rounding tie moves by a whole step in one of the two
  /// (half away from zero there, half to even here): one of 1,152 weights off by 1/127 of the
  /// largest is about 1e-5 more.
  static let activationTolerance = 3e-5

  private func compare(
    _ encoding: Encoding, _ wanted: GoldenEncoding, _ name: String, relative: Double
  ) throws {
    try #require(encoding.scales.count == wanted.scales.count, "\(name)")
    for group in encoding.scales.indices {
      let scale = Double(encoding.scales[group])
      let target = wanted.scales[group]
      #expect(abs(scale - target) <= relative * target, "\(name)[\(group)]: \(scale), \(target)")
      // AIMET writes the lowest code of a symmetric grid as offset −2^(bits−1).
      let shift = encoding.isSigned ? 1 << (encoding.bits - 1) : 0
      let offset = -Int(encoding.zeroPoints[group]) - shift
      #expect(offset == wanted.offsets[group], "\(name)[\(group)]")
    }
  }
}

// SPDX-License-Identifier: Apache-2.0
// The layerwise executor: what layers see, row layouts, spilling, batching, errors.

import HalfstepAlgorithms
import HalfstepFormats
import HalfstepGraph
import HalfstepNumerics
import HalfstepRuntime
import TestSupport
import Testing

@Suite struct LayerWalkTests {
  /// Branches, a residual, grouped, depthwise, strided, dilated and transposed convolutions, two
  /// matrix products, and shapes computed from the input.
  static let lines = [
    "a = Conv(x, wa[8,3,3,3], ba[8]) pads=1,1,1,1 strides=2,2", "ra = Relu(a)",
    "b = Conv(ra, wb[8,1,3,3]) pads=2,2,2,2 dilations=2,2 group=8",
    "c = Conv(ra, wc[8,4,1,1], bc[8]) group=2", "s = Add(b, c)", "rs = Clip(s, lo~0.0, hi~6.0)",
    "t = ConvTranspose(rs, wt[8,3,3,3]) strides=2,2 pads=1,1,1,1 output_padding=1,1 group=2",
    "p = GlobalAveragePool(t)", "f = Flatten(p)", "g = Gemm(f, wg[5,6], bg[5]) transB=1",
    "y = MatMul(g, wm[5,4])",
  ]

  static func graph() throws -> Graph {
    try TextGraph.make(lines, inputs: [("x", [-1, 3, 8, 8])])
  }

  static func data(_ rows: Int, seed: UInt64 = 3) throws -> Tensor {
    var random = SeededGenerator(seed: seed)
    return try Tensor(random.floats(rows * 192), shape: [rows, 3, 8, 8])
  }

  static func part(_ tensor: Tensor, _ rows: Range<Int>) throws -> Tensor {
    let floats = try tensor.floats()
    let stride = floats.count / tensor.shape[0]
    return try Tensor(
      Array(floats[rows.lowerBound * stride..<rows.upperBound * stride]),
      shape: [rows.count] + tensor.shape.dimensions.dropFirst())
  }

  static func options() throws -> LayerReconstruction.Options {
    LayerReconstruction.Options(
      configuration: try RuntimeConfigurationFile.load(nameOrPath: "default_per_channel"))
  }

  /// Rounds to nearest at half the weight, so that changes show, and records what it saw.
  final class Recorder: LayerRounder {
    var reference: [[Float]] = []
    var quantized: [[Float]] = []
    var labels: [String] = []
    var outputs: [[Float]] = []

    func round(_ problem: LayerProblem) throws(HalfstepError) -> LayerRounding {
      labels.append(problem.node.label)
      var float: [Float] = []
      var rounded: [Float] = []
      var sums: [Float] = []
      for chunk in 0..<problem.chunkCount {
        let (a, b) = try problem.inputs(chunk)
        float += try a.floats()
        rounded += try b.floats()
        sums += try products(problem, b)
      }
      reference.append(float)
      quantized.append(rounded)
      outputs.append(sums)
      return LayerRounding(
        weight: try problem.nearest.fakeQuantize(problem.weight), encoding: problem.nearest,
        note: "recorded")
    }

    /// The layer's output without bias, from rows and matrices: `[row][group][output]`.
    private func products(
      _ problem: LayerProblem, _ input: Tensor
    ) throws(HalfstepError) -> [Float] {
      let unfolding = try problem.unfolding(input.shape)
      let layout = problem.layer.layout
      let table = unfolding.table(0..<unfolding.rowCount)
      let weight = try problem.nearest.fakeQuantize(problem.weight)
      let (groups, outputs, columns) = (layout.groups, layout.outputsPerGroup, layout.columns)
      var result = [Float](repeating: 0, count: unfolding.rowCount * groups * outputs)
      for group in 0..<groups {
        var panel = [Float](repeating: 0, count: columns * table.count)
        try input.withFloats { (values) throws(HalfstepError) in
          panel.withUnsafeMutableBufferPointer {
            unfolding.gather(
              table, group: group, from: values.baseAddress!, into: $0.baseAddress!,
              stride: table.count)
          }
        }
        let matrix = try weight.withFloats { (values) throws(HalfstepError) in
          layout.matrix(of: values, group: group)
        }
        for row in 0..<table.count {
          for output in 0..<outputs {
            var sum = 0.0
            for column in 0..<columns {
              sum +=
                Double(matrix[output * columns + column])
                * Double(panel[column * table.count + row])
            }
            result[(row * groups + group) * outputs + output] = Float(sum)
          }
        }
      }
      return result
    }
  }

  private func walked(
    _ graph: Graph, _ batches: [[String: Tensor]], bytes: Int = 1 << 29
  ) throws -> (Recorder, Graph, LayerReconstruction.Report) {
    var options = try Self.options()
    options.maximumBytes = bytes
    let recorder = Recorder()
    var result = graph
    let report = try LayerReconstruction(options: options).apply(
      to: &result, batches: batches, rounder: recorder)
    return (recorder, result, report)
  }

  @Test func layersSeeWhatSessionsCompute() throws {
    let graph = try Self.graph()
    let x = try Self.data(6)
    let (seen, result, report) = try walked(graph, [["x": x]])
    #expect(seen.labels == ["n0", "n2", "n3", "n6", "n9", "n10"])
    #expect(report.layers.map(\.layer) == seen.labels)
    // Pieces of four rows, as the walk makes them: sums do not depend on that here, but oneDNN may
    // choose other code for another batch.
    let inputs = ["x", "ra", "ra", "rs", "f", "g"]
    var expected = [[Float]](repeating: [], count: inputs.count)
    for rows in [0..<4, 4..<6] {
      let session = try Session(graph: graph, extraOutputs: ["ra", "rs", "f", "g"])
      let chunk = try Self.part(x, rows)
      var results = try session.run(["x": chunk])
      results["x"] = chunk
      for (index, name) in inputs.enumerated() { expected[index] += try results[name]!.floats() }
    }
    #expect(seen.reference == expected)

    // The quantized prefix is what a simulation of the result computes, given the same grids.
    let options = QuantizationSimulation.Options()
    let simulation = try QuantizationSimulation(
      graph: graph, configuration: try Self.options().configuration, options: options)
    for (name, quantizer) in simulation.quantizers where quantizer.site.role == .parameter {
      try simulation.setEnabled(false, for: name)
    }
    try simulation.observe(["x": x])
    try simulation.computeEncodings()
    var grids: [String: Encoding] = [:]
    for (name, quantizer) in simulation.quantizers where quantizer.site.role == .activation {
      grids[name] = quantizer.encoding
    }
    var rounded = [[Float]](repeating: [], count: inputs.count)
    for rows in [0..<4, 4..<6] {
      let session = try Session(
        graph: result, quantized: grids, extraOutputs: ["ra", "rs", "f", "g"])
      let chunk = try Self.part(x, rows)
      var results = try session.run(["x": chunk])
      results["x"] = try grids["x"]!.fakeQuantize(chunk)
      for (index, name) in inputs.enumerated() { rounded[index] += try results[name]!.floats() }
    }
    for (a, b) in zip(seen.quantized, rounded) { #expect(a == b) }
    #expect(Set(result.weightEncodings.keys) == ["wa", "wb", "wc", "wt", "wg", "wm"])
  }

  @Test func rowsTimesMatricesAreTheLayersOutput() throws {
    let graph = try Self.graph()
    let x = try Self.data(4)
    let (seen, result, _) = try walked(graph, [["x": x]])
    // Biases are left out on the rows' side.
    var bare = result
    for name in ["ba", "bc", "bg"] {
      let zeros = [Float](repeating: 0, count: bare.initializers[name]!.count)
      bare.initializers[name] = try Tensor(zeros, shape: [zeros.count])
    }
    let names = ["a", "b", "c", "t", "g", "y"]
    let inputs = ["x", "ra", "ra", "rs", "f", "g"]
    for (index, name) in names.enumerated() {
      // The one layer alone, on what it saw.
      var part = Graph()
      part.opsetVersions = bare.opsetVersions
      part.initializers = bare.initializers
      part.insert(bare.nodes.first { $0.outputs == [name] }!)
      part.inputs = [ValueInfo(name: inputs[index], dataType: .float32, dimensions: nil)]
      part.outputs = [ValueInfo(name: name, dataType: nil, dimensions: nil)]
      let shape = try Session(graph: graph, extraOutputs: [inputs[index]]).run(["x": x])[
        inputs[index]]?.shape
      let input = try Tensor(seen.quantized[index], shape: (shape ?? x.shape).dimensions)
      let output = try #require(try Session(graph: part).run([inputs[index]: input])[name])
      let values = try output.floats()
      // Output positions to rows: [N, K, positions] to [N, positions, K].
      let (n, k) = (output.shape[0], output.shape[1])
      let positions = values.count / (n * k)
      #expect(values.count == seen.outputs[index].count)
      for picture in 0..<n {
        for channel in 0..<k {
          for position in 0..<positions {
            let got = seen.outputs[index][(picture * positions + position) * k + channel]
            let want = values[(picture * k + channel) * positions + position]
            // 72 products at most, each below 8: float sums are within 72 · 2⁻²⁴ · 576 of exact.
            expectClose(got, want, absolute: 72 * 0x1p-24 * 576)
          }
        }
      }
    }
  }

  @Test func batchingAndSpillingChangeNothing() throws {
    let graph = try Self.graph()
    let x = try Self.data(11)
    let (whole, first, _) = try walked(graph, [["x": x]])
    let cut = [0..<1, 1..<6, 6..<8, 8..<11]
    let (parts, second, _) = try walked(graph, try cut.map { ["x": try Self.part(x, $0)] })
    let (spilled, third, _) = try walked(graph, [["x": x]], bytes: 3000)
    for other in [parts, spilled] {
      #expect(whole.reference == other.reference)
      #expect(whole.quantized == other.quantized)
    }
    for other in [second, third] {
      for (name, tensor) in first.initializers {
        #expect(try tensor.floats() == other.initializers[name]?.floats())
      }
    }
  }

  @Test func storeKeepsTensorsInMemoryAndFile() throws {
    let store = ActivationStore(maximumBytes: 40)
    let tensors = try (0..<6).map {
      try Tensor([Float](repeating: Float($0), count: 5), shape: [5])
    }
    var slots = try tensors.map { (tensor) throws in try store.put(tensor) }
    #expect(store.bytesInMemory == 40)
    #expect(store.bytesInFile == 80)
    store.remove(slots[3])
    store.remove(slots[4])
    // Two neighboring gaps of 20 bytes take 40.
    slots[3] = try store.put(Tensor([Float](repeating: 9, count: 10), shape: [10]))
    #expect(store.bytesInFile == 80)
    #expect(try store.get(slots[3]).floats() == [Float](repeating: 9, count: 10))
    #expect(try store.get(slots[5]).floats() == [Float](repeating: 5, count: 5))
    #expect(try store.get(slots[0]).floats() == [Float](repeating: 0, count: 5))
    store.remove(slots[0])
    #expect(store.bytesInMemory == 20)
    #expect(throws: HalfstepError.self) { try store.get(slots[0]) }
  }

  @Test func cancelledRunsAndBadDataLeaveTheGraph() throws {
    let graph = try Self.graph()
    let x = try Self.data(4)
    let before = try graph.initializers.values.map { try $0.floats() }
    var options = try Self.options()
    func expectFailure(
      _ code: HalfstepError.Code, _ batches: [[String: Tensor]],
      _ progress: ((LayerReconstruction.Progress) -> Bool)? = nil
    ) throws {
      var copy = graph
      #expect {
        try LayerReconstruction(options: options).apply(
          to: &copy, batches: batches, rounder: Recorder(), progress: progress)
      } throws: {
        ($0 as? HalfstepError)?.code == code
      }
      #expect(try copy.initializers.values.map { try $0.floats() } == before)
      #expect(copy.weightEncodings.isEmpty)
    }
    try expectFailure(.cancelled, [["x": x]]) { $0.layer != "n6" }
    try expectFailure(.cancelled, [["x": x]]) { _ in false }
    try expectFailure(.emptyStatistics, [])
    try expectFailure(.emptyStatistics, [["x": Tensor([], shape: [0, 3, 8, 8])]])
    try expectFailure(.unknownName, [["z": x]])
    try expectFailure(.unknownName, [[:]])
    var broken = try x.floats()
    broken[7] = .nan
    try expectFailure(.nonFiniteValue, [["x": Tensor(broken, shape: [4, 3, 8, 8])]])
    options.maximumRows = 0
    try expectFailure(.invalidArgument, [["x": x]])
  }
}

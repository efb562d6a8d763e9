// SPDX-License-Identifier: Apache-2.0
// Sessions: inputs, observers, extra outputs, plans, memory.

import HalfstepGraph
import HalfstepNumerics
import HalfstepRuntime
import TestSupport
import Testing

@Suite struct SessionTests {
  /// conv (3 → 20 channels) → relu → conv (20 → 20) → relu → global average.
  private func network() throws -> Graph {
    var random = SeededGenerator(seed: 1)
    var b = GraphBuilder(shape: [2, 3, 6, 6])
    b.graph.inputs[0].dimensions = [.symbolic("N"), .fixed(3), .unknown, .unknown]
    try b.constant("w1", random.floats(20 * 27), [20, 3, 3, 3])
    try b.constant("w2", random.floats(20 * 20), [20, 20, 1, 1])
    b.node("Conv", ["x", "w1"], "c1", ["pads": .ints([1, 1, 1, 1])])
    b.node("Relu", ["c1"], "r1")
    b.node("Conv", ["r1", "w2"], "c2")
    b.node("Relu", ["c2"], "r2")
    b.node("GlobalAveragePool", ["r2"], "y")
    return try b.finish("y")
  }

  private func input(_ shape: [Int] = [2, 3, 6, 6], seed: UInt64 = 2) throws -> Tensor {
    var random = SeededGenerator(seed: seed)
    return try Tensor(random.floats(shape.reduce(1, *)), shape: shape)
  }

  @Test func observersSeeEveryElementAndNoOther() throws {
    let recorder = Recorder()
    let names: Set<String> = ["x", "c1", "r1", "y"]
    let session = try Session(graph: network(), observed: names, extraOutputs: ["c1", "r1"])
    let results = try session.run(["x": input()], observer: recorder)
    #expect(recorder.order == ["x", "c1", "r1", "y"])
    for name in ["c1", "r1", "y"] {
      let expected = try results[name]!.floats().sorted()
      var seen = recorder.values[name]!.sorted()
      let zeros = recorder.zeros[name]!
      #expect(seen.count == expected.count + zeros)
      let first = seen.firstIndex(of: 0) ?? 0
      seen.removeSubrange(first..<(first + zeros))
      #expect(seen == expected)
    }
    #expect(try recorder.values["x"]! == input().floats())
  }

  @Test func observersSeeValuesBeforeTheyAreRounded() throws {
    let recorder = Recorder()
    let encoding = try Encoding(
      bits: 2, isSigned: false, isSymmetric: false, scales: [0.5], zeroPoints: [0])
    let graph = try network()
    let session = try Session(
      graph: graph, quantized: ["r1": encoding], observed: ["r1"], extraOutputs: ["r1"])
    let result = try session.run(["x": input()], observer: recorder)
    #expect(Set(recorder.values["r1"]!).count > 100)
    #expect(Set(try result["r1"]!.floats()) == [0, 0.5, 1, 1.5])
    let plain = try Session(graph: graph, quantized: ["r1": encoding]).run(["x": input()])
    #expect(try plain["y"]!.floats() == result["y"]!.floats())
  }

  @Test func extraOutputsFollowTheGraphsOwn() throws {
    let results = try Session(graph: network(), extraOutputs: ["r2", "c1", "y", "x"])
      .run(["x": input()])
    #expect(Array(results.keys) == ["y", "r2", "c1", "x"])
    #expect(results["c1"]!.shape.dimensions == [2, 20, 6, 6])
    #expect(try results["x"]!.floats() == input().floats())
  }

  @Test func everyShapeGetsItsPlan() throws {
    let session = try Session(graph: network())
    let shapes = [
      [2, 3, 6, 6], [1, 3, 6, 6], [2, 3, 9, 5], [3, 3, 6, 6], [4, 3, 7, 7], [5, 3, 8, 8],
    ]
    var first: [[UInt32]] = []
    for shape in shapes {
      let result = try session.run(["x": input(shape)])
      #expect(result["y"]!.shape.dimensions == [shape[0], 20, 1, 1])
      first.append(try result["y"]!.floats().map(\.bitPattern))
    }
    // More shapes than plans are kept: all come back the same after a round.
    for (shape, bits) in zip(shapes, first) {
      #expect(try session.run(["x": input(shape)])["y"]!.floats().map(\.bitPattern) == bits)
    }
  }

  @Test func batchesDoNotInfluenceEachOther() throws {
    let session = try Session(graph: network())
    let both = try input()
    let pair = try session.run(["x": both])["y"]!.floats()
    let half = try Tensor(Array(both.floats()[108...]), shape: [1, 3, 6, 6])
    let single = try session.run(["x": half])["y"]!.floats()
    for (a, b) in zip(pair[20...], single) { #expect(a == b) }
  }

  @Test func memoryIsReused() throws {
    // 40 convolutions in a row need room for two tensors and little else.
    var b = GraphBuilder(shape: [1, 16, 32, 32])
    var random = SeededGenerator(seed: 1)
    try b.constant("w", random.floats(16 * 16 * 9, in: -0.1...0.1), [16, 16, 3, 3])
    var name = "x"
    for layer in 0..<40 {
      name = b.node("Conv", [name, "w"], "c\(layer)", ["pads": .ints([1, 1, 1, 1])])
    }
    let session = try Session(graph: b.finish(name))
    let result = try session.run(["x": input([1, 16, 32, 32])])
    #expect(result[name]!.count == 16 * 1024)
    // A tensor is 64 KiB; scratchpads are of the same order.
    #expect(session.arenaBytes < 8 * 65_536)
  }

  @Test func initializersAreDefaultsOfInputs() throws {
    var b = GraphBuilder(shape: [2])
    try b.constant("k", [10, 20], [2])
    b.graph.inputs.append(ValueInfo(name: "k", dataType: .float32, dimensions: [.fixed(2)]))
    b.node("Add", ["x", "k"], "y")
    let session = try Session(graph: b.finish("y"))
    let x = try Tensor([1, 2], shape: [2])
    #expect(try session.run(["x": x])["y"]!.floats() == [11, 22])
    let k = try Tensor([5, 5], shape: [2])
    #expect(try session.run(["x": x, "k": k])["y"]!.floats() == [6, 7])
    #expect(try session.run(["x": x])["y"]!.floats() == [11, 22])
  }

  @Test func callersTensorsAreNotWritten() throws {
    var b = GraphBuilder(shape: [4])
    b.node("Relu", ["x"], "y")
    let x = try Tensor([-1, 2, -3, 4], shape: [4])
    let encoding = try Encoding(
      bits: 2, isSigned: false, isSymmetric: false, scales: [1], zeroPoints: [0])
    _ = try Session(graph: b.finish("y"), quantized: ["x": encoding]).run(["x": x])
    #expect(try x.floats() == [-1, 2, -3, 4])
  }

  @Test func doubleInputsAreConverted() throws {
    var b = GraphBuilder(shape: [2])
    b.graph.inputs[0].dataType = .float64
    b.node("Relu", ["x"], "y")
    let x = try Tensor(elements: [-1.5, 2.5] as [Double], .float64, shape: [2])
    #expect(try Session(graph: b.finish("y")).run(["x": x])["y"]!.floats() == [0, 2.5])
  }

  @Test func unneededNodesNeedNoSupport() throws {
    var b = GraphBuilder(shape: [2])
    b.node("Relu", ["x"], "y")
    b.node("Mystery", ["x"], "z")
    let result = try Session(graph: b.finish("y")).run(["x": Tensor([-1, 1], shape: [2])])
    #expect(try result["y"]!.floats() == [0, 1])
  }
}

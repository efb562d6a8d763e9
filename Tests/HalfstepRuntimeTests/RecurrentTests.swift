// SPDX-License-Identifier: Apache-2.0
// Recurrent operators on cases worked by hand; ONNX's node tests cover the defaults.

import HalfstepGraph
import HalfstepNumerics
import HalfstepRuntime
import TestSupport
import Testing

@Suite struct RecurrentTests {
  /// Functions that keep numbers exact.
  private func linear(_ count: Int) -> Attribute {
    .strings([[UInt8]](repeating: Array("Affine".utf8), count: count))
  }

  private func tensor(_ values: [Float], _ shape: [Int]) throws -> Tensor {
    try Tensor(values, shape: shape)
  }

  @Test(arguments: ["forward", "reverse", "bidirectional"])
  func simpleStateAddsUp(_ direction: String) throws {
    // h = x + 2·h with the identity as function: 1, 2 + 2 = 4, 3 + 8 = 11; from the end 3, 8, 17.
    let count = direction == "bidirectional" ? 2 : 1
    let ones = try tensor([Float](repeating: 1, count: count), [count, 1, 1])
    let twos = try tensor([Float](repeating: 2, count: count), [count, 1, 1])
    let result = try runNode(
      "RNN", [([1, 2, 3], [3, 1, 1])], constants: [ones, twos],
      ["activations": linear(count), "direction": .string(Array(direction.utf8))])
    #expect(result.shape.dimensions == [3, count, 1, 1])
    let expected: [String: [Float]] = [
      "forward": [1, 4, 11], "reverse": [17, 8, 3], "bidirectional": [1, 17, 4, 8, 11, 3],
    ]
    #expect(try result.floats() == expected[direction])
  }

  @Test func batchFirstAndInitialStatesAndLengths() throws {
    // Two sequences, the second of one step: 1 + 2·5 = 11, 2 + 22 = 24 and 4 + 2·6 = 16, then zeros.
    let result = try runNode(
      "RNN", [([1, 2, 4, 8], [2, 2, 1])],
      constants: [
        try tensor([1], [1, 1, 1]), try tensor([2], [1, 1, 1]), nil,
        try Tensor(elements: [2, 1] as [Int32], .int32, shape: [2]),
        try tensor([5, 6], [2, 1, 1]),
      ], ["activations": linear(1), "layout": .int(1)])
    #expect(result.shape.dimensions == [2, 2, 1, 1])
    #expect(try result.floats() == [11, 24, 16, 0])
  }

  @Test func longShortTermMemoryWorkedByHand() throws {
    // Linear gates i, o, f, c of input weights 1, 2, 3, 4, no recurrence but biases 1 for f: with x = 1,
    // i = 1, o = 2, f = 4, c = 4. C = 4·10 + 1·4 = 44, H = 2·44 = 88. Peepholes add 0.5·10 to i and
    // 0.25·C to o: i = 6, C = 4·10 + 6·4 = 64, o = 2 + 16 = 18, H = 18·64 = 1152.
    func hidden(_ peepholes: Tensor?) throws -> [Float] {
      try runNode(
        "LSTM", [([1], [1, 1, 1])],
        constants: [
          try tensor([1, 2, 3, 4], [1, 4, 1]), try tensor([0, 0, 0, 0], [1, 4, 1]),
          try tensor([0, 0, 1, 0, 0, 0, 0, 0], [1, 8]), nil, try tensor([7], [1, 1, 1]),
          try tensor([10], [1, 1, 1]), peepholes,
        ], ["activations": linear(3)]
      ).floats()
    }
    #expect(try hidden(nil) == [88])
    #expect(try hidden(try tensor([0.5, 0.25, 0], [1, 3])) == [1152])
  }

  @Test func clipBoundsWhatFunctionsGet() throws {
    let result = try runNode(
      "RNN", [([1, 20], [2, 1, 1])],
      constants: [try tensor([1], [1, 1, 1]), try tensor([2], [1, 1, 1])],
      ["activations": linear(1), "clip": .float(3)])
    #expect(try result.floats() == [1, 3])
  }

  @Test(arguments: [(Int64(0), Float(5.5)), (Int64(1), Float(5))])
  func gatedUnitResetsBeforeOrAfterTheProduct(_ resetsAfter: Int64, _ expected: Float) throws {
    // x = 1, h = 4; z = 0.5 and r = 0.5 from biases. The hidden gate is 1·x + 2·(r·h) + 2·1 (bias of the
    // recurrence) = 1 + 4 + 2 = 7, or 1 + r·(2·h + 2) = 1 + 5 = 6; H = 0.5·7 + 0.5·4 = 5.5, and 0.5·6 + 0.5·4 = 5.
    let result = try runNode(
      "GRU", [([1], [1, 1, 1])],
      constants: [
        try tensor([0, 0, 1], [1, 3, 1]), try tensor([0, 0, 2], [1, 3, 1]),
        try tensor([0.5, 0.5, 0, 0, 0, 2], [1, 6]), nil, try tensor([4], [1, 1, 1]),
      ], ["activations": linear(2), "linear_before_reset": .int(resetsAfter)])
    #expect(try result.floats() == [expected])
  }

  @Test(arguments: [1, 3, 200])
  func resultsDoNotDependOnThreads(_ batch: Int) throws {
    var random = SeededGenerator(seed: 5)
    let x = (random.floats(6 * batch * 40), [6, batch, 40])
    let w = try tensor(random.floats(2 * 4 * 33 * 40), [2, 4 * 33, 40])
    let r = try tensor(random.floats(2 * 4 * 33 * 33), [2, 4 * 33, 33])
    let b = try tensor(random.floats(2 * 8 * 33), [2, 8 * 33])
    func run() throws -> [Float] {
      try runNode(
        "LSTM", [x], constants: [w, r, b], ["direction": .string(Array("bidirectional".utf8))]
      ).floats()
    }
    let threads = Parallel.maximumThreads
    defer { Parallel.setMaximumThreads(threads) }
    let expected = try run()
    Parallel.setMaximumThreads(1)
    #expect(try run() == expected)
  }

  @Test func errorsNameTheNodeAndTheInput() throws {
    let (one, two) = (try tensor([1], [1, 1, 1]), try tensor([1, 1], [1, 2, 1]))
    let x: ([Float], [Int]) = ([1, 2], [2, 1, 1])
    for (constants, attributes, code, text) in [
      ([one, two], [:], HalfstepError.Code.shapeMismatch, "input 2"),
      ([two, one], [:], .shapeMismatch, "input 1"),
      ([one, one, one], [:], .shapeMismatch, "input 3"),
      ([one, one], ["direction": .string(Array("up".utf8))], .invalidGraph, "'up'"),
      ([one, one], ["hidden_size": .int(9)], .shapeMismatch, "hidden size 9"),
      ([one, one], ["activations": linear(2)], .invalidGraph, "activations"),
      ([one, one], ["activations": .strings([Array("Odd".utf8)])], .unsupportedOperator, "'Odd'"),
    ] as [([Tensor?], Attributes, HalfstepError.Code, String)] {
      let error = try #require(
        failure { _ = try runNode("RNN", [x], constants: constants, attributes) })
      #expect(error.code == code)
      #expect(error.message.contains(text) && error.message.contains("'node'"), "\(error.message)")
    }
    let lengths = try Tensor(elements: [3] as [Int32], .int32, shape: [1])
    let error = try #require(
      failure { _ = try runNode("RNN", [x], constants: [one, one, nil, lengths]) })
    #expect(error.code == .invalidArgument && error.message.contains("3 of 2"))
  }
}

// SPDX-License-Identifier: Apache-2.0
// Networks whose first layers run image by image give the same bits as single images.

import HalfstepGraph
import HalfstepNumerics
import HalfstepRuntime
import OrderedCollections
import TestSupport
import Testing

@Suite struct BatchPartsTests {
  /// Images of a batch: odd, so that no part divides it but one image.
  static let batch = 9
  static let side = 128

  /// Two branches with tensors of 512 KB an image, joined, then small layers; the batch is free.
  static func network(channels: Int = 8) throws -> Graph {
    var random = SeededGenerator(seed: 21)
    var b = GraphBuilder(shape: [batch, 3, side, side])
    b.graph.inputs = [
      ValueInfo(
        name: "x", dataType: .float32,
        dimensions: [.symbolic("N"), .fixed(3), .fixed(side), .fixed(side)])
    ]
    func layer(_ name: String, _ from: String, _ input: Int, _ output: Int, stride: Int64) throws {
      try b.constant(name + ".w", random.floats(output * input * 9), [output, input, 3, 3])
      b.node(
        "Conv", [from, name + ".w"], name,
        ["pads": .ints([1, 1, 1, 1]), "strides": .ints([stride, stride])])
    }
    try layer("a", "x", 3, channels, stride: 1)
    b.node("Relu", ["a"], "ar")
    try layer("b", "ar", channels, channels, stride: 1)
    b.node("Add", ["b", "ar"], "s")
    b.node("Relu", ["s"], "sr")
    try layer("c", "sr", channels, 20, stride: 4)
    try layer("d", "c", 20, 20, stride: 4)
    b.node("GlobalAveragePool", ["d"], "p")
    b.node("Flatten", ["p"], "y")
    // `c` crosses into the layers that run at the whole batch, and so does the input.
    b.node("GlobalAveragePool", ["x"], "z")
    return try b.finish("y", "c", "z")
  }

  static func images() throws -> Tensor {
    var random = SeededGenerator(seed: 22)
    return try Tensor(random.floats(batch * 3 * side * side), shape: [batch, 3, side, side])
  }

  static func image(_ index: Int, of tensor: Tensor) throws -> Tensor {
    let size = tensor.count / batch
    let values = try tensor.floats()
    return try Tensor(
      Array(values[index * size..<(index + 1) * size]), shape: [1, 3, side, side])
  }

  /// Channels that fill oneDNN's blocks of 8 and 16, and that need padding.
  @Test(arguments: [8, 16, 20]) func batchEqualsSingleImages(channels: Int) throws {
    let graph = try Self.network(channels: channels)
    let images = try Self.images()
    let encoding = try Encoding(
      bits: 6, isSigned: false, isSymmetric: false, scales: [0.31], zeroPoints: [21])
    for quantized in [[:], ["ar": encoding, "c": encoding, "x": encoding]] {
      let session = try Session(graph: graph, quantized: quantized)
      // Twice, so that a second run finds nothing of the first.
      for _ in 0..<2 {
        let whole = try session.run(["x": images])
        for index in 0..<Self.batch {
          let single = try session.run(["x": try Self.image(index, of: images)])
          for (name, expected) in single {
            let wanted = try expected.floats().map(\.bitPattern)
            let all = try whole[name]!.floats().map(\.bitPattern)
            #expect(
              Array(all[index * wanted.count..<(index + 1) * wanted.count]) == wanted,
              "\(name), image \(index)")
          }
        }
      }
    }
  }

  @Test func observerSeesEveryValueOnce() throws {
    /// Adds up what it sees.
    final class Statistics: TensorObserver {
      var seen: [String: RangeStatistics] = [:]
      var calls: [String: Int] = [:]
      func observe(_ tensor: String, values: UnsafeBufferPointer<Float>, paddingZeros: Int) {
        seen[tensor, default: RangeStatistics(keepsHistogram: true)]
          .observe(values, paddingZeros: paddingZeros)
        calls[tensor, default: 0] += 1
      }
    }
    let images = try Self.images()
    let graph = try Self.network(channels: 20)
    let session = try Session(graph: graph, observed: ["x", "ar", "s", "d"])
    let whole = Statistics()
    _ = try session.run(["x": images], observer: whole)
    let single = Statistics()
    for index in 0..<Self.batch {
      _ = try session.run(["x": try Self.image(index, of: images)], observer: single)
    }
    #expect(whole.seen == single.seen)
    #expect(whole.seen["ar"]?.count == UInt64(Self.batch * 20 * Self.side * Self.side))
    // The large tensors came in parts, the small one whole.
    #expect(whole.calls["ar"].map { $0 > 1 } == true && whole.calls["d"] == 1)
  }
}

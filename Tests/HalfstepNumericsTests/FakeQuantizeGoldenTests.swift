// SPDX-License-Identifier: Apache-2.0
// Fake quantization against AIMET 2.42 (torch).

import HalfstepNumerics
import TestSupport
import Testing

@Suite(.enabled(if: Golden.isPresent)) struct FakeQuantizeGoldenTests {
  @Test func forwardEqualsTorchPackage() throws {
    let (cases, arrays) = try GoldenFakeQuantize.load()
    #expect(cases.count == 96)
    let input = try #require(arrays["x"])
    let values = try input.floats()
    for test in cases {
      let expected = try #require(arrays[test.key + "_y"]).floats()
      let output = try test.encoding.fakeQuantize(input).floats()
      let layout = try test.encoding.layout(for: input.shape)
      for run in (0..<layout.runCount).map(layout.run) {
        let scale = test.encoding.scales[run.group]
        for index in run.offset..<run.offset + run.count {
          // AIMET divides by the scale where gradients are wanted; we multiply by its reciprocal, which
          // is off by half a unit. Only a quotient within 2 units of a tie can round differently.
          let quotient = values[index] / scale
          let isNearTie =
            abs(abs(quotient - quotient.rounded(.down)) - 0.5) <= 2 * abs(quotient).ulp
          if isNearTie && test.range != "tie" {
            expectClose(output[index], expected[index], absolute: scale * 1.0001, "\(test.key)")
          } else {
            // The product with the scale is the same one.
            expectClose(output[index], expected[index], ulps: 1, "\(test.key)")
          }
        }
      }
    }
  }

  @Test func gradientsEqualTorchPackage() throws {
    let (cases, arrays) = try GoldenFakeQuantize.load()
    let input = try #require(arrays["x"])
    let upstream = try #require(arrays["g"])
    let elements = Double(input.count)
    for test in cases {
      let gradients = try test.encoding.fakeQuantizeGradients(of: input, upstream: upstream)
      // Inside or outside is decided by rounding; no value here is within half a unit of the border.
      #expect(
        try gradients.input.floats() == #require(arrays[test.key + "_gx"]).floats(), "\(test.key)")
      let (minimum, maximum) = try gradients.grid.ends(of: test.encoding, minimums: test.minimumSet)
      for group in minimum.indices {
        // AIMET sums in float: an error of 2⁻²⁴ for each of up to `elements` additions of terms up to the
        // gradient (below 4) times the largest code over the number of steps (at most 1), and
        // times 1 for the shift. Its chain from the ends to the scale cancels terms of that size.
        let tolerance = elements * 8 * 0x1p-24
        #expect(abs(minimum[group] - test.minimumGradient[group]) <= tolerance, "\(test.key)")
        #expect(abs(maximum[group] - test.maximumGradient[group]) <= tolerance, "\(test.key)")
      }
    }
  }
}

/// A case of `torch_fakequant.json`.
struct GoldenFakeQuantize {
  var key: String
  var range: String
  var encoding: Encoding
  /// Lower ends as set, before the zero point was rounded.
  var minimumSet: [Float]
  var minimumGradient: [Double]
  var maximumGradient: [Double]

  static func load() throws -> ([GoldenFakeQuantize], [String: Tensor]) {
    let arrays = try Golden.arrays("torch_fakequant.npz")
    let rows = try #require(try Golden.json("torch_fakequant.json") as? [[String: Any]])
    return (try rows.map(GoldenFakeQuantize.init), arrays)
  }

  private init(_ row: [String: Any]) throws {
    key = try #require(row["key"] as? String)
    range = try #require(row["range"] as? String)
    let kind = try #require(row["gran"] as? String)
    let granularities: [String: Granularity] = [
      "tensor": .perTensor, "channel0": .perChannel(axis: 0), "channel1": .perChannel(axis: 1),
      // Block size [1, 3, -1, -1]: one channel, three inputs, the whole kernel.
      "block": .perBlock(channelAxis: 0, axis: 1, size: 3),
    ]
    let offsets = try #require(row["offset"] as? [Double])
    let gradients = try #require(row["grads"] as? [String: [Double]])
    minimumSet = try #require(row["min_set"] as? [Double]).map { Float($0) }
    minimumGradient = try #require(gradients["min"])
    maximumGradient = try #require(gradients["max"])
    encoding = try Encoding(
      bits: try #require(row["bw"] as? Int), isSigned: try #require(row["qmin"] as? Int) < 0,
      isSymmetric: try #require(row["symmetric"] as? Bool),
      isStrict: row["mode"] as? String == "strict",
      granularity: try #require(granularities[kind]),
      scales: try #require(row["scale"] as? [Double]).map { Float($0) },
      zeroPoints: offsets.map { Int32(-$0) })
  }
}

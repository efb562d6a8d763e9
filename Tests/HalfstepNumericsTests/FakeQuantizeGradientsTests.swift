// SPDX-License-Identifier: Apache-2.0
// Gradients through fake quantization: worked cases, properties, errors.

import HalfstepNumerics
import TestSupport
import Testing

@Suite struct FakeQuantizeGradientsTests {
  @Test func asymmetricCaseByHand() throws {
    // Range −1...2, 4 bits: s = 0.2, codes less zero point −5...10. Quotients of the inside values are
    // −4.65, −1.5, 0, 3.5, 5.55, with rounding errors −0.35, −0.5, 0, 0.5, 0.45: their sum is 0.1. One
    // value below adds −5, one above adds 10, so ds = 5.1, and the shift is 2·0.2.
    // dmax = 5.1/15 + 0.4·1/(0.04·15) = 1.00667; dmin = −5.1/15 + 0.4·(5 − 1/0.6) = 0.99333.
    let encoding = try Encoding(
      bits: 4, isSigned: false, isSymmetric: false, scales: [0.2], zeroPoints: [5])
    let input = try Tensor([-1.5, -0.93, -0.3, 0, 0.7, 1.11, 2.2], shape: [7])
    let ones = try Tensor([Float](repeating: 1, count: 7), shape: [7])
    let gradients = try encoding.fakeQuantizeGradients(of: input, upstream: ones)
    #expect(try gradients.input.floats() == [0, 1, 1, 1, 1, 1, 0])
    let (minimum, maximum) = try gradients.grid.ends(of: encoding)
    // Quotients are rounded to float: 2⁻²⁴ of up to 10, a few times.
    #expect(abs(minimum[0] - 0.993333) < 1e-5)
    #expect(abs(maximum[0] - 1.006667) < 1e-5)
  }

  @Test func symmetricCaseByHand() throws {
    // Range −1...0.875, 4 bits: s = 0.125, codes −8...7. Quotients −7.44, −2.4, 0, 5.6 round by 0.44, 0.4,
    // 0, 0.4; below −8, above 7: ds = 1.24 − 8 + 7 = 0.24, divided by 15 steps.
    let encoding = try Encoding(
      bits: 4, isSigned: true, isSymmetric: true, scales: [0.125], zeroPoints: [0])
    let input = try Tensor([-1.5, -0.93, -0.3, 0, 0.7, 1.11], shape: [6])
    let ones = try Tensor([Float](repeating: 1, count: 6), shape: [6])
    let gradients = try encoding.fakeQuantizeGradients(of: input, upstream: ones)
    let (minimum, maximum) = try gradients.grid.ends(of: encoding)
    #expect(abs(maximum[0] - 0.016) < 1e-6 && abs(minimum[0] + 0.016) < 1e-6)
  }

  @Test func sumsFollowTheDefinitionInEveryLayout() throws {
    for dimensions in [[1], [40], [3, 70_000], [2, 5, 4, 3], [4, 2, 33], [9, 16]] {
      let shape = try Shape(dimensions)
      var random = SeededGenerator(seed: 5)
      let values = random.floats(shape.elementCount, in: -2...2)
      let upstream = random.floats(shape.elementCount, in: -1...1)
      let input = try Tensor(values, shape: dimensions)
      let gradient = try Tensor(upstream, shape: dimensions)
      for granularity in GroupLayoutTests.granularities(rank: shape.rank)
      where shape.rank < 4
        || granularity != .perTensor
      {
        let groups = try granularity.groupCount(for: shape)
        let encoding = try Encoding(
          bits: 4, isSigned: false, isSymmetric: false, granularity: granularity,
          scales: (0..<groups).map { 0.125 + 0.125 * Float($0 % 2) },
          zeroPoints: (0..<groups).map { Int32($0 % 9) })
        let result = try encoding.fakeQuantizeGradients(of: input, upstream: gradient)
        var scale = [Double](repeating: 0, count: groups)
        var shift = scale
        var expected = upstream
        for index in values.indices {
          let group = GroupLayoutTests.group(index, granularity, shape)
          let zero = Double(encoding.zeroPoints[group])
          let quotient = Double(values[index]) / Double(encoding.scales[group])
          let code = quotient.rounded(.toNearestOrEven)
          let inside = min(max(code, -zero), 15 - zero)
          scale[group] += Double(upstream[index]) * (code == inside ? code - quotient : inside)
          if code != inside {
            expected[index] = 0
            shift[group] += Double(upstream[index]) * Double(encoding.scales[group])
          }
        }
        #expect(try result.input.floats() == expected)
        // Float partial sums of 1,024 terms up to 1, all added up.
        let tolerance = Double(shape.elementCount) * 0x1p-22 + 1e-9
        for group in 0..<groups {
          #expect(abs(result.grid.scale[group] - scale[group]) <= tolerance * 16)
          #expect(abs(result.grid.shift[group] - shift[group]) <= tolerance)
        }
      }
    }
  }

  @Test func nothingPassesForNaN() throws {
    let encoding = try Encoding(
      bits: 8, isSigned: true, isSymmetric: true, scales: [1], zeroPoints: [0])
    let input = try Tensor([.nan, .infinity, -.infinity, 1], shape: [4])
    let ones = try Tensor([1, 1, 1, 1], shape: [4])
    let gradients = try encoding.fakeQuantizeGradients(of: input, upstream: ones)
    #expect(try gradients.input.floats() == [0, 0, 0, 1])
    #expect(gradients.grid.scale == [-128 + 127 - 128])
  }

  @Test func wrongArgumentsThrow() throws {
    let encoding = try Encoding(
      bits: 8, isSigned: true, isSymmetric: true, scales: [1], zeroPoints: [0])
    let input = try Tensor([1, 2], shape: [2])
    #expect(throws: HalfstepError.self) {
      try encoding.fakeQuantizeGradients(of: input, upstream: Tensor([1], shape: [1]))
    }
    let bias = try Encoding(
      bits: 32, isSigned: true, isSymmetric: true, scales: [1], zeroPoints: [0])
    #expect(throws: HalfstepError.self) {
      try bias.fakeQuantizeGradients(of: input, upstream: input)
    }
    let gradients = try encoding.fakeQuantizeGradients(of: input, upstream: input)
    #expect(throws: HalfstepError.self) { try gradients.grid.ends(of: encoding, minimums: [1, 2]) }
  }
}

// SPDX-License-Identifier: Apache-2.0
// Min-max ranges: worked cases and degenerate ones.

import HalfstepNumerics
import Testing

@Suite struct MinMaxTests {
  @Test(arguments: [
    // data, bits, symmetric, strict, unsigned -> scale, zero point
    MinMaxCase([-4, 1], 8, true, scale: 4 / 128),  // the longer side has 128 codes
    MinMaxCase([-4, 1], 8, true, strict: true, scale: 4 / 127),
    MinMaxCase([-1, 4], 8, true, scale: 4 / 127),
    MinMaxCase([-1, 4], 2, true, scale: 2),  // 2 bits: the positive side ends at code 2
    MinMaxCase([-1, 4], 2, true, strict: true, scale: 4),
    MinMaxCase([0, 2], 8, true, unsigned: true, scale: 2 / 255),
    MinMaxCase([0.5, 2], 8, true, unsigned: true, strict: true, scale: 2 / 254),
    MinMaxCase([-0.1, 2], 8, true, unsigned: true, scale: 2 / 127),
    MinMaxCase([-3.125, 4.84375], 8, false, scale: 0.03125, zero: 100),
    MinMaxCase([5, 7], 4, false, scale: 7 / 15, zero: 0),  // zero belongs to the range
    MinMaxCase([-7, -5], 4, false, scale: 7 / 15, zero: 15),
    MinMaxCase([0], 8, false, scale: 0x1p-23),
    MinMaxCase([0], 8, true, scale: 0x1p-23),
    MinMaxCase([-0.5, 14.5], 4, false, scale: 1, zero: 0),  // 0.5 rounds to even
    MinMaxCase([-1.5, 13.5], 4, false, scale: 1, zero: 2),
  ]) func worked(_ test: MinMaxCase) throws {
    var statistics = RangeStatistics(keepsHistogram: false)
    statistics.observe(test.values)
    let spec = QuantizerSpec(
      bits: test.bits, isSymmetric: test.isSymmetric, isStrict: test.isStrict,
      allowsUnsigned: test.isUnsigned)
    let encoding = try statistics.encoding(for: spec, scheme: .minMax)
    #expect(encoding.scales == [Float(test.scale)])
    #expect(encoding.zeroPoints == [test.zero])
    let weights = try Tensor(test.values, shape: [test.values.count])
    #expect(try Encoding.make(for: weights, spec: spec, scheme: .minMax) == encoding)
  }
}

struct MinMaxCase: Sendable {
  var values: [Float]
  var bits: Int
  var isSymmetric: Bool
  var isStrict: Bool
  var isUnsigned: Bool
  var scale: Double
  var zero: Int32

  init(
    _ values: [Float], _ bits: Int, _ symmetric: Bool, unsigned: Bool = false,
    strict: Bool = false, scale: Double, zero: Int32 = 0
  ) {
    self.values = values
    self.bits = bits
    isSymmetric = symmetric
    isStrict = strict
    isUnsigned = unsigned
    self.scale = scale
    self.zero = zero
  }
}

// SPDX-License-Identifier: Apache-2.0
// Grids between the ends of ranges: worked cases, the way back, errors.

import HalfstepNumerics
import TestSupport
import Testing

@Suite struct EncodingRangeTests {
  private func spanning(
    _ minimums: [Float], _ maximums: [Float], bits: Int = 8, isSigned: Bool = false,
    isSymmetric: Bool = false, isStrict: Bool = false
  ) throws -> Encoding {
    try minimums.withUnsafeBufferPointer { low in
      try maximums.withUnsafeBufferPointer { high in
        try Encoding.spanning(
          minimums: low, maximums: high, bits: bits, isSigned: isSigned, isSymmetric: isSymmetric,
          isStrict: isStrict)
      }
    }
  }

  @Test func casesByHand() throws {
    // (2 + 1)/15 = 0.2, 1/0.2 = 5. (1.5 + 1)/15 = 1/6, 6. Ties: 0.5/0.2 = 2.5 goes to 2.
    let asymmetric = try spanning([-1, -1, -0.5], [2, 1.5, 2.5], bits: 4)
    #expect(asymmetric.scales == [0.2, 1 / 6, 0.2])
    #expect(asymmetric.zeroPoints == [5, 6, 2])
    // Signed codes start at -8.
    let signed = try spanning([-1], [2], bits: 4, isSigned: true)
    #expect(signed.zeroPoints == [-3])
    // Both ends count: (1 + 0.875)/15, and (0 + 1.875)/15 as well. Strict: 14 steps.
    let symmetric = try spanning(
      [-1, 0], [0.875, 1.875], bits: 4, isSigned: true, isSymmetric: true)
    #expect(symmetric.scales == [0.125, 0.125] && symmetric.zeroPoints == [0, 0])
    let strict = try spanning(
      [-1.75], [1.75], bits: 4, isSigned: true, isSymmetric: true, isStrict: true)
    #expect(strict.scales == [0.25])
    // Ends on the wrong side of zero count as 0; the least scale is single precision's epsilon.
    let crossed = try spanning([1, 0, 3], [2.55, 0, -3])
    #expect(crossed.scales == [0.01, .ulpOfOne, .ulpOfOne] && crossed.zeroPoints == [0, 0, 0])
    // The widest range of floats.
    let huge = try spanning(
      [-.greatestFiniteMagnitude], [.greatestFiniteMagnitude], bits: 16, isSigned: true)
    #expect(huge.scales[0].isFinite && huge.zeroPoints == [0])
  }

  @Test func endsLeadBackToTheGrid() throws {
    var random = SeededGenerator(seed: 3)
    for bits in [2, 3, 4, 8, 12, 16] {
      for kind in 0..<4 {
        let isSigned = kind != 0
        let isSymmetric = kind >= 2
        let lowest = isSigned ? -(1 << (bits - 1)) + (kind == 3 ? 1 : 0) : 0
        let steps = (isSigned ? (1 << (bits - 1)) - 1 : (1 << bits) - 1) - lowest
        var scales: [Float] = []
        var zeros: [Int32] = []
        for value in random.floats(2000, in: 1...2) {
          scales.append(value * (scales.count % 2 == 0 ? 0x1p-9 : 0x1p7))
          let position = scales.count % 5 == 0 ? 0 : scales.count % 7 == 0 ? steps : nil
          let zero = position ?? Int(Float(steps) * (value - 1))
          zeros.append(isSymmetric ? 0 : Int32(lowest + min(zero, steps)))
        }
        let encoding = try Encoding(
          bits: bits, isSigned: isSigned, isSymmetric: isSymmetric, isStrict: kind == 3,
          scales: scales, zeroPoints: zeros)
        // `ends` throws if the way back is not exact; the ends are the grid's own within an ulp.
        let ends = try encoding.ends()
        for group in scales.indices {
          expectClose(
            ends.minimums[group], Float(encoding.minimum(group: group)),
            absolute: scales[group] * Float(steps) * .ulpOfOne, "\(bits) bits, kind \(kind)")
          expectClose(
            ends.maximums[group], Float(encoding.maximum(group: group)), ulps: 1,
            absolute: scales[group] * Float(steps) * .ulpOfOne, "\(bits) bits, kind \(kind)")
        }
      }
    }
  }

  @Test func errors() throws {
    #expect(throws: HalfstepError.self) { try spanning([.nan], [1]) }
    #expect(throws: HalfstepError.self) { try spanning([0], [.infinity]) }
    #expect(throws: HalfstepError.self) { try spanning([0, 0], [1]) }
    #expect(throws: HalfstepError.self) { try spanning([], []) }
    #expect(throws: HalfstepError.self) { try spanning([0], [1], bits: 17) }
    #expect(throws: HalfstepError.self) { try spanning([0], [1], bits: 1) }
    let shifted = try Encoding(
      bits: 8, isSigned: true, isSymmetric: true, scales: [1], zeroPoints: [1])
    #expect(throws: HalfstepError.self) { try shifted.ends() }
    let tiny = try Encoding(
      bits: 8, isSigned: true, isSymmetric: true, scales: [1e-9], zeroPoints: [0])
    #expect(throws: HalfstepError.self) { try tiny.ends() }
    let bias = try Encoding(
      bits: 32, isSigned: true, isSymmetric: true, scales: [1], zeroPoints: [0])
    #expect(throws: HalfstepError.self) { try bias.ends() }
  }
}

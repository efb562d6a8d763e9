// SPDX-License-Identifier: Apache-2.0
// Fake quantization: ties, ends, NaN, layouts.

import HalfstepNumerics
import Testing

@Suite struct FakeQuantizeTests {
  @Test func tiesGoToEvenAndEndsClamp() throws {
    // Scale 1, codes −2...1: halves go to the even neighbor, the rest is clamped.
    let encoding = try Encoding(
      bits: 2, isSigned: true, isSymmetric: true, scales: [1], zeroPoints: [0])
    let input: [Float] = [0.5, 1.5, -0.5, -1.5, -2.5, 0.51, 9, -9, .infinity, -.infinity, .nan]
    let output = try encoding.fakeQuantize(Tensor(input, shape: [11])).floats()
    #expect(output == [0, 1, 0, -2, -2, 1, 1, -2, 1, -2, -2])
    #expect(output.allSatisfy { !($0 == 0 && $0.sign == .minus) })
  }

  @Test func zeroPointShiftsTheEnds() throws {
    // Scale 0.5, codes 0...3, zero point 1: reals −0.5, 0, 0.5, 1.
    let encoding = try Encoding(
      bits: 2, isSigned: false, isSymmetric: false, scales: [0.5], zeroPoints: [1])
    let output = try encoding.fakeQuantize(Tensor([-3, -0.3, 0.2, 0.3, 0.8, 5], shape: [6]))
    #expect(try output.floats() == [-0.5, -0.5, 0, 0.5, 1, 1])
  }
}

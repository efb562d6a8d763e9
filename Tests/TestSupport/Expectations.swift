// SPDX-License-Identifier: Apache-2.0
// Comparisons with a stated tolerance.

import Testing

/// Expects two numbers to agree within `ulps` units of the expected value's last place, or within
/// `absolute + relative · |expected|`.
public func expectClose(
  _ actual: Float, _ expected: Float, ulps: Int = 0, absolute: Float = 0, relative: Float = 0,
  _ comment: Comment? = nil, sourceLocation: SourceLocation = #_sourceLocation
) {
  let tolerance = max(Float(ulps) * expected.ulp, absolute + relative * abs(expected))
  #expect(
    actual == expected || abs(actual - expected) <= tolerance, comment,
    sourceLocation: sourceLocation)
}

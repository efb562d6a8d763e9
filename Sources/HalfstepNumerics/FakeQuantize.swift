// SPDX-License-Identifier: Apache-2.0
// Rounds values to a grid and back.

extension Encoding {
  /// Rounds values to the grid and back: `scale · clamp(round(x / scale))`, half to even.
  package func fakeQuantize(_ tensor: Tensor) throws(HalfstepError) -> Tensor {
    throw HalfstepError(.internalError, "under construction")
  }
}

// SPDX-License-Identifier: Apache-2.0
// The small network and its calibration data, shared with the tests of the C interface.

import Halfstep
import Testing

enum Fixture {
  private static var folder: String {
    let file = #filePath
    let end = file.firstRange(of: "/HalfstepTests/")?.lowerBound ?? file.startIndex
    return String(file[..<end]) + "/CABITests/Fixtures"
  }

  static func model() throws -> Model { try Model(contentsOf: folder + "/small.onnx") }

  /// Float32 `[20, 3, 8, 8]`.
  static func data() throws -> Tensor {
    try NamedTensors(contentsOfNumPyFile: folder + "/small.npy")[0].tensor
  }

  /// Folded, equalized and calibrated.
  static func simulation() throws -> QuantizationSimModel {
    var model = try model()
    try model.foldBatchNorms()
    try model.equalize()
    let simulation = try QuantizationSimModel(model)
    try simulation.computeEncodings(data: ["input": try data()])
    return simulation
  }
}

/// Expects a failure of a kind, whose message holds a text.
func expectError<R>(
  _ code: HalfstepError.Code, naming text: String = "",
  sourceLocation: SourceLocation = #_sourceLocation, _ body: () throws -> R
) {
  do {
    _ = try body()
    Issue.record("expected \(code), nothing was thrown", sourceLocation: sourceLocation)
  } catch let error as HalfstepError {
    #expect(error.code == code, "\(error.message)", sourceLocation: sourceLocation)
    #expect(
      text.isEmpty || error.message.contains(text), "\(error.message)",
      sourceLocation: sourceLocation)
  } catch {
    Issue.record("unexpected error \(error)", sourceLocation: sourceLocation)
  }
}

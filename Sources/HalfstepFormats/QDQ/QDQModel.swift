// SPDX-License-Identifier: Apache-2.0
// Builds the ONNX model whose QuantizeLinear/DequantizeLinear pairs carry the encodings.

import HalfstepGraph
import HalfstepNumerics

/// Builds quantize-dequantize models for integer runtimes.
package enum QDQModel {
  /// Options of the export; the defaults suit onnxruntime and Qualcomm's converter.
  package struct Options: Sendable {
    /// Whether weights are stored as integers with a DequantizeLinear only.
    package var prequantizesConstants = false
    /// Whether biases become 32-bit integers.
    package var exportsInt32Bias = false
    package init() {}
  }
  /// Inserts quantize-dequantize pairs at every tensor that the table names.
  package static func make(
    from graph: Graph, encodings: EncodingTable, options: Options = Options()
  ) throws(HalfstepError) -> Graph {
    throw HalfstepError(.internalError, "under construction")
  }
}

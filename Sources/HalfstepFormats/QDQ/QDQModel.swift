// SPDX-License-Identifier: Apache-2.0
// Builds the ONNX model whose QuantizeLinear/DequantizeLinear pairs carry the encodings.

import HalfstepGraph
import HalfstepNumerics

/// Builds quantize-dequantize models for integer runtimes.
///
/// Each tensor `T` with an encoding is written as `T -> QuantizeLinear -> T_q -> DequantizeLinear ->
/// T_qdq`, and its readers read `T_qdq`. Graph outputs, and tensors that subgraphs read, keep their
/// name on the last of the three. Constants hold the rounded values already, so that an integer runtime
/// finds exactly the codes of the simulation.
///
/// Grids that no ONNX type has (strict ones, and widths other than 4, 8 and 16 bits) take the next wider
/// type: activations pass a Clip to the grid's ends first, constants need none.
///
/// Types of 4 and 16 bits and blocks need operator set 21, axes 13. The graph is moved there if each of
/// its nodes can be expressed in it; otherwise, unless there are blocks, the pairs use onnxruntime's
/// operators of the same names in the domain `com.microsoft`, and the rest stays as it is.
package enum QDQModel {
  /// Options of the export; the defaults suit onnxruntime and Qualcomm's converter.
  package struct Options: Sendable {
    /// Whether weights are stored as integers with a DequantizeLinear only.
    package var prequantizesConstants: Bool = false
    /// Whether biases become 32-bit integers.
    package var exportsInt32Bias: Bool = false

    package init() {}
  }

  /// Inserts quantize-dequantize pairs at every tensor that the table names.
  ///
  /// - Throws: `HalfstepError.encodingMismatch` for a tensor that the graph lacks or whose shape does not
  ///   fit; `.typeMismatch` for a tensor that is not float32; `.unsupportedVersion` naming the node that
  ///   keeps the graph from the operator set that blocks need; `.invalidArgument` for encodings that no
  ///   pair can express.
  package static func make(
    from graph: Graph, encodings: EncodingTable, options: Options = Options()
  ) throws(HalfstepError) -> Graph {
    var table = encodings
    try table.adapt(to: graph)
    let needed = neededOpset(table)
    var source = graph
    var domain = ""
    if graph.opset < needed.version {
      do throws(HalfstepError) {
        source = try OpsetUpgrade.apply(to: graph, target: needed.version)
      } catch {
        if needed.hasBlocks || error.code != .unsupportedVersion { throw error }
        domain = "com.microsoft"
        if source.opsetVersions[domain] == nil { source.opsetVersions[domain] = 1 }
      }
    }
    var builder = try QDQBuilder(source, table, options, domain: domain)
    return try builder.build()
  }

  private static func neededOpset(_ table: EncodingTable) -> (version: Int, hasBlocks: Bool) {
    var version = 10
    var hasBlocks = false
    for encoding in Array(table.activations.values) + Array(table.parameters.values) {
      let type = encoding.storageType
      if ![.int8, .uint8, .int32].contains(type) { version = max(version, 21) }
      switch encoding.granularity {
      case .perTensor: break
      case .perChannel: version = max(version, 13)
      case .perBlock:
        version = max(version, 21)
        hasBlocks = true
      }
    }
    return (version, hasBlocks)
  }
}

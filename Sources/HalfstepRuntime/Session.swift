// SPDX-License-Identifier: Apache-2.0
// Runs a graph on the CPU.

import HalfstepGraph
import HalfstepNumerics
import OrderedCollections

/// Receives tensors while a graph runs.
package protocol TensorObserver: AnyObject {
  /// Called once for each observed tensor of a run, on the running thread, in execution order.
  ///
  /// `values` may be in any memory order and hold `paddingZeros` extra zeros; they die on return.
  func observe(_ tensor: String, values: UnsafeBufferPointer<Float>, paddingZeros: Int)
}

/// A graph prepared to run on the CPU; compiled once for each combination of input shapes.
///
/// Not safe for concurrent use: one session is used by one thread at a time.
package final class Session {
  /// Prepares a graph.
  ///
  /// - Parameters:
  ///   - graph: A valid graph. Constants are used as they are.
  ///   - quantized: Per-tensor encodings by tensor name: right after such a tensor (graph input or
  ///     node output) is computed it is rounded to its grid. Nodes are fused only where no tensor of
  ///     `quantized`, `observed` or `extraOutputs` would disappear.
  ///   - observed: Tensors that `run` hands to its observer, before they are quantized.
  ///   - extraOutputs: Tensors that `run` returns besides the graph's outputs.
  /// - Throws: `HalfstepError.unsupportedOperator` naming every operator it cannot run;
  ///   `.unknownName` for a tensor that the graph does not have.
  package init(
    graph: Graph, quantized: [String: Encoding] = [:], observed: Set<String> = [],
    extraOutputs: [String] = []
  ) throws(HalfstepError) {
    throw HalfstepError(.internalError, "under construction")
  }

  /// Runs the graph.
  ///
  /// - Returns: The graph's outputs, then the extra outputs, by name.
  /// - Throws: `HalfstepError` naming the input or node: missing or unknown input, wrong type or shape.
  package func run(
    _ inputs: [String: Tensor], observer: (any TensorObserver)? = nil
  ) throws(HalfstepError) -> OrderedDictionary<String, Tensor> {
    throw HalfstepError(.internalError, "under construction")
  }
}

// SPDX-License-Identifier: Apache-2.0
// Simulates a network on integer hardware.

import HalfstepGraph
import HalfstepNumerics
import HalfstepRuntime
import OrderedCollections

/// Simulates a network on integer hardware: places quantizers, calibrates them, runs the result.
///
/// Not safe for concurrent use.
package final class QuantizationSimulation {
  package struct Options: Sendable {
    package var parameterBits = 8
    package var activationBits = 8
    package var scheme: RangeScheme = .minMax
    package init() {}
  }

  package let graph: Graph
  package let placement: Placement

  /// Places quantizers and computes the encodings of constants.
  package init(
    graph: Graph, configuration: RuntimeConfiguration, options: Options = Options()
  ) throws(HalfstepError) {
    throw HalfstepError(.internalError, "under construction")
  }

  /// Runs one batch with quantized weights and float activations and remembers activation ranges.
  ///
  /// On an error (wrong shape, NaN in the data) the statistics stay as they were.
  package func observe(_ inputs: [String: Tensor]) throws(HalfstepError) {
    throw HalfstepError(.internalError, "under construction")
  }
  /// Forgets the activation statistics.
  package func resetStatistics() {}
  /// Everything observed so far, to be merged elsewhere.
  package func serializedStatistics() throws(HalfstepError) -> [UInt8] {
    throw HalfstepError(.internalError, "under construction")
  }
  /// Adds statistics that another simulation of the same network serialized.
  package func mergeStatistics(_ bytes: [UInt8]) throws(HalfstepError) {
    throw HalfstepError(.internalError, "under construction")
  }
  /// Chooses the activation grids from what was observed.
  package func computeEncodings() throws(HalfstepError) {
    throw HalfstepError(.internalError, "under construction")
  }
  /// The encodings; `.invalidState` before they were computed or loaded.
  package func encodings() throws(HalfstepError) -> EncodingTable {
    throw HalfstepError(.internalError, "under construction")
  }
  /// What did not match when encodings were loaded.
  package struct LoadReport: Sendable {
    /// Names in the file that have no quantizer here.
    package var unknown: [String] = []
    /// Quantizers here that the file does not name.
    package var missing: [String] = []
    /// Tensor, property, expected, got.
    package var different: [String] = []
    package init() {}
  }
  /// Takes encodings from a table. Strict: any mismatch throws `.encodingMismatch`, nothing changes.
  @discardableResult
  package func load(
    _ table: EncodingTable, strict: Bool
  ) throws(HalfstepError) -> LoadReport {
    throw HalfstepError(.internalError, "under construction")
  }
  /// Runs the simulated network; `extraOutputs` names tensors to return besides the outputs.
  package func run(
    _ inputs: [String: Tensor], extraOutputs: [String] = []
  ) throws(HalfstepError) -> OrderedDictionary<String, Tensor> {
    throw HalfstepError(.internalError, "under construction")
  }
}

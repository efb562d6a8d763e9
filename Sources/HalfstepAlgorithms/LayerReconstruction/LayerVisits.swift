// SPDX-License-Identifier: Apache-2.0
// Visits layers with data, for methods that change weights and quantize nothing.

import HalfstepGraph
import HalfstepNumerics

/// Visits linear layers in the order in which they run, each with its inputs in the network as it was
/// and behind what became of the layers before.
package struct LayerVisits {
  let graph: Graph
  let data: ReconstructionData
  /// Rows that a layer learns from at most.
  var maximumRows = 1 << 14

  /// Visits layers.
  ///
  /// - Parameters:
  ///   - stops: Layers of the graph, in the order of their nodes.
  ///   - progress: Receives the share that is done; throws to stop.
  ///   - body: Gets the position in `stops`, the layer with its data (whose grid means nothing), and
  ///     the walk, to which it commits what becomes of the layer.
  /// - Throws: What running the network and `body` throw.
  package func forEach(
    _ stops: [LayerWalk.Stop], _ progress: (Double) throws(HalfstepError) -> Void,
    _ body: (Int, LayerProblem, LayerWalk) throws(HalfstepError) -> Void
  ) throws(HalfstepError) {
    var options = LayerReconstruction.Options(configuration: RuntimeConfiguration())
    options.maximumRows = maximumRows
    let walk = LayerWalk(
      graph: graph, quantized: nil, stops: stops, activations: [:], data: data,
      maximumBytes: options.maximumBytes)
    func tell(_ share: Double) throws(HalfstepError) {
      try progress((Double(max(walk.position, 0)) + share) / Double(max(stops.count, 1)))
    }
    // Nothing is quantized here: no method asks for these.
    let spec = QuantizerSpec(bits: 16, isSymmetric: true)
    let grid = try Encoding(
      bits: 16, isSigned: true, isSymmetric: true, scales: [1], zeroPoints: [0])
    while try walk.advance(progress: { () throws(HalfstepError) in try tell(0) }) {
      try withoutActuallyEscaping(tell) { tell throws(HalfstepError) in
        let problem = try LayerProblem(
          walk, spec: spec, nearest: grid, options: options, report: tell)
        try body(walk.position, problem, walk)
      }
    }
    try progress(1)
  }
}

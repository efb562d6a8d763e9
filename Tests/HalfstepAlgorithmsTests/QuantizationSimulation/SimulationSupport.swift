// SPDX-License-Identifier: Apache-2.0
// Configurations, data and checks for the tests of the simulation.

import HalfstepAlgorithms
import HalfstepGraph
import HalfstepNumerics
import OrderedCollections
import TestSupport
import Testing

extension RuntimeConfiguration {
  /// Every output, parameter but biases, and input; symmetric parameters.
  static var everything: RuntimeConfiguration {
    var it = RuntimeConfiguration()
    it.outputsQuantized = true
    it.parametersQuantized = true
    it.parametersSymmetric = true
    it.parameters["bias"] = .init(isQuantized: false)
    it.modelInputQuantized = true
    return it
  }
}

func simulate(
  _ lines: [String], input shape: [Int] = [-1, 3, 8, 8],
  configuration: RuntimeConfiguration = .everything, scheme: RangeScheme = .minMax
) throws -> QuantizationSimulation {
  var options = QuantizationSimulation.Options()
  options.scheme = scheme
  return try QuantizationSimulation(
    graph: TextGraph.make(lines, inputs: [("x", shape)]), configuration: configuration,
    options: options)
}

/// A graph that takes batches of images.
func imageGraph(_ lines: [String]) throws -> Graph {
  try TextGraph.make(lines, inputs: [("x", [-1, 3, 8, 8])])
}

/// Images of seeded noise, `[count, 3, 8, 8]`, whose spread grows from image to image.
func images(_ count: Int, seed: UInt64 = 3) throws -> [[Float]] {
  var random = SeededGenerator(seed: seed)
  return (0..<count).map { image in
    random.floats(3 * 8 * 8).map { $0 * (1 + Float(image) / 4) }
  }
}

func batch(_ images: [[Float]]) throws -> [String: Tensor] {
  ["x": try Tensor(images.flatMap { $0 }, shape: [images.count, 3, 8, 8])]
}

/// Expects `body` to throw an error of the given kind whose message holds every given text.
func expectError(
  _ code: HalfstepError.Code, _ texts: String...,
  sourceLocation: SourceLocation = #_sourceLocation, _ body: () throws -> Void
) {
  let error = #expect(throws: HalfstepError.self, sourceLocation: sourceLocation) { try body() }
  #expect(error?.code == code, "\(String(describing: error))", sourceLocation: sourceLocation)
  for text in texts {
    #expect(
      error?.message.contains(text) == true, "\(String(describing: error))",
      sourceLocation: sourceLocation)
  }
}

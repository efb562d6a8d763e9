// SPDX-License-Identifier: Apache-2.0
// Runs small graphs in tests.

import HalfstepGraph
import HalfstepNumerics
import HalfstepRuntime
import OrderedCollections
import TestSupport

typealias Attributes = OrderedDictionary<String, Attribute>

/// Runs a graph of one node on float inputs; `x0`, `x1`, … are computed, `constants` follow them.
func runNode(
  _ opType: String, _ inputs: [([Float], [Int])], constants: [Tensor?] = [],
  _ attributes: Attributes = [:], opset: Int = 17
) throws -> Tensor {
  var graph = Graph()
  graph.opsetVersions[""] = opset
  var names: [String] = []
  var given: [String: Tensor] = [:]
  for (index, input) in inputs.enumerated() {
    let name = "x\(index)"
    names.append(name)
    graph.inputs.append(
      ValueInfo(name: name, dataType: .float32, dimensions: input.1.map { .fixed($0) }))
    given[name] = try Tensor(input.0, shape: input.1)
  }
  for (index, constant) in constants.enumerated() {
    guard let constant else {
      names.append("")
      continue
    }
    names.append("c\(index)")
    graph.initializers["c\(index)"] = constant
  }
  graph.insert(
    Node(name: "node", opType: opType, inputs: names, outputs: ["y"], attributes: attributes))
  graph.outputs = [ValueInfo(name: "y", dataType: .float32, dimensions: nil)]
  let result = try Session(graph: graph).run(given)
  return result["y"]!
}

/// The code of the error that a body throws, and its message.
func failure(_ body: () throws -> Void) -> HalfstepError? {
  do {
    try body()
    return nil
  } catch let error as HalfstepError {
    return error
  } catch {
    return nil
  }
}

/// Remembers what it was shown.
final class Recorder: TensorObserver {
  private(set) var order: [String] = []
  private(set) var values: [String: [Float]] = [:]
  private(set) var zeros: [String: Int] = [:]

  func observe(_ tensor: String, values: UnsafeBufferPointer<Float>, paddingZeros: Int) {
    order.append(tensor)
    self.values[tensor] = Array(values)
    zeros[tensor] = paddingZeros
  }
}

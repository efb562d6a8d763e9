// SPDX-License-Identifier: Apache-2.0
// Small graphs from a line of text per node.

import Foundation
import HalfstepGraph
import HalfstepNumerics
import OrderedCollections

/// Small graphs from a line of text per node.
///
/// A line is `outputs = Op(inputs) key=value …`. Constants stand where they are read first:
/// `w[4,3,1,1]` is a float tensor (seeded noise; `v+[4]` is positive), `s:1,4` are integers,
/// `z:f1,2` floats, `k~0.5` one float. `& k[3]` makes a Constant node. Attribute values are integers,
/// lists of integers, `f0.5` for a float, or text. Nodes are named `n0`, `n1`, …
package enum TextGraph {
  /// Builds and checks a graph with input `x`; outputs are `y`, and `y2` where it is written. An
  /// extent below 0 is left open.
  package static func make(
    _ lines: [String], inputs: [(String, [Int])] = [("x", [1, 3, 8, 8])],
    outputs: [String] = ["y", "y2"]
  ) throws -> Graph {
    var graph = Graph()
    graph.opsetVersions[""] = 17
    var seed: UInt64 = 7
    for line in lines {
      if line.hasPrefix("& ") {
        var holder = Graph()
        let name = try constant(String(line.dropFirst(2)), &holder, &seed)
        let value = holder.initializers[name]!
        graph.insert(
          Node(
            name: "n\(graph.nodes.count)", opType: "Constant", inputs: [], outputs: [name],
            attributes: ["value": .tensor(value)]))
        continue
      }
      let sides = line.components(separatedBy: " = ")
      let open = sides[1].firstIndex(of: "(")!
      let close = sides[1].firstIndex(of: ")")!
      var operands: [String] = []
      for token in split(String(sides[1][sides[1].index(after: open)..<close])) {
        operands.append(try constant(token, &graph, &seed))
      }
      var attributes: OrderedDictionary<String, Attribute> = [:]
      for item in sides[1][sides[1].index(after: close)...].split(separator: " ") {
        let parts = item.split(separator: "=", maxSplits: 1).map(String.init)
        attributes[parts[0]] = attribute(parts[0], parts[1])
      }
      graph.insert(
        Node(
          name: "n\(graph.nodes.count)", opType: String(sides[1][..<open]), inputs: operands,
          outputs: sides[0].components(separatedBy: ", "), attributes: attributes))
    }
    let produced = Set(graph.nodes.flatMap(\.outputs))
    graph.inputs = inputs.map {
      ValueInfo(
        name: $0.0, dataType: .float32,
        dimensions: $0.1.map { $0 < 0 ? .symbolic("N") : .fixed($0) })
    }
    graph.outputs = outputs.filter { produced.contains($0) }.map {
      ValueInfo(name: $0, dataType: nil, dimensions: nil)
    }
    try graph.validateAndSort()
    return graph
  }

  /// Splits at commas that are not inside a constant.
  private static func split(_ text: String) -> [String] {
    var tokens: [String] = []
    for piece in text.components(separatedBy: ",") {
      if let first = piece.first, first.isNumber || first == "-" {
        tokens[tokens.count - 1] += "," + piece
      } else {
        tokens.append(piece.trimmingCharacters(in: .whitespaces))
      }
    }
    return tokens
  }

  private static func constant(
    _ token: String, _ graph: inout Graph, _ seed: inout UInt64
  ) throws -> String {
    func noise() -> Float {
      seed = seed &* 6_364_136_223_846_793_005 &+ 1_442_695_040_888_963_407
      return Float(Int64(bitPattern: seed) >> 40) / Float(1 << 23)
    }
    func put(_ name: Substring, _ tensor: Tensor) -> String {
      graph.initializers[String(name)] = tensor
      return String(name)
    }
    if let open = token.firstIndex(of: "[") {
      let shape = token[token.index(after: open)...].dropLast().split(separator: ",")
        .map { Int($0)! }
      let isPositive = token[..<open].hasSuffix("+")
      let values = (0..<shape.reduce(1, *)).map { _ in
        isPositive ? abs(noise()) + 0.1 : noise()
      }
      return put(token[..<open].filter { $0 != "+" }[...], try Tensor(values, shape: shape))
    }
    if let colon = token.firstIndex(of: ":") {
      let list = token[token.index(after: colon)...]
      if list.hasPrefix("f") {
        let values = list.dropFirst().split(separator: ",").map { Float($0)! }
        return put(token[..<colon], try Tensor(values, shape: [values.count]))
      }
      return put(token[..<colon], try Tensor(list.split(separator: ",").map { Int64($0)! }))
    }
    if let tilde = token.firstIndex(of: "~") {
      let value = Float(token[token.index(after: tilde)...])!
      return put(token[..<tilde], try Tensor([value], shape: []))
    }
    return token
  }

  private static func attribute(_ key: String, _ text: String) -> Attribute {
    if text.hasPrefix("f"), let value = Float(text.dropFirst()) { return .float(value) }
    let numbers = text.split(separator: ",").compactMap { Int64($0) }
    if numbers.isEmpty { return .string(Array(text.utf8)) }
    return numbers.count == 1 && key != "axes" ? .int(numbers[0]) : .ints(numbers)
  }
}

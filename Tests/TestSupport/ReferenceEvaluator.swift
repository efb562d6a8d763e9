// SPDX-License-Identifier: Apache-2.0
// A slow evaluator in Double for small graphs, written from the operators' definitions.

import HalfstepGraph
import HalfstepNumerics

/// Evaluates small graphs in `Double` with plain loops: an oracle that shares no code with the engine.
package struct ReferenceEvaluator {
  /// A dense array of doubles.
  package struct Array64 {
    package var shape: [Int]
    package var values: [Double]

    package init(_ shape: [Int], _ values: [Double]) {
      precondition(shape.reduce(1, *) == values.count)
      self.shape = shape
      self.values = values
    }

    /// The element at an index that broadcasts against this array's shape.
    func broadcast(_ index: [Int]) -> Double {
      var offset = 0
      for axis in shape.indices {
        let i = index[index.count - shape.count + axis]
        offset = offset * shape[axis] + (shape[axis] == 1 ? 0 : i)
      }
      return values[offset]
    }
  }

  /// Runs a graph on the given inputs and returns every tensor by name.
  package static func run(
    _ graph: Graph, _ inputs: [String: Array64]
  ) throws -> [String: Array64] {
    var tensors = inputs
    for (name, tensor) in graph.initializers where tensor.dataType == .float32 {
      tensors[name] = Array64(tensor.shape.dimensions, try tensor.floats().map(Double.init))
    }
    for node in graph.nodes { tensors[node.outputs[0]] = try evaluate(node, tensors) }
    return tensors
  }

  struct Unsupported: Error { let operation: String }

  private static func evaluate(_ node: Node, _ tensors: [String: Array64]) throws -> Array64 {
    func argument(_ slot: Int) -> Array64 { tensors[node.inputs[slot]]! }
    switch node.opType {
    case "Conv": return convolve(node, argument(0), argument(1), node.input(2).map { tensors[$0]! })
    case "ConvTranspose":
      return deconvolve(node, argument(0), argument(1), node.input(2).map { tensors[$0]! })
    case "Gemm":
      let (a, b) = (argument(0), argument(1))
      let transposed = (node.intAttribute("transB") ?? 0) != 0
      let (rows, depth) = (a.shape[0], a.shape[1])
      let columns = b.shape[transposed ? 0 : 1]
      let alpha = Double(node.floatAttribute("alpha") ?? 1)
      let beta = Double(node.floatAttribute("beta") ?? 1)
      return fill([rows, columns]) { at in
        var sum = 0.0
        for k in 0..<depth {
          sum +=
            a.values[at[0] * depth + k]
            * b.values[transposed ? at[1] * depth + k : k * columns + at[1]]
        }
        return alpha * sum + (node.input(2).map { beta * tensors[$0]!.broadcast(at) } ?? 0)
      }
    case "MatMul":
      let (a, b) = (argument(0), argument(1))
      let (depth, columns) = (b.shape[0], b.shape[1])
      return fill(a.shape.dropLast() + [columns]) { at in
        let row = zip(a.shape, at).dropLast().reduce(0) { $0 * $1.0 + $1.1 }
        return (0..<depth).reduce(0.0) {
          $0 + a.values[row * depth + $1] * b.values[$1 * columns + at[at.count - 1]]
        }
      }
    case "BatchNormalization":
      let x = argument(0)
      let epsilon = Double(node.floatAttribute("epsilon") ?? 1e-5)
      let p = (1...4).map { argument($0).values }
      return fill(x.shape) { at in
        let c = at[1]
        return p[0][c] * (x.broadcast(at) - p[2][c]) / (p[3][c] + epsilon).squareRoot() + p[1][c]
      }
    case "Identity": return argument(0)
    case "Constant":
      guard case .tensor(let value)? = node.attributes["value"] else {
        throw Unsupported(operation: "Constant")
      }
      return Array64(value.shape.dimensions, try value.floats().map(Double.init))
    case "Relu": return map(argument(0)) { max($0, 0) }
    case "Sigmoid": return map(argument(0)) { 1 / (1 + exponential(-$0)) }
    case "LeakyRelu":
      let slope = Double(node.floatAttribute("alpha") ?? 0.01)
      return map(argument(0)) { $0 < 0 ? slope * $0 : $0 }
    case "PRelu":
      let (x, slope) = (argument(0), argument(1))
      return fill(x.shape) { at in
        let value = x.broadcast(at)
        return value < 0 ? value * slope.broadcast(at) : value
      }
    case "Clip":
      let low =
        node.input(1).map { tensors[$0]!.values[0] }
        ?? node.floatAttribute("min").map(Double.init) ?? -.infinity
      let high =
        node.input(2).map { tensors[$0]!.values[0] }
        ?? node.floatAttribute("max").map(Double.init) ?? .infinity
      return map(argument(0)) { min(max($0, low), high) }
    case "Add": return pairwise(argument(0), argument(1), +)
    case "Mul": return pairwise(argument(0), argument(1), *)
    case "Min": return pairwise(argument(0), argument(1), min)
    case "GlobalAveragePool":
      let x = argument(0)
      let area = x.shape[2] * x.shape[3]
      return fill([x.shape[0], x.shape[1], 1, 1]) { at in
        let first = (at[0] * x.shape[1] + at[1]) * area
        return x.values[first..<first + area].reduce(0, +) / Double(area)
      }
    case "MaxPool":  // kernel and stride 2 only
      let x = argument(0)
      return fill([x.shape[0], x.shape[1], x.shape[2] / 2, x.shape[3] / 2]) { at in
        var best = -Double.infinity
        for (dy, dx) in [(0, 0), (0, 1), (1, 0), (1, 1)] {
          best = max(best, x.broadcast([at[0], at[1], 2 * at[2] + dy, 2 * at[3] + dx]))
        }
        return best
      }
    case "Concat":
      let parts = node.inputs.map { tensors[$0]! }
      var shape = parts[0].shape
      shape[1] = parts.map { $0.shape[1] }.reduce(0, +)
      return fill(shape) { at in
        var at = at
        for part in parts {
          if at[1] < part.shape[1] { return part.broadcast(at) }
          at[1] -= part.shape[1]
        }
        return .nan
      }
    case "Flatten":
      let x = argument(0)
      return Array64([x.shape[0], x.values.count / x.shape[0]], x.values)
    default: throw Unsupported(operation: node.opType)
    }
  }

  private static func fill(_ shape: [Int], _ body: ([Int]) -> Double) -> Array64 {
    var values: [Double] = []
    let count = shape.reduce(1, *)
    values.reserveCapacity(count)
    var at = [Int](repeating: 0, count: shape.count)
    for _ in 0..<count {
      values.append(body(at))
      for axis in shape.indices.reversed() {
        at[axis] += 1
        if at[axis] < shape[axis] { break }
        at[axis] = 0
      }
    }
    return Array64(shape, values)
  }

  private static func map(_ x: Array64, _ body: (Double) -> Double) -> Array64 {
    Array64(x.shape, x.values.map(body))
  }

  private static func pairwise(
    _ a: Array64, _ b: Array64, _ body: (Double, Double) -> Double
  ) -> Array64 {
    let rank = max(a.shape.count, b.shape.count)
    func extent(_ x: Array64, _ axis: Int) -> Int {
      let own = axis - (rank - x.shape.count)
      return own < 0 ? 1 : x.shape[own]
    }
    let shape = (0..<rank).map { max(extent(a, $0), extent(b, $0)) }
    return fill(shape) { body(a.broadcast($0), b.broadcast($0)) }
  }

  private static func convolve(
    _ node: Node, _ x: Array64, _ w: Array64, _ bias: Array64?
  ) -> Array64 {
    let groups = node.intAttribute("group") ?? 1
    let strides = node.intsAttribute("strides") ?? [1, 1]
    let pads = node.intsAttribute("pads") ?? [0, 0, 0, 0]
    let (height, width) = (x.shape[2], x.shape[3])
    let outHeight = (height + pads[0] + pads[2] - w.shape[2]) / strides[0] + 1
    let outWidth = (width + pads[1] + pads[3] - w.shape[3]) / strides[1] + 1
    return fill([x.shape[0], w.shape[0], outHeight, outWidth]) { at in
      let group = at[1] / (w.shape[0] / groups)
      var sum = bias?.values[at[1]] ?? 0
      for i in 0..<w.shape[1] {
        for ky in 0..<w.shape[2] {
          for kx in 0..<w.shape[3] {
            let (y, z) = (at[2] * strides[0] + ky - pads[0], at[3] * strides[1] + kx - pads[1])
            guard y >= 0, y < height, z >= 0, z < width else { continue }
            sum +=
              x.broadcast([at[0], group * w.shape[1] + i, y, z])
              * w.broadcast([at[1], i, ky, kx])
          }
        }
      }
      return sum
    }
  }

  private static func deconvolve(
    _ node: Node, _ x: Array64, _ w: Array64, _ bias: Array64?
  ) -> Array64 {
    let groups = node.intAttribute("group") ?? 1
    let strides = node.intsAttribute("strides") ?? [1, 1]
    let (inPer, outPer) = (x.shape[1] / groups, w.shape[1])
    var result = fill(
      [
        x.shape[0], outPer * groups, (x.shape[2] - 1) * strides[0] + w.shape[2],
        (x.shape[3] - 1) * strides[1] + w.shape[3],
      ]) { at in bias?.values[at[1]] ?? 0 }
    let shape = result.shape
    for n in 0..<x.shape[0] {
      for c in 0..<x.shape[1] {
        for (y, z) in (0..<x.shape[2]).flatMap({ y in (0..<x.shape[3]).map { (y, $0) } }) {
          for o in 0..<outPer {
            for ky in 0..<w.shape[2] {
              for kx in 0..<w.shape[3] {
                let k = c / inPer * outPer + o
                let row = (n * shape[1] + k) * shape[2] + y * strides[0] + ky
                result.values[row * shape[3] + z * strides[1] + kx] +=
                  x.broadcast([n, c, y, z]) * w.broadcast([c, o, ky, kx])
              }
            }
          }
        }
      }
    }
    return result
  }

  /// e to a power, by a series after halving the argument; keeps the oracle free of imports.
  private static func exponential(_ x: Double) -> Double {
    if abs(x) > 0.5 {
      let half = exponential(x / 2)
      return half * half
    }
    var (sum, term) = (1.0, 1.0)
    for k in 1..<20 {
      term *= x / Double(k)
      sum += term
    }
    return sum
  }
}

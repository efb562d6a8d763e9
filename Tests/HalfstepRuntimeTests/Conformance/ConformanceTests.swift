// SPDX-License-Identifier: Apache-2.0
// ONNX's backend tests: every case whose operators the runtime has.

import Foundation
import HalfstepFormats
import HalfstepGraph
import HalfstepNumerics
import HalfstepRuntime
import Testing

/// Folders with ONNX's backend tests, separated by colons; see `Tests/Conformance`.
private let folders = (ProcessInfo.processInfo.environment["HALFSTEP_ONNX_NODE_TESTS"] ?? "")
  .split(separator: ":").map(String.init)

@Suite struct ConformanceTests {
  enum Outcome {
    case passed
    /// The runtime says that it does not support the case.
    case declined(String)
    case failed(String)
  }

  @Test(.enabled(if: !folders.isEmpty, "HALFSTEP_ONNX_NODE_TESTS names no folder"))
  func backendTestsPass() throws {
    var passed: [String: Int] = [:]
    var declined: [String: [String]] = [:]
    var failed: [String] = []
    for folder in folders {
      for name in try FileManager.default.contentsOfDirectory(atPath: folder).sorted() {
        let url = URL(fileURLWithPath: folder).appendingPathComponent(name)
        let model = url.appendingPathComponent("model.onnx").path
        guard FileManager.default.fileExists(atPath: model) else { continue }
        let graph: Graph
        do {
          graph = try ONNXFile.load(path: model)
        } catch {
          declined["cannot be read", default: []].append("\(name): \(error)")
          continue
        }
        let types = Set(graph.nodes.map(\.opType)).sorted().joined(separator: "+")
        switch Self.run(graph, url) {
        case .passed: passed[types, default: 0] += 1
        case .declined(let reason): declined[types, default: []].append("\(name): \(reason)")
        case .failed(let reason): failed.append("\(name) (\(types)): \(reason)")
        }
      }
    }
    let total = passed.values.reduce(0, +)
    print(
      "conformance: \(total) passed, \(failed.count) failed, "
        + "\(declined.values.map(\.count).reduce(0, +)) declined")
    print(
      "passed: "
        + passed.sorted { $0.key < $1.key }.map { "\($0.key) \($0.value)" }
        .joined(separator: ", "))
    if ProcessInfo.processInfo.environment["HALFSTEP_ONNX_NODE_TESTS_VERBOSE"] != nil {
      for (types, reasons) in declined.sorted(by: { $0.key < $1.key }) {
        for reason in reasons { print("declined \(types): \(reason)") }
      }
    }
    for reason in failed { Issue.record("\(reason)") }
    // 933 pass with the node tests of onnx 1.23.2; a folder of another origin has fewer cases.
    if folders.contains(where: { $0.hasSuffix("/node") }) { #expect(total >= Self.floor) }
  }

  static let floor = 930

  static func run(_ graph: Graph, _ url: URL) -> Outcome {
    var tolerance = (relative: 1e-3, absolute: 1e-7)
    if let text = try? String(
      contentsOf: url.appendingPathComponent("tolerance.txt"), encoding: .utf8)
    {
      let numbers = text.split(whereSeparator: \.isWhitespace).compactMap { Double($0) }
      if numbers.count == 2 { tolerance = (numbers[0], max(numbers[1], 1e-7)) }
    }
    for index in 0... {
      let data = url.appendingPathComponent("test_data_set_\(index)")
      guard FileManager.default.fileExists(atPath: data.path) else { break }
      let outcome = run(graph, data, tolerance)
      guard case .passed = outcome else { return outcome }
    }
    return .passed
  }

  private static func run(
    _ graph: Graph, _ data: URL, _ tolerance: (relative: Double, absolute: Double)
  ) -> Outcome {
    var inputs: [String: Tensor] = [:]
    var expected: [Tensor] = []
    do {
      for (index, input) in graph.inputs.enumerated() {
        let file = data.appendingPathComponent("input_\(index).pb")
        guard FileManager.default.fileExists(atPath: file.path) else { continue }
        inputs[input.name] = try TensorFile.read(file)
      }
      for index in graph.outputs.indices {
        expected.append(try TensorFile.read(data.appendingPathComponent("output_\(index).pb")))
      }
    } catch {
      return .declined("data: \(error)")
    }
    var tolerance = tolerance
    for tensor in Array(inputs.values) + expected {
      // Empty inputs are refused on purpose.
      if tensor.count == 0 { return .declined("an empty tensor") }
      // The references round every intermediate result to 8 bits; the runtime computes in float32.
      if tensor.dataType == .bfloat16 { tolerance.relative = 0x1p-5 }
    }
    do {
      return try compare(graph, inputs, expected, tolerance)
    } catch let error as HalfstepError {
      guard error.code == .unsupportedOperator || error.code == .shapeMismatch else {
        return error.code == .typeMismatch ? .declined(error.message) : .failed(error.message)
      }
      // Operands that the runtime wants to know when it compiles become constants: all but the
      // first input, then all.
      let first = frozen(graph, inputs, keeping: 1, expected, tolerance)
      guard case .declined = first else { return first }
      return frozen(graph, inputs, keeping: 0, expected, tolerance)
    } catch {
      return .failed("\(error)")
    }
  }

  private static func frozen(
    _ graph: Graph, _ inputs: [String: Tensor], keeping count: Int, _ expected: [Tensor],
    _ tolerance: (relative: Double, absolute: Double)
  ) -> Outcome {
    var frozen = graph
    var rest = inputs
    for input in graph.inputs.dropFirst(count) {
      guard let tensor = rest.removeValue(forKey: input.name) else {
        return .declined("input '\(input.name)' has no tensor")
      }
      frozen.initializers[input.name] = tensor
    }
    frozen.inputs = Array(frozen.inputs.prefix(count))
    do {
      return try compare(frozen, rest, expected, tolerance)
    } catch let error as HalfstepError {
      let isDeclined = [.unsupportedOperator, .typeMismatch].contains(error.code)
      return isDeclined ? .declined(error.message) : .failed(error.message)
    } catch {
      return .failed("\(error)")
    }
  }

  private static func compare(
    _ graph: Graph, _ inputs: [String: Tensor], _ expected: [Tensor],
    _ tolerance: (relative: Double, absolute: Double)
  ) throws -> Outcome {
    let results = try Session(graph: graph).run(inputs)
    for (info, want) in zip(graph.outputs, expected) {
      guard let got = results[info.name] else { return .failed("no output '\(info.name)'") }
      guard got.shape == want.shape else {
        return .failed("'\(info.name)': expected shape \(want.shape), got \(got.shape)")
      }
      for (index, (a, b)) in zip(try got.doubles(), try want.doubles()).enumerated() {
        if a == b || (a.isNaN && b.isNaN) { continue }
        if !(abs(a - b) <= tolerance.absolute + tolerance.relative * abs(b)) {
          return .failed("'\(info.name)' at \(index): expected \(b), got \(a)")
        }
      }
    }
    return .passed
  }
}

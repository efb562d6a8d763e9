// SPDX-License-Identifier: Apache-2.0
// Golden numbers of AIMET 2.42, from the shared folder beside the checkout.

import Foundation
import HalfstepFormats
import HalfstepNumerics

/// Numbers that AIMET 2.42 computed; see `reference/golden/README.md` in the shared folder.
enum Golden {
  /// The folder with the golden files, or nil if there is none on this machine.
  static let folder: String? = {
    let environment = ProcessInfo.processInfo.environment["HALFSTEP_SHARED"]
    let beside = URL(fileURLWithPath: #filePath).deletingLastPathComponent()
      .appendingPathComponent("../../../shared").standardizedFileURL.path
    for shared in [environment, beside, "../shared"].compactMap(\.self) {
      let path = shared + "/reference/golden"
      if FileManager.default.fileExists(atPath: path) { return path }
    }
    print("golden tests skipped: no ../shared/reference/golden, and HALFSTEP_SHARED is not set")
    return nil
  }()

  static var isPresent: Bool { folder != nil }

  static func json(_ name: String) throws -> Any {
    let url = URL(fileURLWithPath: (folder ?? "") + "/" + name)
    return try JSONSerialization.jsonObject(with: Data(contentsOf: url))
  }

  static func arrays(_ name: String) throws -> [String: Tensor] {
    var result: [String: Tensor] = [:]
    for (key, value) in try NumPyFile.load(path: (folder ?? "") + "/" + name) {
      result[key] = value
    }
    return result
  }

  /// One range that AIMET chose, and the data it saw.
  struct Row: Sendable, CustomStringConvertible {
    var input: String
    var batches: String
    var axis: Int?
    var scheme: String
    var mode: String
    var bits: Int
    /// Values of each group: one for the tensor, or one for each channel.
    var groups: [[Float]]
    /// Scale and zero point (code of zero on the grid that `spec` describes) of each group.
    var choices: [(scale: Double, zero: Double)]

    var spec: QuantizerSpec {
      QuantizerSpec(
        bits: bits, isSymmetric: mode != "asym", isStrict: mode.contains("strict"),
        allowsUnsigned: mode.hasSuffix("_unsigned"))
    }
    /// The same with one scale for each group of `tensor`.
    var channelSpec: QuantizerSpec {
      var result = spec
      result.granularity = .perChannel(axis: 0)
      return result
    }
    /// The groups as rows of a matrix.
    var tensor: Tensor {
      get throws { try Tensor(groups.flatMap { $0 }, shape: [groups.count, groups[0].count]) }
    }
    var description: String {
      "\(input) batches \(batches) axis \(axis ?? -1) \(scheme) \(mode) \(bits) bits: \(choices)"
    }

    /// Decibels by which an encoding's noise exceeds that of AIMET's choice.
    ///
    /// Clipped values count `gamma` times. AIMET's scale is rounded to float, as when it is stored.
    /// Noise below 10⁻³⁰ counts as 10⁻³⁰: two perfect grids are equally good.
    func loss(of encoding: Encoding, group: Int, gamma: Double) -> Double {
      func noise(_ scale: Float, _ zero: Double) -> Double {
        groups[group].reduce(0) { sum, value in
          let steps = Double(value) / Double(scale)
          let low = Double(encoding.minimumCode) - zero
          let high = Double(encoding.maximumCode) - zero
          let inside = min(max(steps, low), high)
          let error = (steps - inside.rounded(.toNearestOrEven)) * Double(scale)
          return sum + error * error * (steps == inside ? 1 : gamma)
        }
      }
      let ours = noise(encoding.scales[group], Double(encoding.zeroPoints[group]))
      let theirs = noise(Float(choices[group].scale), choices[group].zero)
      return 10 * log10((ours + 1e-30) / (theirs + 1e-30))
    }
  }

  /// Values of each group in the batches that a row names.
  static func groups(_ input: Tensor, axis: Int?, batches: String) throws -> [[Float]] {
    let factor: Float? = ["2grow": 2.5, "2in": 0.7][batches]
    let values = try input.floats()
    let layout = try GroupLayout(
      axis.map { .perChannel(axis: $0) } ?? .perTensor, shape: input.shape)
    var gathered = values
    values.withUnsafeBufferPointer { source in
      gathered.withUnsafeMutableBufferPointer {
        layout.gather(source.baseAddress!, into: $0.baseAddress!, sizes: layout.groupSizes())
      }
    }
    var start = 0
    return layout.groupSizes().map { size in
      let first = Array(gathered[start..<start + size])
      start += size
      return first + (factor.map { factor in first.map { $0 * factor } } ?? [])
    }
  }

  /// Rows of `onnx_encodings.json`: [bits, scale, offset, minimum, maximum] a group.
  static func onnxRows() throws -> [Row] {
    let inputs = try arrays("inputs.npz")
    guard let file = try json("onnx_encodings.json") as? [String: Any],
      let rows = file["rows"] as? [[String: Any]]
    else { return [] }
    return try rows.compactMap { row in
      guard let name = row["t"] as? String, let input = inputs[name], let bits = row["bw"] as? Int,
        let mode = row["mode"] as? String, let encodings = row["enc"] as? [[Double]],
        let batches = row["batches"] as? String, let scheme = row["scheme"] as? String
      else { return nil }
      let axis = row["axis"] as? Int
      return Row(
        input: name, batches: batches, axis: axis, scheme: scheme, mode: mode, bits: bits,
        groups: try groups(input, axis: axis, batches: batches),
        choices: encodings.map { encoding in
          // The offset is the lowest code less the zero point.
          let lowest =
            mode == "asym" || encoding[2] >= 0
            ? 0 : -Double(1 << (bits - 1)) + (mode.contains("strict") ? 1 : 0)
          return (encoding[1], lowest - encoding[2])
        })
    }
  }

  /// Rows of the analyzers in `torch_encodings.json`: ends of the range for each group.
  static func torchRows() throws -> [Row] {
    let inputs = try arrays("inputs.npz")
    guard let file = try json("torch_encodings.json") as? [String: Any],
      let rows = file["analyzers"] as? [[String: Any]]
    else { return [] }
    return try rows.compactMap { row in
      guard let name = row["t"] as? String, let input = inputs[name], let bits = row["bw"] as? Int,
        let mode = row["mode"] as? String, let scheme = row["scheme"] as? String,
        let low = row["min"] as? [Double], let high = row["max"] as? [Double],
        let batches = row["batches"] as? String, let granularity = row["gran"] as? String
      else { return nil }
      let axis = granularity == "per_tensor" ? nil : Int(String(granularity.last ?? "0"))
      let steps = Double(1 << bits) - (mode == "strict" ? 2 : 1)
      return Row(
        input: name, batches: batches, axis: axis, scheme: scheme, mode: mode, bits: bits,
        groups: try groups(input, axis: axis, batches: batches),
        choices: zip(low, high).map { low, high in
          let scale = (high - low) / steps
          return (scale, mode == "asym" ? (-low / scale).rounded(.toNearestOrEven) : 0)
        })
    }
  }
}

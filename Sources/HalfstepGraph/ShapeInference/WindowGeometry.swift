// SPDX-License-Identifier: Apache-2.0
// Kernel, strides, dilations and paddings of convolutions and pools, checked.

import HalfstepNumerics

/// Kernel, strides, dilations and paddings of a sliding window along each spatial axis, checked so
/// that no arithmetic on them can overflow.
package struct WindowGeometry: Hashable, Sendable {
  package let kernel: [Int]
  package let strides: [Int]
  package let dilations: [Int]
  package let padBegin: [Int]
  /// Declared padding at the end; with `ceil_mode` the last window may reach beyond it.
  package let padEnd: [Int]
  /// Spatial extents of the input.
  package let input: [Int]
  /// Spatial extents of the output.
  package let output: [Int]

  /// Largest stride, dilation or kernel extent that is accepted.
  package static let attributeLimit = 1 << 24
  /// Largest padding that is accepted: oneDNN writes code for each window that lies in the padding,
  /// and ends the process when it runs out of memory for that.
  package static let paddingLimit = 1 << 16

  /// Reads and checks a node's attributes.
  ///
  /// - Parameters:
  ///   - input: Spatial extents of the input, each 1 or more.
  ///   - weightKernel: Spatial extents of the weights, which `kernel_shape` must equal; nil for
  ///     pools, which need `kernel_shape`.
  /// - Throws: `HalfstepError.invalidGraph` naming the node for a stride or dilation below 1, a
  ///   negative padding, a kernel larger than the padded input, or lists of the wrong length.
  package init(
    _ node: Node, input: [Int], weightKernel: [Int]? = nil
  ) throws(HalfstepError) {
    let rank = input.count
    func fail(_ text: String) -> HalfstepError {
      HalfstepError(.invalidGraph, "node '\(node.label)': \(text)", node: node.label)
    }
    func list(
      _ key: String, count: Int, minimum: Int, default value: Int
    ) throws(HalfstepError) -> [Int] {
      guard let values = node.intsAttribute(key), !values.isEmpty else {
        return [Int](repeating: value, count: count)
      }
      guard values.count == count else {
        throw fail("\(key) \(values): expected \(count) numbers")
      }
      for number in values where number < minimum || number > Self.attributeLimit {
        throw fail("\(key) \(values): expected numbers in \(minimum)...\(Self.attributeLimit)")
      }
      return values
    }
    let kernel: [Int]
    if let weightKernel {
      kernel = weightKernel
      let declared = try list("kernel_shape", count: rank, minimum: 1, default: 0)
      if node.intsAttribute("kernel_shape")?.isEmpty == false, declared != kernel {
        throw fail("kernel_shape \(declared): the weights have \(kernel)")
      }
    } else {
      guard let declared = node.intsAttribute("kernel_shape"), !declared.isEmpty else {
        throw fail("kernel_shape is missing")
      }
      kernel = try list("kernel_shape", count: rank, minimum: 1, default: 1)
    }
    for extent in kernel where extent < 1 || extent > Self.attributeLimit {
      throw fail("kernel \(kernel): expected extents in 1...\(Self.attributeLimit)")
    }
    let strides = try list("strides", count: rank, minimum: 1, default: 1)
    let dilations = try list("dilations", count: rank, minimum: 1, default: 1)
    let pads = try list("pads", count: 2 * rank, minimum: 0, default: 0)
    var padBegin = Array(pads[..<rank])
    var padEnd = Array(pads[rank...])
    let ceil = (node.intAttribute("ceil_mode") ?? 0) != 0
    let auto = node.stringAttribute("auto_pad") ?? "NOTSET"
    var output: [Int] = []
    for axis in 0..<rank {
      // Bounds of 2^24 each, extents below 2^48: no sum or product below overflows.
      let reach = (kernel[axis] - 1) * dilations[axis] + 1
      let step = strides[axis]
      switch auto {
      case "NOTSET", "":
        break
      case "VALID":
        padBegin[axis] = 0
        padEnd[axis] = 0
      case "SAME_UPPER", "SAME_LOWER":
        let count = (input[axis] + step - 1) / step
        let total = max(0, (count - 1) * step + reach - input[axis])
        padBegin[axis] = auto == "SAME_UPPER" ? total / 2 : total - total / 2
        padEnd[axis] = total - padBegin[axis]
      default:
        throw fail("auto_pad '\(auto)' is not known")
      }
      guard max(padBegin[axis], padEnd[axis]) <= Self.paddingLimit else {
        throw fail(
          "paddings \(padBegin) and \(padEnd): expected numbers in 0...\(Self.paddingLimit)")
      }
      let padded = input[axis] + padBegin[axis] + padEnd[axis]
      guard padded >= reach else {
        throw fail(
          "a kernel of \(reach) along axis \(axis + 2) exceeds the padded input of \(padded)")
      }
      var count = (padded - reach + (ceil ? step - 1 : 0)) / step + 1
      // A window that would begin in the padding behind the input is left out.
      if ceil, (count - 1) * step >= input[axis] + padBegin[axis] { count -= 1 }
      output.append(count)
    }
    self.kernel = kernel
    self.strides = strides
    self.dilations = dilations
    self.padBegin = padBegin
    self.padEnd = padEnd
    self.input = input
    self.output = output
  }

  /// A geometry with given paddings, for an input that already holds them.
  package func withoutPadding() -> WindowGeometry {
    var padded: [Int] = []
    for axis in input.indices { padded.append(input[axis] + padBegin[axis] + padEnd[axis]) }
    return WindowGeometry(
      kernel: kernel, strides: strides, dilations: dilations, input: padded, output: output)
  }

  private init(kernel: [Int], strides: [Int], dilations: [Int], input: [Int], output: [Int]) {
    self.kernel = kernel
    self.strides = strides
    self.dilations = dilations
    self.padBegin = [Int](repeating: 0, count: kernel.count)
    self.padEnd = padBegin
    self.input = input
    self.output = output
  }

  /// Extent of the window along an axis, with the gaps of its dilation.
  package func reach(_ axis: Int) -> Int { (kernel[axis] - 1) * dilations[axis] + 1 }

  /// Padding at the end that the windows really touch: more than declared with `ceil_mode`, less
  /// (even negative) if the last window ends early.
  package var touchedPadEnd: [Int] {
    input.indices.map {
      (output[$0] - 1) * strides[$0] + reach($0) - input[$0] - padBegin[$0]
    }
  }
}

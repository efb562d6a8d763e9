// SPDX-License-Identifier: Apache-2.0
// ConvTranspose.

import CDNNL
import HalfstepGraph
import HalfstepNumerics

/// A ConvTranspose node.
struct TransposedConvolution {
  let outputShape: Shape
  private let lowering: Lowering
  private let input: Value
  private let weights: Value
  private let bias: Value?
  private let groups: Int
  private let strides: [Int]
  private let dilations: [Int]
  private let padBegin: [Int]
  private let padEnd: [Int]
  /// Spatial extents before the paddings are cut off.
  private let full: [Int]

  init(_ node: Node, _ lowering: Lowering) throws(HalfstepError) {
    let input = try lowering.floatInput(node, 0)
    let weights = try lowering.floatInput(node, 1)
    let bias = try lowering.optionalFloatInput(node, 2)
    func fail(_ text: String) -> HalfstepError {
      HalfstepError(.shapeMismatch, "node '\(node.label)' \(text)", node: node.label)
    }
    guard (3...5).contains(input.rank), weights.rank == input.rank, input.count > 0,
      weights.count > 0
    else { throw fail("weight \(weights.shape): does not fit the input \(input.shape)") }
    let groups = node.intAttribute("group") ?? 1
    guard groups > 0, input.shape[1] % groups == 0, weights.shape[0] == input.shape[1] else {
      throw fail(
        "weight \(weights.shape) with \(groups) groups: does not fit the input \(input.shape)")
    }
    let (channels, overflow) = weights.shape[1].multipliedReportingOverflow(by: groups)
    guard !overflow else { throw fail("weight \(weights.shape) with \(groups) groups: too large") }
    if let bias, bias.dimensions != [channels] {
      throw fail("bias \(bias.shape): expected [\(channels)]")
    }
    let rank = input.rank - 2
    func list(_ key: String, _ count: Int, _ minimum: Int) throws(HalfstepError) -> [Int] {
      guard let values = node.intsAttribute(key), !values.isEmpty else {
        return [Int](repeating: minimum, count: count)
      }
      guard values.count == count,
        values.allSatisfy({ $0 >= minimum && $0 <= WindowGeometry.attributeLimit })
      else {
        throw HalfstepError(
          .invalidGraph, "node '\(node.label)': \(key) \(values) is out of range",
          node: node.label)
      }
      return values
    }
    strides = try list("strides", rank, 1)
    dilations = try list("dilations", rank, 1)
    let pads = try list("pads", 2 * rank, 0)
    let extra = try list("output_padding", rank, 0)
    let kernel = Array(weights.dimensions[2...])
    if let declared = node.intsAttribute("kernel_shape"), !declared.isEmpty, declared != kernel {
      throw fail("weight \(weights.shape): kernel_shape is \(declared)")
    }
    let wanted = node.intsAttribute("output_shape").flatMap { $0.isEmpty ? nil : $0 }
    if let wanted, wanted.count < rank { throw fail("output_shape \(wanted): too short") }
    let auto = node.stringAttribute("auto_pad") ?? "NOTSET"
    var padBegin = Array(pads[..<rank])
    var padEnd = Array(pads[rank...])
    var full: [Int] = []
    var spatial: [Int] = []
    for axis in 0..<rank {
      guard kernel[axis] <= WindowGeometry.attributeLimit,
        input.shape[axis + 2] <= WindowGeometry.attributeLimit
      else { throw fail("weight \(weights.shape): too large") }
      // Bounds of 2^24: nothing below overflows.
      let reach = (kernel[axis] - 1) * dilations[axis] + 1
      let extent = strides[axis] * (input.shape[axis + 2] - 1) + reach + extra[axis]
      full.append(extent)
      var size: Int?
      if let wanted {
        size = wanted[wanted.count - rank + axis]
      } else if auto.hasPrefix("SAME") {
        size = input.shape[axis + 2] * strides[axis]
      }
      if let size {
        guard size > 0, size <= WindowGeometry.attributeLimit else {
          throw fail("output_shape: \(size) is out of range")
        }
        let total = max(0, extent - size)
        padBegin[axis] =
          auto == "SAME_UPPER" || wanted != nil && auto == "NOTSET"
          ? total / 2 : total - total / 2
        padEnd[axis] = total - padBegin[axis]
        spatial.append(max(size, extent - total))
        full[axis] = max(extent, size)
      } else {
        guard extent > padBegin[axis] + padEnd[axis] else {
          throw fail("pads \(pads): nothing of \(extent) elements is left")
        }
        spatial.append(extent - padBegin[axis] - padEnd[axis])
      }
    }
    self.outputShape = try Shape([input.shape[0], channels] + spatial)
    self.full = full
    self.padBegin = padBegin
    self.padEnd = padEnd
    self.groups = groups
    self.lowering = lowering
    self.input = input
    self.weights = weights
    self.bias = bias
  }

  /// Computes the result without paddings and cuts them off: oneDNN would have to know paddings
  /// that are negative where `output_padding` exceeds them.
  func build(_ operations: [PostOperation]) throws(HalfstepError) -> Value {
    let kernel = Array(weights.dimensions[2...])
    var produced: [Int] = []
    for axis in kernel.indices {
      produced.append(
        strides[axis] * (input.shape[axis + 2] - 1) + (kernel[axis] - 1) * dilations[axis] + 1)
    }
    let direct = zip(zip(produced, outputShape.dimensions[2...]), zip(padBegin, padEnd)).allSatisfy
    {
      $0.0 - $1.0 - $1.1 == $0.1
    }
    let spatial = direct ? Array(outputShape.dimensions[2...]) : produced
    let zero = kernel.map { _ in 0 }
    let (begin, end) = direct ? (padBegin, padEnd) : (zero, zero)
    let channels = outputShape[1]
    let shape = try Shape([input.shape[0], channels] + spatial)
    let (inner, outer) = (input.shape[1] / groups, weights.shape[1])
    // ONNX keeps [C, K/g, …]; oneDNN reads [g, K/g, C/g, …].
    let taps = try Shape(kernel).elementCount
    let tapStrides = try Shape(kernel).strides
    let from = try MemoryDescriptor(
      [groups, outer, inner] + kernel,
      strides: [inner * outer * taps, taps, outer * taps] + tapStrides)
    let source = try MemoryDescriptor.any(input.dimensions)
    let any = try MemoryDescriptor.any([groups, outer, inner] + kernel)
    let target = try MemoryDescriptor.any(shape.dimensions)
    let shift = try bias.map { (_) throws(HalfstepError) in try MemoryDescriptor([channels]) }
    var operation = dnnl_deconvolution_desc_t()
    let (s, d) = (strides.map(Int64.init), dilations.map { Int64($0 - 1) })
    let (b, e) = (begin.map(Int64.init), end.map(Int64.init))
    let status = withDescriptors(source, any, shift, target) { source, any, shift, target in
      dnnl_dilated_deconvolution_forward_desc_init(
        &operation, dnnl_forward_inference, dnnl_deconvolution_direct, source, any, shift, target,
        s, d, b, e)
    }
    try Engine.check(status, "describing the transposed convolution of \(input.shape)")
    guard
      let descriptor = try PrimitiveDescriptor(
        operation: &operation, attributes: PrimitiveAttributes()),
      let sourceLayout = descriptor.descriptor(dnnl_query_src_md),
      let kernelLayout = descriptor.descriptor(dnnl_query_weights_md),
      let targetLayout = descriptor.descriptor(dnnl_query_dst_md)
    else {
      throw HalfstepError(
        .internalError, "oneDNN has no transposed convolution for \(input.shape)")
    }
    var reads: [Lowering.Binding] = [
      (DNNL_ARG_SRC, sourceLayout, try lowering.arranged(input, sourceLayout).buffer),
      (DNNL_ARG_WEIGHTS, kernelLayout, try lowering.prepared(weights, as: from, to: kernelLayout)),
    ]
    if let bias, let shift {
      reads.append((DNNL_ARG_BIAS, shift, try lowering.plain(bias).buffer))
    }
    var value = try lowering.emit(
      descriptor, label: "deconv", reads, result: shape, targetLayout, nil)
    if !direct {
      // What `output_padding` adds beyond the windows holds the bias alone.
      var before = [0, 0]
      var after = [0, 0]
      for axis in kernel.indices {
        before.append(-padBegin[axis])
        after.append(outputShape[axis + 2] + padBegin[axis] - produced[axis])
      }
      if let bias, after.contains(where: { $0 > 0 }) {
        let ones = [Int](repeating: 1, count: kernel.count)
        let column = try lowering.view(bias, as: Shape([channels] + ones))
        let bare = try lowering.arithmetic(.subtract, value, column)
        let cut = try lowering.padded(bare, before: before, after: after, value: 0)
        value = try lowering.arithmetic(.add, cut, column)
      } else {
        value = try lowering.padded(value, before: before, after: after, value: 0)
      }
    }
    return try lowering.apply(operations, to: value)
  }
}

// SPDX-License-Identifier: Apache-2.0
// Conv, and what convolutions and matrix products share: a layer with operations on its result.

import CDNNL
import HalfstepGraph
import HalfstepNumerics

let convolutionOperators: [String: OperatorBuilder] = [
  "Conv": OperatorBuilder { (lowering, node) throws(HalfstepError) in
    [try FusedLayer(node, lowering).build([])]
  },
  "ConvTranspose": OperatorBuilder { (lowering, node) throws(HalfstepError) in
    [try FusedLayer(node, lowering).build([])]
  },
]

/// A node that can carry operations on its result.
struct FusedLayer {
  let outputShape: Shape
  /// Emits the node with the given operations.
  let build: ([PostOperation]) throws(HalfstepError) -> Value

  init(_ node: Node, _ lowering: Lowering) throws(HalfstepError) {
    switch node.opType {
    case "Conv":
      let layer = try Convolution(node, lowering)
      outputShape = layer.outputShape
      build = { (operations) throws(HalfstepError) in try layer.build(operations) }
    case "ConvTranspose":
      let layer = try TransposedConvolution(node, lowering)
      outputShape = layer.outputShape
      build = { (operations) throws(HalfstepError) in try layer.build(operations) }
    default:
      let layer = try GeneralMatrixProduct(node, lowering)
      outputShape = layer.outputShape
      build = { (operations) throws(HalfstepError) in try layer.build(operations) }
    }
  }
}

/// A Conv node.
private struct Convolution {
  let lowering: Lowering
  let input: Value
  let weights: Value
  let bias: Value?
  let groups: Int
  let geometry: WindowGeometry
  let outputShape: Shape

  init(_ node: Node, _ lowering: Lowering) throws(HalfstepError) {
    let input = try lowering.floatInput(node, 0)
    let weights = try lowering.floatInput(node, 1)
    let bias = try lowering.optionalFloatInput(node, 2)
    func fail(_ text: String) -> HalfstepError {
      HalfstepError(.shapeMismatch, "node '\(node.label)' \(text)", node: node.label)
    }
    guard (3...5).contains(input.rank) else {
      throw fail("input \(input.shape): expected rank 3...5, got \(input.rank)")
    }
    guard weights.rank == input.rank, input.count > 0, weights.count > 0 else {
      throw fail("weight \(weights.shape): does not fit the input \(input.shape)")
    }
    let groups = node.intAttribute("group") ?? 1
    guard groups > 0, input.shape[1] % groups == 0, weights.shape[0] % groups == 0,
      weights.shape[1] == input.shape[1] / groups
    else {
      throw fail(
        "weight \(weights.shape) with \(groups) groups: does not fit the input \(input.shape)")
    }
    if let bias, bias.dimensions != [weights.shape[0]] {
      throw fail("bias \(bias.shape): expected [\(weights.shape[0])]")
    }
    let geometry = try WindowGeometry(
      node, input: Array(input.dimensions[2...]), weightKernel: Array(weights.dimensions[2...]))
    self.outputShape = try Shape([input.shape[0], weights.shape[0]] + geometry.output)
    // oneDNN's kernels assume that a window never lies in the padding as a whole.
    let isOutside = geometry.kernel.indices.contains {
      geometry.padBegin[$0] >= geometry.reach($0) || geometry.padEnd[$0] >= geometry.reach($0)
    }
    if isOutside {
      let before = [0, 0] + geometry.padBegin
      let after = [0, 0] + geometry.padEnd
      self.input = try lowering.padded(input, before: before, after: after, value: 0)
      self.geometry = geometry.withoutPadding()
    } else {
      self.input = input
      self.geometry = geometry
    }
    self.lowering = lowering
    self.weights = weights
    self.bias = bias
    self.groups = groups
  }

  func build(_ operations: [PostOperation]) throws(HalfstepError) -> Value {
    let isBlocked = try prefersBlocks()
    return try lowering.emitFused(
      operations,
      describe: { (attributes) throws(HalfstepError) in
        try descriptor(attributes, isBlocked: isBlocked)
      },
      emit: { (descriptor, attachment) throws(HalfstepError) in
        try emit(descriptor, attachment)
      })
  }

  private var weightDimensions: [Int] {
    if groups == 1 { return weights.dimensions }
    return [groups, weights.shape[0] / groups] + weights.dimensions[1...]
  }

  /// Whether to ask for blocks of 16 channels where oneDNN would keep channels last.
  ///
  /// With AVX-512 it prefers channels-last, which took a fifth longer on MobileNetV2 (batch 4, one
  /// thread) and as long on ResNet-18. A rule on shapes and instruction sets, never on
  /// timing.
  private func prefersBlocks() throws(HalfstepError) -> Bool {
    let isDepthwise = groups == input.shape[1] && groups == outputShape[1]
    guard input.rank == 4, groups == 1 || isDepthwise, outputShape[1] >= Self.block,
      let free = try descriptor(PrimitiveAttributes(), isBlocked: false),
      free.implementation.hasPrefix("br"),
      let blocked = try descriptor(PrimitiveAttributes(), isBlocked: true)
    else { return false }
    // Some shapes have only reference code in this layout.
    return blocked.implementation.hasPrefix("jit")
  }

  private static let block = 16

  private func descriptor(
    _ attributes: PrimitiveAttributes, isBlocked: Bool
  ) throws(HalfstepError) -> PrimitiveDescriptor? {
    // Pictures of a few channels are read as they are.
    let source =
      isBlocked && input.shape[1] > 4
      ? try MemoryDescriptor(input.dimensions, tag: dnnl_nChw16c)
      : try MemoryDescriptor.any(input.dimensions)
    let kernel = try MemoryDescriptor.any(weightDimensions)
    let target =
      isBlocked
      ? try MemoryDescriptor(outputShape.dimensions, tag: dnnl_nChw16c)
      : try MemoryDescriptor.any(outputShape.dimensions)
    let shift = try bias.map { (value) throws(HalfstepError) in
      try MemoryDescriptor(value.dimensions)
    }
    var operation = dnnl_convolution_desc_t()
    let strides = geometry.strides.map(Int64.init)
    let dilations = geometry.dilations.map { Int64($0 - 1) }
    let padBegin = geometry.padBegin.map(Int64.init)
    let padEnd = geometry.touchedPadEnd.map(Int64.init)
    let status = withDescriptors(source, kernel, shift, target) { source, kernel, shift, target in
      dnnl_dilated_convolution_forward_desc_init(
        &operation, dnnl_forward_inference, dnnl_convolution_direct, source, kernel, shift, target,
        strides, dilations, padBegin, padEnd)
    }
    try Engine.check(status, "describing the convolution of \(input.shape) with \(weights.shape)")
    return try PrimitiveDescriptor(operation: &operation, attributes: attributes)
  }

  private func emit(
    _ descriptor: PrimitiveDescriptor, _ attachment: Attachment?
  ) throws(HalfstepError) -> Value {
    guard let source = descriptor.descriptor(dnnl_query_src_md),
      let kernel = descriptor.descriptor(dnnl_query_weights_md),
      let target = descriptor.descriptor(dnnl_query_dst_md)
    else { throw HalfstepError(.internalError, "oneDNN: a convolution without layouts") }
    let from = try MemoryDescriptor(weightDimensions)
    let prepared = try lowering.prepared(weights, as: from, to: kernel)
    var reads: [Lowering.Binding] = [
      (DNNL_ARG_SRC, source, try lowering.arranged(input, source).buffer),
      (DNNL_ARG_WEIGHTS, kernel, prepared),
    ]
    if let bias {
      reads.append(
        (DNNL_ARG_BIAS, try MemoryDescriptor(bias.dimensions), try lowering.plain(bias).buffer))
    }
    return try lowering.emit(
      descriptor, label: "conv", reads, result: outputShape, target, attachment)
  }
}

/// Calls `body` with pointers to descriptors, the third of which may be missing.
func withDescriptors<R>(
  _ a: MemoryDescriptor, _ b: MemoryDescriptor, _ c: MemoryDescriptor?, _ d: MemoryDescriptor,
  _ body: (
    UnsafePointer<dnnl_memory_desc_t>, UnsafePointer<dnnl_memory_desc_t>,
    UnsafePointer<dnnl_memory_desc_t>?, UnsafePointer<dnnl_memory_desc_t>
  ) -> R
) -> R {
  withUnsafePointer(to: a.raw) { a in
    withUnsafePointer(to: b.raw) { b in
      withUnsafePointer(to: d.raw) { d in
        guard let c else { return body(a, b, nil, d) }
        return withUnsafePointer(to: c.raw) { c in body(a, b, c, d) }
      }
    }
  }
}

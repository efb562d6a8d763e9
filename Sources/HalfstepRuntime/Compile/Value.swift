// SPDX-License-Identifier: Apache-2.0
// What the compiler knows of a tensor: shape, type, layout, and its elements if they are constant.

import HalfstepNumerics

/// What the compiler knows of a tensor.
final class Value {
  let shape: Shape
  /// Element type at run time; float16, bfloat16 and float64 are float32 here.
  let dataType: DataType
  /// Where the elements are; constants and values with a layout have one from the start.
  let buffer: Buffer
  /// How a float tensor lies in memory; nil if it is row-major.
  let layout: MemoryDescriptor?
  /// The elements, if they are known before the network runs; then row-major.
  let constant: Tensor?
  /// Whether the elements follow from initializers alone and are thus the same in every plan; holds
  /// the name under which prepared copies are kept.
  let staticName: String?
  /// Copies of this value in other layouts, made earlier in the plan.
  var copies: [(layout: MemoryDescriptor?, value: Value)] = []

  /// A computed tensor.
  init(shape: Shape, dataType: DataType, buffer: Buffer, layout: MemoryDescriptor? = nil) {
    self.shape = shape
    self.dataType = dataType
    self.buffer = buffer
    self.layout = layout
    self.constant = nil
    self.staticName = nil
  }

  /// A constant.
  init(constant tensor: Tensor, staticName: String?) {
    self.shape = tensor.shape
    self.dataType = tensor.dataType
    self.buffer = Buffer(constant: tensor.storage, byteCount: tensor.byteCount)
    self.layout = nil
    self.constant = tensor
    self.staticName = staticName
  }

  var dimensions: [Int] { shape.dimensions }
  var rank: Int { shape.rank }
  var count: Int { shape.elementCount }
  var isFloat: Bool { dataType == .float32 }
  var isPlain: Bool { layout == nil }

  /// Floats in memory, with the zeros that the layout adds.
  var storedCount: Int { layout?.elementCount ?? count }
  var paddingZeros: Int { storedCount - count }

  /// The layout in oneDNN's terms.
  ///
  /// - Throws: `HalfstepError.invalidArgument` if the tensor is empty or its rank is not in 1...12.
  func descriptor() throws(HalfstepError) -> MemoryDescriptor {
    if let layout { return layout }
    return try MemoryDescriptor(dimensions)
  }
}

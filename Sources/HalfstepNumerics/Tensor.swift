// SPDX-License-Identifier: Apache-2.0
// A dense row-major array with value semantics.

/// A dense row-major array; copies share storage until one of them is written.
public struct Tensor: Sendable {
  /// Type of the elements.
  public let dataType: DataType
  /// Extents, outermost first.
  public let shape: Shape
  /// Bytes; element 0 is the first.
  public private(set) var storage: TensorStorage

  /// Number of elements.
  public var count: Int { shape.elementCount }
  /// Bytes that the elements take; sub-byte elements are packed, low bits first, as in ONNX.
  public var byteCount: Int { Self.byteCount(of: dataType, count: count) }

  /// Bytes that `count` elements of a type take, rounded up; 0 for strings.
  public static func byteCount(of dataType: DataType, count: Int) -> Int {
    // `Shape` bounds count by 2^48, so the product cannot overflow.
    ((dataType.bitWidth ?? 0) * count + 7) / 8
  }

  /// Creates a tensor over existing storage.
  ///
  /// - Throws: `HalfstepError.shapeMismatch` if the storage is too small, `.typeMismatch` for strings.
  public init(_ dataType: DataType, shape: Shape, storage: TensorStorage) throws(HalfstepError) {
    guard dataType.bitWidth != nil else {
      throw HalfstepError(.typeMismatch, "tensor: strings have no dense storage")
    }
    let needed = Self.byteCount(of: dataType, count: shape.elementCount)
    guard storage.byteCount >= needed else {
      throw HalfstepError(
        .shapeMismatch,
        "tensor \(shape) of \(dataType): expected \(needed) bytes, got \(storage.byteCount)")
    }
    self.dataType = dataType
    self.shape = shape
    self.storage = storage
  }

  /// Creates a tensor of unspecified content.
  public init(uninitialized dataType: DataType, shape: Shape) throws(HalfstepError) {
    let bytes = Self.byteCount(of: dataType, count: shape.elementCount)
    try self.init(dataType, shape: shape, storage: TensorStorage(byteCount: bytes))
  }

  /// Creates a float tensor from values in row-major order.
  ///
  /// - Throws: `HalfstepError.shapeMismatch` if the number of values is not the shape's.
  public init(_ values: [Float], shape: [Int]) throws(HalfstepError) {
    try self.init(elements: values, .float32, shape: shape)
  }

  /// Creates a vector of 64-bit integers, the type of ONNX's shape operands.
  public init(_ values: [Int64]) throws(HalfstepError) {
    try self.init(elements: values, .int64, shape: [values.count])
  }

  /// Creates a tensor from values of any plain element type in row-major order.
  package init<Element: BitwiseCopyable>(
    elements: [Element], _ dataType: DataType, shape: [Int]
  ) throws(HalfstepError) {
    let shape = try Shape(shape)
    guard elements.count == shape.elementCount else {
      throw HalfstepError(
        .shapeMismatch,
        "tensor \(shape): expected \(shape.elementCount) values, got \(elements.count)")
    }
    guard dataType.bitWidth == MemoryLayout<Element>.stride * 8 else {
      throw HalfstepError(.typeMismatch, "tensor \(shape): \(Element.self) is not \(dataType)")
    }
    try self.init(uninitialized: dataType, shape: shape)
    elements.withUnsafeBytes { bytes in
      if let source = bytes.baseAddress {
        storage.baseAddress.copyMemory(from: source, byteCount: bytes.count)
      }
    }
  }

  /// The same elements under another shape of equal count; storage is shared.
  ///
  /// - Throws: `HalfstepError.shapeMismatch` if the counts differ.
  public func reshaped(_ shape: Shape) throws(HalfstepError) -> Tensor {
    guard shape.elementCount == count else {
      throw HalfstepError(.shapeMismatch, "cannot reshape \(self.shape) to \(shape)")
    }
    return try Tensor(dataType, shape: shape, storage: storage)
  }

  /// Calls `body` with the elements as floats.
  ///
  /// - Throws: `HalfstepError.typeMismatch` unless the tensor is float32.
  public func withFloats<R>(
    _ body: (UnsafeBufferPointer<Float>) throws(HalfstepError) -> R
  ) throws(HalfstepError) -> R {
    try withElements(.float32, body)
  }

  /// Calls `body` with the elements, which must be of the given type.
  package func withElements<Element: BitwiseCopyable, R>(
    _ expected: DataType, _ body: (UnsafeBufferPointer<Element>) throws(HalfstepError) -> R
  ) throws(HalfstepError) -> R {
    guard dataType == expected else {
      throw HalfstepError(.typeMismatch, "tensor \(shape): expected \(expected), got \(dataType)")
    }
    defer { withExtendedLifetime(storage) {} }
    let start = storage.baseAddress.assumingMemoryBound(to: Element.self)
    return try body(UnsafeBufferPointer(start: start, count: count))
  }

  /// Calls `body` with writable floats, copying first if the storage is shared or only lent to be read.
  ///
  /// - Throws: `HalfstepError.typeMismatch` unless the tensor is float32; `.outOfMemory`.
  public mutating func withMutableFloats<R>(
    _ body: (UnsafeMutableBufferPointer<Float>) throws(HalfstepError) -> R
  ) throws(HalfstepError) -> R {
    guard dataType == .float32 else {
      throw HalfstepError(.typeMismatch, "tensor \(shape): expected float32, got \(dataType)")
    }
    try makeUnique()
    defer { withExtendedLifetime(storage) {} }
    let start = storage.baseAddress.assumingMemoryBound(to: Float.self)
    return try body(UnsafeMutableBufferPointer(start: start, count: count))
  }

  /// Copies the storage unless this tensor alone refers to it and it may be written.
  package mutating func makeUnique() throws(HalfstepError) {
    if storage.isWritable && isKnownUniquelyReferenced(&storage) { return }
    let copy = try TensorStorage(byteCount: byteCount)
    copy.baseAddress.copyMemory(from: storage.baseAddress, byteCount: byteCount)
    storage = copy
  }

  /// The elements as an array.
  ///
  /// - Throws: `HalfstepError.typeMismatch` unless the tensor is float32.
  public func floats() throws(HalfstepError) -> [Float] {
    try withFloats { (values) throws(HalfstepError) in Array(values) }
  }

  /// The elements of an int64 or int32 tensor as integers.
  ///
  /// - Throws: `HalfstepError.typeMismatch` for another type.
  package func integers() throws(HalfstepError) -> [Int] {
    if dataType == .int32 {
      return try withElements(.int32) { (v: UnsafeBufferPointer<Int32>) throws(HalfstepError) in
        v.map(Int.init)
      }
    }
    return try withElements(.int64) { (v: UnsafeBufferPointer<Int64>) throws(HalfstepError) in
      v.map(Int.init)
    }
  }
}

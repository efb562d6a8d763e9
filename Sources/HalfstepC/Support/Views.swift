// SPDX-License-Identifier: Apache-2.0
// Turns strided views into tensors, and tensors into views.

import CHalfstep
import Halfstep
import HalfstepNumerics

extension Tensor {
  /// Reads a view for the duration of a call: without copying if it is dense and aligned.
  ///
  /// - Throws: `HalfstepError.invalidArgument` for a rank outside 0...32, negative or overflowing
  ///   extents, NULL data, strides that overflow; `.typeMismatch` for strings.
  init(viewing view: hs_tensor_view, _ name: String) throws(HalfstepError) {
    let layout = try ViewLayout(view, name)
    if let dense = try layout.dense {
      self = dense
    } else {
      self = try layout.copy()
    }
  }

  /// Copies a view.
  init(copying view: hs_tensor_view, _ name: String) throws(HalfstepError) {
    self = try ViewLayout(view, name).copy()
  }

  /// Borrows a dense view until nothing reads it any more.
  ///
  /// - Throws: As `init(viewing:_:)`, and `HalfstepError.invalidArgument` unless dense and aligned.
  init(
    borrowing view: hs_tensor_view, _ name: String, isWritable: Bool = false,
    release: @escaping @Sendable () -> Void
  ) throws(HalfstepError) {
    let layout = try ViewLayout(view, name)
    guard layout.isDense, let start = layout.start else {
      throw HalfstepError(
        .invalidArgument, "tensor '\(name)': expected dense aligned memory to borrow")
    }
    // Built first without the release action: a failure must not call it.
    _ = try Tensor(layout.dataType, shape: layout.shape, storage: layout.storage(start) {})
    self = try Tensor(
      layout.dataType, shape: layout.shape,
      storage: layout.storage(start, isWritable: isWritable, release: release))
  }
}

/// A view whose numbers were checked.
private struct ViewLayout {
  let dataType: DataType
  let shape: Shape
  let start: UnsafeRawPointer?
  let elementBytes: Int
  let byteCount: Int
  /// Bytes between neighbors; nil for dense views.
  let strides: [Int]?

  init(_ view: hs_tensor_view, _ name: String) throws(HalfstepError) {
    func fail(_ message: String) -> HalfstepError {
      HalfstepError(.invalidArgument, "tensor '\(name)': \(message)")
    }
    guard let dataType = DataType(rawValue: view.dtype) else {
      throw fail("unknown element type \(view.dtype)")
    }
    guard let bits = dataType.bitWidth else {
      throw HalfstepError(.typeMismatch, "tensor '\(name)': strings are not supported")
    }
    let rank = Int(view.rank)
    guard (0...Shape.maximumRank).contains(rank) else {
      throw fail("expected rank 0...\(Shape.maximumRank), got \(rank)")
    }
    guard rank == 0 || view.shape != nil else { throw fail("shape is NULL") }
    var dimensions: [Int] = []
    for axis in 0..<rank { dimensions.append(Int(view.shape[axis])) }
    do throws(HalfstepError) {
      shape = try Shape(dimensions)
    } catch {
      throw fail(error.message)
    }
    guard view.data != nil || shape.elementCount == 0 else { throw fail("data is NULL") }
    self.dataType = dataType
    start = view.data
    elementBytes = bits / 8
    byteCount = Tensor.byteCount(of: dataType, count: shape.elementCount)
    let (_, wraps) = UInt(bitPattern: start).addingReportingOverflow(UInt(byteCount))
    guard !wraps else { throw fail("shape \(shape) reaches past the end of memory") }

    guard let given = view.strides, rank > 0, shape.elementCount > 0 else {
      strides = nil
      return
    }
    guard bits >= 8 else {
      throw fail("elements of \(dataType) must be dense: strides must be NULL")
    }
    let strides = (0..<rank).map { Int(given[$0]) }
    let isDense = zip(zip(strides, shape.strides), dimensions).allSatisfy { stride, extent in
      extent == 1 || stride.0 == stride.1 * (bits / 8)
    }
    if isDense {
      self.strides = nil
      return
    }
    // The lowest and the highest byte must exist as addresses.
    var low = 0
    var high = bits / 8
    for (stride, extent) in zip(strides, dimensions) {
      let (span, overflow) = stride.multipliedReportingOverflow(by: extent - 1)
      let (sum, sumOverflow) = (span < 0 ? low : high).addingReportingOverflow(span)
      guard !overflow, !sumOverflow else { throw fail("strides \(strides) overflow") }
      if span < 0 { low = sum } else { high = sum }
    }
    let address = UInt(bitPattern: start)
    let (_, above) = address.addingReportingOverflow(UInt(high))
    guard !above, low.magnitude <= address else { throw fail("strides \(strides) overflow") }
    self.strides = strides
  }

  var isDense: Bool {
    guard strides == nil, let start else { return false }
    // Complex numbers are pairs; nothing is wider than 8 bytes.
    let alignment = min(max(elementBytes, 1), 8)
    return Int(bitPattern: start) % alignment == 0
  }

  func storage(
    _ start: UnsafeRawPointer, isWritable: Bool = false, release: @escaping @Sendable () -> Void
  ) -> TensorStorage {
    TensorStorage(
      borrowing: start, byteCount: byteCount, isWritable: isWritable, release: release)
  }

  /// A tensor over the view's memory; nil if that needs a copy.
  var dense: Tensor? {
    get throws(HalfstepError) {
      guard isDense, let start else { return nil }
      return try Tensor(dataType, shape: shape, storage: storage(start) {})
    }
  }

  func copy() throws(HalfstepError) -> Tensor {
    let tensor = try Tensor(uninitialized: dataType, shape: shape)
    guard shape.elementCount > 0, let start else { return tensor }
    let target = tensor.storage.baseAddress
    guard let strides else {
      target.copyMemory(from: start, byteCount: byteCount)
      return tensor
    }
    let inner = strides.count - 1
    let run = shape[inner]
    var position = [Int](repeating: 0, count: strides.count)
    var source = start
    var written = 0
    while true {
      copyRun(from: source, stride: strides[inner], to: target + written, count: run)
      written += run * elementBytes
      // The next row: carry from the innermost of the outer dimensions.
      var axis = inner - 1
      while axis >= 0 {
        position[axis] += 1
        source += strides[axis]
        if position[axis] < shape[axis] { break }
        source -= strides[axis] * shape[axis]
        position[axis] = 0
        axis -= 1
      }
      if axis < 0 { return tensor }
    }
  }

  private func copyRun(
    from source: UnsafeRawPointer, stride: Int, to target: UnsafeMutableRawPointer, count: Int
  ) {
    if stride == elementBytes {
      target.copyMemory(from: source, byteCount: count * elementBytes)
    } else if elementBytes == 4 {
      for index in 0..<count {
        let value = source.loadUnaligned(fromByteOffset: index * stride, as: UInt32.self)
        target.storeBytes(of: value, toByteOffset: index * 4, as: UInt32.self)
      }
    } else {
      for index in 0..<count {
        (target + index * elementBytes).copyMemory(
          from: source + index * stride, byteCount: elementBytes)
      }
    }
  }
}

/// Reads the named inputs of a call; they live as long as it, unless they are copied.
func inputs(
  _ names: UnsafePointer<UnsafePointer<CChar>?>?, _ values: UnsafePointer<hs_tensor_view>?,
  _ count: Int, isCopied: Bool = false
) throws(HalfstepError) -> [String: Tensor] {
  var result: [String: Tensor] = [:]
  if count == 0 { return result }
  let names = try required(names, "names")
  let values = try required(values, "values")
  for index in 0..<(try length(count, "count")) {
    let name = try text(names[index], "names")
    guard result[name] == nil else {
      throw HalfstepError(.invalidArgument, "input '\(name)' is given twice")
    }
    result[name] =
      isCopied
      ? try Tensor(copying: values[index], name) : try Tensor(viewing: values[index], name)
  }
  return result
}

extension hs_run_options {
  /// The names of the extra outputs.
  var extraOutputs: [String] {
    get throws(HalfstepError) { try texts(extra_outputs, extra_output_count, "extra_outputs") }
  }
}

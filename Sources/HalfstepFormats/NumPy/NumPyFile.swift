// SPDX-License-Identifier: Apache-2.0
// Reads NPY and NPZ files.

import HalfstepNumerics
import OrderedCollections

/// Reads NumPy's array files.
package enum NumPyFile {
  /// Arrays of an `.npz` by name, or the one array of an `.npy` under the empty name.
  ///
  /// The content decides, not the name. Arrays come out row-major and in this machine's byte order;
  /// members of an archive that are no arrays are left out.
  ///
  /// - Throws: `HalfstepError.fileAccess`, `.malformedFile` or `.outOfMemory`; the message names the
  ///   path and, in an archive, the member.
  package static func load(
    path: String
  ) throws(HalfstepError) -> OrderedDictionary<String, Tensor> {
    let file = try FileBuffer(path: path)
    do throws(HalfstepError) {
      if file.bytes.starts(with: NPYHeader.magic) {
        return ["": try tensor(file.bytes, owner: file)]
      }
      guard ZipArchive.isArchive(file.bytes) else {
        throw HalfstepError(.malformedFile, "neither an NPY nor an NPZ file")
      }
      return try arrays(ZipArchive(file.bytes), file)
    } catch {
      throw HalfstepError(error.code, "'\(path)': \(error.message)")
    }
  }

  /// Writes one array as `.npy`, whole or not at all.
  ///
  /// - Throws: `HalfstepError.typeMismatch` for an element type that NumPy lacks, `.fileAccess`
  ///   naming the path.
  package static func save(_ tensor: Tensor, path: String) throws(HalfstepError) {
    var file = try FileWriter(path: path)
    try file.append(try NPYHeader.serialize(tensor))
    try file.append(tensor.rawBytes)
    withExtendedLifetime(tensor) {}
    try file.commit()
  }

  private static func arrays(
    _ archive: ZipArchive, _ file: FileBuffer
  ) throws(HalfstepError) -> OrderedDictionary<String, Tensor> {
    var result: OrderedDictionary<String, Tensor> = [:]
    for member in archive.members where member.name.hasSuffix(".npy") {
      let name = String(member.name.dropLast(4))
      do throws(HalfstepError) {
        guard result[name] == nil else {
          throw HalfstepError(.malformedFile, "the archive holds it twice")
        }
        if let stored = try archive.stored(member) {
          let bytes = UnsafeRawBufferPointer(rebasing: file.bytes[stored])
          result[name] = try tensor(bytes, owner: file)
        } else {
          let storage = try archive.inflated(member)
          let bytes = UnsafeRawBufferPointer(start: storage.baseAddress, count: storage.byteCount)
          result[name] = try tensor(bytes, owner: storage)
        }
      } catch {
        throw HalfstepError(error.code, "array '\(name)': \(error.message)")
      }
    }
    return result
  }

  /// The array in `bytes`, which `owner` keeps alive; shares them where the layout allows.
  private static func tensor(
    _ bytes: UnsafeRawBufferPointer, owner: AnyObject & Sendable
  ) throws(HalfstepError) -> Tensor {
    let header = try NPYHeader(bytes)
    let data = UnsafeRawBufferPointer(rebasing: bytes[header.dataOffset...])
    let needed = Tensor.byteCount(of: header.dataType, count: header.shape.elementCount)
    guard data.count >= needed else {
      throw HalfstepError(
        .malformedFile,
        "array \(header.shape) of \(header.dataType): expected \(needed) bytes, got \(data.count)")
    }
    let isInPlace = !header.isSwapped && (!header.isFortranOrder || header.shape.rank < 2)
    if isInPlace, needed > 0, let start = data.baseAddress, UInt(bitPattern: start) % 64 == 0 {
      let storage = TensorStorage(borrowing: start, byteCount: needed) {
        withExtendedLifetime(owner) {}
      }
      return try Tensor(header.dataType, shape: header.shape, storage: storage)
    }
    let result = try Tensor(uninitialized: header.dataType, shape: header.shape)
    guard needed > 0, let start = data.baseAddress else { return result }
    let width = needed / header.shape.elementCount
    let target = result.storage.baseAddress
    if header.isFortranOrder && header.shape.rank > 1 {
      copyColumnMajor(start, to: target, header.shape, width: width)
    } else {
      target.copyMemory(from: start, byteCount: needed)
    }
    if header.isSwapped {
      let all = UnsafeMutableRawBufferPointer(start: target, count: needed)
      for element in stride(from: 0, to: needed, by: width) {
        all[element..<element + width].reverse()
      }
    }
    return result
  }

  /// Copies elements of `width` bytes from first-index-fastest to last-index-fastest order.
  private static func copyColumnMajor(
    _ source: UnsafeRawPointer, to target: UnsafeMutableRawPointer, _ shape: Shape, width: Int
  ) {
    var steps = [Int](repeating: width, count: shape.rank)
    for axis in 1..<shape.rank { steps[axis] = steps[axis - 1] * shape[axis - 1] }
    var index = [Int](repeating: 0, count: shape.rank)
    var offset = 0
    for element in 0..<shape.elementCount {
      (target + element * width).copyMemory(from: source + offset, byteCount: width)
      var axis = shape.rank - 1
      while axis >= 0 {
        index[axis] += 1
        offset += steps[axis]
        if index[axis] < shape[axis] { break }
        offset -= steps[axis] * shape[axis]
        index[axis] = 0
        axis -= 1
      }
    }
  }
}

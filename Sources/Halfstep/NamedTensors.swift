// SPDX-License-Identifier: Apache-2.0
// Tensors by name in a fixed order.

import HalfstepFormats
import HalfstepNumerics
import OrderedCollections

/// Tensors by name in a fixed order, such as what a run gives back.
public struct NamedTensors: Sendable, RandomAccessCollection {
  /// A name and its tensor.
  public typealias Element = (name: String, tensor: Tensor)

  private var storage: OrderedDictionary<String, Tensor>

  /// Creates an empty collection.
  public init() { storage = [:] }

  package init(_ storage: OrderedDictionary<String, Tensor>) { self.storage = storage }

  /// Reads a NumPy file: the arrays of an `.npz` by name, or the one array of an `.npy`, named "".
  ///
  /// - Parameter path: File to read.
  /// - Throws: `HalfstepError.fileAccess`; `.malformedFile` for a file that is not NumPy's;
  ///   `.typeMismatch` for an element type that tensors do not have.
  public init(contentsOfNumPyFile path: String) throws(HalfstepError) {
    storage = try NumPyFile.load(path: path)
  }

  /// Names in order.
  public var names: [String] { Array(storage.keys) }
  /// The same tensors without their order.
  public var dictionary: [String: Tensor] {
    Dictionary(uniqueKeysWithValues: storage.lazy.map { ($0.key, $0.value) })
  }

  /// The tensor of a name; nil if there is none. Setting appends a name that is new.
  public subscript(name: String) -> Tensor? {
    get { storage[name] }
    set { storage[name] = newValue }
  }

  /// Copies a tensor's memory unless this collection alone refers to it.
  package mutating func makeUnique(at position: Int) throws(HalfstepError) {
    try storage.values[position].makeUnique()
  }

  public var startIndex: Int { 0 }
  public var endIndex: Int { storage.count }
  public subscript(position: Int) -> Element {
    let element = storage.elements[position]
    return (element.key, element.value)
  }
}

// SPDX-License-Identifier: Apache-2.0
// Owned handles of oneDNN primitives, their descriptors and attributes.

import CDNNL
import HalfstepNumerics

/// What a primitive does besides its operation: post-operations and scratchpad in our memory.
final class PrimitiveAttributes {
  let handle: OpaquePointer
  private let postOperations: OpaquePointer
  /// How many post-operations there are so far.
  private(set) var count = 0

  init() throws(HalfstepError) {
    var attributes: OpaquePointer?
    try Engine.check(dnnl_primitive_attr_create(&attributes), "creating attributes")
    guard let attributes else { throw HalfstepError(.internalError, "oneDNN: no attributes") }
    var postOperations: OpaquePointer?
    let status = dnnl_post_ops_create(&postOperations)
    guard status == dnnl_success, let postOperations else {
      dnnl_primitive_attr_destroy(attributes)
      throw HalfstepError(.outOfMemory, "oneDNN: cannot create post-operations")
    }
    self.handle = attributes
    self.postOperations = postOperations
    try Engine.check(
      dnnl_primitive_attr_set_scratchpad_mode(attributes, dnnl_scratchpad_mode_user),
      "asking for the scratchpad's size")
  }

  deinit {
    dnnl_post_ops_destroy(postOperations)
    dnnl_primitive_attr_destroy(handle)
  }

  /// Applies an elementwise function to the result.
  func append(_ function: Eltwise) throws(HalfstepError) {
    try Engine.check(
      dnnl_post_ops_append_eltwise(
        postOperations, function.scale, function.algorithm, function.alpha, function.beta),
      "appending an elementwise function")
    count += 1
  }

  /// Combines the result with another tensor; its index is `count` before the call.
  func append(_ algorithm: dnnl_alg_kind_t, with other: MemoryDescriptor) throws(HalfstepError) {
    let status = withUnsafePointer(to: other.raw) {
      dnnl_post_ops_append_binary(postOperations, algorithm, $0)
    }
    try Engine.check(status, "appending a binary operation")
    count += 1
  }

  /// Adds what the destination held before.
  func appendSum() throws(HalfstepError) {
    try Engine.check(dnnl_post_ops_append_sum(postOperations, 1), "appending a sum")
    count += 1
  }

  /// Makes the attributes carry the post-operations appended so far.
  func seal() throws(HalfstepError) {
    try Engine.check(
      dnnl_primitive_attr_set_post_ops(handle, postOperations), "setting post-operations")
  }
}

/// An elementwise function of oneDNN.
struct Eltwise: Equatable {
  let algorithm: dnnl_alg_kind_t
  var alpha: Float = 0
  var beta: Float = 0
  /// Factor of the result; only for post-operations.
  var scale: Float = 1

  init(_ algorithm: dnnl_alg_kind_t, _ alpha: Float = 0, _ beta: Float = 0) {
    self.algorithm = algorithm
    self.alpha = alpha
    self.beta = beta
  }

  /// Whether 0 becomes 0, so that padding stays zero.
  var preservesZero: Bool {
    switch algorithm {
    case dnnl_eltwise_linear: beta == 0
    case dnnl_eltwise_clip, dnnl_eltwise_clip_v2: alpha <= 0 && beta >= 0
    case dnnl_eltwise_logistic, dnnl_eltwise_exp, dnnl_eltwise_log, dnnl_eltwise_soft_relu,
      dnnl_eltwise_logsigmoid, dnnl_eltwise_pow:
      false
    default: true
    }
  }
}

/// A primitive's chosen implementation and the layouts that it asks for.
final class PrimitiveDescriptor {
  let handle: OpaquePointer

  /// Takes ownership of a descriptor made by a special constructor (reorder, concatenation).
  init(owning handle: OpaquePointer) { self.handle = handle }

  /// Chooses an implementation; nil if oneDNN has none for this combination.
  init?(operation: UnsafeRawPointer, attributes: PrimitiveAttributes?) throws(HalfstepError) {
    var handle: OpaquePointer?
    let engine = try Engine.shared()
    let status = dnnl_primitive_desc_create(
      &handle, operation, attributes?.handle, engine.handle, nil)
    if status == dnnl_unimplemented { return nil }
    try Engine.check(status, "choosing an implementation")
    guard let handle else { return nil }
    self.handle = handle
  }

  deinit { dnnl_primitive_desc_destroy(handle) }

  /// A layout that the implementation asks for; `index` selects among several inputs.
  func descriptor(_ what: dnnl_query_t, index: Int32 = 0) -> MemoryDescriptor? {
    guard let raw = dnnl_primitive_desc_query_md(handle, what, index) else { return nil }
    guard raw.pointee.ndims > 0 else { return nil }
    return MemoryDescriptor(raw: raw.pointee)
  }

  /// The implementation's name, such as `jit:avx2`.
  var implementation: String {
    var text: UnsafePointer<CChar>?
    let status = dnnl_primitive_desc_query(handle, dnnl_query_impl_info_str, 0, &text)
    guard status == dnnl_success, let text else { return "" }
    return String(cString: text)
  }
}

/// A primitive that can run.
final class Primitive {
  let handle: OpaquePointer

  init(_ descriptor: PrimitiveDescriptor) throws(HalfstepError) {
    var handle: OpaquePointer?
    try Engine.check(dnnl_primitive_create(&handle, descriptor.handle), "creating a primitive")
    guard let handle else { throw HalfstepError(.internalError, "oneDNN: no primitive") }
    self.handle = handle
  }

  deinit { dnnl_primitive_destroy(handle) }
}

/// A tensor in memory that a primitive reads or writes; the address may change between runs.
final class Memory {
  let handle: OpaquePointer

  init(_ descriptor: MemoryDescriptor) throws(HalfstepError) {
    let engine = try Engine.shared()
    var handle: OpaquePointer?
    // A null address: none is allocated, `point(to:)` gives one before the first run.
    let status = withUnsafePointer(to: descriptor.raw) {
      dnnl_memory_create(&handle, $0, engine.handle, nil)
    }
    try Engine.check(status, "creating a memory object")
    guard let handle else { throw HalfstepError(.internalError, "oneDNN: no memory object") }
    self.handle = handle
  }

  deinit { dnnl_memory_destroy(handle) }

  func point(to address: UnsafeMutableRawPointer) throws(HalfstepError) {
    try Engine.check(dnnl_memory_set_data_handle(handle, address), "setting an address")
  }
}

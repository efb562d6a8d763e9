// SPDX-License-Identifier: Apache-2.0
// Constants of a session in the layouts that primitives ask for, shared between plans.

import CDNNL
import HalfstepNumerics

/// Constants of a session in the layouts that primitives ask for, shared between plans.
final class ConstantStore {
  private var prepared: [String: [(layout: MemoryDescriptor, storage: TensorStorage)]] = [:]
  /// Results of nodes that depend on initializers alone.
  var folded: [String: Tensor] = [:]

  /// A constant in another layout; made once if the constant has a name.
  func arranged(
    _ tensor: Tensor, name: String?, from: MemoryDescriptor, to: MemoryDescriptor
  ) throws(HalfstepError) -> TensorStorage {
    // The same weights may be read under several shapes (group split), so that both ends count.
    let key = name.map { "\($0) \(from.dimensions) \(from.strides)" }
    if let key, let known = prepared[key]?.first(where: { $0.layout == to }) {
      return known.storage
    }
    let storage = try TensorStorage(byteCount: to.byteCount)
    let source = Buffer(constant: tensor.storage, byteCount: tensor.byteCount)
    let target = Buffer(constant: storage, byteCount: to.byteCount)
    let descriptor = try PrimitiveDescriptor.reorder(from: from, to: to)
    var bindings: [Lowering.Binding] = [
      (DNNL_ARG_FROM, from, source), (DNNL_ARG_TO, to, target),
    ]
    if let scratchpad = descriptor.descriptor(dnnl_query_scratchpad_md), scratchpad.byteCount > 0 {
      let bytes = try TensorStorage(byteCount: scratchpad.byteCount)
      let buffer = Buffer(constant: bytes, byteCount: scratchpad.byteCount)
      bindings.append((DNNL_ARG_SCRATCHPAD, scratchpad, buffer))
      try PrimitiveCall(Primitive(descriptor), label: "reorder", bindings).run()
      withExtendedLifetime(bytes) {}
    } else {
      try PrimitiveCall(Primitive(descriptor), label: "reorder", bindings).run()
    }
    if let key { prepared[key, default: []].append((to, storage)) }
    return storage
  }
}

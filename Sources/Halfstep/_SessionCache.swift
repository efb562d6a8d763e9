// SPDX-License-Identifier: Apache-2.0
// Keeps what was compiled for a model's earlier runs.

import HalfstepGraph
import HalfstepNumerics
import HalfstepRuntime
import OrderedCollections
import Synchronization

/// The session of a model's last run. Runs of copies on several threads take turns.
final class SessionCache: Sendable {
  /// `Session` is not Sendable; it never leaves the lock.
  private struct Entry: @unchecked Sendable {
    let session: Session
    let extraOutputs: [String]
  }
  private let entry: Mutex<Entry?> = Mutex(nil)

  func run(
    _ graph: Graph, _ inputs: [String: Tensor], extraOutputs: [String]
  ) throws(HalfstepError) -> NamedTensors {
    let result = entry.withLock { entry in
      Result { () throws(HalfstepError) -> OrderedDictionary<String, Tensor> in
        if entry?.extraOutputs != extraOutputs {
          entry = nil
          entry = Entry(
            session: try Session(graph: graph, extraOutputs: extraOutputs),
            extraOutputs: extraOutputs)
        }
        return try entry?.session.run(inputs) ?? [:]
      }
    }
    return NamedTensors(try result.get().owned())
  }
}

extension OrderedDictionary<String, Tensor> {
  /// Copies tensors over borrowed memory (an output that is an input, unchanged): the caller may
  /// free that memory when the run is over.
  func owned() throws(HalfstepError) -> Self {
    var result = self
    for (name, tensor) in self where tensor.storage.isBorrowed {
      var copy = tensor
      try copy.makeUnique()
      result[name] = copy
    }
    return result
  }
}

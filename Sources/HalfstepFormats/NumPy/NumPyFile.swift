// SPDX-License-Identifier: Apache-2.0
// Reads NPY and NPZ files.

import HalfstepNumerics
import OrderedCollections

/// Reads NumPy's array files.
package enum NumPyFile {
  /// Arrays of an `.npz` by name, or the one array of an `.npy` under the empty name.
  package static func load(
    path: String
  ) throws(HalfstepError) -> OrderedDictionary<String, Tensor> {
    throw HalfstepError(.internalError, "under construction")
  }
  /// Writes one array as `.npy`, whole or not at all.
  package static func save(_ tensor: Tensor, path: String) throws(HalfstepError) {
    throw HalfstepError(.internalError, "under construction")
  }
}

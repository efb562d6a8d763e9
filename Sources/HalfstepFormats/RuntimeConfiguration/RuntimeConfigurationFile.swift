// SPDX-License-Identifier: Apache-2.0
// Reads runtime-configuration JSON and holds the built-in ones.

import HalfstepGraph
import HalfstepNumerics

/// Reads runtime-configuration JSON and holds the built-in ones.
package enum RuntimeConfigurationFile {
  /// Names of the built-in configurations.
  package static var builtInNames: [String] { [] }
  /// A built-in configuration by name, or the file at that path.
  package static func load(nameOrPath: String) throws(HalfstepError) -> RuntimeConfiguration {
    throw HalfstepError(.internalError, "under construction")
  }
  package static func parse(_ bytes: [UInt8]) throws(HalfstepError) -> RuntimeConfiguration {
    throw HalfstepError(.internalError, "under construction")
  }
}

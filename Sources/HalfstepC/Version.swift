// SPDX-License-Identifier: Apache-2.0
// Version of the library.

import CHalfstep

@_cdecl("hs_version") @implementation
public func hs_version() -> UnsafePointer<CChar>? {
  UnsafeRawPointer(versionText.utf8Start).assumingMemoryBound(to: CChar.self)
}

private let versionText: StaticString = "0.1.0"

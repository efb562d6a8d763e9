// SPDX-License-Identifier: Apache-2.0
// Exports: version, status names, threads.

import CHalfstep
import Halfstep

@_cdecl("hs_version") @implementation
public func hs_version() -> UnsafePointer<CChar>? { cString(versionText) }

@_cdecl("hs_status_name") @implementation
public func hs_status_name(_ status: hs_status) -> UnsafePointer<CChar>? {
  guard status != HS_OK else { return cString("HS_OK") }
  guard let code = HalfstepError.Code(rawValue: status) else { return cString("unknown status") }
  switch code {
  case .invalidArgument: return cString("HS_ERR_INVALID_ARGUMENT")
  case .shapeMismatch: return cString("HS_ERR_SHAPE_MISMATCH")
  case .typeMismatch: return cString("HS_ERR_TYPE_MISMATCH")
  case .unknownName: return cString("HS_ERR_UNKNOWN_NAME")
  case .invalidState: return cString("HS_ERR_INVALID_STATE")
  case .fileAccess: return cString("HS_ERR_FILE_ACCESS")
  case .malformedFile: return cString("HS_ERR_MALFORMED_FILE")
  case .unsupportedVersion: return cString("HS_ERR_UNSUPPORTED_VERSION")
  case .unsafePath: return cString("HS_ERR_UNSAFE_PATH")
  case .invalidConfiguration: return cString("HS_ERR_INVALID_CONFIGURATION")
  case .encodingMismatch: return cString("HS_ERR_ENCODING_MISMATCH")
  case .invalidGraph: return cString("HS_ERR_INVALID_GRAPH")
  case .unsupportedOperator: return cString("HS_ERR_UNSUPPORTED_OPERATOR")
  case .nonFiniteValue: return cString("HS_ERR_NON_FINITE_VALUE")
  case .emptyStatistics: return cString("HS_ERR_EMPTY_STATISTICS")
  case .numericFailure: return cString("HS_ERR_NUMERIC_FAILURE")
  case .outOfMemory: return cString("HS_ERR_OUT_OF_MEMORY")
  case .cancelled: return cString("HS_ERR_CANCELLED")
  case .internalError: return cString("HS_ERR_INTERNAL")
  }
}

@_cdecl("hs_set_thread_count") @implementation
public func hs_set_thread_count(
  _ count: Int32, _ error: UnsafeMutablePointer<hs_error>?
) -> hs_status {
  report(to: error) { () throws(HalfstepError) in
    guard (0...1024).contains(count) else {
      throw HalfstepError(.invalidArgument, "thread count: expected 0...1024, got \(count)")
    }
    ThreadCount.set(Int(count))
  }
}

@_cdecl("hs_thread_count") @implementation
public func hs_thread_count() -> Int32 { Int32(clamping: ThreadCount.current) }

private func cString(_ text: StaticString) -> UnsafePointer<CChar> {
  UnsafeRawPointer(text.utf8Start).assumingMemoryBound(to: CChar.self)
}

// SPDX-License-Identifier: Apache-2.0
// Element types of tensors.

/// The type of a tensor's elements; raw values are ONNX's `TensorProto.DataType` numbers.
public enum DataType: Int32, Hashable, Sendable, CaseIterable {
  case float32 = 1
  case uint8 = 2
  case int8 = 3
  case uint16 = 4
  case int16 = 5
  case int32 = 6
  case int64 = 7
  case string = 8
  case bool = 9
  case float16 = 10
  case float64 = 11
  case uint32 = 12
  case uint64 = 13
  case complex64 = 14
  case complex128 = 15
  case bfloat16 = 16
  case float8E4M3FN = 17
  case float8E4M3FNUZ = 18
  case float8E5M2 = 19
  case float8E5M2FNUZ = 20
  case uint4 = 21
  case int4 = 22
  case float4E2M1 = 23
  case float8E8M0 = 24
  case uint2 = 25
  case int2 = 26

  /// Bits that one element takes in storage; nil for strings.
  public var bitWidth: Int? {
    switch self {
    case .uint2, .int2: 2
    case .uint4, .int4, .float4E2M1: 4
    case .uint8, .int8, .bool, .float8E4M3FN, .float8E4M3FNUZ, .float8E5M2, .float8E5M2FNUZ,
      .float8E8M0:
      8
    case .uint16, .int16, .float16, .bfloat16: 16
    case .float32, .int32, .uint32: 32
    case .float64, .int64, .uint64, .complex64: 64
    case .complex128: 128
    case .string: nil
    }
  }
}

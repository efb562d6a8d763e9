// SPDX-License-Identifier: Apache-2.0
// Names of the engine's types that users of the Swift face meet.

import HalfstepNumerics

/// A dense row-major array with value semantics.
public typealias Tensor = HalfstepNumerics.Tensor
/// Reference-counted bytes behind a tensor: the library's, or memory that a caller owns.
public typealias TensorStorage = HalfstepNumerics.TensorStorage
/// The dimensions of a tensor, outermost first.
public typealias Shape = HalfstepNumerics.Shape
/// The type of a tensor's elements.
public typealias DataType = HalfstepNumerics.DataType
/// A failure that names what went wrong and where.
public typealias HalfstepError = HalfstepNumerics.HalfstepError
/// The integer grid of one tensor.
public typealias Encoding = HalfstepNumerics.Encoding
/// Which elements of a tensor share one scale and zero point.
public typealias Granularity = HalfstepNumerics.Granularity
/// How a range is chosen from the values that a quantizer saw.
public typealias RangeScheme = HalfstepNumerics.RangeScheme
/// What a quantizer is asked to be, before it has seen data.
public typealias QuantizerSpec = HalfstepNumerics.QuantizerSpec

/// The version of the library, such as "0.1.0".
public var halfstepVersion: String { versionText.description }

/// The version as static text; the Makefile reads this line.
package let versionText: StaticString = "0.1.0"

// SPDX-License-Identifier: Apache-2.0
// The Swift face: what a Swift user imports.

import HalfstepNumerics

public typealias HalfstepError = HalfstepNumerics.HalfstepError

// SPDX-License-Identifier: Apache-2.0
// What a target's runtime quantizes: the content of an AIMET runtime-configuration file.

import HalfstepNumerics
import OrderedCollections

/// What a target's runtime quantizes: the content of an AIMET runtime-configuration file.
///
/// A missing (nil) setting leaves the decision of the section before it: defaults, params, op_type,
/// supergroups, model_input, model_output, in this order.
package struct RuntimeConfiguration: Sendable {
  /// A number type and width that a target's kernels take.
  package struct KernelType: Hashable, Sendable {
    package var bits: Int
    package var isFloat: Bool
    package init(bits: Int, isFloat: Bool) {
      self.bits = bits
      self.isFloat = isFloat
    }
  }
  /// A combination of types that a target's kernels take; no parameter type for operators without.
  package struct Kernel: Hashable, Sendable {
    package var activation: KernelType
    package var parameter: KernelType?
    package init(activation: KernelType, parameter: KernelType?) {
      self.activation = activation
      self.parameter = parameter
    }
  }
  /// Settings of parameters of one kind (`weight`, `bias`).
  package struct Parameter: Hashable, Sendable {
    package var isQuantized: Bool?
    package var isSymmetric: Bool?
    package init(isQuantized: Bool? = nil, isSymmetric: Bool? = nil) {
      self.isQuantized = isQuantized
      self.isSymmetric = isSymmetric
    }
  }
  /// Settings of one operator type.
  package struct Operator: Sendable {
    package var isInputQuantized: Bool?
    package var isOutputQuantized: Bool?
    package var isSymmetric: Bool?
    package var isPerChannel: Bool?
    package var parameters: OrderedDictionary<String, Parameter> = [:]
    package var supportedKernels: [Kernel] = []
    package var constraintMinimum: Double?
    package var constraintMaximum: Double?
    package init() {}
  }

  // MARK: defaults
  package var outputsQuantized: Bool?
  package var outputsSymmetric: Bool?
  package var parametersQuantized: Bool?
  package var parametersSymmetric: Bool?
  package var isStrictSymmetric = false
  package var isUnsignedSymmetric = false
  package var isPerChannel = false
  package var supportedKernels: [Kernel] = []
  package var hardwareVersion: String?
  // MARK: other sections
  /// By parameter kind.
  package var parameters: OrderedDictionary<String, Parameter> = [:]
  /// By ONNX operator type.
  package var operators: OrderedDictionary<String, Operator> = [:]
  /// Chains of operator types of which only the last one's output is quantized.
  package var supergroups: [[String]] = []
  /// Names of graph patterns that count as one operator.
  package var supergroupPasses: [String] = []
  package var modelInputQuantized = false
  package var modelOutputQuantized = false

  package init() {}
}

// SPDX-License-Identifier: Apache-2.0
// What target hardware demands beyond the configuration: parameter widths, symmetry, shared grids.

import HalfstepNumerics
import OrderedCollections

extension _QuantizerBoard {
  private static let weightedTypes: Set<String> = ["Conv", "ConvTranspose", "Gemm", "MatMul"]
  /// Hardware that multiplies by 8-bit weights only.
  private static let eightBitHardware: Set<String> = ["V66", "V68", "V69"]

  /// A weight that is computed follows the symmetry of constant ones.
  mutating func applyWeightSymmetryToData(_ configuration: RuntimeConfiguration) {
    for operation in operations.list
    where Self.weightedTypes.contains(operation.type) && operation.parameters["weight"] == nil {
      guard let weight = operation.input(1), let source = effectiveQuantizer(of: weight) else {
        continue
      }
      let isSymmetric =
        configuration.operators[operation.type]?.parameters["weight"]?.isSymmetric
        ?? configuration.parametersSymmetric ?? false
      update(source.tensor) { $0.spec.isSymmetric = isSymmetric }
    }
  }

  /// Rules of single operators.
  mutating func applyOperatorRules(hardware: String?) {
    for operation in operations.list {
      switch operation.type {
      case _ where OperatorTraits.normalizations.contains(operation.type):
        applyNormalizationRule(operation, hardware)
      case "MatMul": applyMatMulRule(operation, hardware)
      case "ConvTranspose":
        let groups = graph.nodes[operation.nodes[0]].intAttribute("group") ?? 1
        if groups != 1, let weight = operation.parameters["weight"] {
          update(weight) { $0.spec.granularity = .perTensor }
        }
      default: break
      }
    }
  }

  private mutating func applyNormalizationRule(_ operation: _Operation, _ hardware: String?) {
    let output = operation.outputs.first.flatMap { self[$0] }.flatMap { $0.isEnabled ? $0 : nil }
    for tensor in operation.parameters.values {
      update(tensor) {
        guard $0.isEnabled else { return }
        $0.spec.bits = max($0.spec.bits, 8)
        if ["LayerNormalization", "BatchNormalization"].contains(operation.type) {
          if let hardware, Self.eightBitHardware.contains(hardware) { $0.spec.bits = 8 }
          $0.spec.isSymmetric = $0.spec.bits >= 16
        } else {
          $0.spec.isSymmetric = output?.spec.isSymmetric ?? false
          if let output { $0.spec.bits = output.spec.bits }
        }
      }
    }
  }

  /// Two computed operands: wide weights need wide, symmetric partners, or are not possible at all.
  private mutating func applyMatMulRule(_ operation: _Operation, _ hardware: String?) {
    guard let hardware, operation.parameters["weight"] == nil,
      let first = operation.input(0).flatMap({ effectiveQuantizer(of: $0) }),
      let second = operation.input(1).flatMap({ effectiveQuantizer(of: $0) })
    else { return }
    if Self.eightBitHardware.contains(hardware) {
      update(second.tensor) {
        $0.spec.isSymmetric = true
        $0.spec.bits = 8
      }
    } else if self[second.tensor]?.spec.bits == 16 {
      update(second.tensor) { $0.spec.isSymmetric = true }
      update(first.tensor) { $0.spec.bits = 16 }
    }
  }

  // MARK: Shared grids

  /// Gives tensors that must lie on one grid the same quantizer.
  mutating func tieQuantizers() {
    tieInputsToOutputs()
    tieOutputsToInputs()
    tieRecurrentStates()
  }

  /// Input, initial and final hidden state of a recurrent operator take the quantizer of its sequence
  /// of hidden states, and the initial cell state that of the final one.
  private mutating func tieRecurrentStates() {
    // A quantizer that several operators claim goes to the last.
    var replaced: OrderedDictionary<Int, Int> = [:]
    for operation in operations.list
    where operation.domain.isEmpty && OperatorTraits.recurrent.contains(operation.type) {
      // Without a grid of its own (an excluded layer's), a state has none to share.
      if let hidden = outputQuantizer(of: operation, 0), quantizers[hidden].isEnabled {
        let states = [
          inputQuantizer(of: operation, 0), outputQuantizer(of: operation, 1),
          inputQuantizer(of: operation, 5),
        ]
        for state in states { if let state { replaced[state] = hidden } }
      }
      if let cell = outputQuantizer(of: operation, 2), quantizers[cell].isEnabled,
        let initial = inputQuantizer(of: operation, 6)
      {
        replaced[initial] = cell
      }
    }
    for (old, new) in replaced { replaceQuantizer(old, by: new) }
  }

  /// Inputs of joining operators take the output's quantizer, through nested ones.
  private mutating func tieInputsToOutputs() {
    var visited: Set<Int> = []
    for start in operations.list.indices.reversed() where isJoining(start) {
      guard operations.list[start].outputs.count == 1,
        let output = operations.list[start].outputs.first, isEnabled(output)
      else { continue }
      var sources: [String] = []
      var constraints: [(Double?, Double?)] = []
      var stack = [start]
      while let position = stack.popLast() {
        guard visited.insert(position).inserted else { continue }
        for input in operations.list[position].inputs where types.isQuantizable(input) {
          let source = effectiveQuantizer(of: input)
          if let quantizer = source.flatMap({ self[$0.tensor] }),
            !constraints.contains(where: { $0 == (quantizer.minimum, quantizer.maximum) })
          {
            constraints.append((quantizer.minimum, quantizer.maximum))
          }
          guard outsideReaders(source?.tensor ?? input, source?.path ?? []).count <= 1 else {
            continue
          }
          if let source { sources.append(source.tensor) }
          if let producer = operations.producer[input], isJoining(producer) || keepsGrid(producer) {
            stack.append(producer)
          }
        }
      }
      if let only = constraints.first, constraints.count == 1 {
        update(output) { ($0.minimum, $0.maximum) = only }
      } else {
        sources.removeAll { self[$0]?.isConstrained ?? false }
      }
      for source in sources { tie(source, to: output) }
    }
  }

  /// Outputs of interpolating operators and Relu take the quantizer of the input.
  private mutating func tieOutputsToInputs() {
    for operation in operations.list where OperatorTraits.inputGridKeeping.contains(operation.type)
    {
      guard let input = operation.input(0), let source = effectiveQuantizer(of: input),
        let leader = self[source.tensor]
      else { continue }
      for output in operation.outputs {
        guard let follower = self[output], follower.isEnabled else { continue }
        if follower.isConstrained && !follower.hasSameConstraint(as: leader) {
          // Other readers of the input need its whole range; two different ranges cannot be one.
          let tensors = Set(
            [source.tensor, input] + source.path.flatMap { operations.list[$0].outputs })
          if leader.isConstrained
            || tensors.contains(where: { operations.consumers[$0]?.count != 1 })
          {
            continue
          }
        }
        update(source.tensor) { $0.absorb(follower) }
        tie(output, to: source.tensor)
      }
    }
  }

  /// Which quantizer an output has.
  private func outputQuantizer(of operation: _Operation, _ position: Int) -> Int? {
    position < operation.outputs.count ? assignment[operation.outputs[position]] : nil
  }

  /// Which quantizer shapes the values of an operand.
  private func inputQuantizer(of operation: _Operation, _ position: Int) -> Int? {
    operation.input(position).flatMap { effectiveQuantizer(of: $0) }.flatMap {
      assignment[$0.tensor]
    }
  }

  private func isJoining(_ position: Int) -> Bool {
    operations.list[position].domain.isEmpty
      && OperatorTraits.joining.contains(operations.list[position].type)
  }

  private func keepsGrid(_ position: Int) -> Bool {
    OperatorTraits.preservesGrid(
      operations.list[position].type, domain: operations.list[position].domain)
  }

  /// Operations that read a tensor, or one derived from it along a path, and are not on the path.
  private func outsideReaders(_ tensor: String, _ path: [Int]) -> Set<Int> {
    var readers = Set(operations.consumers[tensor] ?? [])
    for position in path { readers.formUnion(operations.readers(of: position)) }
    return readers.subtracting(path)
  }
}

extension _QuantizerBoard.Quantizer {
  /// Takes over the demands of a quantizer that is replaced by this one.
  fileprivate mutating func absorb(_ other: Self) {
    spec.bits = min(spec.bits, other.spec.bits)
    spec.isSymmetric = spec.isSymmetric || other.spec.isSymmetric
    spec.allowsUnsigned = spec.allowsUnsigned || other.spec.allowsUnsigned
    if !isConstrained { (minimum, maximum) = (other.minimum, other.maximum) }
    if spec.isSymmetric, isConstrained {
      // A symmetric grid needs both bounds; a lone lower bound leaves the range to the data.
      let bound = maximum.map { max(abs($0), abs(minimum ?? 0)) }
      minimum = bound.map { -$0 }
      maximum = bound
    }
  }
}

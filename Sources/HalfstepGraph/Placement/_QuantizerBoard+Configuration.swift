// SPDX-License-Identifier: Apache-2.0
// Applies the sections of a runtime configuration, later ones over earlier ones.

import HalfstepNumerics

extension _QuantizerBoard {
  /// Applies the sections of a configuration in their order.
  ///
  /// - Throws: `HalfstepError.invalidConfiguration` if two operators ask opposite things of a tensor.
  mutating func apply(_ configuration: RuntimeConfiguration) throws(HalfstepError) {
    applyDefaults(configuration)
    applyParameterKinds(configuration)
    try applyOperatorTypes(configuration)
    applySupergroups(configuration.supergroups)
    if configuration.modelInputQuantized {
      for name in graphInputs where operations.consumers[name] != nil {
        update(name) { $0.isEnabled = true }
      }
      for name in constantData { update(name) { $0.isEnabled = true } }
    }
    if configuration.modelOutputQuantized {
      for (position, operation) in operations.list.enumerated()
      where operations.readers(of: position).isEmpty {
        for name in operation.outputs { update(name) { $0.isEnabled = true } }
      }
    }
    applyGranularity(configuration)
    disableFusedBiases()
  }

  private mutating func applyDefaults(_ configuration: RuntimeConfiguration) {
    updateAll(.activation) {
      if let isOn = configuration.outputsQuantized { $0.isEnabled = isOn }
      if let isSymmetric = configuration.outputsSymmetric { $0.spec.isSymmetric = isSymmetric }
    }
    for name in graphInputs + constantData { update(name) { $0.isEnabled = false } }
    updateAll(.parameter) {
      if let isOn = configuration.parametersQuantized { $0.isEnabled = isOn }
      if let isSymmetric = configuration.parametersSymmetric { $0.spec.isSymmetric = isSymmetric }
    }
    updateAll {
      $0.spec.isStrict = configuration.isStrictSymmetric
      $0.spec.allowsUnsigned = configuration.isUnsignedSymmetric
    }
  }

  private mutating func applyParameterKinds(_ configuration: RuntimeConfiguration) {
    for operation in operations.list {
      for (kind, tensor) in operation.parameters {
        if let setting = configuration.parameters[kind] { apply(setting, to: tensor) }
      }
    }
  }

  private mutating func apply(_ setting: RuntimeConfiguration.Parameter, to tensor: String) {
    update(tensor) {
      guard $0.role == .parameter else { return }
      if let isOn = setting.isQuantized { $0.isEnabled = isOn }
      if let isSymmetric = setting.isSymmetric { $0.spec.isSymmetric = isSymmetric }
    }
  }

  // MARK: op_type

  private mutating func applyOperatorTypes(
    _ configuration: RuntimeConfiguration
  ) throws(HalfstepError) {
    for operation in operations.list
    where configuration.operators[operation.type] == nil
      && OperatorTraits.preservesGrid(operation.type, domain: operation.domain)
    {
      for name in operation.outputs { update(name) { $0.isEnabled = false } }
    }
    var switched: [String: (value: Bool, by: String)] = [:]
    var shaped: [String: (value: Bool, by: String)] = [:]
    for operation in operations.list {
      guard let settings = configuration.operators[operation.type] else { continue }
      let label = graph.nodes[operation.nodes.last!].label
      let inputs = operation.inputs.filter { self[$0]?.role == .activation }
      let outputs = operation.outputs.filter { self[$0] != nil }
      if let isOn = settings.isInputQuantized {
        try record(isOn, "quantized", inputs, label, in: &switched)
        for name in inputs { update(name) { $0.isEnabled = isOn } }
      }
      if let isOn = settings.isOutputQuantized {
        try record(isOn, "quantized", outputs, label, in: &switched)
        for name in outputs { update(name) { $0.isEnabled = isOn } }
      }
      if let isSymmetric = settings.isSymmetric {
        try record(isSymmetric, "symmetric", inputs + outputs, label, in: &shaped)
        for name in inputs + outputs { update(name) { $0.spec.isSymmetric = isSymmetric } }
      }
      if let minimum = settings.constraintMinimum {
        let maximum = settings.constraintMaximum
        for name in outputs {
          update(name) {
            $0.minimum = minimum
            $0.maximum = maximum
            if let maximum, minimum == -maximum { $0.spec.isSymmetric = true }
          }
        }
      }
      for (kind, tensor) in operation.parameters {
        if let setting = settings.parameters[kind] { apply(setting, to: tensor) }
      }
    }
  }

  /// Notes what an operator asks of tensors and refuses the opposite of an earlier request.
  private func record(
    _ value: Bool, _ what: String, _ tensors: [String], _ label: String,
    in requests: inout [String: (value: Bool, by: String)]
  ) throws(HalfstepError) {
    for tensor in tensors {
      if let earlier = requests[tensor], earlier.value != value {
        throw HalfstepError(
          .invalidConfiguration,
          "configuration, op_type: tensor '\(tensor)' would have to be \(earlier.value ? "" : "not ")"
            + "\(what) for '\(earlier.by)' and \(value ? "" : "not ")\(what) for '\(label)'",
          node: label)
      }
      requests[tensor] = (value, label)
    }
  }

  // MARK: supergroups

  /// Turns off the inner outputs of straight chains; longer chains win, then earlier ones.
  private mutating func applySupergroups(_ groups: [[String]]) {
    var matched: Set<Int> = []
    let ordered = groups.enumerated().sorted {
      ($1.element.count, $0.offset) < ($0.element.count, $1.offset)
    }
    for (_, types) in ordered where types.count > 1 {
      for start in operations.list.indices where operations.list[start].type == types[0] {
        guard !startsNoSupergroup(operations.list[start]), let chain = chain(types, from: start),
          matched.isDisjoint(with: chain)
        else { continue }
        matched.formUnion(chain)
        for position in chain.dropLast() {
          for name in operations.list[position].outputs { update(name) { $0.isEnabled = false } }
        }
      }
    }
  }

  private func chain(_ types: [String], from start: Int) -> [Int]? {
    var chain = [start]
    for type in types.dropFirst() {
      // A tensor that the caller receives has to exist, so nothing fuses over it.
      guard operations.list[chain.last!].outputs.allSatisfy({ !operations.outputs.contains($0) }),
        operations.list[chain.last!].outputs.reduce(
          0,
          {
            $0 + (operations.consumers[$1]?.count ?? 0)
          }) == 1,
        let next = operations.readers(of: chain.last!).first,
        operations.list[next].type == type
      else { return nil }
      chain.append(next)
    }
    return chain
  }

  /// Convolutions that targets run apart from the activation behind them: depthwise and 3-D ones.
  private func startsNoSupergroup(_ operation: _Operation) -> Bool {
    guard operation.domain.isEmpty, ["Conv", "ConvTranspose"].contains(operation.type) else {
      return false
    }
    let node = graph.nodes[operation.nodes[0]]
    if let data = node.input(0), let info = graph.inputs.first(where: { $0.name == data }),
      info.dimensions?.count == 5
    {
      return true
    }
    guard let weight = operation.parameters["weight"],
      let shape = operations.constants[weight]?.shape
    else { return false }
    if shape.rank == 5 { return true }
    let groups = node.intAttribute("group") ?? 1
    guard groups != 1, shape.rank >= 2 else { return false }
    return operation.type == "Conv" ? shape[1] == 1 : shape[0] == groups
  }

  // MARK: granularity

  private mutating func applyGranularity(_ configuration: RuntimeConfiguration) {
    for operation in operations.list
    where configuration.operators[operation.type]?.isPerChannel ?? configuration.isPerChannel {
      for tensor in operation.parameters.values {
        guard let shape = operations.constants[tensor]?.shape,
          let axis = channelAxis(operation, rank: shape.rank)
        else { continue }
        update(tensor) { $0.spec.granularity = .perChannel(axis: axis) }
      }
    }
  }

  /// Gives weights that have a scale for each output channel one for each run of input channels too.
  mutating func cutWeights(intoBlocksOf size: Int) {
    for operation in operations.list {
      guard let tensor = operation.parameters["weight"],
        let shape = operations.constants[tensor]?.shape, shape.rank >= 2,
        let channel = channelAxis(operation, rank: shape.rank),
        let input = inputAxis(operation, rank: shape.rank), shape[input] > size
      else { continue }
      update(tensor) {
        guard $0.spec.granularity == .perChannel(axis: channel) else { return }
        $0.spec.granularity = .perBlock(channelAxis: channel, axis: input, size: size)
      }
    }
  }

  /// The axis of a weight that counts its operator's input channels.
  private func inputAxis(_ operation: _Operation, rank: Int) -> Int? {
    switch operation.type {
    case "Conv": 1
    case "ConvTranspose": 0
    case "Gemm": operation.isTransposed ? 1 : 0
    case "MatMul": operation.isTransposed ? rank - 1 : rank - 2
    default: nil
    }
  }

  /// The axis of a parameter that counts its operator's output channels.
  private func channelAxis(_ operation: _Operation, rank: Int) -> Int? {
    if rank == 0 { return nil }
    if rank == 1 { return 0 }
    switch operation.type {
    case "Conv": return 0
    case "ConvTranspose": return 1
    case "Gemm": return operation.isTransposed ? 0 : 1
    case "MatMul": return operation.isTransposed ? rank - 2 : rank - 1
    default: return nil
    }
  }

  /// The bias of a MatMul and Add that run as one is added to the accumulator, unquantized.
  private mutating func disableFusedBiases() {
    for operation in operations.list where operation.type == "MatMul" {
      if let bias = operation.parameters["bias"] { update(bias) { $0.isEnabled = false } }
    }
  }
}

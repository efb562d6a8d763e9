// SPDX-License-Identifier: Apache-2.0
// Chooses grids: of constants from their values, of tie groups from what their tensors saw.

import HalfstepGraph
import HalfstepNumerics
import OrderedCollections

extension QuantizationSimulation {
  /// Names of the activations that share a grid, by leader, in graph order; enabled ones only.
  func tieGroups() -> OrderedDictionary<String, [String]> {
    var groups: OrderedDictionary<String, [String]> = [:]
    for (name, quantizer) in quantizers
    where quantizer.isEnabled && quantizer.site.role == .activation {
      groups[quantizer.site.tieLeader, default: []].append(name)
    }
    return groups
  }

  func isFrozen(_ tensor: String) -> Bool { quantizers[tensor]?.isFrozen ?? false }

  /// What the tensors of a group saw together; a constant sees itself, once.
  func mergedStatistics(_ members: [String]) throws(HalfstepError) -> RangeStatistics {
    var merged = RangeStatistics(keepsHistogram: options.scheme.needsHistogram)
    for member in members {
      if let seen = statistics[member] {
        try merged.merge(seen)
      } else if let constant = constants[member] {
        var seen = RangeStatistics(keepsHistogram: options.scheme.needsHistogram)
        try constant.withFloats { (values) throws(HalfstepError) in seen.observe(values) }
        guard !seen.sawNonFinite else {
          throw HalfstepError(
            .nonFiniteValue, "constant '\(member)' holds a NaN or an infinity")
        }
        try merged.merge(seen)
      }
    }
    return merged
  }

  /// The grids of several sites, by leader, each searched on one thread.
  func chooseEncodings(
    _ searches: [(leader: String, site: QuantizerSite, seen: RangeStatistics)]
  ) throws(HalfstepError) -> [String: Encoding] {
    var results = [Result<Encoding, HalfstepError>?](repeating: nil, count: searches.count)
    results.withUnsafeMutableBufferPointer { results in
      // Each index is written by one thread only.
      guard let results = results.baseAddress else { return }
      let grain = options.scheme.needsHistogram ? 1 : 256
      Parallel.forEachRange(searches.count, grain: grain) { _, range in
        for index in range {
          do throws(HalfstepError) {
            let search = searches[index]
            results[index] = .success(try chooseEncoding(search.site, search.seen))
          } catch {
            results[index] = .failure(error)
          }
        }
      }
    }
    var chosen: [String: Encoding] = [:]
    for (search, result) in zip(searches, results) { chosen[search.leader] = try result?.get() }
    return chosen
  }

  /// The grid of a site from statistics.
  func chooseEncoding(
    _ site: QuantizerSite, _ seen: RangeStatistics
  ) throws(HalfstepError) -> Encoding {
    do {
      return try seen.encoding(
        for: site.spec, scheme: options.scheme, fixedMinimum: site.fixedMinimum,
        fixedMaximum: site.fixedMaximum)
    } catch {
      throw HalfstepError(error.code, "tensor '\(site.tensor)': \(error.message)", node: error.node)
    }
  }

  /// Chooses the grid of a parameter from its values.
  func computeParameterEncoding(_ tensor: String) throws(HalfstepError) {
    guard let quantizer = quantizers[tensor], let value = constants[tensor] else { return }
    let encoding: Encoding
    do {
      encoding = try Encoding.make(
        for: value, spec: quantizer.site.spec, scheme: options.scheme)
    } catch {
      throw HalfstepError(error.code, "initializer '\(tensor)': \(error.message)", node: error.node)
    }
    try adopt(encoding, forParameter: tensor)
  }

  /// Gives rounded weights the grids that they were rounded to.
  ///
  /// Weights that were changed since then are not on their grids any more and get new ones.
  func adoptWeightEncodings() throws(HalfstepError) {
    for (name, encoding) in graph.weightEncodings {
      guard let quantizer = quantizers[name], quantizer.site.role == .parameter,
        let value = constants[name],
        let rounded = try? encoding.fakeQuantize(value), try rounded.floats() == value.floats()
      else { continue }
      try adopt(encoding, forParameter: name)
      quantizers[name]?.site.spec.adopt(encoding)
    }
  }

  /// The grid that a parameter would get if it held other values; nothing changes.
  ///
  /// - Parameters:
  ///   - values: Of the parameter's shape, float32.
  ///   - tensor: A parameter that has a quantizer.
  /// - Throws: `HalfstepError.unknownName` if the tensor has no quantizer; `.invalidArgument` if it is
  ///   no parameter; `.shapeMismatch`; `.typeMismatch` unless float32; `.nonFiniteValue`.
  package func parameterEncoding(
    for values: Tensor, of tensor: String
  ) throws(HalfstepError) -> Encoding {
    guard let quantizer = quantizers[tensor] else {
      throw HalfstepError(.unknownName, "tensor '\(tensor)' has no quantizer")
    }
    guard quantizer.site.role == .parameter, let constant = constants[tensor] else {
      throw HalfstepError(.invalidArgument, "tensor '\(tensor)' is no parameter")
    }
    guard constant.shape == values.shape else {
      throw HalfstepError(
        .shapeMismatch, "'\(tensor)': expected shape \(constant.shape), got \(values.shape)")
    }
    do {
      return try Encoding.make(
        for: values, spec: quantizer.site.spec, scheme: options.scheme)
    } catch {
      throw HalfstepError(error.code, "'\(tensor)': \(error.message)", node: error.node)
    }
  }

  /// Sets the grid of a parameter.
  func adopt(_ encoding: Encoding?, forParameter tensor: String) throws(HalfstepError) {
    if let encoding, let value = constants[tensor] { _ = try encoding.layout(for: value.shape) }
    roundedParameters[tensor] = nil
    quantizers[tensor]?.encoding = encoding
    invalidate(calibration: true)
  }

  /// The enabled parameters rounded to their grids; each is rounded once.
  ///
  /// Whoever only asks for grids, such as a simulation of live PyTorch modules, needs no second copy
  /// of the weights.
  func roundParameters() throws(HalfstepError) -> [String: Tensor] {
    for (name, quantizer) in quantizers where quantizer.site.role == .parameter {
      guard quantizer.isEnabled, roundedParameters[name] == nil,
        let encoding = quantizer.encoding, let value = constants[name]
      else { continue }
      roundedParameters[name] = try encoding.fakeQuantize(value)
    }
    return roundedParameters
  }

  /// Refuses weights and biases that are not finite.
  static func checkParameters(of graph: Graph) throws(HalfstepError) {
    var checked: Set<String> = []
    for node in graph.nodes where node.domain.isEmpty {
      for name in OperatorTraits.parameterInputs(of: node) where checked.insert(name).inserted {
        guard let tensor = graph.initializers[name], tensor.dataType == .float32 else { continue }
        var seen = RangeStatistics(keepsHistogram: false)
        try tensor.withFloats { (values) throws(HalfstepError) in seen.observe(values) }
        if seen.sawNonFinite {
          throw HalfstepError(
            .nonFiniteValue,
            "initializer '\(name)' of node '\(node.label)' holds a NaN or an infinity",
            node: node.label)
        }
      }
    }
  }
}

extension RangeScheme {
  /// Whether the scheme looks at more than the smallest and the largest value.
  var needsHistogram: Bool { self != .minMax }

  /// The name that encodings files use.
  var fileName: String {
    switch self {
    case .minMax: "min_max"
    case .sqnr: "post_training_tf_enhanced"
    case .percentile: "post_training_percentile"
    case .mse: "mse"
    case .entropy: "entropy"
    }
  }
}

extension QuantizerSite {
  /// Whether both bounds are prescribed.
  var isFullyFixed: Bool { fixedMinimum != nil && fixedMaximum != nil }
}

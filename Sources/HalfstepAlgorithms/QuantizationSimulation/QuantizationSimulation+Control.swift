// SPDX-License-Identifier: Apache-2.0
// Control of single quantizers.

import HalfstepGraph
import HalfstepNumerics

extension QuantizationSimulation {
  /// Turns a tensor's quantizer on or off.
  ///
  /// A quantizer that comes on keeps its grid, if it has one.
  ///
  /// - Throws: `HalfstepError.unknownName` if the tensor has none.
  package func setEnabled(_ isEnabled: Bool, for tensor: String) throws(HalfstepError) {
    let quantizer = try quantizer(of: tensor)
    guard quantizer.isEnabled != isEnabled else { return }
    quantizers[tensor]?.isEnabled = isEnabled
    if quantizer.site.role == .parameter {
      do {
        try adopt(quantizer.encoding, forParameter: tensor)
      } catch {
        quantizers[tensor]?.isEnabled = quantizer.isEnabled
        throw error
      }
    }
    invalidate(calibration: true)
  }

  /// Keeps a grid as it is, or lets go of it; the tensors of a tie group go together.
  ///
  /// - Throws: `HalfstepError.unknownName` if the tensor has no quantizer; `.invalidState` if a
  ///   quantizer without a grid would be frozen.
  package func setFrozen(_ isFrozen: Bool, for tensor: String) throws(HalfstepError) {
    let quantizer = try quantizer(of: tensor)
    if isFrozen && quantizer.encoding == nil {
      throw HalfstepError(
        .invalidState, "quantizer of '\(tensor)' has no encoding that could be frozen")
    }
    for member in group(of: quantizer) { quantizers[member]?.isFrozen = isFrozen }
  }

  /// Gives a tensor a grid; the tensors of a tie group all get it.
  ///
  /// - Throws: `HalfstepError.unknownName` if the tensor has no quantizer; `.invalidState` if it is
  ///   frozen; `.encodingMismatch` if the grid cannot belong to the tensor.
  package func setEncoding(_ encoding: Encoding, for tensor: String) throws(HalfstepError) {
    let quantizer = try changeable(tensor)
    if quantizer.site.role == .parameter {
      guard let shape = constants[tensor]?.shape,
        let count = try? encoding.granularity.groupCount(for: shape),
        count == encoding.scales.count
      else {
        throw HalfstepError(
          .encodingMismatch, "'\(tensor)' cannot have \(encoding.scales.count) scales")
      }
      try adopt(encoding, forParameter: tensor)
      quantizers[tensor]?.site.spec.adopt(encoding)
      return
    }
    guard encoding.granularity == .perTensor else {
      throw HalfstepError(
        .encodingMismatch, "tensor '\(tensor)' takes one scale, got \(encoding.scales.count)")
    }
    for member in group(of: quantizer) {
      quantizers[member]?.encoding = encoding
      quantizers[member]?.site.spec.adopt(encoding)
    }
    invalidate(calibration: false)
  }

  /// Changes what a tensor's quantizer is asked to be, and chooses its grid anew.
  ///
  /// An activation that has seen no data is left without a grid until encodings are computed. The
  /// tensors of a tie group change together.
  ///
  /// - Throws: `HalfstepError.unknownName` if the tensor has no quantizer; `.invalidState` if it is
  ///   frozen; `.invalidArgument` if the width or the granularity does not fit.
  package func setSpec(_ spec: QuantizerSpec, for tensor: String) throws(HalfstepError) {
    let quantizer = try changeable(tensor)
    guard QuantizerSpec.bitRange.contains(spec.bits) else {
      throw HalfstepError(
        .invalidArgument, "'\(tensor)': expected 2...16 bits, got \(spec.bits)")
    }
    if quantizer.site.role == .parameter {
      quantizers[tensor]?.site.spec = spec
      do {
        try computeParameterEncoding(tensor)
      } catch {
        quantizers[tensor] = quantizer
        throw error
      }
      return
    }
    guard spec.granularity == .perTensor else {
      throw HalfstepError(
        .invalidArgument, "tensor '\(tensor)': computed tensors take one scale")
    }
    try setActivation(quantizer) { $0.spec = spec }
  }

  /// Changes the width of a tensor's codes, 2...16, and chooses its grid anew.
  package func setBits(_ bits: Int, for tensor: String) throws(HalfstepError) {
    var spec = try quantizer(of: tensor).site.spec
    spec.bits = bits
    try setSpec(spec, for: tensor)
  }

  /// Holds a computed tensor's grid to bounds; nil leaves that end to the data.
  ///
  /// - Throws: `HalfstepError.unknownName` if the tensor has no quantizer; `.invalidState` if it is
  ///   frozen; `.invalidArgument` for a parameter, or bounds that are not finite or out of order.
  package func setRange(
    minimum: Double?, maximum: Double?, for tensor: String
  ) throws(HalfstepError) {
    let quantizer = try changeable(tensor)
    guard quantizer.site.role == .activation else {
      throw HalfstepError(.invalidArgument, "'\(tensor)' is a parameter; set its encoding instead")
    }
    try setActivation(quantizer) {
      $0.fixedMinimum = minimum
      $0.fixedMaximum = maximum
    }
  }

  // MARK: Helpers

  private func setActivation(
    _ quantizer: Quantizer, _ change: (inout QuantizerSite) -> Void
  ) throws(HalfstepError) {
    let members = group(of: quantizer)
    var site = quantizer.site
    change(&site)
    let seen = try mergedStatistics(members)
    var encoding: Encoding?
    if !seen.isEmpty || site.isFullyFixed { encoding = try chooseEncoding(site, seen) }
    for member in members {
      if var changed = quantizers[member]?.site {
        change(&changed)
        quantizers[member]?.site = changed
      }
      quantizers[member]?.encoding = encoding
    }
    invalidate(calibration: false)
  }

  /// Enabled tensors that share a quantizer's grid, itself included.
  private func group(of quantizer: Quantizer) -> [String] {
    if quantizer.site.role == .parameter || !quantizer.isEnabled { return [quantizer.site.tensor] }
    return quantizers.filter {
      $1.isEnabled && $1.site.role == .activation
        && $1.site.tieLeader == quantizer.site.tieLeader
    }.map(\.key)
  }

  private func quantizer(of tensor: String) throws(HalfstepError) -> Quantizer {
    guard let quantizer = quantizers[tensor] else {
      throw HalfstepError(.unknownName, "tensor '\(tensor)' has no quantizer")
    }
    return quantizer
  }

  private func changeable(_ tensor: String) throws(HalfstepError) -> Quantizer {
    let quantizer = try quantizer(of: tensor)
    guard !quantizer.isFrozen else {
      throw HalfstepError(.invalidState, "quantizer of '\(tensor)' is frozen")
    }
    return quantizer
  }
}

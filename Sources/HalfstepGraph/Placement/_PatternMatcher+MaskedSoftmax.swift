// SPDX-License-Identifier: Apache-2.0
// Finds attention masks that are written out as a selection before Softmax.

extension _PatternMatcher {
  /// `Softmax(Where(mask, x, ReduceMin(x) + m))` over the last of four axes, with a constant m of −20
  /// or less: a target masks inside its Softmax, so that no grid has to hold the masked values.
  ///
  /// The operation has the type `MaskedSoftmax`, so that bounds which a configuration states for
  /// Softmax do not apply, as in AIMET.
  func maskedSoftmax(_ position: Int) -> _Operation? {
    let softmax = graph.nodes[position]
    // Before operator set 13, Softmax without an axis works on all axes from the second.
    guard let axis = softmax.intAttribute("axis") ?? (graph.opset >= 13 ? -1 : nil),
      isLast(axis), let selection = softmax.input(0).flatMap({ inner($0, "Where") }),
      graph.nodes[selection].inputs.count == 3
    else { return nil }
    let (mask, data) = (graph.nodes[selection].inputs[0], graph.nodes[selection].inputs[1])
    guard rank(of: data).map({ $0 == 4 }) ?? true,
      let sum = inner(graph.nodes[selection].inputs[2], "Add"), graph.nodes[sum].inputs.count == 2
    else { return nil }
    let terms = graph.nodes[sum].inputs
    for (least, value) in [(0, 1), (1, 0)] {
      guard let offset = constants.scalar(terms[value]), offset <= -20,
        let minimum = inner(terms[least], "ReduceMin"), isMinimum(minimum, of: data)
      else { continue }
      // The mask's value sets up the operation and is not data.
      return operation(
        "MaskedSoftmax", [minimum, sum, selection, position], inputs: [data, mask, ""])
    }
    return nil
  }

  /// Whether a node keeps the smallest element of a tensor along its last axis.
  private func isMinimum(_ position: Int, of data: String) -> Bool {
    let node = graph.nodes[position]
    let axes =
      node.intsAttribute("axes")
      ?? node.input(1).flatMap { constants.source(of: $0) }.flatMap { constants[$0] }
      .flatMap { try? $0.integers() }
    guard node.input(0) == data, node.intAttribute("keepdims") ?? 1 != 0, let axes else {
      return false
    }
    return axes.count == 1 && isLast(axes[0])
  }

  /// Whether an axis of four is the last.
  private func isLast(_ axis: Int) -> Bool { axis == -1 || axis == 3 }

  /// Declared rank of a tensor, nil if there is none.
  private func rank(of tensor: String) -> Int? {
    let declared = graph.valueInfos[tensor] ?? graph.inputs.first { $0.name == tensor }
    return declared?.dimensions?.count
  }
}

# SPDX-License-Identifier: Apache-2.0
# Networks of keras.applications: same function, same simulation, tensor by tensor.
import keras
import numpy as np
import onnx
import onnxruntime
import pytest
from keras import layers, tree
from networks import APPLICATIONS, application, error_of_range

from halfstep.keras import (
    QuantizationSimModel,
    QuantizedLayer,
    equalize_model,
    fold_all_batch_norms,
)
from halfstep.keras._building import Building
from halfstep.keras._network import Network

#: Batch norms that nothing can take up: those before an activation that comes before the layer.
KEPT = {"DenseNet121": 62, "EfficientNetV2B0": 0}

# Sums of some thousand terms in float32, in another order: some 1e-6 of the range for each layer.
FUNCTION = 1e-4


def run(model, batch):
    return model(batch, training=False).numpy()


@pytest.mark.parametrize("name", APPLICATIONS)
def test_engine_folding_and_equalization_keep_the_function(name):
    model, batch = application(name)
    expected = run(model, batch)
    network = Network(model)
    engine = network.bound().run({network.inputs[0]: batch})[network.outputs[0]]
    assert error_of_range(engine, expected) < FUNCTION
    folded, folds = fold_all_batch_norms(model)
    norms = [one for one in model.layers if isinstance(one, layers.BatchNormalization)]
    kept = [one for one in folded.layers if isinstance(one, layers.BatchNormalization)]
    assert len(kept) == KEPT.get(name, 0) and len(folds) == len(norms) - len(kept)
    gone = {fold.batch_norm for fold in folds}
    # Keras orders layers by their distance to the output, which branches may change.
    inside = [one for one in network.layers.values() if isinstance(one, layers.Layer)]
    names = {one.name for one in inside} - gone
    assert {one.name for one in folded.layers[1:]} == names
    assert error_of_range(run(folded, batch), expected) < FUNCTION
    equalized = equalize_model(model)
    assert [one.name for one in equalized.layers] == [one.name for one in folded.layers]
    assert error_of_range(run(equalized, batch), expected) < FUNCTION
    # The model that was given is as it was.
    assert np.array_equal(run(model, batch), expected)


@pytest.fixture
def placed(monkeypatch):
    """Symbolic outputs of quantizers, and their tensors' names, of simulations made from now on."""
    found: dict[int, tuple[str, object]] = {}
    put = Building._put

    def recording(self, tensor, x):
        result = put(self, tensor, x)
        if result is not x:
            found[id(result)] = tensor, result
        return result

    monkeypatch.setattr(Building, "_put", recording)
    return found


@pytest.fixture
def inside(monkeypatch):
    """What quantizers inside of layers gave, by tensor, while layers run eagerly."""
    given: dict[str, np.ndarray] = {}
    quantize = QuantizedLayer._quantize

    def recording(self, suffix, x):
        result = quantize(self, suffix, x)
        if suffix in self._suffixes and hasattr(result, "numpy"):
            given[f"{self.name}/{suffix}"] = result.numpy()
        return result

    monkeypatch.setattr(QuantizedLayer, "_quantize", recording)
    return given


def in_kerass_order(sim, tensor, value, shape):
    """Return an engine's tensor in Keras's layout."""
    label = next(n.label for n in reversed(sim._network.builder.nodes) if tensor in n.outputs)
    known = sim._network.values[label]
    first = known.first is not None and not known.first.endswith("/first")
    if value.ndim > 2 and first:
        value = np.moveaxis(value, 1, -1)
    return value.reshape(shape)


def forced_in_keras(sim, placed, batch, theirs):
    """Run `sim.model`, each layer on what the engine has; return what quantizers gave."""
    graph = sim.model
    known = {id(graph.inputs[0]): keras.ops.convert_to_tensor(batch)}
    given = {}
    for depth in sorted(graph._nodes_by_depth, reverse=True):
        for node in graph._nodes_by_depth[depth]:
            if node.is_input:
                continue
            args, kwargs = node.arguments.fill_in(known)
            results = tree.flatten(node.operation(*args, **kwargs))
            for symbol, value in zip(node.outputs, results, strict=True):
                tensor, _ = placed.get(id(symbol), (None, None))
                if tensor in theirs:
                    want = theirs[tensor]
                    if tensor not in sim._network.inputs:
                        want = in_kerass_order(sim, tensor, want, value.shape)
                    given[tensor] = value.numpy(), want
                    value = keras.ops.convert_to_tensor(want)
                known[id(symbol)] = value
    return given


def forced_in_onnxruntime(path, source, batch, theirs):
    """Run a QDQ model, each layer on what the engine has; return what its pairs gave."""
    model = onnx.load(path)
    graph = model.graph
    constants = {one.name for one in graph.initializer}
    makers = {name: node for node in graph.node for name in node.output}
    pairs = {}
    for node in graph.node:
        maker = makers.get(node.input[0]) if node.op_type == "DequantizeLinear" else None
        if maker is not None and maker.input[0] not in constants:
            tensor = maker.output[0].removesuffix("_q")
            # A pair behind an operator that hands values on repeats its input's grid.
            if tensor in theirs:
                pairs[node.output[0]] = tensor
    for node in graph.node:
        for index, name in enumerate(node.input):
            if name in pairs:
                node.input[index] = f"{name}/forced"
    kind = onnx.TensorProto.FLOAT
    known = {one.name for one in graph.output}
    for name, tensor in pairs.items():
        shape = theirs[tensor].shape
        graph.input.append(onnx.helper.make_tensor_value_info(f"{name}/forced", kind, shape))
        if name not in known:
            graph.output.append(onnx.helper.make_tensor_value_info(name, kind, None))
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options)
    feeds = {f"{name}/forced": theirs[tensor] for name, tensor in pairs.items()}
    wanted = {one.name for one in session.get_inputs()}
    feeds = {name: value for name, value in {**feeds, source: batch}.items() if name in wanted}
    results = session.run(list(pairs), feeds)
    return {
        tensor: (result, theirs[tensor])
        for tensor, result in zip(pairs.values(), results, strict=True)
    }


@pytest.mark.parametrize("name", APPLICATIONS)
@pytest.mark.filterwarnings("error:.*stay unquantized")
def test_every_tensor_equals_the_engines_and_onnxruntimes(name, tmp_path, placed, inside, capsys):
    model, batch = application(name)
    folded, _ = fold_all_batch_norms(model)
    sim = QuantizationSimModel(folded)
    sim.compute_encodings(batch)
    engine = sim.engine()
    source, output = sim._network.inputs[0], sim._network.outputs[0]
    # A constant that is multiplied by or added, such as LayerScale's, counts as computed there.
    constants = sim._network.parameters.keys() | sim._network.builder.constants.keys()
    computed = [
        one.tensor
        for one in engine.quantizers
        if one.is_enabled and not one.is_parameter and one.tensor not in constants
    ]
    means = {out for n in sim._network.builder.nodes if n.op == "AveragePool" for out in n.outputs}
    theirs = engine.run({source: batch}, extra_outputs=[n for n in computed if n != output])
    engine.export_qdq(tmp_path / "q.onnx")

    # Teacher forcing: every layer works on the engine's tensors, so that what is compared is one
    # layer, not what a network of random weights makes of single steps further up.
    ours = forced_in_keras(sim, placed, batch, theirs)
    for tensor in inside.keys() - constants:
        value = inside[tensor]
        ours[tensor] = value, in_kerass_order(sim, tensor, theirs[tensor], value.shape)
    for what, given in (
        ("Keras", ours),
        ("onnxruntime", forced_in_onnxruntime(tmp_path / "q.onnx", source, batch, theirs)),
    ):
        assert given.keys() == set(computed), what
        moved = total = 0
        for tensor, (value, want) in given.items():
            off = np.rint(np.abs(value - want) / sim.quantizer(tensor).grid()[0])
            assert off.max() <= 1, (what, tensor)
            if tensor in means:
                # Means of four values on one grid: a quarter of the sums is half a step off it.
                assert off.mean() < 0.25, (what, tensor)
            else:
                moved, total = moved + int(off.sum()), total + off.size
        # Sums in another order are up to 1e-6 of the range off, and a range has 255 borders.
        assert moved / total < 1e-3, what
        with capsys.disabled():
            print(f"\n  {name}, {what}: {moved} of {total} values one step off, none more", end="")

    step = sim.quantizer(output).grid()[0]
    whole = np.rint(np.abs(run(sim.model, batch) - theirs[output]) / step)
    with capsys.disabled():
        print(f"\n  {name}, end to end: {(whole > 0).mean():.1%} off, {whole.max():.0f} at most")

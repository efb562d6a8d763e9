# SPDX-License-Identifier: Apache-2.0
# Exports torchvision architectures with seeded random weights to ONNX, batch norms kept.
"""Torchvision networks as ONNX test models.

Weights are random but seeded. Batch-norm statistics come from one seeded pass in training mode and
are then perturbed, so that activations keep a sane range at any depth while the statistics differ
from the data's (folding must use them, not re-measure them). Convolution weights get a random
scale per output channel, so that per-tensor and per-channel ranges differ and equalization has
work to do.

From a shell::

    python torchvision_models.py --out .build/models resnet18 mobilenet_v2
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import sys
import tempfile
import warnings
from pathlib import Path

import numpy as np

#: Each model's input height and width.
MODELS: dict[str, int] = {
    "resnet18": 224,
    "resnet50": 224,
    "mobilenet_v2": 224,
    "mobilenet_v3_small": 224,
    "mobilenet_v3_large": 224,
    "regnet_y_400mf": 224,
    "regnet_x_400mf": 224,
    "squeezenet1_1": 224,
    "densenet121": 224,
    "inception_v3": 299,
    "efficientnet_b0": 224,
}

INPUT = "input"
OUTPUT = "output"


def inputs(name: str, batch: int = 1, seed: int = 0, size: int | None = None) -> np.ndarray:
    """Return seeded pictures: smooth structure plus noise, mean near 0, unit deviation.

    Parameters
    ----------
    name : str
        A key of `MODELS`; only its input size matters, so that all models of a size share inputs.
    batch : int
        Number of pictures, N.
    seed : int
        Equal seeds give equal pictures; a longer batch begins with those of a shorter.
    size : int, optional
        Height and width instead of the model's own.

    Returns
    -------
    numpy.ndarray
        float32, ``[N, 3, size, size]``.
    """
    side = size or MODELS[name]
    pictures = np.empty((batch, 3, side, side), np.float32)
    for index in range(batch):
        rng = np.random.Generator(np.random.PCG64([seed, index]))
        total = 0.3 * rng.standard_normal((3, side, side))
        for cells in (3, 7, 17, 41):
            coarse = rng.standard_normal((3, cells, cells))
            at = np.linspace(0, cells - 1, side)
            low = np.minimum(at.astype(int), cells - 2)
            part = at - low
            rows = coarse[:, low] * (1 - part)[:, None] + coarse[:, low + 1] * part[:, None]
            total += rows[:, :, low] * (1 - part) + rows[:, :, low + 1] * part
        pictures[index] = total / total.std() + 0.2 * rng.standard_normal()
    return pictures


def _torchvision():
    """Import torchvision also beside a CPU-only torch.

    Its native extension is built against the CUDA torch and does not load beside the CPU wheel,
    and its import then stops at two detection operators that no classifier uses. Declaring them is
    enough.
    """
    import torch

    try:
        import torchvision
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
        for module in [
            m for m in sys.modules if m == "torchvision" or m.startswith("torchvision.")
        ]:
            del sys.modules[module]
        library = torch.library.Library("torchvision", "FRAGMENT")
        for operator in ("nms", "qnms"):
            library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _torchvision.keep = library  # the declarations live as long as this object
        import torchvision
    return torchvision


def build(name: str, seed: int = 0):
    """Return the torch module, in eval mode, with seeded weights and batch-norm statistics."""
    import torch

    models = _torchvision().models
    salt = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little")
    torch.manual_seed(seed * 1_000_003 + salt)
    options = {"weights": None}
    if name == "inception_v3":
        # The auxiliary classifier is not part of the eval graph; the initializer is slow.
        options |= {"init_weights": False, "aux_logits": False, "transform_input": False}
    model = getattr(models, name)(**options)
    norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.Conv2d):
                if norms:
                    module.weight.mul_(torch.exp(0.5 * torch.randn(module.out_channels, 1, 1, 1)))
                if module.bias is not None:
                    # The exporter would merge all-zero biases into one, behind Identity nodes.
                    module.bias.add_(0.05 * torch.randn(module.out_channels))
        for norm in norms:
            norm.weight.copy_(torch.exp(0.25 * torch.randn(norm.num_features)))
            norm.bias.copy_(0.3 * torch.randn(norm.num_features))
            norm.momentum = 1.0  # running statistics become those of the one batch below
        if norms:
            model.train()
            model(torch.from_numpy(inputs(name, batch=4, seed=seed + 1)))
        for norm in norms:
            deviation = norm.running_var.sqrt()
            norm.running_mean.add_(0.1 * deviation * torch.randn(norm.num_features))
            norm.running_var.mul_(torch.exp(0.1 * torch.randn(norm.num_features)))
            norm.running_var.add_(1e-4 * norm.running_var.mean())
            norm.momentum = 0.1
    return model.eval()


def export(
    name: str, path: str | os.PathLike, opset: int = 17, seed: int = 0, exporter: str = "script"
) -> Path:
    """Write one model as ONNX with a dynamic batch axis.

    Parameters
    ----------
    name : str
        A key of `MODELS`.
    path : path-like
        The file to write. It appears whole or not at all.
    opset : int
        Version of the default ONNX domain; "dynamo" takes 18 or more.
    seed : int
        Seed of the weights.
    exporter : {"script", "dynamo"}
        "script" keeps BatchNormalization nodes. "dynamo" is torch's default today: it folds batch
        norms into convolutions, and the weights go to a file of their own beside the model.
    """
    import torch

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    model = build(name, seed)
    side = MODELS[name]
    names = {"input_names": [INPUT], "output_names": [OUTPUT], "opset_version": opset}
    folder = Path(tempfile.mkdtemp(prefix=f".{path.stem}.", dir=path.parent))
    try:
        aside = folder / path.name
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if exporter == "dynamo":
                example = torch.zeros(2, 3, side, side)  # a batch of 1 would be taken for fixed
                program = torch.onnx.export(
                    model,
                    (example,),
                    dynamo=True,
                    verbose=False,
                    dynamic_shapes=({0: torch.export.Dim("N")},),
                    **names,
                )
                program.save(str(aside), external_data=True)
            else:
                torch.onnx.export(
                    model,
                    (torch.zeros(1, 3, side, side),),
                    str(aside),
                    dynamo=False,
                    dynamic_axes={INPUT: {0: "N"}, OUTPUT: {0: "N"}},
                    # EVAL would fuse batch norms into convolutions; keep the module's own mode.
                    training=torch.onnx.TrainingMode.PRESERVE,
                    do_constant_folding=False,
                    **names,
                )
        for file in sorted(folder.iterdir(), key=lambda file: file == aside):
            os.replace(file, path.parent / file.name)  # the model last: it needs the weights
    finally:
        shutil.rmtree(folder)
    return path


def ensure(
    name: str,
    folder: str | os.PathLike = ".build/models",
    opset: int = 17,
    seed: int = 0,
    exporter: str = "script",
) -> Path:
    """Return the path of an exported model, exporting it only if the folder lacks it."""
    plain = (opset, seed, exporter) == (17, 0, "script")
    variant = "" if plain else f"_{exporter}_opset{opset}_seed{seed}"
    path = Path(folder) / f"{name}{variant}.onnx"
    return path if path.exists() else export(name, path, opset, seed, exporter)


def summary(path: str | os.PathLike) -> str:
    """Return one line: the opset, and each operator type with its count."""
    import collections

    import onnx

    model = onnx.load(str(path), load_external_data=False)
    versions = ", ".join(f"{o.domain or 'ai.onnx'} {o.version}" for o in model.opset_import)
    counts = collections.Counter(node.op_type for node in model.graph.node)
    return f"{versions}: " + " ".join(f"{op}×{n}" for op, n in sorted(counts.items()))


def check(path: str | os.PathLike, name: str) -> str:
    """Run a model in onnxruntime; raise if outputs are not finite or not the input's."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    y = session.run(None, {INPUT: inputs(name, batch=4, seed=5)})[0]
    if not np.isfinite(y).all():
        raise ValueError(f"{path}: output is not finite")
    deviation, between = float(y.std()), float(y.std(axis=0).mean())
    # Rounding noise between pictures would be about 1e-7 of the deviation.
    if not (1e-3 < deviation < 1e3 and between > 1e-3 * deviation):
        raise ValueError(
            f"{path}: degenerate output, deviation {deviation:g}, between pictures {between:g}"
        )
    return f"output {list(y.shape)} deviation {deviation:.3g}, between pictures {between:.3g}"


def main(arguments: list[str] | None = None) -> int:
    """Export the named models, all by default, into a folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "names", nargs="*", metavar="MODEL", help=f"any of {', '.join(MODELS)}; default: all"
    )
    parser.add_argument(
        "--out", default=".build/models", help="folder to write to (default %(default)s)"
    )
    parser.add_argument("--opset", type=int, default=17)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--exporter", choices=("script", "dynamo"), default="script")
    parser.add_argument("--check", action="store_true", help="run each in onnxruntime")
    options = parser.parse_args(arguments)
    unknown = sorted(set(options.names) - set(MODELS))
    if unknown:
        parser.error(f"unknown model {', '.join(unknown)}")
    for name in options.names or MODELS:
        path = ensure(name, options.out, options.opset, options.seed, options.exporter)
        print(f"{path}\n  {summary(path)}")
        if options.check:
            print(f"  {check(path, name)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

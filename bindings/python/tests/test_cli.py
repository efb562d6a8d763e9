# SPDX-License-Identifier: Apache-2.0
# The command-line tool: same encodings as Python, clean output, exit codes, Ctrl-C.
import json
import os
import pty
import select
import shlex
import signal
import subprocess
import time

import numpy as np
import onnx
import pytest
from support import small_models
from support.environment import REPOSITORY

import halfstep

CLI = os.environ.get("HALFSTEP_CLI") or str(REPOSITORY / ".build/release/halfstep")
pytestmark = pytest.mark.skipif(
    not os.path.exists(CLI), reason=f"{CLI} is not built (make build, or set HALFSTEP_CLI)"
)


def run(*arguments, code: int = 0) -> subprocess.CompletedProcess:
    done = subprocess.run(
        [CLI, *map(str, arguments)], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == code, (done.returncode, done.stdout, done.stderr)
    return done


@pytest.fixture
def folder(network, tmp_path):
    """A model, data as npy and npz, labels that are FP32's own answers for the first half."""
    (tmp_path / "net.onnx").write_bytes(network)
    x = small_models.data(24)
    np.save(tmp_path / "x.npy", x)
    labels = halfstep.Model.load(network).run(x)["y"].argmax(1).astype(np.int64)
    labels[12:] = (labels[12:] + 1) % small_models.CLASSES
    np.savez(tmp_path / "x.npz", x=x, labels=labels, other=x[:4])
    return tmp_path


def in_python(folder, fold=True, equalize=True, **settings):
    model = halfstep.Model.load(folder / "net.onnx")
    if fold:
        model.fold_batch_norms()
    if equalize:
        model.equalize()
    sim = halfstep.QuantizationSimModel(model, **settings)
    sim.compute_encodings(np.load(folder / "x.npy"), progress=False)
    return sim


# --------------------------------------------------------------------------------------------------
# quantize


CASES = {
    "defaults": ([], {}),
    "per tensor": (["--per-tensor"], {"config": "default"}),
    "per channel": (["--per-channel"], {"config": "default_per_channel"}),
    "config": (["--config", "htp_v73"], {"config": "htp_v73"}),
    "sqnr w4a16": (
        ["--scheme", "sqnr", "--weights", 4, "--activations", 16],
        {"quant_scheme": "sqnr", "param_bits": 4, "activation_bits": 16},
    ),
    "blocks": (["--weights", 4, "--block-size", 2], {"param_bits": 4, "block_size": 2}),
    "mse": (["--scheme", "mse", "--batch-size", 5], {"quant_scheme": "mse"}),
    "entropy": (["--scheme", "entropy"], {"quant_scheme": "entropy"}),
    "percentile": (
        ["--scheme", "percentile", "--percentile", 99.5],
        {"quant_scheme": "percentile", "percentile": 99.5},
    ),
    "as it is": (["--no-fold-batch-norms", "--no-equalize"], {"fold": False, "equalize": False}),
    "folded only": (["--no-equalize"], {"equalize": False}),
}


@pytest.mark.parametrize("case", CASES)
def test_encodings_are_those_of_python(folder, case):
    options, settings = CASES[case]
    out = folder / "out"
    run("quantize", folder / "net.onnx", "--calibration", folder / "x.npy", *options, "-o", out)
    sim = in_python(folder, **settings)
    assert (out / "net.encodings").read_bytes() == sim.encodings_json("1.0.0")
    sim.export(folder / "python", "net")
    assert (out / "net.onnx").read_bytes() == (folder / "python/net.onnx").read_bytes()


def test_rounding_without_data_and_with_a_cache(folder):
    command = ("quantize", folder / "net.onnx", "--calibration", folder / "x.npy", "--weights", "4")
    files = []
    for number, options in enumerate(
        (
            ("--round", "auto", "--data-free"),
            ("--correct-biases", "--data-free"),
            ("--round", "auto", "--rounding-cache", folder / "cache"),
            ("--round", "auto", "--rounding-cache", folder / "cache"),
        )
    ):
        out = folder / f"out{number}"
        run(*command, *options, "-o", out)
        files.append([(out / name).read_bytes() for name in ("net.onnx", "net.encodings")])
    assert files[2] == files[3]
    assert len({file[0] for file in files}) == 3
    assert any((folder / "cache").iterdir())


CONSTANTS = {
    "adaround": (
        *("--rounding-iterations", "1000", "--rounding-regularization", "0.5"),
        *("--rounding-beta-start", "8", "--rounding-beta-end", "3"),
        *("--rounding-warm-start", "0.7"),
    ),
    "seq-mse": ("--rounding-candidates", "7"),
}
SETTINGS = {
    "adaround": {
        "method": "gradient",
        "iterations": 1000,
        "reg_param": 0.5,
        "beta_range": (8, 3),
        "warm_start": 0.7,
    },
    "seq-mse": {"method": "sequential_mse", "num_candidates": 7},
}


@pytest.mark.parametrize("method", CONSTANTS)
def test_constants_of_rounding_are_those_of_python(folder, method):
    options = CONSTANTS[method]
    command = ("quantize", folder / "net.onnx", "--calibration", folder / "x.npy", "--weights", "4")

    def rounded(given):
        run(*command, "--round", method, *given, "-o", folder / "out")
        return (folder / "out/net.onnx").read_bytes()

    model = halfstep.Model.load(folder / "net.onnx")
    model.fold_batch_norms()
    model.equalize()
    model.adaround(np.load(folder / "x.npy"), param_bits=4, **SETTINGS[method])
    assert rounded(options) == model.to_bytes()
    # Each constant arrives: without it, the weights are others.
    for at in range(0, len(options), 2):
        if options[at] != "--rounding-iterations":
            assert rounded((*options[:at], *options[at + 2 :])) != model.to_bytes(), options[at]


@pytest.mark.parametrize("version", ["0.6.1", "1.0.0", "2.0.0"])
def test_versions_and_qdq(folder, version):
    out = folder / "out"
    done = run(
        *("quantize", folder / "net.onnx", "--calibration", folder / "x.npz"),
        *("--encodings", version, "--qdq", "-o", out, "--quiet"),
    )
    names = ["net.onnx", "net.encodings", "net_qdq.onnx"]
    assert done.stdout.splitlines() == [f"{out}/{name}" for name in names]
    assert done.stderr == ""
    assert sorted(os.listdir(out)) == sorted(names)
    assert json.loads((out / "net.encodings").read_bytes())["version"] == version
    onnx.checker.check_model(str(out / "net_qdq.onnx"))


def test_notes_go_to_standard_error_without_a_bar(folder):
    done = run(
        "quantize", folder / "net.onnx", "--calibration", folder / "x.npy", "-o", folder / "out"
    )
    assert "folded 2 batch norms" in done.stderr and "equalized 2 sets" in done.stderr
    assert "\r" not in done.stderr and "[" not in done.stderr
    assert len(done.stdout.splitlines()) == 2


def test_bar_is_drawn_on_a_terminal(folder):
    leader, follower = pty.openpty()
    process = subprocess.Popen(
        [
            CLI,
            "quantize",
            folder / "net.onnx",
            "--calibration",
            folder / "x.npy",
            "-o",
            folder / "o",
        ],
        stdout=subprocess.PIPE,
        stderr=follower,
    )
    os.close(follower)
    seen = b""
    while True:
        ready, _, _ = select.select([leader], [], [], 120)
        assert ready, "no output for two minutes"
        try:
            part = os.read(leader, 4096)
        except OSError:  # Linux: the other end is closed
            break
        if not part:
            break
        seen += part
    out, _ = process.communicate(timeout=60)
    os.close(leader)
    assert process.returncode == 0
    assert b"calibrating [" in seen and b"3/3" in seen
    assert out.count(b"\n") == 2 and b"\r" not in out


def test_array_of_an_npz_is_chosen(folder):
    run(
        *("quantize", folder / "net.onnx", "--calibration", folder / "x.npz", "--array", "other"),
        *("-o", folder / "out"),
    )
    model = halfstep.Model.load(folder / "net.onnx")
    model.fold_batch_norms()
    model.equalize()
    sim = halfstep.QuantizationSimModel(model)
    sim.compute_encodings(np.load(folder / "x.npy")[:4], progress=False)
    assert (folder / "out/net.encodings").read_bytes() == sim.encodings_json()


def test_commands_of_the_readme_run(folder):
    (folder / "x.npy").rename(folder / "images.npy")
    (folder / "x.npz").rename(folder / "test.npz")
    text = (REPOSITORY / "README.md").read_text().split("## Shell\n```sh\n")[1].split("```")[0]
    commands = [shlex.split(line) for line in text.splitlines()]
    assert [command[:2] for command in commands] == [
        ["halfstep", "quantize"],
        ["halfstep", "evaluate"],
        ["halfstep", "inspect"],
        ["halfstep", "compress"],
    ]
    for _, *arguments in commands:
        done = subprocess.run(
            [CLI, *arguments], cwd=folder, capture_output=True, text=True, timeout=300, check=False
        )
        assert done.returncode == 0, (arguments, done.stderr)
        assert done.stdout
    assert {path.name for path in (folder / "out").iterdir()} == {
        "net.onnx",
        "net.encodings",
        "net_qdq.onnx",
    }


def test_commands_of_the_rounding_guide_run(folder):
    (folder / "x.npy").rename(folder / "images.npy")
    text = (REPOSITORY / "docs/rounding.md").read_text()
    lines = text.split("## Shell\n```sh\n")[1].split("```")[0].splitlines()
    files = set()
    for _, *arguments in map(shlex.split, lines):
        done = subprocess.run(
            [CLI, *arguments], cwd=folder, capture_output=True, text=True, timeout=300, check=False
        )
        assert done.returncode == 0, (arguments, done.stderr)
        files.add((folder / "out/net.onnx").read_bytes())
    assert len(lines) == len(files) > 3


# --------------------------------------------------------------------------------------------------
# evaluate, inspect


def test_float_accuracy(folder):
    done = run("evaluate", folder / "net.onnx", folder / "x.npz", "--labels", "labels", "--json")
    result = json.loads(done.stdout)
    assert (result["rows"], result["top1"]) == (24, 0.5)
    assert "sqnr_db" not in result


def test_simulated_accuracy_is_that_of_python(folder):
    sim = in_python(folder)
    sim.export(folder / "out", "net")
    x, model = np.load(folder / "x.npy"), sim.model
    float_output, output = model.run(x)["y"], sim.run(x)["y"]
    done = run(
        *("evaluate", folder / "out/net.onnx", folder / "x.npz", "--labels", "labels", "--json"),
        *("--encodings", folder / "out/net.encodings", "--batch-size", 24),
    )
    result = json.loads(done.stdout)
    labels = np.load(folder / "x.npz")["labels"]
    assert result["top1"] == (output.argmax(1) == labels).mean()
    assert result["float_top1"] == (float_output.argmax(1) == labels).mean()
    assert result["agreement"] == (output.argmax(1) == float_output.argmax(1)).mean()
    noise = np.square((output - float_output).astype(np.float64)).sum()
    expected = 10 * np.log10(np.square(float_output.astype(np.float64)).sum() / noise)
    # Sums of doubles in another order; the difference itself is exact in double, not in float.
    assert result["sqnr_db"] == pytest.approx(expected, abs=1e-4)
    text = run(
        *("evaluate", folder / "out/net.onnx", folder / "x.npy"),
        *("--encodings", folder / "out/net.encodings"),
    ).stdout
    assert "agreement" in text and "sqnr_db" in text and "top1" not in text


def test_encodings_that_do_not_fit(folder):
    sim = in_python(folder)
    sim.export(folder / "out", "net")
    document = sim.encodings()
    document["param_encodings"][0]["name"] = "no.such.tensor"
    (folder / "wrong.encodings").write_text(json.dumps(document))
    arguments = ["evaluate", folder / "out/net.onnx", folder / "x.npy", "--encodings"]
    done = run(*arguments, folder / "wrong.encodings", code=65)
    assert "no.such.tensor" in done.stderr and done.stdout == ""
    done = run(*arguments, folder / "wrong.encodings", "--lenient")
    assert "no.such.tensor" in done.stderr and "agreement" in done.stdout


def test_inspect_tells_layers_folds_and_sets(folder):
    result = json.loads(run("inspect", folder / "net.onnx", "--json").stdout)
    model = halfstep.Model.load(folder / "net.onnx")
    for ours, layer in zip(result["layers"], model.inspect(), strict=True):
        assert (ours["name"], ours["operator"]) == (layer.name, layer.op_type)
        np.testing.assert_allclose(ours["channel_minimum"], layer.channel_minimum, rtol=1e-6)
        np.testing.assert_allclose(ours["channel_maximum"], layer.channel_maximum, rtol=1e-6)
    assert result["folds"] == [
        {"layer": "conv1", "batch_norm": "bn1", "is_forward": False},
        {"layer": "conv2", "batch_norm": "bn2", "is_forward": False},
    ]
    sets = [{"layers": ["conv1", "conv2"]}, {"layers": ["conv2", "fc"]}]
    assert result["equalized_sets"] == sets
    assert result["inputs"] == [{"name": "x", "type": "float32", "shape": ["N", 3, 8, 8]}]
    text = run("inspect", folder / "net.onnx").stdout
    assert [line.split()[0] for line in text.splitlines()] == [
        *("input", "output", "layer", "conv1", "conv2", "fc")
    ]


# --------------------------------------------------------------------------------------------------
# compress


@pytest.mark.parametrize("scheme", ["spatial-svd", "weight-svd"])
def test_compressed_network_is_that_of_python(folder, scheme):
    net, out = folder / "net.onnx", folder / "smaller.onnx"
    model = halfstep.Model.load(net)
    compressor = halfstep.ModelCompressor(model, scheme.replace("-", "_"), cost_metric="memory")
    same = ("compress", net, "--scheme", scheme, "--metric", "memory", "-o", out)
    done = run(*same, "--target", 0.8)
    assert done.stdout.splitlines() == [str(out)]
    assert "of before" in done.stderr and "\r" not in done.stderr
    expected, stats = compressor.compress(ranks=compressor.select(0.8))
    assert out.read_bytes() == expected.to_bytes()
    assert stats.memory_ratio <= 0.8

    layer = compressor.layers[-1]
    done = run(*same, "--layer", f"{layer.name}=0.5", "--json", "--quiet")
    assert done.stderr == ""
    expected, stats = compressor.compress({layer.name: 0.5})
    assert out.read_bytes() == expected.to_bytes()
    result = json.loads(done.stdout)
    assert result["memory_ratio"] == stats.memory_ratio and result["macs"] == list(stats.macs)
    sizes = {entry["name"]: entry["size"] for entry in result["layers"]}
    assert sizes == {entry.name: entry.rank for entry in stats.layers}
    assert sizes[layer.name] is not None and result["refusals"] == stats.refusals

    run(*same, "--ratio", 0.5, "--layer", f"{layer.weight}=1", "--multiplicity", 2, "--quiet")
    compressor = halfstep.ModelCompressor(
        model, scheme.replace("-", "_"), cost_metric="memory", multiplicity=2
    )
    others = {entry.weight: 0.5 for entry in compressor.layers[:-1]}
    assert out.read_bytes() == compressor.compress(others)[0].to_bytes()


def test_compress_with_data_is_that_of_python(folder):
    net, out = folder / "net.onnx", folder / "smaller.onnx"
    model = halfstep.Model.load(net)
    compressor = halfstep.ModelCompressor(model, "weight_svd", data=small_models.data(24))
    same = ("compress", net, "--scheme", "weight-svd", "--target", 0.8, "-o", out)
    expected, stats = compressor.compress(ranks=compressor.select(0.8))
    done = run(*same, "--calibration", folder / "x.npy", "--json")
    assert out.read_bytes() == expected.to_bytes()
    noises = [entry["noise"] for entry in json.loads(done.stdout)["layers"]]
    for noise, layer in zip(noises, stats.layers, strict=True):
        assert (noise is None) == (layer.noise is None)
        if noise is not None:
            np.testing.assert_allclose(noise, layer.noise, rtol=1e-6)
    assert any(noises) and "noise" in done.stderr
    run(*same, "--calibration", folder / "x.npz", "--array", "x", "--quiet")
    assert out.read_bytes() == expected.to_bytes()


def test_pruned_network_is_that_of_python(folder):
    net, out = folder / "net.onnx", folder / "smaller.onnx"
    model = halfstep.Model.load(net)
    compressor = halfstep.ModelCompressor(model, "channel_pruning", data=small_models.data(24))
    same = ("compress", net, "--scheme", "channel-pruning", "-o", out)
    expected, stats = compressor.compress(ranks=compressor.select(0.6))
    done = run(*same, "--calibration", folder / "x.npy", "--target", 0.6, "--json")
    assert out.read_bytes() == expected.to_bytes()
    result = json.loads(done.stdout)
    assert result["mac_ratio"] == stats.mac_ratio <= 0.6
    assert {entry["name"]: entry["size"] for entry in result["layers"]} == {
        entry.name: entry.channels for entry in stats.layers
    }
    assert result["refusals"] == stats.refusals and "stays: node 'fc'" in done.stderr

    plain = (*same, "--by", "magnitude", "--keep-weights", "--quiet", "--ratio", 0.5)
    settings = {"importance": "magnitude", "reconstruct": False}
    run(*plain, "--multiplicity", 3)
    compressor = halfstep.ModelCompressor(model, "channel_pruning", multiplicity=3, **settings)
    assert out.read_bytes() == compressor.compress(0.5)[0].to_bytes()
    done = run(*plain, "--keep-inputs", "fc", "--json")
    compressor = halfstep.ModelCompressor(
        model, "channel_pruning", input_keepers=["fc"], **settings
    )
    assert [layer.name for layer in compressor.layers] == ["conv1"]
    assert out.read_bytes() == compressor.compress(0.5)[0].to_bytes()
    sizes = {entry["name"]: entry["size"] for entry in json.loads(done.stdout)["layers"]}
    assert sizes == {"conv1": 4, "conv2": None, "fc": None}


def test_compress_failures_leave_nothing(folder):
    out = folder / "smaller.onnx"
    data = ["--target", 0.8, "-o", out, "--calibration"]
    run("compress", folder / "net.onnx", *data, folder / "absent.npy", code=66)
    run("compress", folder / "net.onnx", *data, folder / "x.npz", "--array", "no", code=65)
    run("compress", folder / "net.onnx", *data, folder / "x.npz", "--array", "labels", code=65)
    run("compress", folder / "absent.onnx", "--target", 0.5, "-o", out, code=66)
    (folder / "garbage.onnx").write_bytes(b"\xff" * 100)
    run("compress", folder / "garbage.onnx", "--target", 0.5, "-o", out, code=65)
    run("compress", folder / "net.onnx", "--ratio", 0.5, "-o", folder / "no/such.onnx", code=73)
    prune = ("compress", folder / "net.onnx", "--scheme", "channel-pruning", "-o", out)
    done = run(*prune, "--target", 0.5, code=65)
    assert "calibration data" in done.stderr
    plain = (*prune, "--by", "magnitude", "--keep-weights")
    run(*plain, "--target", 0.001, code=64)
    done = run(*plain, "--layer", "fc=0.5", code=65)
    assert "output" in done.stderr
    run(*plain, "--ratio", 0.5, "--keep-inputs", "no", code=64)
    assert not out.exists() and not (folder / "no").exists()


# --------------------------------------------------------------------------------------------------
# Help and exit codes


def test_help_has_examples():
    for command in ("quantize", "evaluate", "inspect", "compress"):
        text = run(command, "--help").stdout
        assert "Examples:" in text and f"halfstep {command} net.onnx" in text
    text = run("--help").stdout
    assert "130" in text and "SUBCOMMANDS" in text
    assert run("--version").stdout.strip() == halfstep.__version__


USAGE = [
    ["quantize"],
    ["quantize", "net.onnx", "-o", "out"],
    ["quantize", "net.onnx", "--calibration", "x.npy"],
    ["quantize", "net.onnx", "--calibration", "x.npy", "-o", "out", "--weights", "1"],
    ["quantize", "net.onnx", "--calibration", "x.npy", "-o", "out", "--weights", "many"],
    ["quantize", "net.onnx", "--calibration", "x.npy", "-o", "out", "--scheme", "magic"],
    ["quantize", "net.onnx", "--calibration", "x.npy", "-o", "out", "--scheme", "percentile"],
    ["quantize", "net.onnx", "--calibration", "x.npy", "-o", "out", "--percentile", "99"],
    ["quantize", "net.onnx", "--calibration", "x.npy", "-o", "out", "--encodings", "3"],
    ["quantize", "net.onnx", "--calibration", "x.npy", "-o", "out", "--batch-size", "0"],
    ["quantize", "net.onnx", "--calibration", "x.npy", "-o", "out", "--data-free"],
    ["quantize", "net.onnx", "--calibration", "x.npy", "-o", "out", "--block-size", "0"],
    [
        *("quantize", "net.onnx", "--calibration", "x.npy", "-o", "out"),
        *("--block-size", "4", "--per-tensor"),
    ],
    [
        *("quantize", "net.onnx", "--calibration", "x.npy", "-o", "out"),
        *("--data-free", "--round", "adaround"),
    ],
    *(
        [*("quantize", "net.onnx", "--calibration", "x.npy", "-o", "out", "--round"), *more]
        for more in (
            ("gram", "--rounding-iterations", "9"),
            ("auto", "--rounding-regularization", "1"),
            ("seq-mse", "--rounding-beta-start", "9"),
            ("nearest", "--rounding-beta-end", "9"),
            ("auto", "--rounding-warm-start", "0.5"),
            ("adaround", "--rounding-candidates", "9"),
            ("adaround", "--rounding-iterations", "0"),
            ("adaround", "--rounding-iterations", "some"),
            ("adaround", "--rounding-regularization", "nan"),
            ("adaround", "--rounding-regularization=-1"),
            ("adaround", "--rounding-beta-start", "0.5"),
            ("adaround", "--rounding-beta-end", "1001"),
            ("adaround", "--rounding-warm-start", "1"),
            ("seq-mse", "--rounding-candidates", "0"),
            ("seq-mse", "--rounding-candidates", "1001"),
        )
    ),
    [
        "quantize",
        "net.onnx",
        "--calibration",
        "x.npy",
        "-o",
        "out",
        "--config",
        "c",
        "--per-tensor",
    ],
    ["quantize", "net.onnx", "--calibration", "x.npy", "-o", "out", "--config", "no_such_config"],
    ["evaluate", "net.onnx", "x.npy"],
    ["compress", "net.onnx", "-o", "out"],
    ["compress", "net.onnx", "--target", "0.5"],
    ["compress", "net.onnx", "--target", "0.5", "--array", "x", "-o", "out"],
    ["compress", "net.onnx", "--target", "0.5", "--ratio", "0.5", "-o", "out"],
    ["compress", "net.onnx", "--target", "2", "-o", "out"],
    ["compress", "net.onnx", "--target", "0.001", "-o", "out"],
    ["compress", "net.onnx", "--ratio", "-1", "-o", "out"],
    ["compress", "net.onnx", "--ratio", "0.5", "--multiplicity", "0", "-o", "out"],
    ["compress", "net.onnx", "--ratio", "0.5", "--ignore", "nobody", "-o", "out"],
    ["compress", "net.onnx", "--layer", "nobody=0.5", "-o", "out"],
    ["compress", "net.onnx", "--layer", "conv2", "-o", "out"],
    ["compress", "net.onnx", "--ratio", "0.5", "--input-shape", "x=1xy", "-o", "out"],
    ["compress", "net.onnx", "--ratio", "0.5", "--input-shape", "z=1x3x8x8", "-o", "out"],
    ["compress", "net.onnx", "--ratio", "0.5", "--scheme", "magic", "-o", "out"],
    ["frobnicate"],
    ["inspect", "net.onnx", "--nonsense"],
]


@pytest.mark.parametrize("arguments", USAGE, ids=" ".join)
def test_wrong_usage_is_64(folder, monkeypatch, arguments):
    monkeypatch.chdir(folder)
    done = run(*arguments, code=64)
    assert done.stdout == "" and done.stderr != ""
    assert not (folder / "out").exists()


def test_bad_data_is_65(folder):
    x = small_models.data(4)
    bad = {
        "nan": np.where(np.arange(x.size).reshape(x.shape) == 7, np.float32(np.nan), x),
        "shape": x[:, :2],
        "type": x.astype(np.float64),
        "empty": x[:0],
        "scalar": np.float32(1),
    }
    for name, value in bad.items():
        np.save(folder / f"{name}.npy", value)
        done = run(
            *("quantize", folder / "net.onnx", "--calibration", folder / f"{name}.npy"),
            *("-o", folder / "out"),
            code=65,
        )
        assert done.stdout == "" and done.stderr.splitlines()[-1].startswith("halfstep: error: ")
    (folder / "garbage.onnx").write_bytes(b"\xff" * 100)
    (folder / "garbage.npy").write_bytes(b"\xff" * 100)
    (folder / "wrong.json").write_text('{"nonsense": {}}')
    run("inspect", folder / "garbage.onnx", code=65)
    quantize = ["quantize", folder / "net.onnx", "-o", folder / "out", "--calibration"]
    run(*quantize, folder / "garbage.npy", code=65)
    done = run(*quantize, folder / "x.npy", "--config", folder / "wrong.json", code=65)
    assert "nonsense" in done.stderr
    done = run(*quantize, folder / "x.npz", "--array", "nobody", code=65)
    assert "'nobody'" in done.stderr and "'labels'" in done.stderr
    assert not (folder / "out").exists()


def test_missing_files_are_66(folder):
    for arguments in (
        ["inspect", folder / "absent.onnx"],
        ["quantize", folder / "absent.onnx", "--calibration", folder / "x.npy", "-o", folder / "o"],
        ["quantize", folder / "net.onnx", "--calibration", folder / "absent", "-o", folder / "o"],
        ["evaluate", folder / "net.onnx", folder / "x.npy", "--encodings", folder / "absent"],
    ):
        assert "absent" in run(*arguments, code=66).stderr


def test_result_that_cannot_be_written_is_73(folder):
    (folder / "file").write_text("in the way")
    for out in (folder / "file", folder / "no/such", "/proc/nowhere"):
        done = run(
            "quantize", folder / "net.onnx", "--calibration", folder / "x.npy", "-o", out, code=73
        )
        assert done.stdout == ""
    assert (folder / "file").read_text() == "in the way"


def test_ctrl_c_is_130_and_leaves_nothing(folder):
    np.save(folder / "long.npy", small_models.data(200_000))
    process = subprocess.Popen(
        [
            *(CLI, "quantize", folder / "net.onnx", "--calibration", folder / "long.npy"),
            *("--batch-size", "1", "--qdq", "-o", folder / "out"),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    for line in process.stderr:
        if line.startswith("placed"):  # calibration begins
            break
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    out, error = process.communicate(timeout=60)
    assert process.returncode == 130, error
    assert out == "" and "cancelled" in error
    assert not (folder / "out").exists()

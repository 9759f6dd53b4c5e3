"""scripts/bench_reap.py without the public code, which only the benchmark itself installs."""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from gguftool.bench_calibrate import tiny
from gguftool.errors import GgufToolError
from gguftool.random_checkpoint import first_layers, shape_named, write_random_checkpoint

SCRIPT = Path(__file__).parent.parent / "scripts" / "bench_reap.py"


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("bench_reap", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_random_checkpoint(tmp_path_factory.mktemp("random") / "model", tiny(shape_named("qwen3-30b-a3b")), 2)


def test_time_of_few_windows_is_scaled_by_the_plain_pass_of_the_same_round(bench):
    def times(plain, few, dense, ours):
        seconds = {"plain": plain, "plain, few": few, "cerebras": dense, bench.OURS: ours}
        return {name: {"seconds": value, "cpu": 1.0} for name, value in seconds.items()}

    # The second round is twice as slow, but for the dense observer: 20 ÷ 2 and 80 ÷ 4 plain passes, √(10 · 20) = 14.14.
    rounds = [times(8.0, 2.0, 20.0, 10.0), times(16.0, 4.0, 80.0, 20.0)]
    found = bench.ratios(rounds, ["plain, few", "cerebras"], "seconds")
    to_plain, to_ours = found["cerebras"]
    assert to_plain.value == pytest.approx(np.sqrt(200))
    assert to_ours.value == pytest.approx(0.8 * np.sqrt(200))
    # The logarithms of 10 and 20 are ln 2 apart: their standard deviation is ln 2 ÷ √2, the mean's error half of ln 2.
    assert to_plain.error == pytest.approx(np.log(2) / 2)
    assert found[bench.OURS][0].value == pytest.approx(1.25)
    assert found["plain, few"][0].value == pytest.approx(1.0)
    assert bench.ratios(rounds, ["cerebras"], "cpu")["cerebras"][0].value == pytest.approx(1.0)


def test_saliencies_are_compared_expert_by_expert(bench):
    ours = np.array([[2.0, 0.0, 4.0], [1.0, 1.0, 1.0]])
    theirs = np.array([[2.0, 0.0, 5.0], [1.0, 3.0, 1.0]])
    assert bench.difference(ours, theirs, 1) == 0.25
    assert bench.difference(ours, theirs, 2) == 2.0
    assert bench.difference(theirs, np.zeros((2, 3)), 2) == 1.0  # it lost an expert that was used
    assert bench.difference(np.zeros((2, 3)), theirs, 2) == np.inf


def test_wrong_options_are_refused(bench, tmp_path):
    for wrong in (["--layers", "10"], ["--layers", "0"], ["--cerebras", str(tmp_path)]):
        with pytest.raises(SystemExit) as refused:
            bench.parse(wrong)
        assert refused.value.code == 2


def test_other_versions_of_transformers_can_read_random_checkpoints(checkpoint, tmp_path):
    """Some read the index's metadata without asking, those before 5 the framework of every shard."""
    for path in (checkpoint, first_layers(tmp_path / "one", checkpoint, 1)):
        index = json.loads((path / "model.safetensors.index.json").read_text())
        assert "metadata" in index
        for name in set(index["weight_map"].values()):
            with safe_open(path / name, "np") as shard:
                assert shard.metadata() == {"format": "pt"}


def test_the_process_beside_it_answers_or_says_what_is_missing(bench, checkpoint, tmp_path):
    np.save(tmp_path / "windows.npy", np.arange(32).reshape(4, 8))
    options = {
        "checkpoint": str(checkpoint), "windows": str(tmp_path / "windows.npy"), "batch": 2, "threads": 1,
        "dtype": "float32", "source": str(tmp_path),
    }  # fmt: skip
    with bench.public(Path(sys.executable), options, tmp_path / "log") as process:
        answer = process.ask({"kind": "plain", "n_windows": 3})
        assert answer["seconds"] > 0 and answer["cpu"] > 0
        with pytest.raises(GgufToolError, match="No module named 'reap'"):
            process.ask({"kind": "cerebras", "n_windows": 3})
    assert process.process.poll() is not None

"""A calibration in parts: ranks of one run give the stats of one process, merged halves those of the whole."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from gguftool.calibrate import calibrate
from gguftool.checkpoint import open_checkpoint
from gguftool.cli import cli
from gguftool.errors import GgufToolError
from gguftool.parts import merge, parse_part, part_of, window_numbers
from gguftool.ranks import ALONE, share
from gguftool.stats import NEURON_SUMS, CalibrationStats, Domain
from killed import domains
from models import sample_text, tiny_checkpoint


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("parts") / "model")


@pytest.fixture(scope="module")
def whole(model, tmp_path_factory) -> CalibrationStats:
    return calibrate(open_checkpoint(model), domains(), tmp_path_factory.mktemp("whole"), batch=2)


def start(commands: list[list[str]]) -> list[subprocess.CompletedProcess[str]]:
    """Runs the commands at the same time as ranks that torchrun would have started."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    running = []
    for rank, command in enumerate(commands):
        own = {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": len(commands),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }
        environment = os.environ | {name: str(value) for name, value in own.items()} | {"OMP_NUM_THREADS": "1"}
        running.append(
            subprocess.Popen(
                [sys.executable, *command], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            )
        )
    return [
        subprocess.CompletedProcess(one.args, one.returncode, *texts)
        for one, texts in ((one, one.communicate(timeout=120)) for one in running)
    ]


def alike(one: CalibrationStats, other: CalibrationStats, *, obs: bool = True) -> None:
    """Equal up to rounding, in everything that a file holds."""
    assert one.domains == other.domains and one.model == other.model and one.n_ctx == other.n_ctx
    assert one.linear_tokens == other.linear_tokens and one.linears.keys() == other.linears.keys()
    near = {"rel": 1e-5, "abs": 1e-6}
    for name, value in other.experts.items():
        assert one.experts[name] == pytest.approx(value, **near), name
    for name, value in other.neurons.items():
        if name != "obs":
            assert one.neurons[name] == pytest.approx(value, **near), name
    for name, value in other.linears.items():
        assert one.linears[name] == pytest.approx(value, **near), name
    assert one.expert_inputs == pytest.approx(other.expert_inputs, **near)
    assert one.residual_inverse == pytest.approx(other.residual_inverse, **near)
    if obs:
        # Costs come from an inverse, which magnifies how float32 rounds the moments.
        assert one.neurons["obs"] == pytest.approx(other.neurons["obs"], rel=1e-3)


def test_two_ranks_give_the_stats_of_one_process_also_after_a_kill(model, whole, tmp_path, monkeypatch):
    script, out = str(Path(__file__).parent / "ranked.py"), tmp_path / "out.safetensors"
    first, second = start([[script, str(model), str(out)]] * 2)
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    alike(CalibrationStats.load(out), whole)
    assert [file.name for file in tmp_path.iterdir()] == ["out.safetensors"]
    # One expert's moments at a time: one of the ranks has nothing to solve then.
    monkeypatch.setenv("GROUP", "1")
    grouped = tmp_path / "grouped" / "out.safetensors"
    grouped.parent.mkdir()
    assert all(done.returncode == 0 for done in start([[script, str(model), str(grouped)]] * 2))
    alike(CalibrationStats.load(grouped), whole)
    monkeypatch.delenv("GROUP")
    again = tmp_path / "again" / "out.safetensors"
    again.parent.mkdir()
    # Rank 1 has 5 windows. It dies in layer 1, before that is saved, then behind the saving of layer 2; rank 0 says so and ends.
    for done, calls in ((9, 3), (14, 25)):
        first, second = start([[script, str(model), str(again), "1", str(done), str(calls)]] * 2)
        assert (first.returncode, second.returncode) == (1, -9), first.stderr + second.stderr
        assert "error: another rank is gone" in first.stderr and not again.exists()
        assert (again.parent / "out.work" / "rank-1-of-2" / "layer-000.safetensors").exists()
    assert all(done.returncode == 0 for done in start([[script, str(model), str(again)]] * 2))
    assert again.read_bytes() == out.read_bytes()
    assert [file.name for file in again.parent.iterdir()] == ["out.safetensors"]


def test_one_speaks_for_all_and_an_error_of_one_ends_all(model, tmp_path):
    text, out = tmp_path / "text.txt", tmp_path / "stats.safetensors"
    text.write_text(sample_text(300))
    command = ["-m", "gguftool", "calibrate", str(model), "-o", str(out), "--ctx", "32", "--windows", "3", "--no-obs"]
    first, second = start([[*command, "--data", str(text)]] * 2)
    assert first.stdout.startswith(f"{out}: 96 tokens, 3 layers, 0 experts never routed\n")
    assert (second.stdout, second.stderr) == ("", "")
    own = tmp_path / "own.safetensors"
    function = "import sys, gguftool; gguftool.calibrate(*sys.argv[1:2], data=sys.argv[2:3], out=sys.argv[3], {})"
    function = function.format("ctx=32, windows=3, obs=False")
    for done in start([["-c", function, str(model), str(text), str(own)]] * 2):
        assert done.returncode == 0, done.stderr
    assert own.read_bytes() == out.read_bytes()
    missing = [*command, "--force", "--data", str(tmp_path / "missing.txt")]
    for commands, line in (
        (
            [[*command, "--force", "--data", str(text)], missing],
            f"rank 1 of 2: {tmp_path}/missing.txt: no such text file",
        ),
        ([missing] * 2, f"{tmp_path}/missing.txt: no such text file"),
    ):
        first, second = start(commands)
        assert (first.returncode, second.returncode) == (1, 1)
        assert first.stderr == f"error: {line}\n" and (second.stdout, second.stderr) == ("", "")


def test_what_cannot_be_shared_is_refused(model, tmp_path, monkeypatch):
    for name, value in {"RANK": "0", "WORLD_SIZE": "3", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    done = CliRunner().invoke(cli, ["methods"])
    assert isinstance(done.exception, GgufToolError) and "methods was started 3 times by torchrun" in str(
        done.exception
    )
    few = [(Domain("few", "few", 24), np.ones((2, 12), dtype=np.int64))]
    with pytest.raises(GgufToolError, match="3 processes, and 2 windows of text"):
        calibrate(open_checkpoint(model), few, tmp_path / "work", ranks=replace(ALONE, rank=0, count=3))


@pytest.mark.parametrize(("count", "parts"), [(10, 3), (2, 5), (7, 7), (0, 2)])
def test_shares_are_all_of_it(count, parts):
    pieces = [list(range(count))[share(count, index, parts)] for index in range(parts)]
    assert [number for piece in pieces for number in piece] == list(range(count))
    assert max(map(len, pieces)) - min(map(len, pieces)) <= 1


def halves(model, tmp_path) -> list[CalibrationStats]:
    found = []
    for index in range(2):
        mine = part_of(domains(), index, 2)
        found.append(calibrate(open_checkpoint(model), mine, tmp_path / "work", batch=2))
    return found


def test_merged_halves_are_the_whole(model, whole, tmp_path):
    one, other = halves(model, tmp_path)
    assert [domain.windows for domain in one.domains] == [(0, 1), (0,)]
    assert [domain.windows for domain in other.domains] == [(2, 3, 4), (1, 2)]
    merged, notes = merge([one, other])
    alike(merged, whole, obs=False)
    assert "obs" not in merged.neurons and len(notes) == 1 and "OBS costs are left out" in notes[0]
    # The order of the files is that of nothing.
    alike(merge([other, one])[0], whole, obs=False)


def test_merged_texts_are_those_of_one_run(model, whole, tmp_path):
    """Each text for itself; numbers by hand: counts add up, maxima do not."""
    alone = [calibrate(open_checkpoint(model), [one], tmp_path / "work", batch=2, obs=False) for one in domains()]
    merged, notes = merge(alone)
    assert notes == ()
    alike(merged, whole, obs=False)
    again = replace(alone[0], domains=(replace(alone[0].domains[0], name="third", sha256="other"),))
    three, _ = merge([alone[0], again, alone[1]])
    assert [domain.name for domain in three.domains] == ["code", "third", "math"]
    for name in NEURON_SUMS:
        assert np.allclose(three.neurons[name], 2 * alone[0].neurons[name] + alone[1].neurons[name])
    assert np.array_equal(three.expert("max_out"), whole.expert("max_out"))


def test_what_does_not_add_up_is_refused(model, whole, tmp_path):
    one, other = halves(model, tmp_path)
    drawn = replace(other, domains=(replace(other.domains[0], windows=(1, 7, 9)), other.domains[1]))
    cases = {
        "code: 1 of its windows, the first is 1, are in file 1 and in file 2": [one, drawn],
        "code: 2 of its windows": [one, whole],
        "1 stats file to merge": [one],
        "file 2 is of another model": [one, replace(other, model=replace(other.model, fingerprint="0" * 64))],
        "file 2 has windows of 6 tokens, the first has 12": [one, replace(other, n_ctx=6)],
        "file 2 and the first do not both have sums of output.weight": [
            one, replace(other, linears={k: v for k, v in other.linears.items() if k != "output.weight"})
        ],
        "file 2 has another 'down_norm_sq'": [
            one, replace(other, neurons={**other.neurons, "down_norm_sq": 2 * other.neurons["down_norm_sq"]})
        ],
    }  # fmt: skip
    for message, files in cases.items():
        with pytest.raises(GgufToolError, match=message):
            merge(files)
    # The same text under another name would count twice just as well.
    renamed = replace(one, domains=(replace(one.domains[0], name="copy"), *one.domains[1:]))
    with pytest.raises(GgufToolError, match="would count twice"):
        merge([one, renamed])


def test_parts_of_a_text():
    assert parse_part("2/3") == (1, 3)
    for wrong in ("0/2", "3/2", "2", "a/b", "1/2/3", ""):
        with pytest.raises(GgufToolError, match="--part"):
            parse_part(wrong)
    drawn = Domain("text", "sha", 24, (3, 4, 8, 9))
    ((domain, windows),) = part_of([(drawn, np.arange(24).reshape(4, 6))], 1, 2)
    assert domain == replace(drawn, tokens=12, windows=(8, 9)) and windows[0, 0] == 12
    assert list(window_numbers(Domain("text", "sha", 24), 6)) == [0, 1, 2, 3]
    with pytest.raises(GgufToolError, match="part 1 of 9 has no window: the longest text has 4"):
        part_of([(drawn, np.arange(24).reshape(4, 6))], 0, 9)


def test_the_commands(model, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(sample_text(400))
    parts = []
    for part in ("1/2", "2/2"):
        parts.append(str(tmp_path / f"{part[0]}.safetensors"))
        arguments = [
            "calibrate",
            str(model),
            "--data",
            str(text),
            "--ctx",
            "32",
            "--part",
            part,
            "-o",
            parts[-1],
            "--quiet",
        ]
        done = CliRunner().invoke(cli, arguments, catch_exceptions=False)
        assert done.exit_code == 0, done.output
    out = tmp_path / "all.safetensors"
    done = CliRunner().invoke(cli, ["stats", "merge", *parts, "-o", str(out)], catch_exceptions=False)
    assert "OBS costs are left out" in done.output
    assert CalibrationStats.load(out).domains[0].windows is None
    done = CliRunner().invoke(cli, ["stats", "merge", *parts, "-o", str(out)])
    assert isinstance(done.exception, GgufToolError) and "--force" in str(done.exception)

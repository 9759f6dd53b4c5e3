"""Killed at any moment, the same command goes on and ends byte for byte as if nothing had happened."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gguftool import durable
from gguftool.errors import GgufToolError
from gguftool.workdir import WorkDir, clear_leftovers
from models import tiny_checkpoint

KINDS = ("calibrate", "plain", "sequential")


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """What `killed.py` did, and the folder of its results."""
    root = tmp_path_factory.mktemp("killed")
    command = [
        sys.executable,
        str(Path(__file__).parent / "killed.py"),
        str(tiny_checkpoint(root / "model")),
        str(root),
    ]
    done = subprocess.run([*command, *KINDS], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), root


@pytest.mark.parametrize("what", KINDS)
def test_killed_at_five_moments_it_ends_the_same(killed, what, fault):
    facts, root = killed
    with fault(len(facts[what]["moments"]) + 3):
        want = (root / what / "whole" / "out.safetensors").read_bytes()
        assert facts[what]["calls"] > 100 and len(want) > 1000
        folders = [root / what / f"at-{moment}" for moment in facts[what]["moments"]] + [root / what / "again"]
        for folder in folders:
            assert [file.name for file in folder.iterdir()] == ["out.safetensors"]
            assert (folder / "out.safetensors").read_bytes() == want, folder.name


def test_a_result_that_was_saved_takes_its_state_along(tmp_path):
    work, out = tmp_path / "out.work", tmp_path / "out"
    state = WorkDir(work, {"of": "this"}, (1, 2, 3), torch.float32)
    with state.next_hidden() as append:
        append(torch.zeros(1, 2, 3))
    state.advance()
    (tmp_path / "out.partial").write_text("result")
    durable.note_saved(work, tmp_path / "out.partial")
    durable.settle(tmp_path / "out.partial", out)
    other = tmp_path / "other"
    other.write_text("result")
    clear_leftovers(work, other)
    assert work.is_dir()  # another file is not its result, whatever is in it
    clear_leftovers(work, out)
    assert not work.exists() and out.read_text() == "result"
    work.mkdir()
    clear_leftovers(work, out)
    assert not work.exists()  # killed in front of the last step
    with pytest.raises(GgufToolError, match="work directory cannot be written"):
        WorkDir(out, {}, (1, 2, 3), torch.float32)

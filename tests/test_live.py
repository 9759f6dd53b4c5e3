"""The live view: its states by hand, and in a pseudo-terminal of its own, where Ctrl-C must leave the cursor as it was."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
import time

import pytest
from rich.console import Console

from gguftool import builtin
from gguftool.live import View, shown, stage_of

HIDDEN, SHOWN = "\x1b[?25l", "\x1b[?25h"
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="pty")


@pytest.mark.parametrize(
    ("name", "stage"),
    [
        ("base.gguf", "convert"), ("stats.safetensors", "calibrate"), ("stats-seed2.safetensors", "calibrate"),
        ("M-AUTO40-Q4_K_M.plan.json", "plan"), ("M-AUTO40.refit-sequential.safetensors", "refit"),
        ("M-DERN40.dern.safetensors", "refit"), ("M-AUTO40RS-BF16.gguf", "prune"), ("M-AUTO40RS-Q4_K_M.gguf", "quantize"),
    ],
)  # fmt: skip
def test_a_files_stage(name, stage):
    assert stage_of(name, "Q4_K_M") == stage


def drawn(view):
    console = Console(width=110, record=True, file=io.StringIO())
    console.print(view)
    return console.export_text()


def states(view):
    return dict(re.findall(r"^  (\w+) +(pending|running|done|already there|left out)", drawn(view), re.M))


def test_stages_follow_each_other(tmp_path):
    now = [0.0]
    view = View("model -> out", "Q8_0", ["{task.description}"], clock=lambda: now[0])
    assert set(states(view).values()) == {"pending"}

    def step(name, *what):
        for state in what:
            view.watch("step", {"name": name, "state": state, "path": tmp_path / name})

    (tmp_path / "base.gguf").write_bytes(b"x" * 2_500_000)
    step("base.gguf", "there")
    assert states(view)["convert"] == "already there"
    now[0] = 10
    step("stats.safetensors", "making")
    view.progress(3, 12, "layer 3 of 12")
    now[0] = 75
    said = drawn(view)
    assert states(view)["calibrate"] == "running" and "0:01:05" in said and "layer 3 of 12" in said
    assert "base.gguf" in said and "2.50 MB" in said
    step("stats.safetensors", "made")
    step("m.plan.json", "making", "made")
    (tmp_path / "m-BF16.gguf").write_bytes(b"x" * 1_000_000)
    step("m-BF16.gguf", "making", "made")
    assert states(view) == {
        "convert": "already there", "calibrate": "done", "plan": "done", "refit": "left out", "prune": "running",
        "quantize": "pending", "measure": "pending", "check": "pending",
    }  # fmt: skip
    view.watch("stage", {"name": "measure"})
    row = {"pruned": {"ppl": 29.125, "bytes": 1_000_000}, "kld": {"mean": 0.0385}}
    view.watch("measured", {"text": "wiki", "models": [("auto 40 %", row)]})
    said = drawn(view)
    assert "wiki: perplexity" in said and re.search(r"auto 40 % +1\.00 MB +29\.125 +0\.03850", said)
    view.watch("stage", {"name": "check"})
    view.finish()
    assert states(view)["check"] == "done" and "running" not in drawn(view) and "auto 40 %" not in drawn(view)


def test_names_are_shown_as_they_are(tmp_path):
    view = View("a:train:b[en] -> out", None, ["{task.description}"])
    (tmp_path / "m[1]:cat:.gguf").write_bytes(b"x")
    for state in ("making", "made"):
        view.watch("step", {"name": "m[1]:cat:.gguf", "state": state, "path": tmp_path / "m[1]:cat:.gguf"})
    said = drawn(view)
    assert "a:train:b[en] -> out" in said and "m[1]:cat:.gguf" in said
    row = {"pruned": {"ppl": 29.125, "bytes": 1_000_000}, "kld": {"mean": 0.0385}}
    view.watch("measured", {"text": "wiki[en]:cat:", "models": [("a[b]:cat:", row)]})
    said = drawn(view)
    assert "wiki[en]:cat:: perplexity" in said and "a[b]:cat:" in said


def test_a_run_with_a_budget_has_stages_of_its_own(tmp_path):
    now = [0.0]
    view = View("model -> out", None, ["{task.description}"], clock=lambda: now[0], fit=True)

    def step(name, *what):
        (tmp_path / name).write_bytes(b"x")
        for state in what:
            view.watch("step", {"name": name, "state": state, "path": tmp_path / name})

    step("base.gguf", "making", "made")
    view.watch("stage", {"name": "budget"})
    now[0] = 5
    step("base.gguf", "there")  # looked up again in front of calibrating
    assert states(view)["convert"] == "done" and states(view)["budget"] == "running"
    step("stats.safetensors", "making", "made")
    view.watch("stage", {"name": "weigh"})
    step("m-Q8_0.gguf", "making", "made")
    step("m-Q8_0.plan.json", "making", "made")
    assert list(states(view).items()) == [
        ("convert", "done"), ("budget", "done"), ("calibrate", "done"), ("weigh", "done"), ("make", "running"),
        ("measure", "pending"), ("check", "pending"),
    ]  # fmt: skip
    assert re.search(r"convert +done +0:00:00", drawn(view))


def test_an_error_gives_the_cursor_back(tmp_path):
    path = tmp_path / "screen"
    with open(path, "w") as screen, pytest.raises(KeyboardInterrupt):
        console = Console(file=screen, force_terminal=True, width=80, _environ={"TERM": "xterm"})
        with shown(View("t", None, []), console):
            raise KeyboardInterrupt
    said = path.read_text()
    assert HIDDEN in said and said.rindex(SHOWN) > said.rindex(HIDDEN)


class Screen:
    """`gguftool` in a pseudo-terminal; pty.spawn hands over what is typed and what is shown."""

    def __init__(self, *arguments):
        # A shell's background job has Ctrl-C ignored, and so would what it starts.
        code = (
            "import os, pty, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); "
            "sys.exit(os.waitstatus_to_exitcode(pty.spawn(sys.argv[1:])))"
        )
        command = [sys.executable, "-c", code, sys.executable, "-m", "gguftool", *map(str, arguments)]
        environment = {**os.environ, "TERM": "xterm", "COLUMNS": "120", "LINES": "50"}
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment
        )
        os.set_blocking(self.process.stdout.fileno(), False)
        self.said = ""

    def until(self, pattern, seconds=240):
        end = time.monotonic() + seconds
        while not re.search(pattern, self.said, re.S):
            assert time.monotonic() < end and self.process.poll() is None, self.said[-3000:]
            self.read()

    def read(self):
        time.sleep(0.05)
        self.said += (self.process.stdout.read() or b"").decode(errors="replace")

    def end(self):
        while self.process.poll() is None:
            self.read()
        self.read()
        return self.process.returncode


def arguments(model, out):
    texts = builtin.texts()
    return (
        "compress", model, "--method", "global", "--ratio", "0.4", "--quant", "Q8_0", "--data", texts["calib_code"],
        "--eval", texts["eval_code"], "--windows", 2, "--eval-windows", 1, "--pre-tokenizer", "qwen2", "--backend", "cpu",
        "-o", out,
    )  # fmt: skip


def test_a_run_in_a_terminal(checkpoint_dir, tmp_path, runtime):
    screen = Screen(*arguments(checkpoint_dir, tmp_path / "out"))
    assert screen.end() == 0, screen.said[-3000:]
    for stage in ("convert", "calibrate"):
        assert re.search(rf"{stage} +(\x1b\[[\d;]*m)*running", screen.said), stage
    last = screen.said[screen.said.rindex("  convert") :]
    for stage in ("convert", "calibrate", "plan", "prune", "quantize", "measure"):
        assert re.search(rf"{stage} +(\x1b\[[\d;]*m)*done", last), stage
    assert re.search(r"refit +(\x1b\[[\d;]*m)*left out", last) and re.search(r"check +(\x1b\[[\d;]*m)*done", last)
    assert "so far" in screen.said and "layer" in screen.said and re.search(r"\d\.\d GB", screen.said)
    assert "what it cost" in last
    assert screen.said.rindex(SHOWN) > screen.said.rindex(HIDDEN)


def test_ctrl_c_gives_the_cursor_back(checkpoint_dir, tmp_path, runtime):
    screen = Screen(*arguments(checkpoint_dir, tmp_path / "out"))
    screen.until(r"calibrate +(\x1b\[[\d;]*m)*running")
    assert SHOWN not in screen.said
    screen.process.stdin.write(b"\x03")
    screen.process.stdin.flush()
    assert screen.end() == 130
    assert "stopped" in screen.said and "Traceback" not in screen.said
    assert screen.said.rindex(SHOWN) > screen.said.rindex(HIDDEN)

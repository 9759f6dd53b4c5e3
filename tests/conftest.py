"""Shared fixtures: the patched and the plain runtime, and the built-in model on its way through the product."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest

from gguftool import builtin, runtime
from gguftool.calibrate import calibrate
from gguftool.checkpoint import open_checkpoint
from gguftool.convert import convert
from gguftool.corpus import load_domain
from gguftool.stats import CalibrationStats

WINDOWS = 8
# Threads that wait by spinning cost minutes where tests share few cores.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

# Faults that tests have injected, and those after which inputs, outputs and the next run were as they must be.
FAULTS = {"injected": 0, "survived": 0}


@pytest.fixture
def fault() -> Callable[..., AbstractContextManager[None]]:
    """A block that counts so many injected faults; what has to hold afterwards is checked inside of it."""

    @contextmanager
    def block(count: int = 1) -> Iterator[None]:
        FAULTS["injected"] += count
        yield
        FAULTS["survived"] += count

    return block


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):  # one of several processes, see scripts/test
        session.config.workeroutput["faults"] = FAULTS


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    for name, count in getattr(node, "workeroutput", {}).get("faults", {}).items():
        FAULTS[name] += count


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if count := FAULTS["injected"]:
        terminalreporter.write_line(f"{count} faults injected, {count - FAULTS['survived']} lost")


@pytest.fixture(scope="session")
def plain_runtime():
    """llama.cpp without our patches. Built before the patched one: ninja then compiles only what the patches touch."""
    return runtime.build("cpu", patched=False)


@pytest.fixture(scope="session")
def runtime_(plain_runtime):
    return runtime.build("cpu")


@pytest.fixture(scope="session", name="runtime")
def patched_runtime(runtime_):
    """The patched llama.cpp."""
    return runtime_


@pytest.fixture(scope="session")
def llama(runtime):
    return __import__("gguftool.runtime", fromlist=["load"]).load(runtime)


@pytest.fixture(scope="session")
def checkpoint_dir(tmp_path_factory) -> Path:
    return builtin.unpack(tmp_path_factory.mktemp("builtin") / "model")


@pytest.fixture(scope="session")
def base_gguf(tmp_path_factory, checkpoint_dir, runtime) -> Path:
    """The built-in model as BF16."""
    out = tmp_path_factory.mktemp("base") / "base.gguf"
    convert(checkpoint_dir, out, runtime, pre_tokenizer="qwen2")
    return out


@pytest.fixture(scope="session")
def base_f32(tmp_path_factory, checkpoint_dir, runtime) -> Path:
    out = tmp_path_factory.mktemp("base32") / "base-f32.gguf"
    convert(checkpoint_dir, out, runtime, pre_tokenizer="qwen2", outtype="f32")
    return out


@pytest.fixture(scope="session")
def eval_text() -> Path:
    return builtin.texts()["eval_code"]


@pytest.fixture(scope="session")
def stats(tmp_path_factory, checkpoint_dir) -> CalibrationStats:
    """The built-in model calibrated on a few windows of code."""
    checkpoint = open_checkpoint(checkpoint_dir)
    domains = [load_domain(builtin.texts()["calib_code"], checkpoint.tokenizer(), 512, WINDOWS)]
    return calibrate(checkpoint, domains, tmp_path_factory.mktemp("calibrate"))

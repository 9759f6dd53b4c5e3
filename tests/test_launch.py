"""run and serve: the patched llama-cli chats with a tiered file, the patched llama-server answers; both end cleanly."""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from types import SimpleNamespace

import pytest

from gguftool import launch as launch_module
from gguftool.errors import GgufToolError
from gguftool.launch import launch
from gguftool.planner import make_plan
from gguftool.recipe import Recipe
from gguftool.writer import prune

GGUFTOOL = [sys.executable, "-m", "gguftool"]
DEADLINE = 60


@pytest.fixture(scope="module")
def pruned(base_gguf, stats, tmp_path_factory):
    """The built-in model with experts of different widths: only the patched runtime loads it."""
    out = tmp_path_factory.mktemp("launch") / "pruned.gguf"
    plan = make_plan(stats, Recipe("global", 0.4))
    assert not plan.uniform
    prune(base_gguf, plan, out)
    return out


@pytest.fixture
def executed(monkeypatch, runtime):
    """What would take this process's place."""
    calls = []
    monkeypatch.setattr(launch_module.os, "execv", lambda path, command: calls.append((path, command)))
    return calls


def test_arguments_go_to_the_program_untouched(executed, pruned, runtime, monkeypatch):
    from gguftool import cli

    arguments = ["-n", "4", "--backend", "x", "--json", "-h", "--", "-p", "a b"]
    monkeypatch.setattr(cli.sys, "argv", ["gguftool", "run", "--backend", "cpu", str(pruned), *arguments])
    with pytest.raises(SystemExit):
        cli.main()
    program = runtime.tool("llama-cli")
    assert executed == [(program, [str(program), "-m", str(pruned), *arguments])]


def test_windows_runs_it_beside_and_hands_on_its_status(pruned, runtime, monkeypatch):
    seen = []
    monkeypatch.setattr(launch_module, "require", lambda _backend: runtime)
    monkeypatch.setattr(type(runtime), "tool", lambda _self, name: f"{name}.exe")
    monkeypatch.setattr(launch_module, "sys", SimpleNamespace(platform="win32"))
    monkeypatch.setattr(launch_module.subprocess, "call", lambda command: seen.append(command) or 3)
    assert launch("llama-server", pruned, ["--port", "1"]) == 3
    assert seen == [["llama-server.exe", "-m", str(pruned), "--port", "1"]]


def test_what_cannot_be_run_is_one_line_and_starts_nothing(executed, pruned, tmp_path):
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(pruned.read_bytes()[: pruned.stat().st_size // 2])
    text = tmp_path / "text.gguf"
    text.write_text("a long enough text that is no GGUF at all")
    for path, message in ((tmp_path / "no.gguf", "no such file"), (cut, "truncated"), (text, "not a GGUF file")):
        with pytest.raises(GgufToolError, match=message) as error:
            launch("llama-cli", path, [])
        assert "\n" not in str(error.value)
    assert executed == []


def test_without_a_runtime_the_command_is_named(pruned, tmp_path, monkeypatch):
    monkeypatch.setenv("GGUFTOOL_CACHE", str(tmp_path))
    with pytest.raises(GgufToolError, match="gguftool runtime build --backend vulkan"):
        launch("llama-cli", pruned, [], "vulkan")


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_run_chats_in_a_terminal(pruned, runtime):
    """Two turns typed at a terminal, each answered, then /exit."""
    import pty

    master, slave = pty.openpty()
    command = [*GGUFTOOL, "run", "--backend", "cpu", str(pruned), "-n", "12", "--temp", "0", "-t", "1", "-c", "256"]
    process = subprocess.Popen([*command, "--color", "off"], stdin=slave, stdout=slave, stderr=slave, close_fds=True)
    os.close(slave)
    screen = Screen(master)
    try:
        start = 0
        for words in (b"import os", b"def main("):
            screen.wait(b"\n> ", start)
            start = len(screen.text)
            os.write(master, words + b"\n")
            screen.wait(b"Generation:", start)
            answer = screen.text[start:].split(b"[ Prompt:")[0].replace(words, b"")
            assert len(answer.strip(b"\r\n |/-\\\x08")) > 3, screen.text
        os.write(master, b"/exit\n")
        screen.drain()
        assert process.wait(DEADLINE) == 0
    finally:
        process.kill()
        process.wait()
        os.close(master)


class Screen:
    """What a pseudo-terminal has shown so far."""

    def __init__(self, master: int) -> None:
        self.master, self.text = master, b""

    def wait(self, pattern: bytes, since: int) -> None:
        """Reads until `pattern` stands behind the first `since` bytes."""
        end = time.monotonic() + DEADLINE
        while pattern not in self.text[since:]:
            assert time.monotonic() < end and self._read(), self.text[-2000:]

    def drain(self) -> None:
        """Reads until the program closes the terminal: it must not wait for room."""
        end = time.monotonic() + DEADLINE
        while self._read() and time.monotonic() < end:
            pass

    def _read(self) -> bool:
        if not select.select([self.master], [], [], 1)[0]:
            return True
        try:
            data = os.read(self.master, 4096)
        except OSError:  # the other end is closed
            return False
        self.text += data
        return bool(data)


@contextmanager
def served(model, *arguments):
    """The address of `gguftool serve`; the process, stopped at the end if it still runs."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [*GGUFTOOL, "serve", str(model), "--host", "127.0.0.1", "--port", str(port), "-c", "256", "-t", "1"]
    process = subprocess.Popen([*command, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield f"http://127.0.0.1:{port}", process
    finally:
        process.kill()
        process.wait()


def ask(url, body=None):
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=DEADLINE) as answer:
        return json.load(answer)


def wait_for(url, process):
    end = time.monotonic() + DEADLINE
    while True:
        try:
            return ask(url)
        except (urllib.error.URLError, ConnectionError):
            assert process.poll() is None and time.monotonic() < end
            time.sleep(0.1)


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_serve_answers_and_stops(pruned, runtime):
    with served(pruned) as (address, process):
        assert wait_for(f"{address}/health", process) == {"status": "ok"}
        question = {"messages": [{"role": "user", "content": "import os"}], "max_tokens": 6, "temperature": 0}
        chat = ask(f"{address}/v1/chat/completions", question)
        assert chat["choices"][0]["message"]["role"] == "assistant" and chat["usage"]["completion_tokens"] > 0
        completion = {"prompt": "import os\n\ndef main(", "max_tokens": 6, "temperature": 0}
        first = ask(f"{address}/v1/completions", completion)
        assert first["choices"][0]["text"].strip() and first["usage"]["completion_tokens"] == 6
        assert ask(f"{address}/v1/completions", completion)["choices"] == first["choices"]
        process.send_signal(signal.SIGINT)
        assert process.wait(DEADLINE) == 0
        with pytest.raises(urllib.error.URLError):
            ask(f"{address}/health")

"""Hugging Face checkpoint -> GGUF, by llama.cpp's own converter of the pinned base."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from contextlib import nullcontext
from difflib import get_close_matches
from pathlib import Path

from .checkpoint import Checkpoint, lacks_predictors, open_checkpoint
from .checkpoint_config import checkpoint_directory
from .durable import check_unchanged, full, held_handles, identity, replacing
from .errors import GgufToolError
from .gguf_file import GgufFile, Progress, check_output, check_space
from .hf_to_gguf import FINGERPRINT, PRE_TOKENIZER
from .processes import ending
from .runtime import Runtime, last_line
from .stored import PICKLED

OUT_TYPES = ("auto", "f32", "f16", "bf16", "q8_0")
# The converter's bar, drawn again and again behind carriage returns.
_WRITING = re.compile(r"Writing:\s+(\d+)%")


def convert(
    model: Path,
    out: Path,
    runtime: Runtime,
    *,
    pre_tokenizer: str | None = None,
    outtype: str = "auto",
    force: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> None:
    """Converts the checkpoint in `model`, a directory or a model of the hub.

    Args:
        pre_tokenizer: llama.cpp's name of the vocabulary's pre-tokenizer, where its hash is not known to llama.cpp.
        outtype: one of OUT_TYPES; auto keeps the checkpoint's 16 bits.
        dry_run: let the converter do all but the writing: it reads every header and the vocabulary, whose pre-tokenizer only it
            knows.
        progress: called with (percent written, 100, what is being done).

    Raises:
        GgufToolError: an unknown type, no checkpoint, no room, an unknown pre-tokenizer, or whatever the converter said last.
    """
    if outtype not in OUT_TYPES:
        raise GgufToolError(f"outtype {outtype!r}: the converter writes {', '.join(OUT_TYPES)}")
    known = pre_tokenizers(runtime)
    if pre_tokenizer and pre_tokenizer not in known:
        near = get_close_matches(pre_tokenizer, known, n=3)
        raise GgufToolError(f"llama.cpp knows no pre-tokenizer {pre_tokenizer!r}; near are {', '.join(near) or 'none'}")
    check_output(out, force or dry_run, model)
    model = checkpoint_directory(model)
    inputs = _inputs(model)
    check_space(out, sum(path.stat().st_size for path in inputs if path.suffix == ".safetensors"))
    path = [str(runtime.convert_dir), str(runtime.convert_dir / "gguf-py"), str(Path(__file__).parent.parent)]
    opened = _opened(model)
    environment = {
        **os.environ, "PYTHONPATH": os.pathsep.join(path), PRE_TOKENIZER: pre_tokenizer or "",
        FINGERPRINT: opened.fingerprint if opened is not None else "",
    }  # fmt: skip
    options = ["--outtype", outtype]
    if opened is not None and lacks_predictors(opened):
        options.append("--no-nextn")
    if dry_run:
        options.append("--dry-run")
    with nullcontext(out) if dry_run else replacing(out) as partial:
        command = [sys.executable, "-m", "gguftool.hf_to_gguf", str(model), "--outfile", str(partial), *options]
        code, log = _run(command, environment, progress)
        # First of all: where another program cuts off a file that the converter has mapped, the system ends it.
        check_unchanged(inputs)
        if code:
            raise GgufToolError(_reason(model, code, log) + full(out))
        if not dry_run:
            GgufFile(partial)


def _opened(model: Path) -> Checkpoint | None:
    """The opened checkpoint; the converter knows more families than gguftool does, and says what is wrong itself."""
    try:
        return open_checkpoint(model)
    except GgufToolError:
        return None


def _inputs(model: Path) -> dict[Path, list[int]]:
    """What the converter will read, for `check_unchanged`. Raises GgufToolError for what is no checkpoint of safetensors."""
    weights = sorted(model.glob("model*.safetensors"))
    if not (model / "config.json").is_file() or not weights:
        pickled = [path.name for kind in PICKLED for path in sorted(model.glob(kind))]
        if pickled and not weights:
            raise GgufToolError(
                f"{model}: {pickled[0]} is a pickle, which can run code when it is read; gguftool reads safetensors only"
            )
        raise GgufToolError(f"{model}: not a Hugging Face checkpoint (config.json and model*.safetensors)")
    return {path: identity(path) for path in (*sorted(model.glob("*.json")), *weights)}


def pre_tokenizers(runtime: Runtime) -> list[str]:
    """The pre-tokenizers that the runtime's converter can write, by llama.cpp's names."""
    source = (runtime.convert_dir / "conversion" / "base.py").read_text(encoding="utf-8")
    return sorted(set(re.findall(r'res = "([^"]+)"', source)))


def _run(command: list[str], environment: dict[str, str], progress: Progress | None) -> tuple[int, str]:
    """Runs the converter; its exit status and what it logged. Stops it when we are stopped."""
    log, percent = "", -1
    process = subprocess.Popen(
        command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        pass_fds=held_handles(),
    )  # fmt: skip
    with process:
        assert process.stderr is not None
        try:
            while chunk := os.read(process.stderr.fileno(), 1 << 16):
                log += chunk.decode("utf-8", "replace")
                found = _WRITING.findall(log[-2000:]) if progress else []
                if progress and found and int(found[-1]) > percent:
                    percent = int(found[-1])
                    progress(percent, 100, "converting")
        except BaseException:
            process.terminate()
            raise
    return process.returncode, log


def _reason(model: Path, code: int, log: str) -> str:
    if code < 0:
        return f"{model}: llama.cpp's converter did not finish: {ending(code)}"
    if short := re.search(r"OSError: (\d+ requested and \d+ written)", log):
        return f"llama.cpp's converter could not write all of it ({short[1]}); make room and run it again"
    if "pre-tokenizer was not recognized" in log:
        return (
            f"{model}: llama.cpp does not know this vocabulary's pre-tokenizer; name the one that it was made with, "
            "such as --pre-tokenizer (in Python pre_tokenizer) qwen2, llama-bpe, gpt-2 or deepseek-llm"
        )
    return f"llama.cpp's converter refused {model}: {last_line(log)}"

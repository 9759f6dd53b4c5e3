"""Hugging Face checkpoint -> GGUF, by llama.cpp's own converter of the pinned base."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from .errors import GgufToolError
from .gguf_file import GgufFile, check_output, check_space, replacing
from .hf_to_gguf import PRE_TOKENIZER
from .runtime import Runtime, last_line

OUT_TYPES = ("auto", "f32", "f16", "bf16", "q8_0")


def convert(
    model: Path,
    out: Path,
    runtime: Runtime,
    *,
    pre_tokenizer: str | None = None,
    outtype: str = "auto",
    force: bool = False,
) -> None:
    """Converts the checkpoint in `model`.

    Args:
        pre_tokenizer: llama.cpp's name of the vocabulary's pre-tokenizer, where its hash is not known to llama.cpp.
        outtype: as the converter's own; auto keeps the checkpoint's 16 bits.

    Raises:
        GgufToolError: no checkpoint, no room, an unknown pre-tokenizer, or whatever the converter said last.
    """
    check_output(out, force)
    weights = sum(path.stat().st_size for path in model.glob("*.safetensors"))
    if not (model / "config.json").is_file() or not weights:
        raise GgufToolError(f"{model}: not a Hugging Face checkpoint (config.json and *.safetensors)")
    check_space(out, weights)
    path = [str(runtime.convert_dir), str(runtime.convert_dir / "gguf-py"), str(Path(__file__).parent.parent)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path), PRE_TOKENIZER: pre_tokenizer or ""}
    with replacing(out) as partial:
        command = [
            sys.executable,
            "-m",
            "gguftool.hf_to_gguf",
            str(model),
            "--outfile",
            str(partial),
            "--outtype",
            outtype,
        ]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise GgufToolError(_reason(model, done.stderr))
        GgufFile(partial)


def _reason(model: Path, log: str) -> str:
    if "pre-tokenizer was not recognized" in log:
        return (
            f"{model}: llama.cpp does not know this vocabulary's pre-tokenizer; name the one that it was made with, "
            "such as --pre-tokenizer qwen2, llama-bpe, gpt-2 or deepseek-llm"
        )
    return f"llama.cpp's converter refused {model}: {last_line(log)}"

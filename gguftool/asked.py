"""What is asked of a pass over texts, and what a GGUF is opened with for one: `calibration` and `refitting` begin here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch

from .corpus import Tokenizer, load_domains
from .errors import GgufToolError
from .gguf_file import check_output
from .gguf_model import GgufModel, open_gguf
from .gguf_tokenizer import GgufTokenizer
from .memory import parse_bytes, parse_dtype
from .parts import parse_part, part_of
from .runtime import load_for
from .sources import Source
from .stats import Domain
from .windows import Windows
from .workdir import work_dir_of

Domains: TypeAlias = Sequence[tuple[Domain, Windows]]


@dataclass(frozen=True)
class Asked:
    """What is asked of a pass over texts: the options that `calibrate` and `refit` share.

    Attributes:
        model: a checkpoint's directory, a model of the hub, or a GGUF. data: the texts. out: the file to write.
        part: only this part of the windows, as `parts.parse_part` reads it.
    """

    model: Path
    data: Sequence[Source]
    out: Path
    n_ctx: int = 512
    windows: int | None = None
    part: str | None = None
    device: str = "cpu"
    dtype: str = "auto"
    memory: str | None = None
    force: bool = False

    @property
    def inputs(self) -> list[Path]:
        """Files and folders that are read; a name that only the hub knows is there for nobody to write to."""
        return [self.model, *(Path(source.place) for source in self.data)]

    @property
    def limit(self) -> int | None:
        """Bytes that the pass may take."""
        return None if self.memory is None else parse_bytes(self.memory)

    @property
    def kind(self) -> torch.dtype | None:
        """Type of the computation, None for auto."""
        return parse_dtype(self.dtype)

    @property
    def numbers(self) -> tuple[int, int] | None:
        """Which part of how many, counted from 0; None for all."""
        return None if self.part is None else parse_part(self.part)

    @property
    def work_dir(self) -> Path:
        """Where the state of the pass lies meanwhile."""
        return work_dir_of(self.out)

    def check(self, dry_run: bool, *more: Path) -> None:
        """Raises GgufToolError for options that say nothing, an output that is an input, or that is there and may not go.

        A dry run leaves an output that is there alone, so that is no reason to refuse it. `more`: inputs beside the shared ones.
        """
        check_output(self.out, self.force or dry_run, *self.inputs, *more)
        _ = self.limit, self.kind, self.numbers

    def domains(self, tokenizer: Tokenizer) -> Domains:
        """The texts, cut into windows. Raises as `corpus.load_domains` and `parts.part_of` do."""
        found = load_domains(self.data, tokenizer, self.n_ctx, self.windows)
        return found if self.numbers is None else part_of(found, *self.numbers)


def open_for_llama(asked: Asked) -> tuple[GgufModel, GgufTokenizer, Any]:
    """A GGUF that is to be measured, its tokenizer, and the llama.cpp that runs it: the built runtime or the package's.

    Raises GgufToolError for options that llama.cpp has no use for, and for what is no such file.
    """
    refuse_options(asked.device, asked.dtype)
    model = open_gguf(asked.model)
    llama, _, _ = load_for("auto", asked.model)
    return model, GgufTokenizer(llama, asked.model), llama


def refuse_options(device: str, dtype: str) -> None:
    """Raises GgufToolError for a device or a type that a GGUF cannot be measured with."""
    if device != "cpu":
        raise GgufToolError(f"device {device!r}: a GGUF is run by llama.cpp on the CPU; leave it out")
    if dtype != "auto":
        raise GgufToolError(f"dtype {dtype!r}: a GGUF is run by llama.cpp in its own types; leave it out")

"""A calibration from its options to its stats, the one way that the command, the Python function and `compress` go.

All that can be refused is refused before the first dear step, and what was checked says on what it will run and how. `checked`
is the whole of it, with the lock that keeps a second run off; whoever has opened a model and read its texts comes in at
`of_checkpoint` or `of_gguf`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch

from .calibrate import calibrate
from .checkpoint import Checkpoint, open_checkpoint
from .corpus import Tokenizer, load_domains
from .errors import GgufToolError
from .forward import LayerStream, Progress, check_windows
from .gguf_calibrate import calibrate_gguf, solves_obs
from .gguf_file import check_output
from .gguf_model import GgufModel, is_gguf, open_gguf
from .gguf_pass import bounded
from .gguf_tokenizer import GgufTokenizer
from .inventory import model_facts
from .loader import usable_device
from .memory import MemoryPlan, parse_bytes, parse_dtype, plan_memory
from .parts import parse_part, part_of
from .processes import own_device, process_count
from .ranks import ALONE, Ranks, joined
from .runtime import load_for
from .sources import Source, files
from .stats import CalibrationStats, Domain, ModelFacts
from .windows import Windows, check_domains
from .workdir import own_work_dir, work_dir_of

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

    def check(self, dry_run: bool, *inputs: Path) -> None:
        """Raises GgufToolError for options that say nothing, an output that is an input, or that is there and may not go.

        A dry run leaves an output that is there alone, so that is no reason to refuse it.
        """
        check_output(self.out, self.force or dry_run, *inputs, *files(self.data))
        _ = self.limit, self.kind, self.numbers

    def domains(self, tokenizer: Tokenizer) -> Domains:
        """The texts, cut into windows. Raises as `corpus.load_domains` and `parts.part_of` do."""
        found = load_domains(self.data, tokenizer, self.n_ctx, self.windows)
        return found if self.numbers is None else part_of(found, *self.numbers)


@dataclass(frozen=True)
class CheckpointCalibration:
    """A checked calibration of a checkpoint, a layer in memory at a time.

    Attributes:
        memory: how it is run. device: of this process. ranks: the processes that share the windows.
    """

    checkpoint: Checkpoint
    domains: Domains
    memory: MemoryPlan
    obs: bool
    device: str
    ranks: Ranks = ALONE

    @property
    def facts(self) -> ModelFacts:
        """What the stats will say of the model."""
        return model_facts(self.checkpoint)

    @property
    def how(self) -> str:
        """How it is run, for a person."""
        return str(self.memory)

    def rehearse(self) -> None:
        """Raises GgufToolError where the weights do not fill the model, which a run finds out first. None is read."""
        LayerStream(self.checkpoint, self.device, self.memory.dtype)

    def run(self, work_dir: Path, out: Path, progress: Progress | None = None) -> CalibrationStats:
        """The stats, which are saved as `out` too. See `calibrate.calibrate`."""
        return calibrate(
            self.checkpoint, self.domains, work_dir, device=self.device, how=self.memory, obs=self.obs, progress=progress,
            out=out, ranks=self.ranks,
        )  # fmt: skip


@dataclass(frozen=True)
class GgufCalibration:
    """A checked calibration of a GGUF, which llama.cpp runs.

    Attributes:
        llama: the llama_cpp module. limit: bytes that second moments may take.
    """

    model: GgufModel
    domains: Domains
    llama: Any
    obs: bool
    limit: int | None

    @property
    def how(self) -> str:
        """How it is run, for a person."""
        return f"llama.cpp on the CPU, in the file's own types{bounded(self.limit)}"

    @property
    def facts(self) -> ModelFacts:
        """What the stats will say of the model, but for `norm_topk`."""
        return self.model.facts()

    def run(self, work_dir: Path, out: Path, progress: Progress | None = None) -> CalibrationStats:
        """The stats, which are saved as `out` too. See `gguf_calibrate.calibrate_gguf`."""
        return calibrate_gguf(
            self.model, self.domains, work_dir, llama=self.llama, obs=self.obs, memory=self.limit, progress=progress, out=out
        )  # fmt: skip


Calibration: TypeAlias = CheckpointCalibration | GgufCalibration


@contextmanager
def checked(asked: Asked, *, obs: bool = True, dry_run: bool = False) -> Iterator[Calibration]:
    """A calibration of which all has been checked, to `run` in `asked.work_dir` while the block lasts.

    Until the block ends no other run can have that directory, and the processes that torchrun started are joined. A
    `dry_run` takes no lock and writes nothing; it also finds out whether the weights fill the model, as a run does first.

    Args:
        obs: whether to solve OBS costs; of a GGUF only where a layer's second moments are not too large.

    Raises:
        GgufToolError: for whatever would be refused, and where another process makes the same output.
    """
    gguf = is_gguf(asked.model)
    if gguf and process_count() > 1:
        raise GgufToolError("a GGUF is run by llama.cpp in one process; start it without torchrun, or with --part")
    with joined(asked.device) as ranks, ExitStack() as stack:
        with ranks.together():
            if ranks.rank == 0 and not dry_run:
                stack.enter_context(own_work_dir(asked.out))
            asked.check(dry_run)
            found = _opened_gguf(asked, obs) if gguf else _opened_checkpoint(asked, obs, ranks, dry_run)
        yield found


def of_checkpoint(
    checkpoint: Checkpoint, domains: Domains, *, obs: bool = True, device: str = "cpu", dtype: torch.dtype | None = None,
    limit: int | None = None, ranks: Ranks = ALONE,
) -> CheckpointCalibration:  # fmt: skip
    """The calibration of an opened checkpoint on these windows; `dtype` and `limit` as `plan_memory` has them.

    Raises as `checked` does.
    """
    usable_device(device)
    n_ctx = check_windows(checkpoint, domains, ranks)
    count = sum(-(-len(windows) // ranks.count) for _, windows in domains)
    memory = plan_memory(
        checkpoint, count, n_ctx, dtype, limit, device=device, moments=None if obs else 0, n_domains=len(domains)
    )
    return CheckpointCalibration(checkpoint, domains, memory, obs, device, ranks)


def of_gguf(
    model: GgufModel, domains: Domains, *, llama: Any, obs: bool = True, limit: int | None = None
) -> GgufCalibration:
    """The calibration of an opened GGUF on these windows. Raises as `checked` does."""
    check_domains(domains, model.n_ctx_train, model.n_vocab)
    return GgufCalibration(model, domains, llama, solves_obs(model, None if obs else False, limit), limit)


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
        raise GgufToolError(f"--device {device}: a GGUF is run by llama.cpp on the CPU; leave it out")
    if dtype != "auto":
        raise GgufToolError(f"--dtype {dtype}: a GGUF is run by llama.cpp in its own types; leave it out")


def _opened_checkpoint(asked: Asked, obs: bool, ranks: Ranks, dry_run: bool) -> CheckpointCalibration:
    device = own_device(asked.device)
    usable_device(device)  # before a long text is read
    checkpoint = open_checkpoint(asked.model)
    domains = asked.domains(checkpoint.tokenizer())
    found = of_checkpoint(checkpoint, domains, obs=obs, device=device, dtype=asked.kind, limit=asked.limit, ranks=ranks)
    if dry_run:
        found.rehearse()
    return found


def _opened_gguf(asked: Asked, obs: bool) -> GgufCalibration:
    model, tokenizer, llama = open_for_llama(asked)
    return of_gguf(model, asked.domains(tokenizer), llama=llama, obs=obs, limit=asked.limit)

"""A calibration from its options to its stats, the one way that the command, the Python function and `compress` go.

All that can be refused is refused before the first dear step, and what was checked says on what it will run and how. `checked`
is the whole of it, with the lock that keeps a second run off; whoever has opened a model and read its texts comes in at
`of_checkpoint` or `of_gguf`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch

from .asked import Asked, Domains, open_for_llama
from .calibrate import calibrate
from .checkpoint import Checkpoint, open_checkpoint
from .errors import GgufToolError
from .forward import LayerStream, Progress, check_windows
from .gguf_calibrate import calibrate_gguf, solves_obs
from .gguf_model import GgufModel, is_gguf
from .gguf_pass import bounded
from .inventory import model_facts
from .loader import usable_device
from .memory import MemoryPlan, plan_memory
from .processes import own_device, process_count
from .ranks import ALONE, Ranks, joined
from .stats import CalibrationStats, ModelFacts
from .windows import check_domains
from .workdir import own_work_dir


@dataclass(frozen=True)
class CheckpointCalibration:
    """A checked calibration of a checkpoint, a layer in memory at a time.

    Attributes:
        memory: how it is run. stream: the model, whose weights come a layer at a time; on the device of this process.
        ranks: the processes that share the windows.
    """

    checkpoint: Checkpoint
    domains: Domains
    memory: MemoryPlan
    stream: LayerStream
    obs: bool
    ranks: Ranks = ALONE

    @property
    def facts(self) -> ModelFacts:
        """What the stats will say of the model."""
        return model_facts(self.checkpoint)

    @property
    def how(self) -> str:
        """How it is run, for a person."""
        return str(self.memory)

    def run(self, work_dir: Path, out: Path, progress: Progress | None = None) -> CalibrationStats:
        """The stats, which are saved as `out` too. See `calibrate.calibrate`."""
        return calibrate(
            self.checkpoint, self.domains, work_dir, stream=self.stream, how=self.memory, obs=self.obs, progress=progress,
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
    `dry_run` takes no lock and writes nothing.

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
            found = _opened_gguf(asked, obs) if gguf else _opened_checkpoint(asked, obs, ranks)
        yield found


def of_checkpoint(
    checkpoint: Checkpoint, domains: Domains, *, obs: bool = True, device: str = "cpu", dtype: torch.dtype | None = None,
    limit: int | None = None, ranks: Ranks = ALONE,
) -> CheckpointCalibration:  # fmt: skip
    """The calibration of an opened checkpoint on these windows; `dtype` and `limit` as `plan_memory` has them.

    Raises as `checked` does; that the weights fill the model is seen here, though none is read yet.
    """
    usable_device(device)
    n_ctx = check_windows(checkpoint, domains, ranks)
    count = sum(-(-len(windows) // ranks.count) for _, windows in domains)
    memory = plan_memory(
        checkpoint, count, n_ctx, dtype, limit, device=device, moments=None if obs else 0, n_domains=len(domains)
    )
    stream = LayerStream(checkpoint, device, memory.dtype)
    return CheckpointCalibration(checkpoint, domains, memory, stream, obs, ranks)


def of_gguf(
    model: GgufModel, domains: Domains, *, llama: Any, obs: bool = True, limit: int | None = None
) -> GgufCalibration:
    """The calibration of an opened GGUF on these windows. Raises as `checked` does."""
    check_domains(domains, model.n_ctx_train, model.n_vocab)
    return GgufCalibration(model, domains, llama, solves_obs(model, None if obs else False, limit), limit)


def _opened_checkpoint(asked: Asked, obs: bool, ranks: Ranks) -> CheckpointCalibration:
    device = own_device(asked.device)
    usable_device(device)  # before a long text is read
    checkpoint = open_checkpoint(asked.model)
    domains = asked.domains(checkpoint.tokenizer())
    return of_checkpoint(checkpoint, domains, obs=obs, device=device, dtype=asked.kind, limit=asked.limit, ranks=ranks)


def _opened_gguf(asked: Asked, obs: bool) -> GgufCalibration:
    model, tokenizer, llama = open_for_llama(asked)
    return of_gguf(model, asked.domains(tokenizer), llama=llama, obs=obs, limit=asked.limit)

"""A refit from its options to the new weights, the one way that the command, the Python function and `compress` go.

As `calibration` does it for stats: what can be refused is refused first, the plan before any text is read.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, TypeAlias

import torch

from .calibration import Asked, Domains, open_for_llama
from .checkpoint import Checkpoint, open_checkpoint
from .errors import GgufToolError
from .forward import LayerStream, Progress, check_windows
from .gguf_model import GgufModel, is_gguf
from .gguf_pass import bounded
from .gguf_refit import NO_SEQUENTIAL, moments_bytes, refit_gguf, refittable
from .loader import usable_device
from .memory import MemoryPlan
from .methods import method
from .overrides import Overrides
from .plan import PrunePlan
from .refit import check_plan, refit, refit_memory, refitted_widths
from .sequential import refit_sequentially
from .windows import check_domains
from .workdir import own_work_dir

KINDS = ("plain", "sequential")


@dataclass(frozen=True)
class CheckpointRefit:
    """A checked refit of a checkpoint's experts, every layer for itself or one after the other.

    Attributes:
        memory: how it is run. kind: "plain" or "sequential".
    """

    checkpoint: Checkpoint
    plan: PrunePlan
    domains: Domains
    memory: MemoryPlan
    kind: str
    device: str
    notes: ClassVar[tuple[str, ...]] = ()

    @property
    def how(self) -> str:
        """How it is run, for a person."""
        return f"{self.kind}: {self.memory}"

    @property
    def widths(self) -> list[int]:
        """The widths of the experts that get new weights, as long as a token reaches each."""
        return refitted_widths(self.checkpoint, self.plan, sequential=self.kind == "sequential")

    @property
    def n_embd(self) -> int:
        """Rows of a down projection."""
        return self.checkpoint.n_embd

    def run(self, work_dir: Path, out: Path, progress: Progress | None = None) -> Overrides:
        """The new weights, saved as `out`. See `refit.refit` and `sequential.refit_sequentially`."""
        fit = refit_sequentially if self.kind == "sequential" else refit
        made = fit(
            self.checkpoint, self.plan, self.domains, work_dir, device=self.device, how=self.memory, progress=progress
        )
        return _saved(made, out)


@dataclass(frozen=True)
class GgufRefit:
    """A checked refit of a GGUF's experts, which llama.cpp runs. `notes` say what is otherwise than the method asks."""

    model: GgufModel
    plan: PrunePlan
    domains: Domains
    llama: Any
    limit: int | None
    notes: tuple[str, ...] = ()

    @property
    def how(self) -> str:
        """How it is run, for a person."""
        return f"plain, by llama.cpp on the CPU{bounded(self.limit)}"

    @property
    def widths(self) -> list[int]:
        """The widths of the experts that get new weights."""
        return refitted_widths(self.model, self.plan)

    @property
    def n_embd(self) -> int:
        """Rows of a down projection."""
        return self.model.n_embd

    def run(self, work_dir: Path, out: Path, progress: Progress | None = None) -> Overrides:
        """The new weights, saved as `out`. See `gguf_refit.refit_gguf`."""
        made = refit_gguf(
            self.model, self.plan, self.domains, work_dir, llama=self.llama, memory=self.limit, progress=progress
        )
        return _saved(made, out)


Refit: TypeAlias = CheckpointRefit | GgufRefit


@contextmanager
def checked(asked: Asked, plan: Path | PrunePlan, *, how: str | None = None, dry_run: bool = False) -> Iterator[Refit]:
    """A refit of which all has been checked, to `run` in `asked.work_dir` while the block lasts.

    Until the block ends no other run can have that directory. A `dry_run` takes no lock and writes nothing; it also finds out
    whether the weights fill the model, as a run does first.

    Args:
        how: one of KINDS, None for what the plan's method asks for and the plan and the model allow.

    Raises:
        GgufToolError: for whatever would be refused, and where another process makes the same output.
    """
    with ExitStack() as stack:
        if not dry_run:
            stack.enter_context(own_work_dir(asked.out))
        asked.check(dry_run, *([plan] if isinstance(plan, Path) else []))
        if how is not None and how not in KINDS:
            raise GgufToolError(f"--how {how}: a refit is {' or '.join(KINDS)}")
        yield _opened_gguf(asked, plan, how) if is_gguf(asked.model) else _opened_checkpoint(asked, plan, how, dry_run)


def of_checkpoint(
    checkpoint: Checkpoint, plan: PrunePlan, domains: Domains, *, kind: str, device: str = "cpu",
    dtype: torch.dtype | None = None, limit: int | None = None,
) -> CheckpointRefit:  # fmt: skip
    """The refit of an opened checkpoint on these windows; the plan is one for it.

    `dtype` and `limit` as `plan_memory` has them. Raises as `checked` does.
    """
    usable_device(device, solves=True)
    check_windows(checkpoint, domains)
    memory = refit_memory(checkpoint, plan, domains, dtype, limit, device=device, sequential=kind == "sequential")
    return CheckpointRefit(checkpoint, plan, domains, memory, kind, device)


def of_gguf(model: GgufModel, plan: PrunePlan, domains: Domains, *, llama: Any, limit: int | None = None) -> GgufRefit:
    """The plain refit of an opened GGUF on these windows; the plan is one for it. Raises as `checked` does."""
    check_domains(domains, model.n_ctx_train, model.n_vocab)
    moments_bytes(plan, limit)
    return GgufRefit(model, plan, domains, llama, limit)


def _opened_checkpoint(asked: Asked, given: Path | PrunePlan, how: str | None, dry_run: bool) -> CheckpointRefit:
    usable_device(asked.device, solves=True)
    checkpoint, plan = open_checkpoint(asked.model), _loaded(given)
    # The sequential one needs the original's routes.
    own = "plain" if plan.drops_experts else method(plan.recipe.method).refitted
    kind = how or own or "plain"
    check_plan(checkpoint, plan, sequential=kind == "sequential")
    domains = asked.domains(checkpoint.tokenizer())
    found = of_checkpoint(
        checkpoint, plan, domains, kind=kind, device=asked.device, dtype=asked.kind, limit=asked.limit
    )
    if dry_run:
        LayerStream(checkpoint, asked.device, found.memory.dtype)
    return found


def _opened_gguf(asked: Asked, given: Path | PrunePlan, how: str | None) -> GgufRefit:
    if how == "sequential":
        raise GgufToolError(f"--how sequential: {NO_SEQUENTIAL}; take --how plain")
    plan = _loaded(given)
    model, tokenizer, llama = open_for_llama(asked)
    model = refittable(model, plan, llama)
    found = of_gguf(model, plan, asked.domains(tokenizer), llama=llama, limit=asked.limit)
    if how is None and method(plan.recipe.method).refitted == "sequential":
        return replace(found, notes=(f"refitting plainly: {NO_SEQUENTIAL}",))
    return found


def _loaded(plan: Path | PrunePlan) -> PrunePlan:
    return PrunePlan.load(plan) if isinstance(plan, Path) else plan


def _saved(made: Overrides, out: Path) -> Overrides:
    made.save(out)
    return made

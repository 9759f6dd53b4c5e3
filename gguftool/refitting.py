"""A refit from its options to the new weights, the one way that the command, the Python function and `compress` go.

As `calibration` does it for stats: what can be refused is refused first, the plan before any text is read.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch

from .asked import Asked, Domains, open_for_llama
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
from .refit import NO_ROUTES, check_plan, refit, refit_memory, refitted_widths
from .sequential import refit_sequentially
from .windows import check_domains
from .workdir import own_work_dir

KINDS = ("plain", "sequential")


def kind_of(model: Checkpoint | GgufModel, plan: PrunePlan, asked: str | None = None) -> tuple[str, tuple[str, ...]]:
    """How the experts of a plan are refitted, and notes where that is otherwise than its method has it.

    Args:
        asked: one of KINDS where somebody asks for it; None or "" for what the method has.

    Returns:
        One of KINDS, or "" where the method goes without a refit and nobody asks for one.

    Raises:
        GgufToolError: the refit that is asked for cannot be had of this model and this plan.
    """
    kind = asked or method(plan.recipe.method).refitted
    if kind != "sequential":
        return kind, ()
    why = NO_SEQUENTIAL if isinstance(model, GgufModel) else NO_ROUTES if plan.drops_experts else None
    if why is None:
        return kind, ()
    if asked:
        raise GgufToolError(f"{why}; refit it plainly")
    return "plain", (f"refitted plainly: {why}",)


@dataclass(frozen=True)
class CheckpointRefit:
    """A checked refit of a checkpoint's experts, every layer for itself or one after the other.

    Attributes:
        memory: how it is run. stream: the model, whose weights come a layer at a time; on the device that it runs on.
        kind: one of KINDS. notes: what is otherwise than the method has it.
    """

    checkpoint: Checkpoint
    plan: PrunePlan
    domains: Domains
    memory: MemoryPlan
    stream: LayerStream
    kind: str
    notes: tuple[str, ...] = ()

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
            self.checkpoint, self.plan, self.domains, work_dir, stream=self.stream, how=self.memory, progress=progress
        )
        return _saved(made, out)


@dataclass(frozen=True)
class GgufRefit:
    """A checked refit of a GGUF's experts, which llama.cpp runs. `notes` say what is otherwise than the method has it."""

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

    Until the block ends no other run can have that directory. A `dry_run` takes no lock and writes nothing.

    Args:
        how: one of KINDS, None for what the plan's method has and the plan and the model allow; "plain" where it has none.

    Raises:
        GgufToolError: for whatever would be refused, and where another process makes the same output.
    """
    with ExitStack() as stack:
        if not dry_run:
            stack.enter_context(own_work_dir(asked.out))
        asked.check(dry_run, *([plan] if isinstance(plan, Path) else []))
        if how is not None and how not in KINDS:
            raise GgufToolError(f"a refit is {' or '.join(KINDS)}, not {how!r}")
        yield _opened_gguf(asked, plan, how) if is_gguf(asked.model) else _opened_checkpoint(asked, plan, how)


def of_checkpoint(
    checkpoint: Checkpoint, plan: PrunePlan, domains: Domains, *, kind: str, device: str = "cpu",
    dtype: torch.dtype | None = None, limit: int | None = None, notes: tuple[str, ...] = (),
) -> CheckpointRefit:  # fmt: skip
    """The refit of an opened checkpoint on these windows; the plan is one for it.

    `dtype` and `limit` as `plan_memory` has them. Raises as `checked` does; that the weights fill the model is seen here, though
    none is read yet.
    """
    usable_device(device, solves=True)
    check_windows(checkpoint, domains)
    memory = refit_memory(checkpoint, plan, domains, dtype, limit, device=device, sequential=kind == "sequential")
    stream = LayerStream(checkpoint, device, memory.dtype)
    return CheckpointRefit(checkpoint, plan, domains, memory, stream, kind, notes)


def of_gguf(
    model: GgufModel, plan: PrunePlan, domains: Domains, *, llama: Any, limit: int | None = None,
    notes: tuple[str, ...] = (),
) -> GgufRefit:  # fmt: skip
    """The plain refit of an opened GGUF on these windows; the plan is one for it. Raises as `checked` does."""
    check_domains(domains, model.n_ctx_train, model.n_vocab)
    moments_bytes(plan, limit)
    return GgufRefit(model, plan, domains, llama, limit, notes)


def _opened_checkpoint(asked: Asked, given: Path | PrunePlan, how: str | None) -> CheckpointRefit:
    usable_device(asked.device, solves=True)
    checkpoint, plan = open_checkpoint(asked.model), _loaded(given)
    kind, notes = kind_of(checkpoint, plan, how)
    check_plan(checkpoint, plan)
    return of_checkpoint(
        checkpoint, plan, asked.domains(checkpoint.tokenizer()), kind=kind or "plain", device=asked.device,
        dtype=asked.kind, limit=asked.limit, notes=notes,
    )  # fmt: skip


def _opened_gguf(asked: Asked, given: Path | PrunePlan, how: str | None) -> GgufRefit:
    plan = _loaded(given)
    model, tokenizer, llama = open_for_llama(asked)
    _, notes = kind_of(model, plan, how)
    model = refittable(model, plan, llama)
    return of_gguf(model, plan, asked.domains(tokenizer), llama=llama, limit=asked.limit, notes=notes)


def _loaded(plan: Path | PrunePlan) -> PrunePlan:
    return PrunePlan.load(plan) if isinstance(plan, Path) else plan


def _saved(made: Overrides, out: Path) -> Overrides:
    made.save(out)
    return made

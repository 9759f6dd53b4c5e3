"""Processes that share one calibration: who they are, what each of them runs, and how their sums become one.

`torchrun --nproc-per-node N -m gguftool calibrate ...` starts N of them, each with the same arguments. Windows are shared out,
sums are added up. Every collective step begins where all have said that nothing went wrong, so that an error on one of them
ends all of them and nobody waits for who is gone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, distributed

from .errors import GgufToolError
from .processes import process_count

Arrays = dict[str, NDArray[Any]]
# How long a rank waits for the slowest one: a layer over all windows, and its OBS costs.
PATIENCE = timedelta(days=1)


class SharedError(GgufToolError):
    """A failure that all ranks know of."""


@dataclass(frozen=True)
class Ranks:
    """This process among `count` that work together; alone with a count of 1."""

    rank: int = 0
    count: int = 1

    @contextmanager
    def together(self) -> Iterator[None]:
        """A block without collective steps, behind which all ranks go on, or none. Raises what one of them raised."""
        if self.count == 1:
            yield
            return
        try:
            yield
        except SharedError:
            raise
        except Exception as error:
            self._agree(error)
            raise
        self._agree(None)

    def _agree(self, error: Exception | None) -> None:
        text = None if error is None else str(error) if isinstance(error, GgufToolError) else repr(error)
        found: list[str | None] = [None] * self.count
        with _peers_there():
            distributed.all_gather_object(found, text)
        wrong = {rank: line for rank, line in enumerate(found) if line is not None}
        if wrong:
            same = len(set(wrong.values())) == 1 and len(wrong) == self.count
            rank, line = next(iter(wrong.items()))
            raise SharedError(line if same else f"rank {rank} of {self.count}: {line}") from error

    def share(self, count: int) -> slice:
        """Which of `count` windows are this rank's."""
        return share(count, self.rank, self.count)

    def add(self, arrays: Mapping[str, NDArray[Any]], largest: Sequence[str] = (), same: Sequence[str] = ()) -> Arrays:
        """The sums of all ranks, the maximum of those in `largest`; those in `same` are equal everywhere already."""
        if self.count == 1:
            return dict(arrays)
        found = {}
        with _peers_there():
            for name in sorted(arrays):
                # A copy: what comes in may be anybody's.
                value = torch.from_numpy(np.array(arrays[name]))
                if name not in same:
                    kind = distributed.ReduceOp.MAX if name in largest else distributed.ReduceOp.SUM
                    distributed.all_reduce(value, kind)
                found[name] = value.numpy()
        return found

    def add_to(self, value: Tensor, rank: int) -> None:
        """Adds up a tensor on one rank, in place; on the others it is used up."""
        if self.count > 1:
            with _peers_there():
                distributed.reduce(value, rank)

    def all_of(self, value: object) -> list[Any]:
        """What each rank has, in their order."""
        found: list[Any] = [value]
        if self.count > 1:
            found = [None] * self.count
            with _peers_there():
                distributed.all_gather_object(found, value)
        return found


ALONE = Ranks()


def share(count: int, index: int, parts: int) -> slice:
    """Part `index` of `count` things cut into consecutive `parts` whose sizes differ by one at most."""
    return slice(count * index // parts, count * (index + 1) // parts)


@contextmanager
def joined(device: str = "cpu") -> Iterator[Ranks]:
    """Joins the processes that torchrun started, for a while; alone without them."""
    count = process_count()
    if count == 1:
        yield ALONE
        return
    cuda = device.startswith("cuda") and torch.cuda.is_available()
    with _peers_there():
        distributed.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=PATIENCE)
    ranks = Ranks(distributed.get_rank(), count)
    try:
        with ranks.together():
            yield ranks
    finally:
        distributed.destroy_process_group()


@contextmanager
def _peers_there() -> Iterator[None]:
    """Says what it means when a collective step breaks."""
    try:
        yield
    except RuntimeError as error:
        raise SharedError(
            f"another rank is gone ({(str(error).strip().splitlines() or ['no word'])[0]}); its own line says why, if it had "
            "time for one. The same command goes on behind the last layer that all had finished"
        ) from error

"""Second moments of a layer's experts, C = sum of g^2 h h^T, and the OBS costs that are solved from them.

C is K x K for every expert. Where all of a layer's fit into memory they are added up while the layer runs. Where they do not,
the inputs of the experts are kept in a mapped file on the way, and the neurons of a group of experts are computed from them a
second time: that costs gate and up once more, whatever the size of a group, and the file tokens x d.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from .obs import costs
from .ranks import ALONE, Ranks
from .recorders import add_gram
from .routes import RoutesFile

# (experts done, all of them)
Tell = Callable[[int, int], None]


@dataclass(frozen=True)
class ObsPlan:
    """How OBS costs are computed.

    Attributes:
        group: experts whose C are in memory at a time; 0 for all of them, added up while the layer runs.
        scratch: folder for the inputs of a layer's experts, where these are computed by groups.
        tokens: how many tokens a layer sees in this process.
        threads: experts that are solved at the same time.
    """

    group: int = 0
    scratch: Path = Path()
    tokens: int = 0
    threads: int = 0


class Grams:
    """C of the experts of one layer.

    Attributes:
        moments: C, float32 at least, [E, K, K], where all are added up on the way; else None.
    """

    def __init__(self, module: nn.Module, how: ObsPlan, ranks: Ranks = ALONE, tell: Tell | None = None) -> None:
        """`module` is the layer's experts; `tell` is called while costs are solved."""
        self.module, self.how, self.ranks, self.tell = module, how, ranks, tell or (lambda done, total: None)
        down = module.get_parameter("down_proj")
        self.n_expert, self.n_embd, self.width = down.shape
        self._kind = torch.promote_types(down.dtype, torch.float32)
        self._device = down.device
        self.moments = self._zeros(self.n_expert) if not how.group else None
        self._file: RoutesFile | None = None
        if how.group:
            self._file = RoutesFile(how.scratch / "inputs.partial", how.tokens, self.n_embd, down.dtype)

    def see(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> None:
        """What the experts are called with: hidden states [T, d], chosen experts [T, k], their weights [T, k]."""
        if self._file is not None:
            self._file.append(hidden_states, top_k_index, top_k_weights)

    def add(self, expert: int, h: Tensor, gate: Tensor) -> None:
        """Neurons [n, K] of one expert and the router's weights [n]."""
        if self.moments is not None:
            add_gram(self.moments[expert], h, gate)

    @torch.no_grad()
    def costs(self, counts: Tensor) -> Tensor:
        """OBS costs (see `obs.costs`), float64 [E, K] on the CPU, of the moments of all ranks, each of which solves a share.

        `counts`: how many tokens this rank gave to each expert, [E].
        """
        tokens = torch.from_numpy(self.ranks.add({"count": counts.cpu().numpy()})["count"])
        down, size = self.module.get_parameter("down_proj"), self.how.group or self.n_expert
        found = torch.zeros(self.n_expert, self.width, dtype=torch.float64)
        try:
            for start in range(0, self.n_expert, size):
                moments: list[Tensor] = []  # those of the group before go first
                group = range(start, min(start + size, self.n_expert))
                with self.ranks.together():
                    moments = self._group(group)
                for expert, moment in zip(group, moments, strict=True):
                    self.ranks.add_to(moment, expert % self.ranks.count)
                with self.ranks.together():
                    mine = [e for e in group if e % self.ranks.count == self.ranks.rank]
                    if mine:
                        found[mine] = costs(
                            [_solvable(moments[expert - start]) for expert in mine],
                            [_solvable(down[expert]) for expert in mine],
                            tokens[mine],
                            threads=self.how.threads,
                            tell=partial(self._tell, start),
                        ).cpu()
        finally:
            self.close()
        return torch.from_numpy(self.ranks.add({"obs": found.numpy()})["obs"])

    def close(self) -> None:
        """Frees what was added up and the file of inputs."""
        self.moments = None
        if self._file is not None:
            self._file.close()

    def _tell(self, before: int, done: int) -> None:
        # Of a group this rank solves its share; the others are about as far.
        self.tell(min(before + done * self.ranks.count, self.n_expert), self.n_expert)

    def _group(self, experts: range) -> list[Tensor]:
        """C of some experts, each [K, K]."""
        if self._file is None:
            assert self.moments is not None, "the moments were used up"
            return list(self.moments)
        return [self._file.moments(self.module, expert)[0] for expert in experts]

    def _zeros(self, count: int) -> Tensor:
        return torch.zeros(count, self.width, self.width, dtype=self._kind, device=self._device)


def _solvable(value: Tensor) -> Tensor:
    """Metal has no float64."""
    return value.cpu() if value.device.type == "mps" else value

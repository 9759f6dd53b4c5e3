"""What a layer's experts were given and which of them were chosen, kept to compute their neurons a second time."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor, nn

from .errors import GgufToolError
from .recorders import neurons_of

# Tokens whose neurons are computed at once.
CHUNK = 4096
# Bytes of an expert that a token chose: its number and its weight, and both once more when they are put together.
ROUTE = 2 * (2 + 4)


@dataclass(frozen=True)
class Routes:
    """What a layer's experts were given: x [T, d], and for each token its chosen experts and their weights, [T, k]."""

    inputs: Tensor
    chosen: Tensor
    weights: Tensor

    def of(self, expert: int) -> tuple[Tensor, Tensor]:
        """The tokens of an expert in their order, and their weights."""
        rows, slots = torch.nonzero(self.chosen == expert, as_tuple=True)
        return rows, self.weights[rows, slots]

    def neurons(
        self, experts: nn.Module, expert: int, rows: Tensor, weights: Tensor, chunk: int = CHUNK
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """(tokens, their weighted neurons g h, float32 at least, [n, K]) of an expert, `chunk` tokens at a time."""
        down = experts.get_parameter("down_proj")
        kind = torch.promote_types(down.dtype, torch.float32)
        for part, gate in zip(rows.split(chunk), weights.split(chunk), strict=True):
            x = self.inputs[part.cpu()].to(down.device)
            yield part.cpu(), (neurons_of(experts, expert, x) * gate.to(down.device)[:, None]).to(kind)


class RoutesFile:
    """Takes up what a layer's experts are given while it runs; x lies in a mapped file until `close`."""

    def __init__(self, path: Path, n_tokens: int, n_embd: int, dtype: torch.dtype) -> None:
        """Raises GgufToolError where there is no room for the file."""
        self.path = path
        allocate(path, n_tokens * n_embd * dtype.itemsize)
        self._inputs = torch.from_file(str(path), shared=True, size=n_tokens * n_embd, dtype=dtype).view(-1, n_embd)
        self._chosen: list[Tensor] = []
        self._weights: list[Tensor] = []
        self._seen = 0
        self._routes: Routes | None = None

    def append(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> None:
        """Hidden states [n, d], chosen experts [n, k] and their weights [n, k], on the CPU from here."""
        self._inputs[self._seen : self._seen + len(hidden_states)] = hidden_states.cpu()
        self._seen += len(hidden_states)
        # As narrow as they can be: at 8 experts a token 48 bytes, not 96.
        self._chosen.append(top_k_index.to("cpu", torch.int16))
        self._weights.append(top_k_weights.cpu())

    def routes(self) -> Routes:
        """All tokens that came in."""
        return Routes(self._inputs[: self._seen], torch.cat(self._chosen), torch.cat(self._weights))

    def moments(self, module: nn.Module, expert: int) -> tuple[Tensor, int]:
        """C = sum of g^2 h h^T of one expert, [K, K], and how many tokens that runs over."""
        if self._routes is None:
            self._routes = self.routes()
        down = module.get_parameter("down_proj")
        kind = torch.promote_types(down.dtype, torch.float32)
        gram = torch.zeros(down.shape[2], down.shape[2], dtype=kind, device=down.device)
        rows, weights = self._routes.of(expert)
        for _, h in self._routes.neurons(module, expert, rows, weights):
            gram.addmm_(h.T, h)
        return gram, len(rows)

    def close(self) -> None:
        """Removes the file."""
        self.path.unlink(missing_ok=True)


def neurons_bytes(tokens: int, n_embd: int, width: int, dtype: torch.dtype) -> int:
    """What `RoutesFile.moments` takes beside C: of a chunk and the one before it what goes in and comes out, and what the
    neurons are made of."""
    size, work = dtype.itemsize, max(4, dtype.itemsize)
    return min(tokens, CHUNK) * (size * (2 * n_embd + 4 * width) + work * 2 * width)


@contextmanager
def mapped(path: Path, shape: tuple[int, ...], dtype: torch.dtype) -> Iterator[Tensor]:
    """A tensor in a file that is there for a while."""
    allocate(path, prod(shape) * dtype.itemsize)
    try:
        yield torch.from_file(str(path), shared=True, size=prod(shape), dtype=dtype).view(shape)
    finally:
        path.unlink(missing_ok=True)


def allocate(path: Path, size: int) -> None:
    """Makes a file of `size` bytes. Raises GgufToolError where the disk has no room for them."""
    with open(path, "wb") as file:
        try:
            # Not a sparse file: a full disk would kill the process when the mapping is written to.
            if hasattr(os, "posix_fallocate") and size:
                os.posix_fallocate(file.fileno(), 0, size)
            file.truncate(size)
        except OSError as error:
            path.unlink(missing_ok=True)
            raise GgufToolError(f"{path}: no room for {size} bytes ({error.strerror})") from error

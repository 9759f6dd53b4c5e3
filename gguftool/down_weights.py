"""DownWeights: refitted down columns of the experts that a plan narrows, and their file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import GgufToolError

FORMAT = "gguftool.refit"
VERSION = 1


@dataclass(frozen=True)
class DownWeights:
    """New down columns.

    Attributes:
        kept_hash: of the plan that they were made for.
        dataset: the texts that they were fitted on.
        weights: (decoder index, expert) -> float32 [d, w], columns in the order of the kept neurons.
    """

    kept_hash: str
    dataset: tuple[Mapping[str, Any], ...]
    weights: Mapping[tuple[int, int], NDArray[np.float32]]

    def save(self, path: Path) -> None:
        """Writes the weights to `path`, first to `path`.partial."""
        from safetensors.numpy import save_file

        header = {"format": FORMAT, "version": VERSION, "kept_hash": self.kept_hash, "dataset": list(self.dataset)}
        partial = path.with_name(path.name + ".partial")
        arrays = {f"{layer}.{expert}": np.ascontiguousarray(v) for (layer, expert), v in self.weights.items()}
        save_file(arrays, partial, {"gguftool": json.dumps(header)})
        partial.replace(path)

    @classmethod
    def load(cls, path: Path) -> DownWeights:
        """Reads the weights. Raises GgufToolError for a file that is missing, damaged or something else."""
        from safetensors import SafetensorError, safe_open

        if not path.is_file():
            raise GgufToolError(f"{path}: no such file; `gguftool refit` makes one")
        try:
            with safe_open(path, "numpy") as file:
                header = json.loads((file.metadata() or {}).get("gguftool", "{}"))
                if header.get("format") != FORMAT or header.get("version") != VERSION:
                    raise GgufToolError(f"{path}: not refitted weights of this gguftool; `gguftool refit` makes them")
                weights = {_key(name): file.get_tensor(name) for name in file.keys()}
        except (SafetensorError, ValueError, OSError) as error:
            raise GgufToolError(f"{path}: damaged refit file ({error})") from error
        return cls(str(header.get("kept_hash")), tuple(header.get("dataset", ())), weights)

    def check(self, kept_hash: str) -> None:
        """Raises GgufToolError unless the weights were made for the plan with this hash."""
        if self.kept_hash != kept_hash:
            raise GgufToolError("the refitted weights were made for another plan; run `gguftool refit` on this one")


def _key(name: str) -> tuple[int, int]:
    layer, expert = name.split(".")
    return int(layer), int(expert)

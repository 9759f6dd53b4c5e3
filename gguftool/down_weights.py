"""DownWeights: refitted down columns of the experts that a plan narrows, and their file.

Together they are as big as a third of the pruned model (20 GB for Qwen3-30B), so they stay on disk: in the work
directory of the refit, one file a layer, until `save` has copied them into one file. One matrix is in memory at a time.
"""

from __future__ import annotations

import json
from collections.abc import Callable, KeysView, Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import GgufToolError

FORMAT = "gguftool.refit"
VERSION = 1

Key = tuple[int, int]


@dataclass
class DownWeights:
    """New down columns: (decoder index, expert) -> float32 [d, w], columns in the order of the kept neurons.

    Attributes:
        kept_hash: of the plan that they were made for.
        dataset: the texts that they were fitted on.
        places: the safetensors file that holds each matrix, and its name there.
        saved: called when `save` has written everything; may remove the files in `places`.
    """

    kept_hash: str
    dataset: tuple[Mapping[str, Any], ...]
    places: Mapping[Key, tuple[Path, str]]
    saved: Callable[[], None] | None = None
    _opened: tuple[Path, Any] | None = field(default=None, repr=False, compare=False)

    def __len__(self) -> int:
        return len(self.places)

    def __contains__(self, key: object) -> bool:
        return key in self.places

    def keys(self) -> KeysView[Key]:
        """Which experts have new columns: (decoder index, expert)."""
        return self.places.keys()

    def get(self, layer: int, expert: int) -> NDArray[np.float32] | None:
        """The new columns of an expert, float32 [d, w], read now, or None where it keeps its own."""
        from safetensors import SafetensorError

        if (layer, expert) not in self.places:
            return None
        path, name = self.places[layer, expert]
        try:
            return np.asarray(self._open(path).get_tensor(name), dtype=np.float32)
        except (SafetensorError, OSError) as error:
            raise GgufToolError(f"{path}: damaged refit file ({error})") from error

    def save(self, path: Path) -> None:
        """Writes all of them to `path`, first to `path`.partial. What they come from is untouched until that is done."""
        shapes = {key: tuple(self._open(file).get_slice(name).get_shape()) for key, (file, name) in self.places.items()}
        header = {"format": FORMAT, "version": VERSION, "kept_hash": self.kept_hash, "dataset": list(self.dataset)}
        partial = path.with_name(path.name + ".partial")
        try:
            with partial.open("wb") as stream:
                stream.write(_safetensors_header(shapes, {"gguftool": json.dumps(header)}))
                for key in shapes:
                    stream.write(np.ascontiguousarray(self.get(*key), dtype="<f4").data)
            partial.replace(path)
        except OSError as error:
            raise GgufToolError(f"{path}: cannot be written ({error})") from error
        self._opened = None
        if self.saved is not None:
            self.saved()
        self.places, self.saved = {key: (path, _name(key)) for key in shapes}, None

    @classmethod
    def load(cls, path: Path) -> DownWeights:
        """Opens saved weights. Raises GgufToolError for a file that is missing, damaged or something else."""
        from safetensors import SafetensorError, safe_open

        if not path.is_file():
            raise GgufToolError(f"{path}: no such file; `gguftool refit` makes one")
        try:
            with safe_open(path, "numpy") as file:
                header = json.loads((file.metadata() or {}).get("gguftool", "{}"))
                if header.get("format") != FORMAT or header.get("version") != VERSION:
                    raise GgufToolError(f"{path}: not refitted weights of this gguftool; `gguftool refit` makes them")
                places = {_key(name): (path, name) for name in file.keys()}
        except (SafetensorError, ValueError, OSError) as error:
            raise GgufToolError(f"{path}: damaged refit file ({error})") from error
        return cls(str(header.get("kept_hash")), tuple(header.get("dataset", ())), places)

    def check(self, kept_hash: str) -> None:
        """Raises GgufToolError unless the weights were made for the plan with this hash."""
        if self.kept_hash != kept_hash:
            raise GgufToolError("the refitted weights were made for another plan; run `gguftool refit` on this one")

    def _open(self, path: Path) -> Any:
        """The file, kept open until another one is asked for: its header lists thousands of matrices."""
        from safetensors import safe_open

        if self._opened is None or self._opened[0] != path:
            self._opened = (path, safe_open(path, "numpy"))
        return self._opened[1]


def _safetensors_header(shapes: Mapping[Key, tuple[int, ...]], metadata: Mapping[str, str]) -> bytes:
    """Length and header of a safetensors file of float32 arrays, which follow in this order.

    `safetensors.save_file` wants all arrays in memory; the format is 8 bytes of length, JSON padded to 8, the data.
    """
    entries: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for key, shape in shapes.items():
        start, end = end, end + 4 * prod(shape)
        entries[_name(key)] = {"dtype": "F32", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _name(key: Key) -> str:
    return f"{key[0]}.{key[1]}"


def _key(name: str) -> Key:
    layer, expert = name.split(".")
    return int(layer), int(expert)

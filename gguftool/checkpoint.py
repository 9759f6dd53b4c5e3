"""A Hugging Face checkpoint on disk: what is in it, and its tensors one at a time.

Opening reads headers only, and refuses a damaged checkpoint before any work.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig

from .architectures import Architecture, for_model_type
from .errors import GgufToolError

DTYPES: dict[str, torch.dtype] = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# What the fingerprint reads of each tensor: so many pieces of so many bytes, first and last included.
PIECES, PIECE_BYTES = 10, 4096
# Tensors of old checkpoints that are recomputed, not loaded (llama.cpp's converter skips the same ones).
IGNORED = (".rotary_emb.inv_freq",)

# What transformers 5 keeps of a layer's experts: [E, 2K, d] and [E, d, K].
EXPERT_PARAMETERS = ("gate_up_proj", "down_proj")

Projection = Literal["gate", "up", "down"]


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies: `nbytes` bytes at `offset` of `file`, row-major, `dtype` one of DTYPES."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Source:
    """A piece of a parameter: the stored tensor that fills `parameter[index]`."""

    tensor: StoredTensor
    index: tuple[int | slice, ...]


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint.

    Attributes:
        path: its directory. name: the directory's name, or the last part of the hub id.
        tensors: by name, in the order in which llama.cpp's converter meets them.
        fingerprint: sha256 over config.json and name, type, shape and ten pieces of 4 KiB of every tensor.
    """

    path: Path
    name: str
    config: PreTrainedConfig
    architecture: Architecture
    tensors: Mapping[str, StoredTensor]
    fingerprint: str

    @property
    def n_layers(self) -> int:
        """Decoder layers, with and without experts."""
        return self._size("num_hidden_layers")

    @property
    def n_embd(self) -> int:
        """Width of the residual stream."""
        return self._size("hidden_size")

    @property
    def n_vocab(self) -> int:
        """Rows of the token embedding."""
        return self._size("vocab_size")

    @property
    def n_expert(self) -> int:
        """Routed experts of a layer."""
        return self._size(self.architecture.count_key)

    @property
    def n_expert_used(self) -> int:
        """Experts that a token is routed to."""
        return self._size(self.architecture.top_k_key)

    @property
    def n_ff_exp(self) -> int:
        """Neurons of one expert."""
        return self._size(self.architecture.width_key)

    @property
    def n_group(self) -> int:
        """Equal groups of neighbouring experts that the router picks from; 1 for a router without groups."""
        return self._groups("n_group")

    @property
    def n_group_used(self) -> int:
        """Groups that a token's experts may come from."""
        return self._groups("topk_group")

    @property
    def norm_topk(self) -> bool:
        """Whether the router's weights of a token's experts are made to add up to 1."""
        row = self.architecture.norm_topk
        return bool(getattr(self.config, "norm_topk_prob", False)) if row is None else row

    @cached_property
    def moe_layers(self) -> tuple[int, ...]:
        """Decoder indices of the layers that have routed experts."""
        return tuple(
            i for i in range(self.n_layers) if self.is_stacked(i) or self._expert_name(i, 0, "down") in self.tensors
        )

    def _size(self, key: str) -> int:
        value = getattr(self.config, key, None)
        if not isinstance(value, int) or value < 1:
            raise GgufToolError(f"{self.path}: config.json gives {key} = {value!r}, not a count")
        return value

    def _groups(self, key: str) -> int:
        return self._size(key) if getattr(self.config, key, None) is not None else 1

    def layer_name(self, layer: int, suffix: str) -> str:
        """The checkpoint's name of a module path or parameter inside a decoder layer, for example `mlp.gate.weight`."""
        prefix = f"{self.architecture.layers}.{layer}."
        block, ours = _parent(self.architecture.experts), _parent(self.architecture.checkpoint_experts)
        renamed = ours + suffix.removeprefix(block) if suffix.startswith(f"{block}.") else suffix
        written_anew = f"{prefix}{suffix}" in self.tensors or f"{prefix}{suffix}.weight" in self.tensors
        return prefix + (suffix if written_anew else renamed)

    def _expert_name(self, layer: int, expert: int, projection: Projection) -> str:
        row = self.architecture
        return f"{row.layers}.{layer}.{row.checkpoint_experts}.{expert}.{getattr(row, projection)}.weight"

    def is_stacked(self, layer: int) -> bool:
        """Whether the layer's experts are stored as 3-D stacks, as transformers 5 keeps them in memory."""
        return self.layer_name(layer, f"{self.architecture.experts}.down_proj") in self.tensors

    def read(self, name: str) -> Tensor:
        """The tensor in the checkpoint's own type, mapped from disk (a copy is made only where it is written to)."""
        return _map_tensor(self.tensors[name])

    def tokenizer(self) -> Any:
        """The checkpoint's tokenizer. Raises GgufToolError where it has none that can be loaded."""
        try:
            tokenizer = AutoTokenizer.from_pretrained(self.path, local_files_only=True)
            # Without its files transformers makes an empty one of the architecture's class.
            works = bool(tokenizer.encode("word", add_special_tokens=False))
        except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
            raise GgufToolError(f"{self.path}: its tokenizer cannot be loaded ({_first_line(error)})") from error
        if not works:
            raise GgufToolError(f"{self.path}: its tokenizer cannot be loaded (no tokenizer.json)")
        return tokenizer

    def expert_sources(self, layer: int, parameter: str) -> Iterator[Source]:
        """What fills the experts' `gate_up_proj` [E, 2K, d] or `down_proj` [E, d, K] of a layer."""
        width = self.n_ff_exp
        parts: dict[Projection, slice] = {"down": slice(None)}
        if parameter == "gate_up_proj":
            parts = {"gate": slice(0, width), "up": slice(width, 2 * width)}
        for expert in range(self.n_expert):
            for projection, rows in parts.items():
                yield Source(self._stored(self._expert_name(layer, expert, projection)), (expert, rows))

    def expert_tensors(self, layer: int) -> list[StoredTensor]:
        """The stored tensors of a layer's experts."""
        if self.is_stacked(layer):
            names = [self.layer_name(layer, f"{self.architecture.experts}.{leaf}") for leaf in EXPERT_PARAMETERS]
            return [self._stored(name) for name in names]
        return [source.tensor for leaf in EXPERT_PARAMETERS for source in self.expert_sources(layer, leaf)]

    def expert(self, layer: int, expert: int) -> dict[Projection, Tensor]:
        """One expert's matrices in the checkpoint's own type, mapped: gate and up [K, d], down [d, K]."""
        if self.is_stacked(layer):
            names = [self.layer_name(layer, f"{self.architecture.experts}.{leaf}") for leaf in EXPERT_PARAMETERS]
            gate_up, down = (self.read(name)[expert] for name in names)
            gate, up = gate_up.chunk(2)
            return {"gate": gate, "up": up, "down": down}
        projections: tuple[Projection, ...] = ("gate", "up", "down")
        return {role: self.read(self._stored(self._expert_name(layer, expert, role)).name) for role in projections}

    def _stored(self, name: str) -> StoredTensor:
        if name not in self.tensors:
            raise GgufToolError(f"{self.path}: the checkpoint lacks tensor {name}")
        return self.tensors[name]


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Opens a checkpoint directory, or fetches a Hugging Face hub id (`owner/name`) into the hub's own cache first.

    Reads config.json, the headers of all shards and ten pieces of 4 KiB of every tensor. Raises GgufToolError for whatever
    is missing, truncated, quantized already or of an unknown architecture.
    """
    directory = _resolve(path)
    raw, fields = _read_config(directory)
    architecture = for_model_type(str(fields.get("model_type")))
    if fields.get("quantization_config"):
        raise GgufToolError(f"{directory}: the checkpoint is quantized already; start from the unquantized original")
    try:
        config = AutoConfig.from_pretrained(directory, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise GgufToolError(f"{directory}: config.json is refused by transformers ({_first_line(error)})") from error
    tensors = _index(directory)
    name = Path(path).resolve().name if Path(path).is_dir() else str(path).rpartition("/")[2]
    checkpoint = Checkpoint(directory, name, config, architecture, tensors, _fingerprint(raw, tensors))
    _check_experts(checkpoint)
    return checkpoint


def _parent(path: str) -> str:
    return path.rpartition(".")[0]


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _resolve(path: str | Path) -> Path:
    """The directory of a checkpoint; a hub id is downloaded."""
    if Path(path).is_dir():
        return Path(path)
    text = str(path)
    if Path(path).exists() or text.startswith((".", "/", "~")) or text.count("/") != 1:
        raise GgufToolError(f"{path}: no such checkpoint directory, and no hub id of the form owner/name")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(snapshot_download(text, allow_patterns=["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]))
    except (HfHubHTTPError, HFValidationError, OSError, ValueError, RuntimeError) as error:
        raise GgufToolError(
            f"{path}: no such directory, and the hub does not give it ({_first_line(error)})"
        ) from error


def _read_config(directory: Path) -> tuple[bytes, dict[str, Any]]:
    """config.json as bytes and as a dictionary."""
    try:
        raw = (directory / "config.json").read_bytes()
        fields = json.loads(raw)
    except FileNotFoundError as error:
        raise GgufToolError(f"{directory}: no config.json; not a Hugging Face checkpoint") from error
    except (ValueError, OSError) as error:
        raise GgufToolError(f"{directory}: config.json cannot be read ({_first_line(error)})") from error
    if not isinstance(fields, dict):
        raise GgufToolError(f"{directory}: config.json is no JSON object")
    return raw, fields


def _index(directory: Path) -> dict[str, StoredTensor]:
    """Every tensor of the checkpoint: shards in the order of their names, tensors in theirs."""
    index = directory / "model.safetensors.index.json"
    indexed: dict[str, str] | None = None
    if index.is_file():
        try:
            indexed = dict(json.loads(index.read_bytes())["weight_map"])
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise GgufToolError(f"{index}: not a safetensors index ({_first_line(error)})") from error
        files = [directory / file for file in sorted(set(indexed.values()))]
    else:
        files = sorted(directory.glob("model*.safetensors"))
    if not files:
        raise GgufToolError(f"{directory}: no model*.safetensors; other formats have to be converted to it first")
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        for tensor in _read_header(file):
            if tensor.name in tensors:
                raise GgufToolError(f"{file}: {tensor.name} is in {tensors[tensor.name].file.name} as well")
            if indexed is not None and indexed.get(tensor.name) != file.name:
                raise GgufToolError(f"{file}: {tensor.name} is not there according to {index.name}")
            tensors[tensor.name] = tensor
    for name, shard in (indexed or {}).items():
        if name not in tensors:
            raise GgufToolError(f"{directory / shard}: lacks {name}, which {index.name} promises")
    return tensors


def _read_header(file: Path) -> list[StoredTensor]:
    """The tensors of one shard in the order of their names. Every one is checked to lie inside the file."""
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > size - 8:
                raise GgufToolError(f"{file}: truncated: {size} bytes do not hold the header; download it again")
            header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        return [_stored_tensor(file, size, 8 + length, name, header[name]) for name in sorted(header)]
    except FileNotFoundError as error:
        raise GgufToolError(f"{file}: the shard is missing; download it again") from error
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise GgufToolError(f"{file}: damaged safetensors header ({_first_line(error)}); download it again") from error


def _stored_tensor(file: Path, size: int, start: int, name: str, entry: Mapping[str, Any]) -> StoredTensor:
    """One entry of a safetensors header, checked."""
    dtype, shape = str(entry["dtype"]), tuple(int(n) for n in entry["shape"])
    begin, end = (int(n) for n in entry["data_offsets"])
    if dtype not in DTYPES:
        raise GgufToolError(f"{file}: {name} is {dtype}; gguftool reads {', '.join(DTYPES)} checkpoints")
    if end - begin != prod(shape) * DTYPES[dtype].itemsize or begin < 0:
        raise GgufToolError(f"{file}: {name} has {end - begin} bytes, which is not {list(shape)} in {dtype}")
    if start + end > size:
        raise GgufToolError(
            f"{file}: truncated: {name} ends at byte {start + end}, the file at {size}; download it again"
        )
    return StoredTensor(name, file, dtype, shape, start + begin, end - begin)


def _map_tensor(stored: StoredTensor) -> Tensor:
    """The tensor's bytes mapped copy-on-write, so that nothing is read before it is needed."""
    try:
        data = np.memmap(stored.file, dtype=np.uint8, mode="c", offset=stored.offset, shape=(stored.nbytes,))
    except (OSError, ValueError) as error:
        raise GgufToolError(f"{stored.file}: {stored.name} cannot be read ({_first_line(error)})") from error
    return torch.from_numpy(data).view(DTYPES[stored.dtype]).reshape(stored.shape)


def _fingerprint(config: bytes, tensors: Mapping[str, StoredTensor]) -> str:
    """See `Checkpoint`. Tensors go in by name, so that another cut into shards is the same checkpoint."""
    digest = hashlib.sha256(config)
    with ExitStack() as stack:
        # Read and not mapped: a mapping brings in what lies around a piece, gigabytes for a large model.
        files = {file: stack.enter_context(file.open("rb")) for file in {tensor.file for tensor in tensors.values()}}
        for name in sorted(tensors):
            tensor = tensors[name]
            digest.update(json.dumps([name, tensor.dtype, tensor.shape]).encode())
            for start, end in _pieces(tensor.nbytes):
                files[tensor.file].seek(tensor.offset + start)
                digest.update(files[tensor.file].read(end - start))
    return digest.hexdigest()


def _pieces(nbytes: int) -> list[tuple[int, int]]:
    """What is read of a tensor of `nbytes` bytes: all of a small one, else PIECES evenly spaced pieces."""
    if nbytes <= PIECES * PIECE_BYTES:
        return [(0, nbytes)]
    starts = (i * (nbytes - PIECE_BYTES) // (PIECES - 1) for i in range(PIECES))
    return [(start, start + PIECE_BYTES) for start in starts]


def _check_experts(checkpoint: Checkpoint) -> None:
    """Raises GgufToolError where the experts on disk are not those of config.json."""
    n_expert, width, n_embd = checkpoint.n_expert, checkpoint.n_ff_exp, checkpoint.n_embd
    if not 0 < checkpoint.n_expert_used <= n_expert:
        raise GgufToolError(
            f"{checkpoint.path}: {checkpoint.n_expert_used} of {n_expert} experts cannot be used by a token"
        )
    if not checkpoint.moe_layers:
        raise GgufToolError(f"{checkpoint.path}: no tensor is that of a routed expert; there is nothing to prune")
    shapes = {"gate": (width, n_embd), "up": (width, n_embd), "down": (n_embd, width)}
    experts = checkpoint.architecture.experts
    for layer in checkpoint.moe_layers:
        if checkpoint._expert_name(layer, n_expert, "down") in checkpoint.tensors:
            raise GgufToolError(f"{checkpoint.path}: layer {layer} has more experts than config.json's {n_expert}")
        want: dict[str, tuple[int, ...]] = {}
        if checkpoint.is_stacked(layer):
            want[checkpoint.layer_name(layer, f"{experts}.gate_up_proj")] = (n_expert, 2 * width, n_embd)
            want[checkpoint.layer_name(layer, f"{experts}.down_proj")] = (n_expert, n_embd, width)
        else:
            projections: tuple[Projection, ...] = ("gate", "up", "down")
            for projection in projections:
                for expert in range(n_expert):
                    want[checkpoint._expert_name(layer, expert, projection)] = shapes[projection]
        for name, shape in want.items():
            found = checkpoint._stored(name).shape
            if found != shape:
                raise GgufToolError(
                    f"{checkpoint.path}: {name} has shape {list(found)}, config.json says {list(shape)}"
                )

"""A Hugging Face checkpoint on disk: what is in it, and its tensors one at a time.

Opening reads headers only, and refuses a damaged checkpoint before any work.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig

from .architectures import Architecture
from .checkpoint_config import architecture_of, check_counts, checkpoint_directory, read_config
from .durable import check_unchanged, identity
from .errors import GgufToolError
from .stored import StoredTensor, dequantize_mxfp4, first_line, map_tensor, pieces, stored_tensors

# Tensors of old checkpoints that are recomputed, not loaded (llama.cpp's converter skips the same ones).
IGNORED = (".rotary_emb.inv_freq",)

# What transformers 5 keeps of a layer's experts: [E, 2K, d] and [E, d, K], or transposed.
EXPERT_PARAMETERS = ("gate_up_proj", "down_proj")

Projection = Literal["gate", "up", "down"]


@dataclass(frozen=True)
class Source:
    """A piece of a parameter: the stored tensor that fills `parameter[index]`.

    With `scales` the tensor is a stack in MXFP4, [E, rows, blocks, 16], of which `expert` is meant, transposed.
    """

    tensor: StoredTensor
    index: tuple[int | slice, ...]
    scales: StoredTensor | None = None
    expert: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the values."""
        if self.scales is None:
            return self.tensor.shape
        _, rows, blocks, _ = self.tensor.shape
        return (32 * blocks, rows)


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint.

    Attributes:
        path: its directory. name: the directory's name, or the last part of the hub id.
        tensors: by name, in the order in which llama.cpp's converter meets them.
        fingerprint: sha256 over config.json and name, type, shape and ten pieces of 4 KiB of every tensor.
        files: what its files were when it was opened, for `check_unchanged`.
    """

    path: Path
    name: str
    config: PreTrainedConfig
    architecture: Architecture
    tensors: Mapping[str, StoredTensor]
    fingerprint: str
    files: Mapping[Path, list[int]] = field(default_factory=dict, repr=False, compare=False)

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

    @cached_property
    def n_predict(self) -> int:
        """Layers behind the decoder's that predict further tokens and that the converter keeps; nothing here runs them."""
        row = self.architecture
        if row.predictors != "kept":
            return 0
        behind = {layer for name in self.tensors if (layer := self._layer_of(self.converter_name(name))) is not None}
        return sum(layer >= self.n_layers for layer in behind)

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

    def stored_name(self, name: str) -> str:
        """The checkpoint's name of a parameter or buffer of transformers' model."""
        layer, suffix = self.split_layer(name)
        if layer is not None:
            return self.layer_name(layer, suffix)
        return self._from_outside(name)

    def layer_name(self, layer: int, suffix: str) -> str:
        """The checkpoint's name of a parameter or buffer inside a decoder layer, for example `mlp.gate.weight`."""
        prefix = f"{self.architecture.layers}.{layer}."
        names = [prefix + suffix]
        names += [prefix + theirs + suffix.removeprefix(ours) for ours, theirs in self.architecture.renamed
                  if suffix.startswith(ours)][:1]  # fmt: skip
        found = [name for name in map(self._from_outside, names) if name in self.tensors]
        return found[0] if found else self._from_outside(names[-1])

    def split_layer(self, name: str) -> tuple[int | None, str]:
        """`model.layers.3.mlp.gate.weight` -> (3, `mlp.gate.weight`); (None, name) outside of the decoder layers."""
        prefix = f"{self.architecture.layers}."
        index, _, suffix = name.removeprefix(prefix).partition(".")
        return (int(index), suffix) if name.startswith(prefix) and index.isdecimal() else (None, name)

    def is_unread(self, name: str) -> bool:
        """Whether a stored tensor has no place in a forward pass: recomputed, of images, or of layers behind the last."""
        return (
            name.endswith(IGNORED)
            or (bool(self.architecture.predictors) and self.is_predictor(name))
            or any(re.match(pattern, name) for pattern in self.architecture.unused)
        )

    def converter_name(self, name: str) -> str:
        """The name that llama.cpp's converter gives a stored tensor before it looks up the GGUF's."""
        ours, theirs = self.architecture.outside
        if theirs and name.startswith(theirs):
            name = ours + name.removeprefix(theirs)
        for own, inside in self.architecture.predictor_names:
            if name.startswith(own):
                return f"{self.architecture.layers}.{self.n_layers}.{inside}{name.removeprefix(own)}"
        return name

    def is_predictor(self, name: str) -> bool:
        """Whether a stored tensor is of a layer behind the decoder's last, that predicts further tokens."""
        layer = self._layer_of(self.converter_name(name))
        return layer is not None and layer >= self.n_layers

    def _layer_of(self, name: str) -> int | None:
        return self.split_layer(name)[0]

    def _from_outside(self, name: str) -> str:
        ours, theirs = self.architecture.outside
        renamed = theirs + name.removeprefix(ours) if theirs and name.startswith(ours) else name
        return name if name in self.tensors else renamed

    def _expert_name(self, layer: int, expert: int, projection: Projection) -> str:
        row = self.architecture
        return self._from_outside(f"{row.layers}.{layer}.{row.single}.{expert}.{getattr(row, projection)}.weight")

    def is_stacked(self, layer: int) -> bool:
        """Whether the layer's experts are stored as 3-D stacks, as transformers 5 keeps them in memory."""
        return self.stack_name(layer, "down_proj") in self.tensors or self.is_mxfp4(layer)

    def is_mxfp4(self, layer: int) -> bool:
        """Whether the layer's experts are stacks of 4-bit blocks and 8-bit scales."""
        return self.stack_name(layer, "down_proj_blocks") in self.tensors

    def stack_name(self, layer: int, leaf: str) -> str:
        """The stored name of one of a layer's stacks, such as `down_proj`."""
        return self.layer_name(layer, f"{self.architecture.experts}.{leaf}")

    def read(self, name: str) -> Tensor:
        """The tensor in the checkpoint's own type, mapped from disk (a copy is made only where it is written to)."""
        return map_tensor(self.tensors[name])

    def tokenizer(self) -> Any:
        """The checkpoint's tokenizer. Raises GgufToolError where it has none that can be loaded."""
        try:
            tokenizer = AutoTokenizer.from_pretrained(self.path, local_files_only=True, trust_remote_code=False)
            # Without its files transformers makes an empty one of the architecture's class.
            works = bool(tokenizer.encode("word", add_special_tokens=False))
        except (KeyboardInterrupt, SystemExit, MemoryError):
            raise
        except BaseException as error:  # tokenizers raises plain Exceptions, and its panics are none even of these
            raise GgufToolError(f"{self.path}: its tokenizer cannot be loaded ({first_line(error)})") from error
        if not works:
            raise GgufToolError(f"{self.path}: its tokenizer cannot be loaded (no tokenizer.json)")
        return tokenizer

    def check_unchanged(self) -> None:
        """Raises GgufToolError where a file was written to or replaced since the checkpoint was opened."""
        check_unchanged(self.files)

    def read_source(self, source: Source) -> Tensor:
        """The values of a piece, [rows, columns] or what the tensor is."""
        values = self.read(source.tensor.name)
        if source.scales is None:
            return values
        return dequantize_mxfp4(values[source.expert], self.read(source.scales.name)[source.expert]).T

    def expert_sources(self, layer: int, parameter: str) -> Iterator[Source]:
        """What fills the experts' `gate_up_proj` [E, 2K, d] or `down_proj` [E, d, K] of a layer, where no one tensor does."""
        if self.is_mxfp4(layer):
            blocks, scales = (
                self._stored(self.stack_name(layer, f"{parameter}_{part}")) for part in ("blocks", "scales")
            )
            for expert in range(self.n_expert):
                yield Source(blocks, (expert,), scales, expert)
            return
        width = self.n_ff_exp
        parts: dict[Projection, slice] = {"down": slice(None)}
        if parameter == "gate_up_proj":
            parts = {"gate": slice(0, width), "up": slice(width, 2 * width)}
        for expert in range(self.n_expert):
            for projection, rows in parts.items():
                yield Source(self._stored(self._expert_name(layer, expert, projection)), (expert, rows))

    def expert(self, layer: int, expert: int) -> dict[Projection, Tensor]:
        """One expert's matrices in the checkpoint's own type, mapped: gate and up [K, d], down [d, K]."""
        if not self.is_stacked(layer):
            projections: tuple[Projection, ...] = ("gate", "up", "down")
            return {role: self.read(self._stored(self._expert_name(layer, expert, role)).name) for role in projections}
        row, found = self.architecture, []
        for leaf in EXPERT_PARAMETERS:
            if self.is_mxfp4(layer):
                one = self.read_source(next(s for s in self.expert_sources(layer, leaf) if s.expert == expert))
            else:
                one = self.read(self._stored(self.stack_name(layer, leaf)).name)[expert]
            found.append(one.T if row.transposed else one)
        gate_up, down = found
        gate, up = (gate_up[::2], gate_up[1::2]) if row.interleaved else gate_up.chunk(2)
        return {"gate": gate, "up": up, "down": down}

    def _stored(self, name: str) -> StoredTensor:
        if name not in self.tensors:
            raise GgufToolError(f"{self.path}: the checkpoint lacks tensor {name}")
        return self.tensors[name]


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Opens a checkpoint directory, or fetches a Hugging Face hub id (`owner/name`) into the hub's own cache first.

    Reads config.json, the headers of all shards and ten pieces of 4 KiB of every tensor. Raises GgufToolError for whatever
    is missing, truncated, quantized already or of an unknown architecture.
    """
    directory = checkpoint_directory(path)
    raw, fields = read_config(directory)
    architecture = architecture_of(directory, fields)
    tensors = stored_tensors(directory)
    check_counts(directory, fields, len(tensors))
    try:
        # Code that a checkpoint brings along is never run, and nobody is asked whether it may be.
        config = AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False).get_text_config()
    except Exception as error:  # of many kinds, transformers' and huggingface_hub's own among them
        raise GgufToolError(f"{directory}: config.json is refused by transformers ({first_line(error)})") from error
    name = Path(path).resolve().name if Path(path).is_dir() else str(path).rpartition("/")[2]
    files = {file: identity(file) for file in (directory / "config.json", *{t.file for t in tensors.values()})}
    checkpoint = Checkpoint(directory, name, config, architecture, tensors, _fingerprint(raw, tensors), files)
    _check_experts(checkpoint)
    return checkpoint


def lacks_predictors(checkpoint: Checkpoint) -> bool:
    """Whether the family's converter asks for layers of multi-token prediction that this checkpoint was stripped of."""
    return checkpoint.architecture.predictors == "kept" and not checkpoint.n_predict


def _fingerprint(config: bytes, tensors: Mapping[str, StoredTensor]) -> str:
    """See `Checkpoint`. Tensors go in by name, so that another cut into shards is the same checkpoint."""
    digest = hashlib.sha256(config)
    with ExitStack() as stack:
        # Read and not mapped: a mapping brings in what lies around a piece, gigabytes for a large model.
        files = {file: stack.enter_context(file.open("rb")) for file in {tensor.file for tensor in tensors.values()}}
        for name in sorted(tensors):
            tensor = tensors[name]
            digest.update(json.dumps([name, tensor.dtype, tensor.shape]).encode())
            for start, end in pieces(tensor.nbytes):
                files[tensor.file].seek(tensor.offset + start)
                digest.update(files[tensor.file].read(end - start))
    return digest.hexdigest()


def _check_experts(checkpoint: Checkpoint) -> None:
    """Raises GgufToolError where the experts on disk are not those of config.json."""
    n_expert = checkpoint.n_expert
    if not 0 < checkpoint.n_expert_used <= n_expert:
        raise GgufToolError(
            f"{checkpoint.path}: {checkpoint.n_expert_used} of {n_expert} experts cannot be used by a token"
        )
    if not checkpoint.moe_layers:
        raise GgufToolError(f"{checkpoint.path}: no tensor is that of a routed expert; there is nothing to prune")
    for layer in checkpoint.moe_layers:
        if checkpoint._expert_name(layer, n_expert, "down") in checkpoint.tensors:
            raise GgufToolError(f"{checkpoint.path}: layer {layer} has more experts than config.json's {n_expert}")
        for name, shape in _expert_shapes(checkpoint, layer):
            found = checkpoint._stored(name).shape
            if found != shape:
                raise GgufToolError(
                    f"{checkpoint.path}: {name} has shape {list(found)}, config.json says {list(shape)}"
                )


def _expert_shapes(checkpoint: Checkpoint, layer: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Stored name and shape of everything that a layer's experts are made of, one by one: the count is config.json's."""
    row = checkpoint.architecture
    n_expert, width, n_embd = checkpoint.n_expert, checkpoint.n_ff_exp, checkpoint.n_embd
    if not checkpoint.is_stacked(layer):
        shapes: dict[Projection, tuple[int, int]] = {
            "gate": (width, n_embd), "up": (width, n_embd), "down": (n_embd, width)
        }  # fmt: skip
        for projection, shape in shapes.items():
            for expert in range(n_expert):
                yield checkpoint._expert_name(layer, expert, projection), shape
        return
    want: dict[str, tuple[int, ...]] = {}
    for leaf, (rows, columns) in (("gate_up_proj", (2 * width, n_embd)), ("down_proj", (n_embd, width))):
        if checkpoint.is_mxfp4(layer):
            want[f"{leaf}_blocks"] = (n_expert, rows, columns // 32, 16)
            want[f"{leaf}_scales"] = (n_expert, rows, columns // 32)
        else:
            want[leaf] = (n_expert, columns, rows) if row.transposed else (n_expert, rows, columns)
        if row.expert_bias:
            want[f"{leaf}_bias"] = (n_expert, rows)
    yield from ((checkpoint.stack_name(layer, leaf), shape) for leaf, shape in want.items())

"""A GGUF file as the model that is measured: what a plan needs to know of it, and its experts' matrices one at a time.

Only the names of its tensors count, so every architecture will do whose experts are stacks `blk.N.ffn_*_exps.weight`.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .architectures import DENSE, SHARED
from .cut import KEY
from .encoding import FLOATS, file_type_name
from .errors import GgufToolError
from .gguf_file import GgufFile
from .layout import parse
from .requant import dequantize_rows
from .stats import ModelFacts
from .stored import pieces
from .tensors import TensorSpec

# Fingerprints of GGUF files begin with this.
OWN = "gguf:"


@dataclass(frozen=True)
class GgufModel:
    """An opened GGUF with experts.

    Attributes:
        name: `general.name` with dashes for blanks, or the file's own.
        fingerprint: sha256 over the metadata, the list of tensors and ten pieces of 4 KiB of every tensor.
        moe_layers: decoder indices of the layers with experts, without those that predict further tokens (MTP).
        n_ff_exp: neurons of one expert. n_embd: width of the residual stream.
        norm_topk: whether the weights of a token's experts are made to add up to 1; None until it was seen in the graph.
    """

    file: GgufFile
    name: str
    fingerprint: str
    moe_layers: tuple[int, ...]
    n_expert: int
    n_expert_used: int
    n_ff_exp: int
    n_embd: int
    n_vocab: int
    norm_topk: bool | None = None

    @property
    def path(self) -> Path:
        """The file."""
        return self.file.path

    @property
    def n_ctx_train(self) -> int | None:
        """The longest context that the model knows, where the file says it."""
        return self.file.arch_integer("context_length", 0) or None

    @property
    def encoding(self) -> str:
        """The encoding that the file says it has, such as Q4_K_M."""
        return file_type_name(self.file.integer("general.file_type", -1))

    @property
    def is_quantized(self) -> bool:
        """Whether any matrix is in blocks."""
        return any(spec.type not in (*FLOATS, "I32") for spec in self.file.tensors)

    def facts(self) -> ModelFacts:
        """What the stats and the plan keep of it."""
        file = self.file
        return ModelFacts(
            name=self.name, fingerprint=self.fingerprint, model_type=file.arch, gguf_arch=file.arch,
            block_count=file.arch_integer("block_count"), moe_layers=self.moe_layers, n_expert=self.n_expert,
            n_expert_used=self.n_expert_used, n_ff_exp=self.n_ff_exp, n_embd=self.n_embd, n_vocab=self.n_vocab,
            tensors=file.tensors, n_group=max(1, file.arch_integer("expert_group_count", 1)),
            n_group_used=max(1, file.arch_integer("expert_group_used_count", 1)), norm_topk=self.norm_topk,
            n_predict=max(0, file.arch_integer("nextn_predict_layers", 0)), tied=tied(file), n_gqa=n_gqa(file),
            pruned=file.value(f"{KEY}version", None) is not None,
        )  # fmt: skip

    def down(self, layer: int, expert: int, ggml: Path) -> Tensor:
        """The down projection of an expert, float32 [d, K]. `ggml` is the library that reads quantized rows."""
        spec = self._spec(f"blk.{layer}.ffn_down_exps.weight")
        return torch.from_numpy(dequantize_rows(self.file.expert(spec, expert), spec.type, ggml))

    def router(self, layer: int, ggml: Path) -> Tensor:
        """A layer's router, float32 [E, d]. Raises GgufToolError where it has none of its own."""
        spec = self._spec(f"blk.{layer}.ffn_gate_inp.weight")
        return torch.from_numpy(dequantize_rows(self.file.raw(spec), spec.type, ggml))

    def _spec(self, name: str) -> TensorSpec:
        found = next((spec for spec in self.file.tensors if spec.name == name), None)
        if found is None:
            raise GgufToolError(f"{self.path}: has no {name}")
        return found


def tied(file: GgufFile) -> tuple[str, ...]:
    """How names of tensors end that llama.cpp sizes by the experts' width, because no key of the metadata is theirs.

    It sizes shared experts, and some architectures dense layers, by the same key as the experts where they have none.
    """
    keys = {"expert_shared_feed_forward_length": SHARED, "expert_feed_forward_length": DENSE}
    return tuple(end for key, end in keys.items() if file.arch_value(key, None) is None)


def n_gqa(file: GgufFile) -> int:
    """Query heads per key-value head of layer 0; 0 where it has none (llama-hparams.cpp, `llama_hparams::n_gqa`)."""
    heads = first_integer(file, "attention.head_count", 0)
    kv_heads = first_integer(file, "attention.head_count_kv", heads)
    return heads // kv_heads if kv_heads > 0 and heads > 0 else 0


def first_integer(file: GgufFile, key: str, default: int) -> int:
    """The metadata value of `<arch>.<key>`, one whole number or one for each layer: that of layer 0."""
    value = file.arch_value(key, default)
    if isinstance(value, list) and value:
        value = value[0]
    if not isinstance(value, int):
        raise GgufToolError(f"{file.path}: {file.arch}.{key} is neither a whole number nor one for each layer")
    return value


def is_gguf(path: Path) -> bool:
    """Whether a model that was named is one file: a GGUF, and no checkpoint directory."""
    return not path.is_dir() and (path.suffix == ".gguf" or path.is_file())


def open_gguf(path: Path) -> GgufModel:
    """Opens a GGUF. Its metadata and the pieces for the fingerprint are read, no whole tensor.

    Raises GgufToolError for a file that is damaged, split, without experts, pruned in tiers already, or in which not all
    layers have experts of one number and width.
    """
    file = GgufFile(path)
    file.check_whole()
    if any((name := parse(spec.name)) and (name.role == "map" or name.tier is not None) for spec in file.tensors):
        raise GgufToolError(
            f"{path}: its experts have different widths already; calibrate the file that it was cut from"
            f" ({file.value(f'{KEY}base.name', 'the unpruned one')})"
        )
    predictors = range(file.arch_integer("block_count") - file.arch_integer("nextn_predict_layers", 0), 1 << 31)
    downs = {
        name.layer: spec
        for spec in file.tensors
        if (name := parse(spec.name))
        and name.role == "down"
        and name.suffix == "weight"
        and name.layer not in predictors
    }
    if not downs:
        raise GgufToolError(f"{path}: a dense model: it has no routed experts, so there is nothing to prune")
    layers = tuple(sorted(downs))
    width, n_embd, n_expert = downs[layers[0]].ne
    for layer in layers:
        if downs[layer].ne != (width, n_embd, n_expert):
            raise GgufToolError(
                f"{path}: layer {layer} has {downs[layer].ne[2]} experts of {downs[layer].ne[0]} neurons, layer"
                f" {layers[0]} {n_expert} of {width}; gguftool wants them alike"
            )
    used = file.arch_integer("expert_used_count")
    if not 0 < used <= n_expert:
        raise GgufToolError(f"{path}: {used} of {n_expert} experts cannot be used by a token")
    embedding = next((spec for spec in file.tensors if spec.name == "token_embd.weight"), None)
    if embedding is None:
        raise GgufToolError(f"{path}: has no token_embd.weight; not a model that gguftool can use")
    title = re.sub(r"[^A-Za-z0-9.+_-]+", "-", str(file.value("general.name", "") or path.stem)).strip("-")
    return GgufModel(file, title or "model", fingerprint(file), layers, n_expert, used, width, n_embd, embedding.ne[1])


def fingerprint(file: GgufFile) -> str:
    """See `GgufModel`. It begins with OWN, as that of a checkpoint does not."""
    with file.path.open("rb") as stream:
        digest = hashlib.sha256(stream.read(file.data_start))
    for spec in sorted(file.tensors, key=lambda spec: spec.name):
        digest.update(json.dumps([spec.name, spec.type, spec.ne]).encode())
        for start, end in pieces(spec.nbytes):
            digest.update(file.piece(spec, start, end).data)
    return OWN + digest.hexdigest()

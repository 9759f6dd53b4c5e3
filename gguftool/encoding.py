"""Encodings: the ggml type of each tensor of a file for a target such as Q4_K_M. Pure: names and shapes in, types out.

A mirror of llama.cpp's own mix (src/llama-quant.cpp: `tensor_allows_quantization`, `llama_tensor_get_type_impl`,
`tensor_type_fallback`), held against the `llama-quantize` binary by a test. Not mirrored: what it does only for the
architectures falcon, glm5-next and bailingmoe3.

Tiers (`blk.L.ffn_down_exps.T.weight`) get the type of the stack that they replace. Where their rows are no multiple of
its block, they get its twin of 32-weight blocks, chosen to be of the same size where there is one, and not llama.cpp's
fallback.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import TYPE_CHECKING, NamedTuple

from .errors import GgufToolError
from .tensors import BLOCKS, TensorSpec, row_bytes

if TYPE_CHECKING:  # it brings numpy along, which every `--help` would wait for
    from .stats import ModelFacts


class Target(NamedTuple):
    """A file type: its name, its number in `general.file_type` (llama.h, `llama_ftype`), the type of most tensors."""

    name: str
    file_type: int
    default: str


TARGETS: dict[str, Target] = {
    row.name: row
    for row in (
        Target("F32", 0, "F32"), Target("F16", 1, "F16"), Target("BF16", 32, "BF16"),
        Target("Q8_0", 7, "Q8_0"), Target("Q6_K", 18, "Q6_K"),
        Target("Q5_K_M", 17, "Q5_K"), Target("Q5_K_S", 16, "Q5_K"),
        Target("Q4_K_M", 15, "Q4_K"), Target("Q4_K_S", 14, "Q4_K"),
        Target("Q3_K_L", 13, "Q3_K"), Target("Q3_K_M", 12, "Q3_K"), Target("Q3_K_S", 11, "Q3_K"),
        Target("Q2_K", 10, "Q2_K"), Target("Q2_K_S", 21, "Q2_K"),
        Target("Q5_0", 8, "Q5_0"), Target("Q5_1", 9, "Q5_1"), Target("Q4_0", 2, "Q4_0"), Target("Q4_1", 3, "Q4_1"),
        Target("IQ4_NL", 25, "IQ4_NL"), Target("IQ4_XS", 30, "IQ4_XS"),
        Target("IQ3_M", 27, "IQ3_S"), Target("IQ3_S", 26, "IQ3_S"), Target("IQ3_XS", 22, "IQ3_S"),
        Target("IQ3_XXS", 23, "IQ3_XXS"),
        Target("IQ2_M", 29, "IQ2_S"), Target("IQ2_S", 28, "IQ2_XS"), Target("IQ2_XS", 20, "IQ2_XS"),
        Target("IQ2_XXS", 19, "IQ2_XXS"), Target("IQ1_M", 31, "IQ1_M"), Target("IQ1_S", 24, "IQ1_S"),
        Target("MXFP4_MOE", 38, "MXFP4"),
    )
}  # fmt: skip
ALIASES = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M"}
FLOATS = ("F32", "F16", "BF16")

# llama.cpp's fallback for rows that are no multiple of 256 (`tensor_type_fallback`).
FALLBACK = {
    "IQ1_S": "IQ4_NL", "IQ1_M": "IQ4_NL", "IQ2_XXS": "IQ4_NL", "IQ2_XS": "IQ4_NL", "IQ2_S": "IQ4_NL",
    "IQ3_XXS": "IQ4_NL", "IQ3_S": "IQ4_NL", "IQ4_XS": "IQ4_NL",
    "Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0",
}  # fmt: skip
# Ours for the rows of experts: of the same size for Q4_K and Q5_K, the better of two equals for Q2_K and Q3_K.
TWINS = FALLBACK | {"Q2_K": "IQ4_NL", "Q3_K": "IQ4_NL", "Q4_K": "IQ4_NL", "Q5_K": "Q5_0"}

# llama.cpp quantizes only matrices named *weight, and none whose name holds one of these.
_KEPT = (
    "_norm.weight", "ffn_gate_inp.weight", "ffn_gate_tid2eid.weight", "ffn_exps_tier.weight", "altup", "laurel",
    "per_layer_model_proj", "ssm_conv1d", "shortconv.conv.weight", "indexer.k_proj.weight", "indexer.q_proj.weight",
    "time_mix_first.weight", "time_mix_w0.weight", "time_mix_w1.weight", "time_mix_w2.weight", "time_mix_v0.weight",
    "time_mix_v1.weight", "time_mix_v2.weight", "time_mix_a0.weight", "time_mix_a1.weight", "time_mix_a2.weight",
    "time_mix_g1.weight", "time_mix_g2.weight", "time_mix_decay_w1.weight", "time_mix_decay_w2.weight",
    "time_mix_lerp_fused.weight", "attn_rel_b.weight", ".position_embd", "sam.pos_embd", "sam.neck.", "sam.net_",
    ".rel_pos", ".patch_embd", ".patch_merger", "a.rvq.codebook", "mm.a.code_embd",
)  # fmt: skip
_KEPT_WHOLE = ("position_embd.weight", "token_types.weight")
# Broad categories, the first match wins (`tensor_get_category`).
_CATEGORIES = (
    ("attn_qkv.weight", "attn_v"), ("attn_kv_b.weight", "attn_v"), ("attn_v.weight", "attn_v"),
    ("attn_k.weight", "attn_k"), ("attn_q.weight", "attn_q"), ("attn_output.weight", "attn_output"),
    ("ffn_up", "ffn_up"), ("ffn_gate", "ffn_gate"), ("ffn_down", "ffn_down"),
)  # fmt: skip

_TIER = re.compile(r"(blk\.\d+\.ffn_(?:gate|up|down|gate_up)_exps)\.\d+\.weight")
_EXPERTS = re.compile(r"blk\.(\d+)\.ffn_(gate|up|down|gate_up)_exps(?:\.(\d+))?\.weight")
_LAYER = re.compile(r"blk\.(\d+)\.")

# Layers in which a model of llama.cpp's type "70B" is recognised (src/models/*.cpp); llama only with grouped heads.
_LAYERS_70B = {"llama": 80, "qwen2": 80, "deci": 80, "olmo": 80, "jais2": 68}


@dataclass(frozen=True)
class MixFacts:
    """What llama.cpp's mix depends on besides names and shapes.

    Attributes:
        gguf_arch: `general.architecture`.
        n_layer: `{arch}.block_count`, multi-token-prediction layers included.
        n_expert: experts of the model that was measured, not of what was cut from it; 0 for a dense one.
        n_gqa: query heads per key-value head of layer 0, as the metadata counts them; 0 where it counts none.
        has_imatrix: whether an importance matrix will be used.
        twins: whether stock stacks of experts take the 32-block twin too, as tiers always do: true for a pruned file.
    """

    gguf_arch: str
    n_layer: int
    n_expert: int
    n_gqa: int
    has_imatrix: bool = False
    twins: bool = False

    @classmethod
    def of_model(cls, model: ModelFacts, *, has_imatrix: bool = False) -> MixFacts:
        """Facts of a model that was measured, for whoever has no KVs."""
        n_gqa = _heads_by_rows(model.tensors) if model.n_gqa is None else model.n_gqa
        return cls(model.gguf_arch, model.block_count, model.n_expert, n_gqa, has_imatrix, model.pruned)

    @property
    def is_70b(self) -> bool:
        """Whether llama.cpp calls this model's size 70B, which its mix treats better."""
        if _LAYERS_70B.get(self.gguf_arch) != self.n_layer:
            return False
        return self.gguf_arch != "llama" or (self.n_expert != 8 and self.n_gqa != 1)


def _heads_by_rows(tensors: Iterable[TensorSpec]) -> int:
    """Query heads per key-value head, for stats that do not say it: by the rows of layer 0's attn_q and attn_k.

    Wrong where layer 0 has no attention of this kind, and the metadata counts heads all the same (Qwen3-Next).
    """
    rows = {spec.name: spec.ne[1] for spec in tensors if spec.name.startswith("blk.0.attn_") and len(spec.ne) > 1}
    query, key = rows.get("blk.0.attn_q.weight", 0), rows.get("blk.0.attn_k.weight", 0)
    return query // key if key else 0


def parse_target(text: str) -> Target:
    """The target that `text` names, in any case, aliases included. Raises GgufToolError that lists near names."""
    name = text.strip().upper()
    name = ALIASES.get(name, name)
    if name in TARGETS:
        return TARGETS[name]
    near = get_close_matches(name, TARGETS, n=3)
    hint = f" (did you mean {' or '.join(near)}?)" if near else ""
    raise GgufToolError(f"no encoding {text!r} is known{hint}; known are {', '.join(TARGETS)}")


def file_type_name(file_type: int) -> str:
    """The name of a number in `general.file_type`; `file type N` for one that gguftool does not write."""
    return next((row.name for row in TARGETS.values() if row.file_type == file_type), f"file type {file_type}")


def assign(tensors: Sequence[TensorSpec], target: str, facts: MixFacts) -> tuple[TensorSpec, ...]:
    """The same tensors, in the same order, each with the type that it gets in a file of type `target`.

    Stock files get what `llama-quantize` would choose by itself. Raises GgufToolError for an unknown target and for an
    expert tensor of a layer that the model does not have.
    """
    wanted = _wanted(tensors, parse_target(target), facts)
    return tuple(
        TensorSpec(spec.name, spec.ne, fit(wanted[spec.name], spec.ne[0], _takes_twin(spec.name, facts)))
        if spec.name in wanted
        else spec
        for spec in tensors
    )


def fit(type_name: str, row: int, twins: bool) -> str:
    """The type that rows of `row` weights really get where `type_name` is wanted; F16 where nothing smaller divides.

    `twins` chooses between TWINS and llama.cpp's FALLBACK.
    """
    if row % BLOCKS[type_name][0] == 0:
        return type_name
    other = (TWINS if twins else FALLBACK).get(type_name, type_name)
    return "F16" if row % BLOCKS[other][0] else other


@dataclass(frozen=True)
class ExpertTypes:
    """The types of one MoE layer's experts before their width is known: what the mix wants."""

    gate: str
    up: str
    down: str

    @property
    def alignment(self) -> int:
        """32 where down has 32-weight blocks, a twin of the same size or is a float; else 256, to keep its size."""
        return 32 if _costs_nothing(self.down) else 256


def expert_types(tensors: Sequence[TensorSpec], target: str, facts: MixFacts) -> dict[int, ExpertTypes]:
    """For each layer with a stack of experts (stock or tiers): the types that the mix wants for them.

    A float target may leave a tensor that is not to be quantized as it is; experts always are, so no layer is missing.
    """
    wanted = _wanted(tensors, parse_target(target), facts)
    layers: dict[int, dict[str, str]] = {}
    for name, type_name in wanted.items():
        if match := _EXPERTS.fullmatch(name):
            kinds = ("gate", "up") if match[2] == "gate_up" else (match[2],)
            layers.setdefault(int(match[1]), {}).update(dict.fromkeys(kinds, type_name))
    missing = [layer for layer, kinds in layers.items() if set(kinds) != {"gate", "up", "down"}]
    if missing:
        raise GgufToolError(f"layer {min(missing)} has expert tensors, but not gate, up and down")
    return {layer: ExpertTypes(**layers[layer]) for layer in sorted(layers)}


def alignment(target: str, layers: Mapping[int, ExpertTypes] | None = None) -> int:
    """The multiple that widths should be of: 32 where at least half of the layers lose nothing by it, else 256.

    `layers` comes from `expert_types`; without it, a model of 48 layers and 64 experts stands in.
    """
    layers = layers or _typical(target)
    free = sum(types.alignment == 32 for types in layers.values())
    return 32 if 2 * free >= len(layers) else 256


def _typical(target: str) -> dict[int, ExpertTypes]:
    stacks = tuple(TensorSpec(f"blk.{i}.ffn_{k}_exps.weight", (256, 256, 64), "F16") for i in range(48) for k in _KINDS)
    return expert_types(stacks, target, MixFacts("qwen3moe", 48, 64, 8))


def needs_imatrix(tensors: Iterable[TensorSpec], target: str) -> list[str]:
    """Names of the assigned tensors that llama-quantize refuses to write without an importance matrix.

    `tensors` as `assign` returns them (`tensor_requires_imatrix`).
    """
    types = {"IQ3_XXS", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ1_M", "IQ1_S"}
    if parse_target(target).name == "Q2_K_S":
        types.add("Q2_K")
    exempt = ("token_embd.weight", "per_layer_token_embd.weight", "output.weight")
    return [spec.name for spec in tensors if spec.type in types and spec.name not in exempt and quantizable(spec)]


def quantizable(spec: TensorSpec) -> bool:
    """Whether llama.cpp would change this tensor's type at all: a matrix of weights, no norm, router or tier map."""
    dims = max((i + 1 for i, n in enumerate(spec.ne) if n > 1), default=1)
    if dims < 2 or (spec.type.startswith("I") and not spec.type.startswith("IQ")):
        return False
    return spec.name.endswith("weight") and spec.name not in _KEPT_WHOLE and not any(k in spec.name for k in _KEPT)


def stock_name(name: str) -> str:
    """The name of the stack that a tier belongs to; any other name as it is."""
    match = _TIER.fullmatch(name)
    return f"{match[1]}.weight" if match else name


_KINDS = ("gate", "up", "down")


def _takes_twin(name: str, facts: MixFacts) -> bool:
    match = _EXPERTS.fullmatch(name)
    return match is not None and (facts.twins or match[3] is not None)


def _costs_nothing(down: str) -> bool:
    return row_bytes(fit(down, 32, True), 256) <= row_bytes(down, 256)


def _wanted(tensors: Sequence[TensorSpec], target: Target, facts: MixFacts) -> dict[str, str]:
    """Tensor name -> wanted type, before shapes are looked at, for every tensor that is quantized at all."""
    names = {spec.name for spec in tensors}
    mix = _Mix(target, facts, "output.weight" not in names, sum(_category(name) == "attn_v" for name in names))
    wanted: dict[str, str] = {}
    by_stack: dict[str, str] = {}
    for spec in sorted(filter(quantizable, tensors), key=_order):
        stack = stock_name(spec.name)
        if stack not in by_stack:  # the tiers of one stack count once, as their stack did
            is_stack = stack != spec.name or (len(spec.ne) > 2 and spec.ne[2] > 1)
            by_stack[stack] = mix.type_of(stack, spec.ne[0], is_stack)
        wanted[spec.name] = by_stack[stack]
    return wanted


def _order(spec: TensorSpec) -> tuple[int, bytes]:
    """llama.cpp's order of a file's tensors (`weight_name_comparer`): layer, then name."""
    match = _LAYER.match(spec.name)
    return int(match[1]) if match else -1, spec.name.encode()


def _category(name: str) -> str:
    if name == "output.weight":
        return "output"
    if name in ("token_embd.weight", "per_layer_token_embd.weight"):
        return "token_embd"
    return next((category for part, category in _CATEGORIES if part in name), "other")


_LOWEST = frozenset({"IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M", "IQ1_S", "IQ1_M"})


@dataclass
class _Mix:
    """One run of `llama_tensor_get_type_impl` over a file: the choices, and the counters that some of them depend on.

    The branches keep llama.cpp's order, so that the two can be read side by side.
    """

    target: Target
    facts: MixFacts
    tied: bool
    n_attn_v: int

    def __post_init__(self) -> None:
        self.seen: Counter[str] = Counter()  # tensors of a category before this one

    def type_of(self, name: str, row: int, is_stack: bool) -> str:
        """The type wanted for one tensor. Call once for each, in llama.cpp's order."""
        default, label, category = self.target.default, self.target.name, _category(name)
        if default in FLOATS:
            return default
        if category == "output" or (self.tied and category == "token_embd"):
            return self._output(row)
        if label == "MXFP4_MOE":
            return "MXFP4" if is_stack else "Q8_0"
        if category == "token_embd":
            return self._token_embd()
        index = self.seen[category]
        self.seen[category] += 1
        if label in _LOWEST:
            return self._lowest(category, index)
        if category == "attn_v":
            return self._attn_v(index)
        if category in ("attn_k", "attn_q"):
            return self._attn_qk(category)
        if category == "ffn_down":
            return self._ffn_down(self._layer(name, index))
        if category == "attn_output":
            return self._attn_output()
        if category in ("ffn_gate", "ffn_up"):
            n, layer = self.facts.n_layer, self._layer(name, index)
            return "IQ3_XXS" if label == "IQ3_XS" and n // 8 <= layer < 7 * n // 8 else default
        return default

    def _layer(self, name: str, index: int) -> int:
        """The layer of an MLP tensor: from its name in an MoE, from the count of such tensors in a dense model."""
        if self.facts.n_expert <= 1:
            return index
        match = _LAYER.match(name)
        layer = int(match[1]) if match else -1
        if not 0 <= layer < self.facts.n_layer:
            raise GgufToolError(f"{name}: the model has {self.facts.n_layer} layers; no such layer")
        return layer

    def _more_bits(self, layer: int, n_layers: int) -> bool:
        """`use_more_bits`: the first and the last eighth, and every third layer between."""
        return layer < n_layers // 8 or layer >= 7 * n_layers // 8 or (layer - n_layers // 8) % 3 == 2

    def _output(self, row: int) -> str:
        if self.target.name == "MXFP4_MOE" or row % BLOCKS[self.target.default][0] or self.target.default == "Q8_0":
            return "Q8_0"
        return "Q5_K" if self.target.name in _LOWEST | {"IQ3_XXS"} else "Q6_K"

    def _token_embd(self) -> str:
        if self.target.name in ("IQ2_XXS", "IQ2_XS", "IQ1_S", "IQ1_M"):
            return "Q2_K"
        return "IQ3_S" if self.target.name in ("IQ2_S", "IQ2_M", "IQ3_XXS") else self.target.default

    def _lowest(self, category: str, index: int) -> str:
        better = "IQ3_S" if self.target.name in ("IQ2_S", "IQ2_M") else "Q2_K"
        if category == "attn_v":
            return "Q4_K" if self.facts.n_gqa >= 4 or self.facts.n_expert >= 4 else better
        if category == "attn_k" and self.facts.n_expert == 8:
            return "Q4_K"
        if category == "ffn_down" and index < self.facts.n_layer // 8:
            return better
        if category == "attn_output":
            if self.facts.n_expert == 8:
                return "Q5_K"
            if better == "IQ3_S":
                return better
            if self.target.name in ("IQ1_S", "IQ1_M"):
                return "IQ2_XXS"
        return self.target.default

    def _attn_v(self, index: int) -> str:
        if self.facts.n_expert == 8:
            return "Q8_0"
        label, grouped = self.target.name, self.facts.n_gqa >= 4
        chosen = self.target.default
        if label == "Q2_K":
            chosen = "Q4_K" if grouped else "Q3_K"
        elif label in ("Q2_K_S", "IQ3_XS", "IQ3_S") and grouped:
            chosen = "Q4_K"
        elif label == "IQ3_XXS":
            chosen = "Q4_K" if grouped else "IQ3_XXS" if self.facts.has_imatrix else "IQ3_S"
        elif label == "IQ3_M":
            chosen = "Q4_K"
        elif label == "Q3_K_M":
            chosen = "Q5_K" if index < 2 else "Q4_K"
        elif label == "Q3_K_L" or (label in ("IQ4_NL", "IQ4_XS") and grouped):
            chosen = "Q5_K"
        elif label in ("Q4_K_M", "Q5_K_M") and self._more_bits(index, self.n_attn_v):
            chosen = "Q6_K"
        elif label == "Q4_K_S" and index < 4:
            chosen = "Q5_K"
        return "Q5_K" if self.facts.is_70b and chosen in ("Q3_K", "Q4_K") else chosen

    def _attn_qk(self, category: str) -> str:
        if category == "attn_k" and self.facts.n_expert == 8:
            return "Q8_0"
        return {"IQ3_XS": "IQ3_XXS", "IQ3_XXS": "IQ2_S"}.get(self.target.name, self.target.default)

    def _ffn_down(self, layer: int) -> str:
        label, n, blind = self.target.name, self.facts.n_layer, not self.facts.has_imatrix
        first, more = layer < n // 8, self._more_bits(layer, n)
        if label == "Q2_K":
            return "Q3_K"
        if label == "IQ3_XXS" and blind:
            return "Q4_K" if first else "Q3_K"
        if label == "Q3_K_M":
            return "Q5_K" if layer < n // 16 else "Q4_K"
        if label == "Q3_K_L":
            return "Q5_K"
        if label in ("Q4_K_M", "Q5_K_M") and more:
            return "Q6_K"
        if label == "IQ3_M" and (first or (self.facts.n_expert == 8 and more)):
            return "Q4_K"
        if first and label in ("IQ4_NL", "IQ4_XS") and blind:
            return "Q5_K"
        if first and label in ("Q2_K_S", "Q4_K_S"):
            return {"Q2_K_S": "Q4_K", "Q4_K_S": "Q5_K"}[label]
        if first and label in ("Q4_0", "Q5_0") and not blind:
            return {"Q4_0": "Q4_1", "Q5_0": "Q5_1"}[label]
        return self.target.default

    def _attn_output(self) -> str:
        label, default = self.target.name, self.target.default
        if self.facts.n_expert == 8:
            better = ("Q2_K", "IQ3_XS", "IQ3_XXS", "Q3_K_S", "Q3_K_M", "IQ4_NL", "Q4_K_S", "Q4_K_M", "IQ3_S", "IQ3_M")
            return "Q5_K" if label in (*better, "IQ4_XS") else default
        chosen = {"Q2_K": "Q3_K", "IQ3_XXS": "IQ3_S", "Q3_K_M": "Q4_K", "Q3_K_L": "Q5_K", "IQ3_M": "Q4_K"}
        return chosen.get(label, default)

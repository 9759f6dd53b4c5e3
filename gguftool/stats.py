"""CalibrationStats: what one forward pass over the corpus measured. The dear file; plans are made from it for free.

Sums and counts are kept in float64 and divided on read. On disk: one safetensors file, arrays plus a JSON header.

Symbols (see `saliency`): token t, expert e, x_t the input of the MoE block, g_e(t) the router weight really multiplied in,
h_t the neurons act(gate)*up, W the down projection, f_e(t) = W h_t the ungated output, p_k = h_k <W_:k, f>/||f||.
Where experts have a bias b behind W (gpt-oss), f is the output that the model weights, W h_t + b, in all of these sums, p_k
among them: b goes with an expert and stays with its neurons. The papers write of experts without one.
D domains (one per --data), L MoE layers, E experts, K neurons of an expert, d the width of the residual stream.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from math import inf
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .durable import note_saved, replacing
from .errors import GgufToolError
from .strict_json import GARBLED, parse, text, whole
from .tensors import TensorSpec, specs_from_json

FORMAT = "gguftool.stats"
VERSION = 1

Array = NDArray[np.float64]

# Sums over the tokens routed to an expert: [D, L, E].
EXPERT_SUMS: dict[str, str] = {
    "count": "sum of 1",
    "gate": "sum of g",
    "gate_sq": "sum of g^2",
    "norm": "sum of ||f||",
    "norm_sq": "sum of ||f||^2",
    "gate_norm": "sum of g ||f||",
    "gate_sq_norm_sq": "sum of g^2 ||f||^2",
    "turn": "sum of g ||f|| (1 - cos(x, f))",
    "max_out": "largest |f_i| (a maximum, not a sum)",
}
# Sums over the same tokens for every neuron, all domains together: [L, E, K].
NEURON_SUMS: dict[str, str] = {
    "h_sq": "sum of h_k^2",
    "gate_sq_h_sq": "sum of g^2 h_k^2",
    "proj": "sum of p_k",
    "proj_abs": "sum of |p_k|",
}
# Constants of the weights, so that a plan never has to read a tensor: [L, E, K].
WEIGHT_NORMS = {"down_norm_sq": "||W_:k||^2"}
# Solved from the K x K second moments of a layer, which are too big to keep; no sums, and not in every file: [L, E, K].
SOLVED = {"obs": "cost of neuron k at the moment when it goes, the others refitted (see `obs`)"}


@dataclass(frozen=True)
class Domain:
    """One calibration text: its file name, the sha256 of its bytes, and how many of its tokens were used.

    `windows` holds the numbers of the windows that were drawn from the text; None stands for the first ones. The rest
    says what was read of the bytes, None being the plain case: `field` of its documents (None: text, or all of the file),
    `template`, sha256 of the chat template that rendered them, `limit`, the most documents that were read, and `weight`,
    by which the number of windows was multiplied (None: 1). The sha256 of a dataset is that of the documents read.
    """

    name: str
    sha256: str
    tokens: int
    windows: tuple[int, ...] | None = None
    field: str | None = None
    template: str | None = None
    limit: int | None = None
    weight: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """Plain values. The plain case is left out, so that files and fingerprints of older versions stay what they are."""
        facts = asdict(self)
        return {name: value for name, value in facts.items() if value is not None or name == "windows"}


@dataclass(frozen=True)
class ModelFacts:
    """What a plan needs to know of the checkpoint, without the checkpoint.

    `fingerprint` is a sha256 over config.json and the names, shapes, types and pieces of every tensor.
    `moe_layers` holds the decoder index of each of the L layers that have experts. `tensors` is every tensor of the
    unpruned GGUF as the converter would write it, so that bytes can be counted before anything is written.
    The router picks from `n_group_used` of `n_group` equal groups of neighbouring experts. `norm_topk` says whether the
    weights of the chosen experts are made to add up to 1; None in stats of a gguftool that did not look. The last
    `n_predict` of `block_count` layers predict further tokens (MTP): no plan prunes them. `tied` says how the names of
    tensors end that llama.cpp sizes by the experts' width (see `layout.bystanders`). `n_gqa` are the query heads per
    key-value head of layer 0, as the GGUF's metadata counts them (0: none). Both are None in stats of an older gguftool.
    `pruned` says that the model is a file which gguftool pruned before, so that stacks of experts are quantized as in one.
    """

    name: str
    fingerprint: str
    model_type: str
    gguf_arch: str
    block_count: int
    moe_layers: tuple[int, ...]
    n_expert: int
    n_expert_used: int
    n_ff_exp: int
    n_embd: int
    n_vocab: int
    tensors: tuple[TensorSpec, ...]
    n_group: int = 1
    n_group_used: int = 1
    norm_topk: bool | None = None
    n_predict: int = 0
    tied: tuple[str, ...] | None = None
    n_gqa: int | None = None
    pruned: bool = False


@dataclass(frozen=True)
class CalibrationStats:
    """The accumulators of one calibration.

    Attributes:
        model: facts of the checkpoint that was calibrated.
        domains: the D calibration texts, in the order of the leading axis of `experts`.
        n_ctx: tokens in a window.
        experts: name in EXPERT_SUMS -> float64 [D, L, E].
        neurons: name in NEURON_SUMS or WEIGHT_NORMS, and perhaps in SOLVED -> float64 [L, E, K].
        expert_inputs: sum of x^2 over the tokens routed to an expert, [L, E, d] (the imatrix of gate and up).
        residual_inverse: sum over all tokens of 1 / squared length of the residual stream behind each MoE layer, [L]; None
            in files that were made without.
        linears: GGUF tensor name -> (sum of x^2 over all tokens, [columns]), the imatrix of every other matrix.
        linear_tokens: how many tokens those sums run over.
    """

    model: ModelFacts
    domains: tuple[Domain, ...]
    n_ctx: int
    experts: Mapping[str, Array]
    neurons: Mapping[str, Array]
    expert_inputs: Array
    residual_inverse: Array | None = None
    linears: Mapping[str, Array] = field(default_factory=dict)
    linear_tokens: int = 0

    @property
    def tokens(self) -> int:
        """Calibration tokens over all domains."""
        return sum(domain.tokens for domain in self.domains)

    @classmethod
    def blank(cls, model: ModelFacts, n_domains: int = 1, *, obs: bool = True) -> CalibrationStats:
        """Stats of nothing, every expert routed alike: what a recipe can be tried on before the dear pass."""
        shape = (len(model.moe_layers), model.n_expert)
        experts = {name: np.ones((n_domains, *shape)) for name in EXPERT_SUMS}
        names = (*NEURON_SUMS, *WEIGHT_NORMS, *(SOLVED if obs else ()))
        neurons = {name: np.ones((*shape, model.n_ff_exp)) for name in names}
        domains = (Domain("blank", "", 0),) * n_domains
        return cls(model, domains, 0, experts, neurons, np.ones((*shape, model.n_embd)), np.ones(shape[0]))

    @property
    def array_bytes(self) -> int:
        """Bytes of the arrays about experts, most of the file."""
        arrays = [*self.experts.values(), *self.neurons.values(), self.expert_inputs]
        return sum(array.size * 8 for array in arrays)

    def expert(self, name: str) -> Array:
        """An expert accumulator over all domains, [L, E]: the sum, or the maximum for `max_out`."""
        values = self.experts[name]
        return values.max(axis=0) if name == "max_out" else values.sum(axis=0)

    def check(self) -> None:
        """Raises GgufToolError where a shape is wrong, a value is not finite or a routed token was lost."""
        n_layers, n_expert, width = len(self.model.moe_layers), self.model.n_expert, self.model.n_ff_exp
        want = {name: (len(self.domains), n_layers, n_expert) for name in EXPERT_SUMS}
        want |= {name: (n_layers, n_expert, width) for name in (*NEURON_SUMS, *WEIGHT_NORMS)}
        want |= {name: (n_layers, n_expert, width) for name in SOLVED if name in self.neurons}
        have: dict[str, Array] = {**self.experts, **self.neurons}
        for name, shape in want.items():
            if name not in have:
                raise GgufToolError(f"the stats lack {name!r}; calibrate again")
            if have[name].shape != shape:
                raise GgufToolError(f"the stats' {name!r} has shape {have[name].shape}, not {shape}; calibrate again")
        if self.expert_inputs.shape != (n_layers, n_expert, self.model.n_embd):
            raise GgufToolError(f"the stats' 'expert_inputs' has shape {self.expert_inputs.shape}; calibrate again")
        if self.residual_inverse is not None and (
            self.residual_inverse.shape != (n_layers,) or not (self.residual_inverse > 0).all()
        ):
            raise GgufToolError(
                f"the stats' 'residual_inverse' is no positive sum for each of {n_layers} layers; calibrate again"
            )
        for name, values in (*have.items(), ("expert_inputs", self.expert_inputs), *self.linears.items()):
            if values.dtype != np.float64:
                raise GgufToolError(f"the stats' {name!r} is {values.dtype}, not float64; calibrate again")
            if not np.isfinite(values).all():
                raise GgufToolError(f"the stats' {name!r} is not finite; the checkpoint or its calibration overflowed")
        if (self.experts["count"] < 0).any():
            raise GgufToolError("the stats count fewer than 0 tokens of an expert; calibrate again")
        routed = self.experts["count"].sum(axis=2)
        expected = np.array([[domain.tokens * self.model.n_expert_used] for domain in self.domains], dtype=np.float64)
        if not np.array_equal(routed, np.broadcast_to(expected, routed.shape)):
            raise GgufToolError(
                f"{int(routed.sum())} routed tokens were counted, not tokens x top-k = {int(expected.sum()) * n_layers}"
            )

    def save(self, path: Path, work_dir: Path | None = None) -> None:
        """Writes the stats to `path`, first to `path`.partial; `work_dir` is told (see `durable.note_saved`).

        Raises GgufToolError where that is impossible.
        """
        from safetensors import SafetensorError
        from safetensors.numpy import save_file

        arrays = {f"expert.{k}": v for k, v in self.experts.items()}
        arrays |= {f"neuron.{k}": v for k, v in self.neurons.items()}
        arrays |= {f"linear.{k}": v for k, v in self.linears.items()}
        arrays["expert_inputs"] = self.expert_inputs
        if self.residual_inverse is not None:
            arrays["residual_inverse"] = self.residual_inverse
        header = {
            "format": FORMAT,
            "version": VERSION,
            "model": asdict(self.model),
            "domains": [domain.as_dict() for domain in self.domains],
            "n_ctx": self.n_ctx,
            "linear_tokens": self.linear_tokens,
        }
        arrays = {k: np.ascontiguousarray(v) for k, v in arrays.items()}
        try:
            with replacing(path) as partial:
                save_file(arrays, partial, {"gguftool": json.dumps(header)})
                partial.chmod(0o644)  # safetensors makes files that nobody else may read
                if work_dir is not None:
                    note_saved(work_dir, partial)
        except (SafetensorError, OSError) as error:
            raise GgufToolError(f"{path}: cannot be written ({error})") from error

    @classmethod
    def load(cls, path: Path) -> CalibrationStats:
        """Reads and checks stats. Raises GgufToolError for a file that is missing, damaged or something else."""
        from safetensors import SafetensorError, safe_open

        if not path.is_file():
            raise GgufToolError(f"{path}: no such stats file; `gguftool calibrate` makes one")
        if path.suffix == ".gguf":
            raise GgufToolError(f"{path}: a GGUF, no stats file; `gguftool calibrate` makes one")
        try:
            with safe_open(path, "numpy") as file:
                header = parse((file.metadata() or {}).get("gguftool", "{}"))
                if not isinstance(header, dict) or header.get("format") != FORMAT:
                    raise GgufToolError(f"{path}: not gguftool stats; `gguftool calibrate` makes them")
                if header.get("version") != VERSION:
                    raise GgufToolError(
                        f"{path}: stats version {header.get('version')}, this gguftool reads {VERSION}; calibrate again"
                    )
                arrays = {name: file.get_tensor(name) for name in file.keys()}
        except (SafetensorError, *GARBLED, OSError) as error:
            if path.suffix in (".json", ".txt", ".jsonl"):
                raise GgufToolError(f"{path}: text, no stats file; `gguftool calibrate` makes one") from error
            raise GgufToolError(f"{path}: damaged stats file ({error})") from error
        try:
            stats = cls(
                model=_model_facts(header["model"]),
                domains=tuple(_domain(domain) for domain in header["domains"]),
                n_ctx=whole(header["n_ctx"], "n_ctx", 1),
                experts=_with_prefix(arrays, "expert."),
                neurons=_with_prefix(arrays, "neuron."),
                expert_inputs=arrays["expert_inputs"],
                residual_inverse=arrays.get("residual_inverse"),
                linears=_with_prefix(arrays, "linear."),
                linear_tokens=whole(header["linear_tokens"], "linear_tokens"),
            )
        except GARBLED as error:
            raise GgufToolError(f"{path}: the stats header lacks or garbles {error}; calibrate again") from error
        stats.check()
        return stats


def _with_prefix(arrays: Mapping[str, Array], prefix: str) -> dict[str, Array]:
    return {name.removeprefix(prefix): value for name, value in arrays.items() if name.startswith(prefix)}


def _domain(raw: dict[str, Any]) -> Domain:
    drawn = raw.get("windows")
    for name in ("name", "sha256", "field", "template"):
        if raw.get(name) is not None or name in ("name", "sha256"):
            text(raw[name], f"a domain's {name}")
    whole(raw["tokens"], "a domain's tokens")
    if raw.get("limit") is not None:
        whole(raw["limit"], "a domain's limit", 1)
    if raw.get("weight") is not None and not 0 < float(raw["weight"]) < inf:
        raise ValueError(f"a domain's weight is {raw['weight']}")
    windows = None if drawn is None else tuple(whole(number, "a domain's windows") for number in drawn)
    return Domain(**{**raw, "windows": windows})


# Whole numbers of the model's facts, each with the least that it can be.
_COUNTS = {"block_count": 1, "n_expert": 1, "n_expert_used": 1, "n_ff_exp": 1, "n_embd": 1, "n_vocab": 1}
_MORE_COUNTS = {"n_group": 1, "n_group_used": 1, "n_predict": 0}


def _model_facts(raw: dict[str, Any]) -> ModelFacts:
    for name in ("name", "fingerprint", "model_type", "gguf_arch"):
        text(raw[name], name)
    for name, least in (*_COUNTS.items(), *((name, least) for name, least in _MORE_COUNTS.items() if name in raw)):
        whole(raw[name], name, least, 2**31 - 1)
    layers = tuple(whole(index, "moe_layers", 0, 2**31 - 1) for index in raw["moe_layers"])
    if not layers or sorted(set(layers)) != list(layers):
        raise ValueError("moe_layers, which are no rising numbers of layers")
    if layers[-1] >= raw["block_count"]:
        raise ValueError(f"moe_layers: layer {layers[-1]} of {raw['block_count']}")
    n_expert, groups, chosen = raw["n_expert"], raw.get("n_group", 1), raw.get("n_group_used", 1)
    if raw["n_expert_used"] > n_expert or n_expert % groups or chosen > groups:
        raise ValueError(f"n_expert: {raw['n_expert_used']} of {n_expert} are used, {chosen} of {groups} groups")
    if not isinstance(raw.get("norm_topk"), bool | None):
        raise ValueError(f"norm_topk: {raw['norm_topk']}")
    if not isinstance(raw.get("pruned", False), bool):
        raise ValueError(f"pruned: {raw['pruned']}")
    if raw.get("n_gqa") is not None:
        whole(raw["n_gqa"], "n_gqa", 0, 2**31 - 1)
    tied = raw.get("tied")
    tied = None if tied is None else tuple(text(ending, "tied") for ending in tied)
    return ModelFacts(**{**raw, "moe_layers": layers, "tensors": specs_from_json(raw["tensors"]), "tied": tied})

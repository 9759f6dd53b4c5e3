"""PrunePlan: which neurons of which experts stay. A value that a person can read; nothing here touches a tensor.

On disk: JSON with a format version and the fingerprints of what it was made from. The neurons of an expert that is
narrowed are a bit mask in hexadecimal, bit k of the little-endian bytes for neuron k; whole and empty experts are words.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from math import inf
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .durable import write_text
from .errors import GgufToolError
from .recipe import Recipe
from .strict_json import GARBLED, parse, text, whole
from .tensors import TensorSpec, specs_from_json

FORMAT = "gguftool.plan"
VERSION = 1
# More neurons than any expert has (Mixtral: 14336), experts than any layer: what a plan says must not decide what is allocated.
MOST_NEURONS, MOST_EXPERTS = 1 << 20, 1 << 16

STOCK, TIERED = "stock", "tiered"

Neurons = NDArray[np.int64]


@dataclass(frozen=True)
class Tier:
    """Experts of one layer that keep the same number of neurons; `rows` are their rows in the router, ascending."""

    width: int
    rows: tuple[int, ...]


@dataclass(frozen=True)
class LayerPlan:
    """One MoE layer.

    Attributes:
        index: decoder index (`blk.<index>`).
        router: original ids of the experts that the router keeps, ascending. The others are gone.
        retained: for each row of `router`, the ascending original indices of the neurons that stay. An expert may stay
            in the router without a neuron: it is then chosen and adds nothing.
        importance: of every expert of the unpruned layer, 0 or more, where what is dropped is merged into what stays by it
            (`dern`); empty for other methods.
    """

    index: int
    router: tuple[int, ...]
    retained: tuple[Neurons, ...]
    importance: tuple[float, ...] = ()

    @property
    def widths(self) -> tuple[int, ...]:
        """Neurons that stay, by router row."""
        return tuple(len(neurons) for neurons in self.retained)

    def tiers(self) -> tuple[Tier, ...]:
        """The tiers by falling width; experts of width 0 are in none."""
        widths = self.widths
        return tuple(
            Tier(width, tuple(row for row, w in enumerate(widths) if w == width))
            for width in sorted(set(widths) - {0}, reverse=True)
        )


@dataclass(frozen=True)
class PrunePlan:
    """A whole model's plan.

    Attributes:
        recipe: what was asked for.
        formula: the criterion's formula and source, for the record.
        model_name, model_fingerprint, gguf_arch: the checkpoint it was made for.
        stats_fingerprint: sha256 of what the stats held; None for a plan written by hand.
        dataset: (name, tokens) of every calibration text.
        n_expert, n_expert_used, n_ff_exp: of the unpruned model.
        layers: every MoE layer, by rising index.
        layout: of the file that `prune` writes, STOCK or TIERED; "" where nobody decided, in a plan written by hand or by an
            older gguftool: then the base file does.
        notes: what a person should know: experts without calibration tokens, protected experts, rounding.
        tensors: every tensor of the file that `prune` writes, with its type and so its bytes.
        encoded: the same tensors as `quantize` will write them, where the recipe names a target.
    """

    recipe: Recipe
    formula: str
    model_name: str
    model_fingerprint: str
    gguf_arch: str
    stats_fingerprint: str | None
    dataset: tuple[tuple[str, int], ...]
    n_expert: int
    n_expert_used: int
    n_ff_exp: int
    layers: tuple[LayerPlan, ...]
    layout: str = ""
    notes: tuple[str, ...] = ()
    tensors: tuple[TensorSpec, ...] = ()
    encoded: tuple[TensorSpec, ...] = ()

    @property
    def kept_share(self) -> float:
        """Share of routed-expert parameters that stay."""
        return sum(sum(layer.widths) for layer in self.layers) / (len(self.layers) * self.n_expert * self.n_ff_exp)

    @property
    def drops_experts(self) -> bool:
        """Whether any layer's router loses experts."""
        return any(len(layer.router) < self.n_expert for layer in self.layers)

    @property
    def tensor_bytes(self) -> int:
        """Bytes of all tensors in the file, with the padding between them; the header comes on top."""
        return sum(spec.padded_bytes for spec in self.tensors)

    @property
    def encoded_bytes(self) -> int | None:
        """Bytes of all tensors after quantization, or None where the recipe names no target."""
        return sum(spec.padded_bytes for spec in self.encoded) if self.encoded else None

    @property
    def uniform(self) -> bool:
        """Whether every layer keeps the same number of experts and every expert the same width. See `layout.decide`."""
        return len({width for layer in self.layers for width in layer.widths}) == 1 and (
            len({len(layer.router) for layer in self.layers}) == 1
        )

    @property
    def kept_hash(self) -> str:
        """sha256 over the kept experts and neurons: two files with the same hash were cut the same way."""
        digest = hashlib.sha256()
        for layer in self.layers:
            digest.update(np.array([layer.index, *layer.router], dtype="<u4").tobytes())
            for neurons in layer.retained:
                digest.update(pack_mask(neurons, self.n_ff_exp))
        return digest.hexdigest()

    def check(self) -> None:
        """Raises GgufToolError, with the layer and the numbers, for a plan that cannot be carried out."""
        if not self.layers:
            raise GgufToolError("the plan has no layers")
        seen: set[int] = set()
        for layer in self.layers:
            self._check_layer(layer)
            if layer.index in seen:
                raise GgufToolError(f"the plan has layer {layer.index} twice")
            seen.add(layer.index)
        if self.layout == STOCK and not self.uniform:
            raise GgufToolError(
                "the plan says that its file is stock, but its experts have different widths or numbers"
            )

    def _check_layer(self, layer: LayerPlan) -> None:
        where = f"layer {layer.index}"
        if len(layer.router) != len(layer.retained):
            raise GgufToolError(
                f"{where}: {len(layer.router)} experts in the router, neurons for {len(layer.retained)}"
            )
        if list(layer.router) != sorted(set(layer.router)) or not all(
            0 <= expert < self.n_expert for expert in layer.router
        ):
            raise GgufToolError(f"{where}: the router's experts are not ascending ids below {self.n_expert}")
        if len(layer.router) < self.n_expert_used:
            raise GgufToolError(
                f"{where}: {len(layer.router)} experts would remain but {self.n_expert_used} are routed per token; "
                f"keep at least {self.n_expert_used} or lower --ratio"
            )
        for expert, neurons in zip(layer.router, layer.retained, strict=True):
            inside = len(neurons) == 0 or (neurons[0] >= 0 and neurons[-1] < self.n_ff_exp)
            if not inside or (np.diff(neurons) <= 0).any():
                raise GgufToolError(f"{where}: the neurons of expert {expert} are not ascending below {self.n_ff_exp}")
        if not any(layer.widths):
            raise GgufToolError(f"{where}: no neuron would remain; lower --ratio")
        given = layer.importance
        if given and (len(given) != self.n_expert or not all(0 <= value < inf for value in given)):
            raise GgufToolError(f"{where}: the importance is not {self.n_expert} finite numbers of 0 or more")

    def save(self, path: Path) -> None:
        """Writes the plan as JSON, a line an expert."""
        write_text(path, dumps(self))

    @classmethod
    def load(cls, path: Path) -> PrunePlan:
        """Reads and checks a plan. Raises GgufToolError for a file that is missing, no plan, or impossible."""
        if not path.is_file():
            raise GgufToolError(f"{path}: no such plan; `gguftool plan` makes one")
        try:
            raw = parse(path.read_text(encoding="utf-8"))
        except (ValueError, OSError) as error:
            if path.suffix in (".safetensors", ".gguf"):
                raise GgufToolError(f"{path}: not a plan but tensors; `gguftool plan` makes one") from error
            raise GgufToolError(f"{path}: not a plan ({error})") from error
        if not isinstance(raw, dict) or raw.get("format") != FORMAT:
            raise GgufToolError(f"{path}: not a gguftool plan")
        if raw.get("version") != VERSION:
            raise GgufToolError(f"{path}: plan version {raw.get('version')}, this gguftool reads {VERSION}; plan again")
        try:
            plan = _from_json(raw)
        except GARBLED as error:
            raise GgufToolError(f"{path}: the plan lacks or garbles {error}") from error
        plan.check()
        return plan


def pack_mask(neurons: Neurons, n_ff: int) -> bytes:
    """Neuron indices as a little-endian bit mask of ceil(n_ff / 8) bytes."""
    mask = np.zeros(n_ff, dtype=bool)
    mask[neurons] = True
    return np.packbits(mask, bitorder="little").tobytes()


def unpack_mask(data: bytes, n_ff: int) -> Neurons:
    """The inverse of `pack_mask`. Raises ValueError where the length or a bit beyond `n_ff` is wrong."""
    if len(data) != -(-n_ff // 8):
        raise ValueError(f"a mask of {len(data)} bytes for {n_ff} neurons")
    bits = np.unpackbits(np.frombuffer(data, dtype=np.uint8), bitorder="little")
    if bits[n_ff:].any():
        raise ValueError(f"a mask with a bit beyond its {n_ff} neurons")
    return np.nonzero(bits)[0].astype(np.int64)


def keep_all(layers: Iterable[int], n_expert: int, n_ff_exp: int) -> tuple[LayerPlan, ...]:
    """Layers in which everything stays."""
    every = np.arange(n_ff_exp, dtype=np.int64)
    return tuple(LayerPlan(index, tuple(range(n_expert)), (every,) * n_expert) for index in layers)


def dumps(plan: PrunePlan) -> str:
    """The plan as JSON text: one line for each expert and each tensor, so that a diff of two plans can be read."""
    head: dict[str, Any] = {"format": FORMAT, "version": VERSION, "recipe": asdict(plan.recipe)}
    for key in ("formula", "model_name", "model_fingerprint", "gguf_arch", "stats_fingerprint"):
        head[key] = getattr(plan, key)
    head |= {"dataset": [list(item) for item in plan.dataset], "notes": list(plan.notes)}
    head |= {"n_expert": plan.n_expert, "n_expert_used": plan.n_expert_used, "n_ff_exp": plan.n_ff_exp}
    head |= {"kept_share": plan.kept_share, "kept_hash": plan.kept_hash, "tensor_bytes": plan.tensor_bytes}
    head |= {"encoded_bytes": plan.encoded_bytes, "layout": plan.layout}
    lines = [f"  {json.dumps(key)}: {json.dumps(value)}," for key, value in head.items()]
    lines.append('  "layers": [')
    lines.append(",\n".join(_layer_json(layer, plan.n_ff_exp) for layer in plan.layers))
    lines.append("  ],")
    for key, specs in (("tensors", plan.tensors), ("encoded", plan.encoded)):
        lines.append(f'  "{key}": [')
        lines.extend([",\n".join(f"    {json.dumps(asdict(t) | {'bytes': t.nbytes})}" for t in specs)] if specs else [])
        lines.append("  ]," if key == "tensors" else "  ]")
    return "{\n" + "\n".join(lines) + "\n}\n"


def _layer_json(layer: LayerPlan, n_ff: int) -> str:
    experts = []
    for expert, neurons in zip(layer.router, layer.retained, strict=True):
        word = {0: "none", n_ff: "all"}.get(len(neurons)) or pack_mask(neurons, n_ff).hex()
        experts.append(f'      {{"expert": {expert}, "width": {len(neurons)}, "neurons": "{word}"}}')
    tiers = [{"width": tier.width, "count": len(tier.rows)} for tier in layer.tiers()]
    importance = f' "importance": {json.dumps(layer.importance)},' if layer.importance else ""
    head = f'    {{"layer": {layer.index}, "tiers": {json.dumps(tiers)},{importance} "experts": [\n'
    return head + ",\n".join(experts) + "\n    ]}"


def _from_json(raw: dict[str, Any]) -> PrunePlan:
    n_ff = whole(raw["n_ff_exp"], "n_ff_exp", 1, MOST_NEURONS)
    # JSON has lists for tuples.
    recipe: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in raw["recipe"].items()}
    of_stats = raw["stats_fingerprint"]
    every = np.arange(n_ff, dtype=np.int64)  # one for all experts that are kept whole
    return PrunePlan(
        recipe=Recipe(**recipe),
        **{k: text(raw[k], k) for k in ("formula", "model_name", "model_fingerprint", "gguf_arch")},
        stats_fingerprint=None if of_stats is None else text(of_stats, "stats_fingerprint"),
        dataset=tuple((text(name, "dataset"), whole(tokens, "dataset")) for name, tokens in raw["dataset"]),
        n_expert=whole(raw["n_expert"], "n_expert", 1, MOST_EXPERTS),
        n_expert_used=whole(raw["n_expert_used"], "n_expert_used", 1, MOST_EXPERTS),
        n_ff_exp=n_ff,
        layers=tuple(_layer_from_json(layer, every) for layer in raw["layers"]),
        layout=_layout(raw.get("layout", "")),
        notes=tuple(text(note, "notes") for note in raw["notes"]),
        tensors=specs_from_json(raw["tensors"]),
        encoded=specs_from_json(raw["encoded"]),
    )


def _layout(value: Any) -> str:
    if value not in ("", STOCK, TIERED):
        raise ValueError(f"layout: {str(value)[:40]} is not {STOCK} or {TIERED}")
    return str(value)


def _layer_from_json(raw: dict[str, Any], every: Neurons) -> LayerPlan:
    router, retained = [], []
    for row in raw["experts"]:
        router.append(whole(row["expert"], "expert"))
        retained.append(_neurons(row, every))
        if len(retained[-1]) != row["width"]:
            raise ValueError(
                f"layer {raw['layer']}, expert {row['expert']}: width {row['width']}, mask of {len(retained[-1])}"
            )
    importance = tuple(float(value) for value in raw.get("importance", ()))
    return LayerPlan(whole(raw["layer"], "layer"), tuple(router), tuple(retained), importance)


def _neurons(row: dict[str, Any], every: Neurons) -> Neurons:
    word = text(row["neurons"], "neurons")
    if word in ("all", "none"):
        return every if word == "all" else every[:0]
    return unpack_mask(bytes.fromhex(word), len(every))

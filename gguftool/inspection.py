"""inspect: what a GGUF holds, expert by expert, and what is wrong with it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

import gguf
import numpy as np

from . import cut, encoding
from .errors import GgufToolError
from .gguf_file import GgufFile
from .layout import STOCK, TIERED, ExpertName, map_name, n_entries, parse, tier_name
from .tensors import BLOCKS, TensorSpec

_CHUNK = 1 << 22
# llama-hparams.h: LLAMA_MAX_EXPERTS.
_MOST_EXPERTS = 1024
_BLOCK = re.compile(r"blk\.(\d+)\.")
_HASH_TABLE = re.compile(r"blk\.(\d+)\.ffn_gate_tid2eid(?:\.weight)?")


@dataclass(frozen=True)
class LayerView:
    """One MoE layer of a file: widths by router row, original expert ids where the file knows them, tiers."""

    index: int
    experts: tuple[tuple[int, int], ...]
    tiers: tuple[tuple[int, int, dict[str, str]], ...]

    def as_dict(self) -> dict[str, Any]:
        """For --json."""
        return {
            "layer": self.index,
            "experts": [{"expert": expert, "width": width} for expert, width in self.experts],
            "tiers": [
                {"width": width, "count": count, "type": types.get("down", ""), "types": types}
                for width, count, types in self.tiers
            ],
        }


@dataclass(frozen=True)
class Inspection:
    """What `inspect` found."""

    file: GgufFile
    layout: str
    layers: tuple[LayerView, ...]
    pruned: cut.Cut | None

    def as_dict(self) -> dict[str, Any]:
        """For --json; `bytes` is the file's size."""
        file = self.file
        experts = [t for t in file.tensors if (name := parse(t.name)) and name.role != "router"]
        return {
            "path": str(file.path),
            "arch": file.arch,
            "name": file.value("general.name", ""),
            "file_type": encoding.file_type_name(file.integer("general.file_type", 0)),
            "layout": self.layout,
            "bytes": file.path.stat().st_size,
            "tensor_bytes": sum(t.padded_bytes for t in file.tensors),
            "expert_bytes": sum(t.nbytes for t in experts),
            "method": self.pruned.method if self.pruned else None,
            "ratio": file.value(f"{cut.KEY}ratio", 0.0),
            "base": file.value(f"{cut.KEY}base.name", None),
            "kept_hash": file.value(f"{cut.KEY}kept_hash", None),
            "weights": file.value(f"{cut.KEY}weights", None),
            "layers": [layer.as_dict() for layer in self.layers],
        }


def inspect(file: GgufFile) -> Inspection:
    """Reads the experts of every layer.

    Raises GgufToolError where tier map and tensors contradict each other, and for a shard of a split model.
    """
    file.check_whole()
    specs = {spec.name: spec for spec in file.tensors}
    indices = sorted({name.layer for spec in file.tensors if (name := parse(spec.name)) and name.role != "router"})
    pruned = cut.read(file)
    layers = tuple(_layer(file, specs, index, pruned) for index in indices)
    tiered = any(spec.name.endswith("ffn_exps_tier.weight") for spec in file.tensors)
    kind = TIERED if tiered else str(file.value(f"{cut.KEY}layout", STOCK))
    return Inspection(file, kind, layers, pruned)


def _layer(file: GgufFile, specs: dict[str, TensorSpec], index: int, pruned: cut.Cut | None) -> LayerView:
    tier_map = cut.read_tier_map(file, index)
    if tier_map is None:
        down = _spec(file, specs, f"blk.{index}.ffn_down_exps.weight")
        types = _types(specs, [f"blk.{index}.ffn_{role}_exps.weight" for role in ("gate", "up", "down", "gate_up")])
        widths = [down.ne[0]] * down.ne[2]
        tiers = [(down.ne[0], down.ne[2], types)]
    else:
        widths, tiers = [0] * tier_map.shape[1], []
        for tier, row in enumerate(tier_map):
            down = _spec(file, specs, tier_name(index, "down", tier))
            members = np.nonzero(row >= 0)[0].tolist()
            if down.ne[2] != len(members):
                raise GgufToolError(f"{file.path}: {down.name} holds {down.ne[2]} experts, its map {len(members)}")
            for expert in members:
                widths[expert] = down.ne[0]
            names = [tier_name(index, role, tier) for role in ("gate", "up", "down", "gate_up")]
            tiers.append((down.ne[0], len(members), _types(specs, names)))
    ids = _original_ids(pruned, index, len(widths))
    return LayerView(index, tuple(zip(ids, widths, strict=True)), tuple(tiers))


def _spec(file: GgufFile, specs: dict[str, TensorSpec], name: str) -> TensorSpec:
    if name not in specs or len(specs[name].ne) != 3:
        raise GgufToolError(f"{file.path}: {name} is missing or not a stack of matrices")
    return specs[name]


def _types(specs: dict[str, TensorSpec], names: list[str]) -> dict[str, str]:
    found = {name.role: specs[text].type for text in names if text in specs and (name := parse(text))}
    return found


def _original_ids(pruned: cut.Cut | None, index: int, count: int) -> list[int]:
    for layer in pruned.layers if pruned else ():
        if layer.index == index and len(layer.router) == count:
            return list(layer.router)
    return list(range(count))


def check(view: Inspection) -> list[str]:
    """Everything that is wrong with a file, a line each; an empty list for a sound one."""
    return [*_check_layers(view), *_check_tensors(view), *_check_arrays(view), *_check_data(view.file)]


def _check_layers(view: Inspection) -> Iterator[str]:
    file = view.file
    specs = {spec.name: spec for spec in file.tensors}
    used, count = file.arch_integer("expert_used_count", 0), file.arch_integer("expert_count", 0)
    groups = file.arch_integer("expert_group_count", 0)
    yield from _check_counts(view)
    if count and not view.layers:
        yield f"the metadata says {count} experts, and no layer has any"
    for layer in view.layers:
        n_expert, where = len(layer.experts), f"layer {layer.index}"
        if f"blk.{layer.index}.ffn_gate_inp.weight" not in specs:
            yield f"{where}: blk.{layer.index}.ffn_gate_inp.weight, the router, is missing"
        if n_expert < used:
            yield f"{where}: {n_expert} experts, but {used} are routed per token"
        if groups > 1 and (n_expert % groups or n_expert // groups < 2):
            yield f"{where}: {n_expert} experts do not divide into {groups} groups of two or more"
        tiered = map_name(layer.index) in specs
        if n_expert > count if tiered else n_expert != count:
            yield f"{where}: {n_expert} experts, the metadata says {count}"
        if not any(width for _, width in layer.experts):
            yield f"{where}: no expert has a neuron"
    yield from _check_cut(view)


# Numbers of the metadata that decide about experts; llama.cpp takes them as uint32 and as nothing else.
_NUMBERS = ("block_count", "embedding_length", "expert_count", "expert_used_count", "expert_group_count")


def _check_counts(view: Inspection) -> Iterator[str]:
    file = view.file
    for name in _NUMBERS:
        key = f"{file.arch}.{name}"
        if key in file.keys() and not isinstance(file.value(key), list) and file.entry(key).type.name != "UINT32":
            yield f"{key} is of type {file.entry(key).type.name.lower()}, not uint32"
    yield from _check_routing(file)
    blocks = file.arch_integer("block_count")
    present = {int(match[1]) for spec in file.tensors if (match := _BLOCK.match(spec.name))}
    wanted = blocks - file.arch_integer("nextn_predict_layers", 0)
    if len(present) < wanted or blocks < 1:
        yield f"the metadata says {blocks} blocks, and {len(present)} have tensors"
    for spec in file.tensors:
        if ".ffn_exps_tier." in spec.name and parse(spec.name) is None:
            yield f"{spec.name} is no tier map of a layer"
    if outside := sorted(index for index in present if index >= blocks):
        yield f"block {outside[0]} has tensors, and the metadata says {blocks} blocks"


def _check_routing(file: GgufFile) -> Iterator[str]:
    """The numbers that llama.cpp asserts (llama-model.cpp, load_hparams): it ends the program where they are wrong."""
    count, used = file.arch_integer("expert_count", 0), file.arch_integer("expert_used_count", 0)
    groups, chosen = file.arch_integer("expert_group_count", 0), file.arch_integer("expert_group_used_count", 0)
    if count > _MOST_EXPERTS:
        yield f"the metadata says {count} experts; llama.cpp takes {_MOST_EXPERTS} at most"
    if used > count or (count and used < 1):
        yield f"the metadata says {used} of {count} experts are used"
    if (groups > 1 and (count % groups or not 0 < chosen < groups)) or (groups and groups >= count):
        yield f"the metadata says {chosen} of {groups} groups of {count} experts are used"


def _check_tensors(view: Inspection) -> Iterator[str]:
    """Which expert tensors there are, and their shapes."""
    file = view.file
    by_layer: dict[int, list[tuple[ExpertName, TensorSpec]]] = {}
    for spec in file.tensors:
        if name := parse(spec.name):
            by_layer.setdefault(name.layer, []).append((name, spec))
    roles = {name.role for found in by_layer.values() for name, _ in found}
    gated, n_embd = bool(roles & {"gate", "gate_up"}), _expert_input(file)
    n_router = file.arch_integer("embedding_length", 0)
    layers = {layer.index: layer for layer in view.layers}
    for index, found in sorted(by_layer.items()):
        if index not in layers:
            yield f"layer {index}: {found[0][1].name}, but no experts"
            continue
        layer, own = layers[index], {spec.name for _, spec in found}
        tiers = range(len(layer.tiers)) if map_name(index) in own else [None]
        for tier in tiers:
            yield from _check_complete(index, tier, own, gated)
        for name, spec in found:
            if name.role not in ("router", "map") and name.tier not in tiers:
                yield f"{spec.name}: left over, it belongs to no expert of its layer"
            else:
                yield from _check_shape(layer, name, spec, n_embd or _found_input(found), n_router)
    yield from _check_hash_tables(view)


def _expert_input(file: GgufFile) -> int:
    """Length of what an expert reads and adds to; 0 where the metadata does not say it."""
    keys = ("moe_latent_size", "expert_latent_length", "embedding_length")
    return next((n for key in keys if (n := file.arch_integer(key, 0))), 0)


def _found_input(found: list[tuple[ExpertName, TensorSpec]]) -> int:
    """The same, of a file that does not say it, from a layer's first down projection."""
    return next(spec.ne[1] for name, spec in found if name.role == "down" and name.suffix == "weight")


def _check_complete(index: int, tier: int | None, own: set[str], gated: bool) -> Iterator[str]:
    def named(role: str) -> str:
        return f"blk.{index}.ffn_{role}_exps.weight" if tier is None else tier_name(index, role, tier)

    if named("gate_up") in own:
        return
    for role in ("gate", "up") if gated else ("up",):
        if named(role) not in own:
            yield f"{named(role)} is missing"


def _check_shape(layer: LayerView, name: ExpertName, spec: TensorSpec, n_embd: int, n_router: int) -> Iterator[str]:
    if name.role == "map":
        return
    if name.role == "router":
        if (rows := n_entries(spec.ne)) != len(layer.experts):
            yield f"{spec.name} has {rows} rows for {len(layer.experts)} experts"
        if spec.name.endswith("ffn_gate_inp.weight") and n_router and spec.ne[0] != n_router:
            yield f"{spec.name} reads {spec.ne[0]} numbers, the model has {n_router}"
        return
    width, count, _ = layer.tiers[name.tier or 0]
    rows = width * (2 if name.role == "gate_up" else 1)
    if name.suffix.endswith("scale"):
        want: tuple[int, ...] = (count,)
    elif name.suffix == "bias":
        want = (n_embd if name.role == "down" else rows, count)
    else:
        want = (width, n_embd, count) if name.role == "down" else (n_embd, rows, count)
    if spec.ne != want:
        yield f"{spec.name} is {spec.ne}, and {count} experts of width {width} need {want}"


def _check_hash_tables(view: Inspection) -> Iterator[str]:
    """Tables that say, for every token, which experts it goes to: llama.cpp's `ffn_gate_tid2eid`, I32 [top-k, tokens]."""
    counts = {layer.index: len(layer.experts) for layer in view.layers}
    for spec in view.file.tensors:
        match = _HASH_TABLE.fullmatch(spec.name)
        if match is None or spec.type != "I32":
            continue
        rows = np.sort(view.file.ints(spec).reshape(-1, spec.ne[0]), axis=1)
        twice = int((np.diff(rows, axis=1) == 0).any(axis=1).sum())
        outside = int(((rows < 0) | (rows >= counts.get(int(match[1]), 0))).any(axis=1).sum())
        if twice:
            yield f"{spec.name}: {twice} tokens go to the same expert twice"
        if outside:
            yield f"{spec.name}: {outside} tokens go to experts that the layer does not have"


def _check_cut(view: Inspection) -> Iterator[str]:
    for layer in view.pruned.layers if view.pruned else ():
        seen = next((found for found in view.layers if found.index == layer.index), None)
        if seen is None:
            yield f"layer {layer.index}: pruned by its metadata, but it has no experts"
        elif view.layout != "expanded" and tuple(width for _, width in seen.experts) != layer.widths:
            yield f"layer {layer.index}: the widths of its tensors are not those of its metadata"


def _check_arrays(view: Inspection) -> Iterator[str]:
    blocks = view.file.arch_integer("block_count")
    for key in view.file.keys():
        if not key.startswith(f"{view.file.arch}."):
            continue
        if "feed_forward" not in key and "head_count" not in key:
            continue
        value = view.file.value(key)
        if isinstance(value, list) and len(value) != blocks:
            yield f"{key} has {len(value)} entries for {blocks} blocks"


def _check_data(file: GgufFile) -> Iterator[str]:
    for spec in file.tensors:
        if spec.type == "I32":
            continue
        kind = gguf.GGMLQuantizationType[spec.type]
        count = prod(spec.ne[1:])
        step = max(1, _CHUNK // max(1, spec.ne[0]))
        for start in range(0, count, step):
            if not _finite(file.rows(spec, start, min(start + step, count)), kind):
                yield f"{spec.name}: holds values that are not finite"
                break


def _finite(rows: np.ndarray, kind: gguf.GGMLQuantizationType) -> bool:
    with np.errstate(all="ignore"):
        if BLOCKS[kind.name][0] == 1 and kind.name == "F32":
            return bool(np.isfinite(rows.view(np.float32)).all())
        return bool(np.isfinite(gguf.quants.dequantize(rows, kind)).all())

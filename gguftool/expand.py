"""expand: tiered GGUF -> stock GGUF, padded with zero neurons, one tensor in memory at a time.

The padded file is the same function on any llama.cpp: what a user without the patches runs, and the oracle of the patches.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from pathlib import Path

import gguf
import numpy as np
from gguf import GGUFValueType as V

from . import cut
from .errors import GgufToolError
from .gguf_file import Bytes, GgufFile, KeyValue, Progress, check_output, copied_entries, write_gguf
from .layout import ExpertName, n_entries, parse
from .requant import quantize_rows
from .tensors import BLOCKS, TensorSpec


@dataclass(frozen=True)
class Expansion:
    """A tiered file and the stock file that it becomes: its metadata, its tensors, which stacks of tiers are in which of
    them, and notes: stacks whose tiers have different types, which only F32 holds without loss; empty arrays left out."""

    file: GgufFile
    pruned: cut.Cut
    entries: dict[str, KeyValue]
    tensors: list[TensorSpec]
    stacks: dict[str, list[TensorSpec]]
    notes: list[str]

    @property
    def tensor_bytes(self) -> int:
        """Bytes of the stock file's tensors; the header comes on top."""
        return sum(spec.padded_bytes for spec in self.tensors)


def expand(source: Path, out: Path, *, force: bool = False, progress: Progress | None = None) -> list[str]:
    """Writes a tiered file as a stock file: narrow experts padded with zero neurons. The same function, more bytes.

    Returns:
        The notes of the expansion.

    Raises:
        GgufToolError: as `plan_expansion` does; an output that exists.
    """
    check_output(out, force, source)
    found = plan_expansion(source)

    def produce(spec: TensorSpec) -> Bytes:
        tiers = found.stacks.get(spec.name)
        return found.file.raw(spec) if tiers is None else _pad(found.file, spec, tiers, found.pruned.n_ff_exp)

    write_gguf(out, found.file.arch, found.entries, found.tensors, produce, progress, found.file)
    return found.notes


def plan_expansion(source: Path) -> Expansion:
    """What `expand` would write.

    Raises:
        GgufToolError: not tiered, or layers keep different numbers of experts (no stock file can say that).
    """
    file = GgufFile(source)
    file.check_whole()
    pruned = cut.read(file)
    if pruned is None or not pruned.layers or not any(t.name.endswith("ffn_exps_tier.weight") for t in file.tensors):
        raise GgufToolError(f"{source}: not a tiered file; every llama.cpp can read it as it is")
    count, first = len(pruned.layers[0].router), pruned.layers[0].index
    for layer in pruned.layers:
        if len(layer.router) != count:
            raise GgufToolError(
                f"{source}: layer {layer.index} keeps {len(layer.router)} experts and layer {first} {count}: "
                "a stock file cannot hold layers with different numbers of experts"
            )
    _check_whole_layers(file, pruned, count)
    stacks, specs, notes = _plan_stacks(file, pruned)
    entries, left_out = copied_entries(file)
    entries[f"{file.arch}.expert_count"] = KeyValue(count, V.UINT32)
    entries[f"{cut.KEY}layout"] = KeyValue("expanded", V.STRING)
    return Expansion(file, pruned, entries, specs, stacks, [*notes, *left_out])


def _check_whole_layers(file: GgufFile, pruned: cut.Cut, count: int) -> None:
    """Layers that were never pruned, those of multi-token prediction, have all experts."""
    cut_layers = {layer.index for layer in pruned.layers}
    for spec in file.tensors:
        name = parse(spec.name)
        if name and name.role == "router" and name.layer not in cut_layers and n_entries(spec.ne) != count:
            raise GgufToolError(
                f"{file.path}: layer {name.layer} has all {n_entries(spec.ne)} experts and the others {count}: "
                "a stock file cannot hold layers with different numbers of experts"
            )


def _plan_stacks(file: GgufFile, pruned: cut.Cut) -> tuple[dict[str, list[TensorSpec]], list[TensorSpec], list[str]]:
    """Tier stacks by the name of the stock tensor they become; every tensor of the stock file; notes."""
    stacks: dict[str, list[TensorSpec]] = {}
    order: list[TensorSpec | str] = []
    for spec in file.tensors:
        name = parse(spec.name)
        if name is None or name.role == "router" or (name.tier is None and name.role != "map"):
            order.append(spec)
        elif name.role != "map":
            stock = f"blk.{name.layer}.ffn_{name.role}_exps.{name.suffix}"
            if stock not in stacks:
                stacks[stock] = []
                order.append(stock)
            stacks[stock].append(spec)
    notes: list[str] = []
    specs = [item if isinstance(item, TensorSpec) else _stock_spec(item, stacks[item], pruned, notes) for item in order]
    return stacks, specs, notes


def _stock_spec(stock: str, tiers: list[TensorSpec], pruned: cut.Cut, notes: list[str]) -> TensorSpec:
    name = parse(stock)
    assert name is not None
    n_ff = pruned.n_ff_exp
    count = len(pruned.layers[0].router)
    if name.suffix.endswith("scale"):
        return TensorSpec(stock, (count,), tiers[0].type)
    if name.suffix == "bias":
        length = tiers[0].ne[0] if name.role == "down" else n_ff * (2 if name.role == "gate_up" else 1)
        return TensorSpec(stock, (length, count), tiers[0].type)
    kind = tiers[0].type
    if len({tier.type for tier in tiers}) > 1 or (name.role == "down" and n_ff % BLOCKS[kind][0]):
        notes.append(f"{stock}: its tiers are {', '.join(t.type for t in tiers)}; written as F32 to lose nothing")
        kind = "F32"
    rows = n_ff * (2 if name.role == "gate_up" else 1)
    ne = (n_ff, tiers[0].ne[1], count) if name.role == "down" else (tiers[0].ne[0], rows, count)
    return TensorSpec(stock, ne, kind)


def _pad(file: GgufFile, spec: TensorSpec, tiers: list[TensorSpec], n_ff: int) -> Bytes:
    """The stock stack of `spec`. A block of zero bytes is a block of zeros in every ggml type."""
    name = parse(spec.name)
    assert name is not None
    tier_map = cut.read_tier_map(file, name.layer)
    if tier_map is None or tier_map.shape != (len(tiers), spec.ne[-1]):
        raise GgufToolError(f"{file.path}: layer {name.layer} has no tier map that goes with {tiers[0].name}")
    out = np.zeros(spec.nbytes, dtype=np.uint8).reshape(*reversed(spec.ne[1:]), -1)
    out = out.reshape(spec.ne[-1], -1, spec.nbytes // prod(spec.ne[1:])) if len(spec.ne) == 3 else out
    for tier, row in zip(tiers, tier_map, strict=True):
        raw = file.raw(tier)
        if tier.type != spec.type:
            floats = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[tier.type])
            raw = quantize_rows(floats.reshape(-1, floats.shape[-1]), spec.type, None).reshape(*floats.shape[:-1], -1)
        for expert in np.nonzero(row >= 0)[0]:
            _place(out, int(expert), raw, int(row[expert]), name, n_ff)
    return out


def _place(out: Bytes, expert: int, raw: Bytes, index: int, name: ExpertName, n_ff: int) -> None:
    if name.suffix.endswith("scale"):
        out.reshape(-1, 4)[expert] = raw.reshape(-1, 4)[index]
    elif name.suffix == "bias" or name.role == "down":
        one = raw[index]
        if name.suffix == "bias" and name.role == "gate_up":
            half = one.shape[-1] // 2
            out[expert, :half], out[expert, n_ff * 4 : n_ff * 4 + half] = one[:half], one[half:]
        else:
            out[expert, ..., : one.shape[-1]] = one
    elif name.role == "gate_up":
        width = raw.shape[1] // 2
        out[expert, :width], out[expert, n_ff : n_ff + width] = raw[index, :width], raw[index, width:]
    else:
        out[expert, : raw.shape[1]] = raw[index]

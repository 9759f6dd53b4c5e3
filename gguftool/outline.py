"""What a GGUF will be before it is written: its metadata and tensors, and so its size to the byte.

Bytes of the header follow the GGUF specification (ggml/docs/gguf.md): 24 bytes, the entries, the list of tensors, padding.
`prune` writes through gguf-py, which lists every dimension of a tensor; llama-quantize leaves ones at the end out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from gguf import GGUFValueType as V

from .cut import tier_map
from .encoding import FLOATS, parse_target
from .gguf_file import Bytes, GgufFile, KeyValue, copied_entries, write_sparse
from .plan import PrunePlan
from .quantize import IMATRIX_FILE, without_ones
from .stats import CalibrationStats
from .tensors import GGUF_ALIGNMENT, TensorSpec
from .writer import outline

_SIZES = {
    V.UINT8: 1, V.INT8: 1, V.BOOL: 1, V.UINT16: 2, V.INT16: 2, V.UINT32: 4, V.INT32: 4, V.FLOAT32: 4,
    V.UINT64: 8, V.INT64: 8, V.FLOAT64: 8,
}  # fmt: skip
# llama-quantize keeps so many bytes of a name (`val_str` of llama_model_kv_override).
_LONGEST = 127
# What llama-quantize drops: it writes one file.
_SPLIT = ("split.no", "split.count", "split.tensors.count")
# Tensors up to this size are copied into a skeleton where the base has the same ones: norms, routers, rotations.
_COPIED = 16 << 20


@dataclass(frozen=True)
class Base:
    """The unpruned GGUF, its metadata read once."""

    file: GgufFile
    copied: Mapping[str, KeyValue]
    sizes: Mapping[str, int] = field(repr=False)

    @classmethod
    def open(cls, path: Path) -> Base:
        """Raises GgufToolError for a file that is no whole GGUF."""
        file = GgufFile(path)
        file.check_whole()
        return cls(file, copied_entries(file)[0], {key: file.entry_bytes(key) for key in file.keys()})


@dataclass(frozen=True)
class Outline:
    """A file that is not there yet.

    Attributes:
        entries: its metadata, but for `hidden`.
        entry_bytes: bytes of all of it.
        specs: its tensors as they are listed. alignment: to which they are padded.
        tensors: those that a skeleton has to fill: name -> bytes.
    """

    arch: str
    entries: Mapping[str, KeyValue]
    entry_bytes: int
    specs: tuple[TensorSpec, ...]
    alignment: int = GGUF_ALIGNMENT
    tensors: Mapping[str, Bytes] = field(default_factory=dict, repr=False)

    @property
    def weight_bytes(self) -> int:
        """Bytes of all tensors, with the padding between them."""
        return sum(_padded(spec.nbytes, self.alignment) for spec in self.specs)

    @property
    def file_bytes(self) -> int:
        """Bytes of the file."""
        infos = sum(8 + len(spec.name.encode()) + 4 + 8 * len(spec.ne) + 4 + 8 for spec in self.specs)
        return _padded(24 + self.entry_bytes + infos, self.alignment) + self.weight_bytes

    def write_skeleton(self, out: Path, base: Base) -> None:
        """A sparse file that llama.cpp loads and runs as it would the real one, with zeros for the large weights."""
        own = {spec.name: spec for spec in base.file.tensors}
        known = dict(self.tensors)
        for spec in self.specs:
            if (same := own.get(spec.name)) is not None and same.type == spec.type and spec.nbytes <= _COPIED:
                raw = base.file.raw(same)
                if raw.nbytes == spec.nbytes:
                    known[spec.name] = raw
        write_sparse(out, self.arch, self.entries, self.specs, known)


def unpruned(base: Base) -> Outline:
    """The base file itself."""
    alignment = base.file.integer("general.alignment", GGUF_ALIGNMENT)
    return Outline(base.file.arch, base.copied, sum(base.sizes.values()), _listed(base.file), alignment)


def pruned(base: Base, plan: PrunePlan, made_by: str | None) -> Outline:
    """What `prune` writes; `made_by` is the command that new weights come from, None without any."""
    entries, specs = outline(base.file, plan, made_by, base.copied)
    entries["general.architecture"] = KeyValue(base.file.arch, V.STRING)
    entries.pop("general.alignment", None)
    size = sum(
        base.sizes[key] if base.copied.get(key) is entry else entry_bytes(key, entry) for key, entry in entries.items()
    )
    maps = {f"blk.{layer.index}.ffn_exps_tier.weight": tier_map(layer) for layer in plan.layers if layer.tiers()}
    return Outline(base.file.arch, entries, size, specs, tensors=maps)


def quantized(source: Outline, target: str, encoded: Sequence[TensorSpec], stats: CalibrationStats) -> Outline:
    """What `quantize` makes of `source` with an importance matrix from `stats`; `encoded` has the types."""
    new = {
        "general.quantization_version": KeyValue(2, V.UINT32),
        "general.file_type": KeyValue(parse_target(target).file_type, V.UINT32),
    }
    if parse_target(target).default not in FLOATS:
        dataset = stats.domains[0].name.encode()[:_LONGEST].decode(errors="ignore")
        new |= {
            "quantize.imatrix.file": KeyValue(IMATRIX_FILE, V.STRING),
            "quantize.imatrix.dataset": KeyValue(dataset, V.STRING),
            "quantize.imatrix.entries_count": KeyValue(1, V.UINT32),
            "quantize.imatrix.chunks_count": KeyValue(1, V.UINT32),
        }
    gone = {key: entry for key, entry in source.entries.items() if key in new or key in _SPLIT}
    size = source.entry_bytes - sum(entry_bytes(key, entry) for key, entry in gone.items())
    size += sum(entry_bytes(key, entry) for key, entry in new.items())
    entries = {key: entry for key, entry in source.entries.items() if key not in gone} | new
    types = {spec.name: spec.type for spec in encoded}
    specs = tuple(TensorSpec(spec.name, without_ones(spec.ne), types[spec.name]) for spec in source.specs)
    return replace(source, entries=entries, entry_bytes=size, specs=specs)


def entry_bytes(key: str, entry: KeyValue) -> int:
    """Bytes of a metadata entry: name, type, value."""
    return 8 + len(key.encode()) + 4 + _value_bytes(entry)


def _value_bytes(entry: KeyValue) -> int:
    if entry.type == V.STRING:
        return 8 + len(str(entry.value).encode())
    if entry.type != V.ARRAY:
        return _SIZES[entry.type]
    if entry.sub_type == V.STRING:
        return 12 + sum(8 + len(str(item).encode()) for item in entry.value)
    assert entry.sub_type is not None
    return 12 + _SIZES[entry.sub_type] * len(entry.value)


def _listed(file: GgufFile) -> tuple[TensorSpec, ...]:
    """The tensors of a file; a stack of one may be listed as a matrix there, which `GgufFile` makes a stack again."""
    return tuple(TensorSpec(spec.name, without_ones(spec.ne), spec.type) for spec in file.tensors)


def _padded(size: int, alignment: int) -> int:
    return -(-size // alignment) * alignment

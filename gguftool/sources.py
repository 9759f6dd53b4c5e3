"""What `--data` names: a file or a dataset of the hub, which field of its documents, how many of them, and its weight.

    PATH[:FIELD][:LIMIT][@WEIGHT]        hf:OWNER/NAME[/CONFIG][:SPLIT[:FIELD]][:LIMIT][@WEIGHT]

Read from the right: @NUMBER is the weight, a part of digits alone is the limit. Of all ways to read it, the one in which
the longest file name is a file wins, so that paths with colons (C:\\texts\\code.jsonl, a:b.txt) need no escape.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import floor, isfinite
from pathlib import Path

from .errors import GgufToolError

HUB = "hf:"
_WEIGHT = re.compile(r"(.+)@([-+0-9.eE]+)")
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+){0,2}")
_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
_FIELD = re.compile(r"[^\W\d][\w.-]*")


@dataclass(frozen=True)
class Source:
    """One calibration text.

    Attributes:
        place: the path of a file, or the hub's name of a dataset (or the folder of one).
        field: which field of a document is read; None takes the first of `documents.FIELDS` that it has.
        limit: at most so many documents, from the start; None takes all.
        weight: takes so many times `--windows` windows of it.
        hub: whether `place` is a dataset. config, split: which part of it.
    """

    place: str
    field: str | None = None
    limit: int | None = None
    weight: float = 1.0
    hub: bool = False
    config: str | None = None
    split: str = "train"

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 1:
            raise GgufToolError(f"--data {self.place}: a limit of {self.limit} documents leaves none; take 1 or more")
        if not isfinite(self.weight) or self.weight <= 0:
            raise GgufToolError(f"--data {self.place}: a weight of {self.weight:g} is no finite number above 0")

    @property
    def name(self) -> str:
        """What reports call it: a file's name, or the dataset's with its part."""
        if not self.hub:
            return Path(self.place).name
        return self._part_of(Path(self.place).name if Path(self.place).is_dir() else self.place)

    def __str__(self) -> str:
        return HUB + self._part_of(self.place) if self.hub else self.place

    def _part_of(self, dataset: str) -> str:
        return f"{dataset}{f'/{self.config}' if self.config else ''}:{self.split}"

    def share(self, windows: int) -> int:
        """How many windows `--windows` allows it: that many times its weight, rounded; halves go up."""
        count = floor(windows * self.weight + 0.5)
        if count < 1:
            raise GgufToolError(
                f"{self}: {windows} windows times its weight of {self.weight:g} is none; raise --windows"
            )
        return count


def as_source(given: Source | Path) -> Source:
    """A path as the source that is all of that file."""
    return given if isinstance(given, Source) else Source(str(given))


def files(sources: Sequence[Source]) -> list[Path]:
    """The files among the sources."""
    return [Path(source.place) for source in sources if not source.hub]


def spell(source: Source) -> str:
    """The source as `--data` has it: `parse_source` reads it back."""
    text = f"{HUB if source.hub else ''}{source.place}"
    if source.hub:
        text += f"{f'/{source.config}' if source.config else ''}:{source.split}"
    text += f":{source.field}" if source.field is not None else ""
    text += f":{source.limit}" if source.limit is not None else ""
    return text + (f"@{source.weight!r}" if source.weight != 1 else "")


def parse_source(text: str) -> Source:
    """A source as `--data` has it, see above. Raises GgufToolError for one that cannot be read."""
    if Path(text).is_file():
        return Source(text)
    matched = _WEIGHT.fullmatch(text)
    weight = 1.0
    if matched:
        text = matched[1]
        try:
            weight = float(matched[2])
        except ValueError:
            raise GgufToolError(f"--data {text}@{matched[2]}: {matched[2]!r} is no weight; write a number") from None
    if text.startswith(HUB) and not Path(text).exists():
        return _parse_hub(text.removeprefix(HUB), weight)
    place, parts = _split(text, 2)
    field, limit = _field_and_limit(text, parts)
    return Source(place, field, limit, weight)


def is_hub_id(model: str | Path) -> bool:
    """Whether `model` can only be a model of the hub, OWNER/NAME: nothing of that name is here, and it names no GGUF."""
    text = str(model)
    return _HUB_ID.fullmatch(text) is not None and not text.lower().endswith(".gguf") and not Path(text).exists()


def check_model(model: str | Path) -> None:
    """Raises GgufToolError for a model that is not here and none of the hub's. Costs nothing, as does `check_texts`: both are
    asked before what reads models and texts is loaded, which takes seconds."""
    if Path(model).exists() or is_hub_id(model):
        return
    if str(model).lower().endswith(".gguf"):
        raise GgufToolError(f"{model}: no such file")
    raise GgufToolError(f"{model}: no such checkpoint directory, and no hub id of the form owner/name")


def check_texts(given: Iterable[Source | Path]) -> None:
    """Raises GgufToolError for a text that is not here."""
    for source in map(as_source, given):
        if not source.hub and not Path(source.place).exists():
            raise GgufToolError(f"{source}: no such text file")


def _parse_hub(text: str, weight: float) -> Source:
    place, parts = _split(text, 3)
    is_folder = bool(place) and Path(place).is_dir()
    if not is_folder and not _HUB_NAME.fullmatch(place):
        raise GgufToolError(f"--data {HUB}{text}: write hf:OWNER/NAME[/CONFIG][:SPLIT[:FIELD]][:LIMIT]")
    split = parts.pop(0) if parts and not parts[0].isdecimal() else ""
    field, limit = _field_and_limit(HUB + text, parts)
    config = None
    if not is_folder and place.count("/") == 2:
        place, _, config = place.rpartition("/")
    return Source(place, field, limit, weight, True, config, split or "train")


def _split(text: str, most: int) -> tuple[str, list[str]]:
    """The place and at most `most` parts behind it. A longer name that exists goes before a shorter one."""
    pieces = text.split(":")
    cuts = range(max(1, len(pieces) - most), len(pieces) + 1)
    for cut in reversed(cuts):
        place = ":".join(pieces[:cut])
        if place and Path(place).exists():
            return place, pieces[cut:]
    # Nothing is there: what is said of it names what is most likely the file.
    cut = len(pieces)
    while cut > max(1, len(pieces) - most) and _is_part(pieces, cut - 1):
        cut -= 1
    return ":".join(pieces[:cut]), pieces[cut:]


def _is_part(pieces: Sequence[str], index: int) -> bool:
    piece, drive = pieces[index], index == 1 and len(pieces[0]) == 1
    return not drive and (not piece or piece.isdecimal() or bool(_FIELD.fullmatch(piece)))


def _field_and_limit(text: str, parts: list[str]) -> tuple[str | None, int | None]:
    """[FIELD][:LIMIT]; either may be left out, and FIELD be empty."""
    limit = int(parts.pop()) if parts and parts[-1].isdecimal() else None
    if len(parts) > 1 or (parts and parts[0].isdecimal()):
        raise GgufToolError(f"--data {text}: {':'.join(parts)!r} is not [FIELD][:LIMIT], as messages:2000")
    return (parts[0] or None if parts else None), limit

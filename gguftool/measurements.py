"""What was measured of model files that are gone again: a small file for each, named by all that the numbers depend on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .durable import write_text
from .evaluate import Comparison, pool

ROW_FORMAT, ROW_VERSION = "gguftool.sweep-row", 1


@dataclass(frozen=True)
class Store:
    """The measurements, a file for each model and group, named by what it depends on."""

    folder: Path

    def load(self, key: Mapping[str, Any]) -> dict[str, Any] | None:
        """What was measured under this key, or None where it was not, or the file is damaged."""
        try:
            found = json.loads(self.path(key).read_text(encoding="utf-8"))
            same = (found["format"], found["version"], found["key"]) == (ROW_FORMAT, ROW_VERSION, key)
            return dict(found["measured"]) if same else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def save(self, key: Mapping[str, Any], measured: Mapping[str, Any]) -> None:
        """Keeps a measurement; the file appears whole or not at all."""
        facts = {"format": ROW_FORMAT, "version": ROW_VERSION, "key": key, "measured": measured}
        write_text(self.path(key), json.dumps(facts, indent=1) + "\n")

    def path(self, key: Mapping[str, Any]) -> Path:
        """Where the measurement of a key is."""
        return self.folder / f"{digest(key)}.json"


def digest(key: Any) -> str:
    """A short name of plain values."""
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:20]


def plain(value: Any) -> Any:
    """As JSON gives it back."""
    return json.loads(json.dumps(value))


def measured_facts(file: Path, parts: Sequence[Comparison], texts: Sequence[Path]) -> dict[str, Any]:
    """One file on one group, its texts pooled: plain values, those of `Divergence.as_dict` among them."""
    total = pool(parts)
    ppl, base = total.ppl, total.base_ppl
    return {
        "bytes": file.stat().st_size, "ppl": ppl.value, "ppl_err": ppl.error, **total.as_dict(),
        "base": {"ppl": base.value, "ppl_err": base.error},
        "texts": [{"name": path.name, **part.protocol.as_dict()} for path, part in zip(texts, parts, strict=True)],
    }  # fmt: skip

"""An output folder that remembers what each of its files was made from.

Every step leaves a file and a fingerprint of what it was made from. A step whose file is there and whose fingerprint is
the same is skipped, so a run that was stopped goes on where it stopped, and a changed recipe repeats only what it must.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import __version__
from .durable import flush, settle
from .errors import GgufToolError

Say = Callable[[str], None]
BEING_MADE = "being made"


@dataclass
class Workspace:
    """An output folder that remembers what each of its files was made from (`state.json`).

    `watch` is told the name of every file that is made or found.
    """

    folder: Path
    say: Say
    state: dict[str, str] = field(default_factory=dict)
    watch: Say = lambda name: None

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            found = json.loads((self.folder / "state.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            found = {}
        self.state = {str(k): str(v) for k, v in found.items()} if isinstance(found, dict) else {}

    def step(self, name: str, inputs: Mapping[str, Any], make: Callable[[Path], object]) -> Path:
        """The file `name`, made by `make(path)` unless it was made from the same inputs before.

        Raises GgufToolError for a file of that name which this folder's runs did not make.
        """
        self.watch(name)
        path = self.folder / name
        key = hashlib.sha256(json.dumps({"gguftool": __version__, **inputs}, sort_keys=True).encode()).hexdigest()
        if path.exists() and self.state.get(name) == key:
            self.say(f"{name}: already there")
            return path
        if path.exists() and name not in self.state:
            raise GgufToolError(f"{path} exists and was not made by this command; choose another folder or move it")
        if path.exists() and self.state[name] != BEING_MADE:
            self.say(f"{name}: was made from other inputs or by another recipe; replacing it")
        # A run that is killed in between must leave no file under another run's key.
        self._remember(name, BEING_MADE)
        path.unlink(missing_ok=True)
        make(path)
        flush(path)
        self._remember(name, key)
        return path

    def _remember(self, name: str, key: str) -> None:
        self.state[name] = key
        partial = self.folder / "state.json.partial"
        partial.write_text(json.dumps(self.state, indent=1) + "\n", encoding="utf-8")
        settle(partial, self.folder / "state.json")

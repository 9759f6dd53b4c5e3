"""An output folder that remembers what each of its files was made from.

Every step leaves a file and a fingerprint of what it was made from. A step whose file is there and whose fingerprint is
the same is skipped, so a run that was stopped goes on where it stopped, and a changed recipe repeats only what it must.
"""

from __future__ import annotations

import hashlib
import json
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from . import __version__
from .durable import flush, hold, release, stated, write_text
from .errors import GgufToolError
from .verification import disown, recorded, sha256

Say = Callable[[str], None]
# What happens, with facts: "step" (name, path, state: making, made or there), "stage" (name: budget, weigh, measure or
# check), "measured" (text, models: pairs of a label and `Comparison.as_dict()`).
Watch = Callable[[str, Mapping[str, Any]], None]
BEING_MADE = "being made"
LOCK, STATE = ".lock", "state.json"
T = TypeVar("T")


def is_free(folder: Path) -> bool:
    """Whether a run may take `folder`: it is not there, or a run left its state in it, or was stopped before it had one."""
    if not folder.exists() or (folder / STATE).is_file():
        return True
    return folder.is_dir() and {path.name for path in folder.iterdir()} <= {LOCK, f"{STATE}.partial"}


@dataclass
class Workspace:
    """An output folder that remembers what each of its files was made from (`state.json`).

    `used` are the names of the steps so far, `watch` is told of each. While it lives no other process can open it: a second
    run says that this one is there. A `dry` one writes nothing: its steps only tell what is there already (`missing` is what
    is not), and give paths at which there may be nothing. A file that an ended run `recorded` is taken up with those bytes only.
    """

    folder: Path
    say: Say
    state: dict[str, str] = field(default_factory=dict)
    watch: Watch = lambda _what, _facts: None
    used: list[str] = field(default_factory=list)
    dry: bool = False
    missing: list[str] = field(default_factory=list)
    recorded: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.folder.is_file():
            raise GgufToolError(f"{self.folder}: a file, and -o names a folder for everything; choose another")
        if not self.dry:
            lock = self.folder / LOCK
            with stated(lock):
                self.folder.mkdir(parents=True, exist_ok=True)
                hold(lock, self.folder)
            # Steps follow each other, and what they make is read between them: the folder is this run's until the run ends.
            weakref.finalize(self, release, lock)
            self.recorded = dict(recorded(self.folder))
        try:
            found = json.loads((self.folder / STATE).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            found = {}
        self.state = {str(k): str(v) for k, v in found.items()} if isinstance(found, dict) else {}

    def step(self, name: str, inputs: Mapping[str, Any], make: Callable[[Path], object]) -> Path:
        """The file `name`, made by `make(path)` unless it was made from the same inputs before.

        Before it is made, a record in the folder that speaks of an earlier one goes (`verification.disown`).

        Raises GgufToolError for a file of that name which this folder's runs did not make.
        """
        path = self.folder / name
        self.used.append(name)
        key = hashlib.sha256(json.dumps({"gguftool": __version__, **inputs}, sort_keys=True).encode()).hexdigest()
        if path.exists() and self.state.get(name) == key:
            if name not in self.recorded or sha256(path) == self.recorded[name]:
                self.say(f"{name}: already there")
                self.watch("step", {"name": name, "state": "there", "path": path})
                return path
            self.say(f"{name}: its bytes are not those that verified.json recorded; making it again")
            self._remember(name, BEING_MADE)
        if path.exists() and name not in self.state:
            raise GgufToolError(f"{path} exists and was not made by this command; choose another folder or move it")
        if self.dry:
            self.missing.append(name)
            return path
        if path.exists() and self.state[name] != BEING_MADE:
            self.say(f"{name}: was made from other inputs or by another recipe; replacing it")
        self.recorded.pop(name, None)
        disown(self.folder, name)
        # A run that is killed in between must leave no file under another run's key.
        self._remember(name, BEING_MADE)
        path.unlink(missing_ok=True)
        self.watch("step", {"name": name, "state": "making", "path": path})
        make(path)
        flush(path)
        self._remember(name, key)
        self.watch("step", {"name": name, "state": "made", "path": path})
        return path

    def read(self, path: Path, load: Callable[[Path], T]) -> T | None:
        """What a step made; None where a dry one did not make it."""
        if self.dry and path.name in self.missing:
            return None
        return load(path)

    def _remember(self, name: str, key: str) -> None:
        self.state[name] = key
        write_text(self.folder / STATE, json.dumps(self.state, indent=1) + "\n")

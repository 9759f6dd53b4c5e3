"""Whether what was written is what was meant: files reopened and hashed, measurements held against what can be right.

`verified.json` beside the outputs keeps the sha256 of every file that a run made, and what was found wrong. It is written
behind all else that it speaks of, recipe.toml among that, and the next run in that folder takes it away when it begins, as
does any other command that makes one of those files anew.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from math import isfinite
from pathlib import Path
from typing import Any

from .durable import stated, write_text
from .errors import GgufToolError
from .gguf_file import GgufFile, Progress
from .inspection import check, inspect
from .prediction import bound
from .report_files import load as load_report
from .report_files import publish

NAME = "verified.json"
# What says of the files in a folder how they came about; of files that were made later it would be wrong.
RECORDS = (NAME, "fit.json")
FORMAT = "gguftool.verified"
VERSION = 1


@dataclass(frozen=True)
class Verified:
    """What `verified.json` holds: sha256 by name of every file that the run made, and its failures, a line each."""

    files: Mapping[str, str]
    failures: Sequence[str] = ()

    def save(self, folder: Path) -> None:
        """Writes verified.json into `folder`, in one step."""
        text = json.dumps(
            {"format": FORMAT, "version": VERSION, "ok": not self.failures, "failures": list(self.failures)}
            | {"files": dict(self.files)},
            indent=1,
        )
        write_text(folder / NAME, text + "\n")

    @classmethod
    def load(cls, folder: Path) -> Verified:
        """Reads it. Raises GgufToolError where it is missing, with how the run stands that has not left one yet, or where
        it is damaged or something else."""
        if not folder.is_dir():
            raise GgufToolError(
                f"{folder}: no such folder; `verify` takes the one that `gguftool compress` wrote into (-o)"
            )
        path = folder / NAME
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            found = unended(folder)
            why = f"that in this folder has not come to its end: {found}" if found else "`gguftool compress` leaves one"
            raise GgufToolError(f"{path}: no such record of a run; {why}") from error
        except (OSError, ValueError) as error:
            raise GgufToolError(f"{path}: no record of a run ({error}); `gguftool compress` leaves one") from error
        if not isinstance(raw, dict) or (raw.get("format"), raw.get("version")) != (FORMAT, VERSION):
            raise GgufToolError(f"{path}: not a record that this gguftool wrote; run `gguftool compress` again")
        files, failures = raw.get("files"), raw.get("failures")
        if not isinstance(files, dict) or not isinstance(failures, list):
            raise GgufToolError(f"{path}: damaged; run `gguftool compress` again")
        return cls({str(name): str(sha) for name, sha in files.items()}, tuple(map(str, failures)))


def unended(folder: Path) -> str:
    """How the run in `folder` stands, in a sentence, where its report says that it is not done; else nothing."""
    try:
        return str(load_report(folder).status)
    except GgufToolError:  # files may have been taken elsewhere without their report: the record alone speaks then
        return ""


def recorded(folder: Path) -> Mapping[str, str]:
    """sha256 by name of the files that an ended run left in `folder`; nothing where none did, or nobody can read its record."""
    with suppress(GgufToolError):
        if (folder / NAME).is_file():
            return Verified.load(folder).files
    return {}


def not_done(folder: Path, was: Verified) -> list[str]:
    """Why the run that `was` records is not done, a line each: what was found wrong, or where it was stopped behind that."""
    return list(was.failures) or [line for line in [unended(folder)] if line]


def forget(folder: Path) -> None:
    """Removes what an earlier run recorded in `folder`."""
    for path in (folder / name for name in RECORDS):
        with stated(path):
            path.unlink(missing_ok=True)


def disown(folder: Path, name: str) -> None:
    """Before the file `name` is made anew: if a run in `folder` has recorded it, the record goes, and its report says why."""
    if name not in recorded(folder):
        return
    report = None
    with suppress(GgufToolError):  # files may have been taken elsewhere without their report
        report = load_report(folder)
    if report is not None and report.status.done:
        message = (
            f"{name} was made anew in this folder by another command, so the files are not those of this run any more; the "
            "same command makes them again"
        )
        publish(replace(report, status=replace(report.status, state="failed", message=message)), folder)
    forget(folder)


def check_sound(path: Path) -> None:
    """Reopens a GGUF and reads all of it, as `inspect --check` does. Raises GgufToolError with every fault."""
    if faults := check(inspect(GgufFile(path))):
        raise GgufToolError(
            f"{path} was written, and {len(faults)} faults were found in it: {'; '.join(faults)}; is the disk or the "
            "memory of this machine sound?"
        )


def sha256(path: Path) -> str:
    """sha256 of a file's bytes, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hashes(folder: Path, names: Iterable[str], progress: Progress | None = None) -> dict[str, str]:
    """sha256 by name of files in `folder`, in the order given, each once."""
    wanted = list(dict.fromkeys(names))
    found = {}
    for done, name in enumerate(wanted):
        if progress:
            progress(done, len(wanted), f"hashing {name}")
        found[name] = sha256(folder / name)
    return found


def differences(was: Mapping[str, str], now: Mapping[str, str], how: str = "is") -> list[str]:
    """A line for every file of `was` that `now` lacks or has otherwise, and for those that `now` has beside. `how`: what
    brought `now` about, "made again is"."""
    lines = []
    for name, sha in was.items():
        if name not in now:
            lines.append(f"{name}: sha256 was {sha}, and it is missing")
        elif now[name] != sha:
            lines.append(f"{name}: sha256 was {sha}, and {how} {now[name]}")
    return lines + [f"{name}: was not there, and has sha256 {sha}" for name, sha in now.items() if name not in was]


def recheck(folder: Path, was: Verified, progress: Progress | None = None) -> list[str]:
    """What is no longer as it was recorded, a line each: every file hashed again, every GGUF reopened and read."""
    there = [name for name in was.files if (folder / name).is_file()]
    now = hashes(folder, there, progress)
    lines = differences(was.files, now)
    for name in there:
        if name.endswith(".gguf"):
            try:
                check_sound(folder / name)
            except GgufToolError as error:
                lines.append(str(error))
    return lines


@dataclass(frozen=True)
class Expected:
    """What a measured model is held against: `noise` of its plan (`prediction.noise`), None where there is no plan or it
    cannot be told; `quantized`, the KL by text of the unpruned model of the same encoding, where there is one."""

    label: str
    noise: float | None
    quantized: Mapping[str, float] = field(default_factory=dict)


def failures(
    texts: Mapping[str, Sequence[Mapping[str, Any]]], expected: Sequence[Expected], n_vocab: int
) -> Iterator[str]:
    """Measurements that no sound file gives, a line each.

    Args:
        texts: by text, `Comparison.as_dict()` of every model, in the order of `expected`.
    """
    for text, rows in texts.items():
        for row, want in zip(rows, expected, strict=True):
            values = (row["base"]["ppl"], row["pruned"]["ppl"], row["kld"]["mean"], row["kld"]["max"])
            if not all(isfinite(value) for value in values):
                yield (
                    f"{want.label} on {text}: perplexity {row['pruned']['ppl']} (original {row['base']['ppl']}), KL divergence "
                    f"{row['kld']['mean']}: not finite"
                )
                continue
            most = bound(want.noise, want.quantized.get(text, 0.0), n_vocab, row["base"]["ppl"])
            if row["kld"]["mean"] - 3 * row["kld"]["err"] > most:
                yield (
                    f"{want.label} on {text}: KL divergence {row['kld']['mean']:.5f} ± {row['kld']['err']:.5f} nats, and a sound "
                    f"file has at most {most:.5f}" + (_why(want) if want.noise is not None else "")
                )


def _why(want: Expected) -> str:
    return f" by what its plan takes away (noise {want.noise:.3g})"

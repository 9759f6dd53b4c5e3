"""Sources to documents: files of text, JSON lines or a JSON array, and datasets of the hub, one document after the other.

Conversations among them go through a chat template; what comes out is text in either case.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from .chat import ChatTemplate, conversation
from .errors import GgufToolError
from .sources import Source
from .strict_json import parse

# What is read of a document where no field is named: the first of these that the first document has.
FIELDS = ("text", "messages", "conversations")
# A packed text may be so many times as long as it is packed, and so long in any case.
PACKS_TO, MOST_UNPACKED = 100, 64 << 20
Templates = Callable[[], ChatTemplate | None]
SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Document:
    """A text, and whether it is a conversation that a chat template has rendered."""

    text: str
    chat: bool = False


class Reading:
    """A source while it is read: iterate once.

    Attributes, of what was taken so far:
        sha256: of a file's bytes, unpacked; of a dataset's documents as JSON lines.
        field: that was read; None for a file that is one text.
        template: the chat template, where it rendered anything.
    """

    def __init__(self, source: Source, template: Templates) -> None:
        """`template` is asked when the first conversation is met.

        Raises GgufToolError for a source that is missing, empty, not UTF-8 or badly formed. Of a file everything is
        checked now, but for what the template says; of a dataset each document when it is its turn."""
        self.source = source
        self.field = source.field
        self.template: ChatTemplate | None = None
        self._find_template = template
        self._digest = hashlib.sha256()
        self._text: str | None = None
        self._records: Iterable[tuple[str, Any]] = []
        if source.hub:
            self._records = self._from_hub()
            return
        path = Path(source.place)
        raw = _read(path)
        self._digest.update(raw)
        text = _decode(raw, path)
        name = path.name.removesuffix(".gz")
        if name.endswith(".jsonl"):
            self._records = self._checked(islice(_lines(text, path), source.limit))
        elif name.endswith(".json") and text.lstrip().startswith("["):
            self._records = self._checked(islice(_array(text, path), source.limit))
        elif source.field is not None or source.limit is not None:
            asked = f"field {source.field!r}" if source.field is not None else f"limit of {source.limit} documents"
            raise GgufToolError(f"{path}: it is one text without fields or documents, so it has no {asked}; see --data")
        else:
            self._text = text

    @property
    def sha256(self) -> str:
        """See above."""
        return self._digest.hexdigest()

    def __iter__(self) -> Iterator[Document]:
        if self._text is not None:
            yield Document(self._text)
            return
        for where, record in self._records:
            yield self._document(where, record)

    def _checked(self, records: Iterable[tuple[str, Any]]) -> list[tuple[str, Any]]:
        """All of a file's documents, each with its field and of the right type."""
        found = list(records)
        for where, record in found:
            self._value(where, record)
        return found

    def _value(self, where: str, record: Any) -> Any:
        """What the field of a document holds: a string, or what should be a conversation."""
        if not isinstance(record, dict):
            raise GgufToolError(
                f"{where}: no field {(self.field or 'text')!r}: it is {type(record).__name__}, no object"
            )
        if self.field is None:
            self.field = next((name for name in FIELDS if name in record), None)
            if self.field is None:
                raise GgufToolError(
                    f"{where}: no field 'text', 'messages' or 'conversations'; it has {', '.join(map(repr, record)) or 'none'}, "
                    "name the one to read: --data SOURCE:FIELD"
                )
        if self.field not in record:
            raise GgufToolError(f"{where}: no field {self.field!r}; it has {', '.join(map(repr, record)) or 'none'}")
        value = record[self.field]
        wanted = (list, dict) if self.field in FIELDS[1:] else (str, list, dict) if self.field != "text" else (str,)
        if not isinstance(value, wanted):
            kind = "no string" if str in wanted else "no list of messages"
            raise GgufToolError(f"{where}: {self.field!r} is {kind} but {type(value).__name__}")
        return value

    def _document(self, where: str, record: Any) -> Document:
        value = self._value(where, record)
        chat = not isinstance(value, str)
        if chat:
            assert self.field is not None
            messages, tools = conversation(record, self.field, where)
            self.template = self.template or self._find_template()
            if self.template is None:
                raise GgufToolError(
                    f"{where}: it is a conversation, and the model's tokenizer has no chat template to render it with; put "
                    "the template of its chat variant beside it as chat_template.jinja, or name a field of text: SOURCE:FIELD"
                )
            value = self.template.render(messages, tools, where)
        if SURROGATE.search(value):
            raise GgufToolError(f"{where}: {self.field!r} holds half of a surrogate pair")
        return Document(value, chat)

    def _from_hub(self) -> Iterator[tuple[str, Any]]:
        for number, record in enumerate(islice(_stream(self.source), self.source.limit), start=1):
            # As it stands in the fingerprint; what JSON has no word for (a date, a picture) is in no field that is read.
            self._digest.update(json.dumps(record, sort_keys=True, default=str).encode() + b"\n")
            yield f"{self.source}, document {number}", record


def _stream(source: Source) -> Iterator[Any]:
    """The documents of a dataset of the hub, or of a folder of one, fetched as they are asked for."""
    try:
        import datasets
    except ImportError as error:
        raise GgufToolError(
            f"{source}: reading datasets of the hub takes the package datasets: pip install 'gguftool[datasets]'"
        ) from error
    try:
        yield from datasets.load_dataset(source.place, source.config, split=source.split, streaming=True)
    except Exception as error:  # of many kinds: no such name, config or split, no network, a damaged file
        reason = " ".join(str(error).split())
        raise GgufToolError(f"{source}: the dataset cannot be read: {type(error).__name__}: {reason[:300]}") from error


def _read(path: Path) -> bytes:
    """The bytes of the text, unpacked."""
    try:
        if path.exists() and not (path.is_file() or path.is_fifo()):
            raise GgufToolError(f"{path}: no text file but a folder or a device")
        raw = path.read_bytes()
        if path.suffix == ".gz":
            raw = _unpack(raw, path)
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
        raise GgufToolError(f"{path}: no such text file") from error
    except (EOFError, zlib.error, OSError) as error:
        raise GgufToolError(f"{path}: cannot be read ({error})") from error
    if not raw.strip():
        raise GgufToolError(f"{path}: the file is empty")
    return raw


def _unpack(packed: bytes, path: Path) -> bytes:
    """The unpacked bytes. Text packs to a tenth or so; what packs far better is no text, and may be made to fill the memory."""
    most = max(MOST_UNPACKED, PACKS_TO * len(packed))
    with gzip.GzipFile(fileobj=io.BytesIO(packed)) as stream:
        raw = stream.read(most + 1)
    if len(raw) > most:
        raise GgufToolError(
            f"{path}: {len(packed)} bytes unpack to more than {most}: no text; unpack it yourself if it is"
        )
    return raw


def _reason(error: ValueError) -> str:
    """What is wrong, and in which column where that is known."""
    return f"{error.msg}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)


def _decode(raw: bytes, path: Path) -> str:
    """UTF-8 text without a byte order mark. A failure states where the first bad byte is."""
    if b"\0" in raw:
        raise GgufToolError(f"{path}: not text but binary: a zero byte at position {raw.index(0)}")
    try:
        return raw.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise GgufToolError(
            f"{path}: not UTF-8: byte 0x{raw[error.start]:02x} at position {error.start} (line {line})"
        ) from error


def _lines(text: str, path: Path) -> Iterator[tuple[str, Any]]:
    """The documents of JSON lines: one in every line that is not blank."""
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            yield f"{path}, line {number}", parse(line, strict=False)
        except ValueError as error:
            raise GgufToolError(f"{path}, line {number}: not JSON ({_reason(error)})") from error


def _array(text: str, path: Path) -> Iterator[tuple[str, Any]]:
    """The documents of a JSON array."""
    try:
        found = parse(text, strict=False)
    except ValueError as error:
        line = f", line {error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        raise GgufToolError(f"{path}{line}: not JSON ({_reason(error)})") from error
    if not found:
        raise GgufToolError(f"{path}: the array is empty")
    for number, record in enumerate(found, start=1):
        yield f"{path}, document {number}", record

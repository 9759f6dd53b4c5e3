"""Perplexity of a GGUF file by llama-perplexity's protocol, run in this process through llama-cpp-python.

Protocol (llama.cpp, tools/perplexity/perplexity.cpp): the whole text is cut into windows of n_ctx tokens, one after the
other, the rest is left out; where the tokenizer adds a BOS, it stands in for the first token of each window; positions
n_ctx/2 ... n_ctx-2 are scored on the token after them, so every scored position has half a window of context.

Windows run one at a time: the logits of one are large enough.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self, TypedDict, Unpack

import numpy as np

from .divergence import Estimate, Logits, Tokens, TokenScores, perplexity, score
from .errors import GgufToolError
from .gguf_header import refuse_missing

# Called with (windows done, windows, what runs).
Progress = Callable[[int, int, str], None]

_LOG_ERROR = 4
_LOG_CONTINUED = 5
_DEVICE = re.compile(r"using device (\S+) \(([^)]*)\)")


@dataclass(frozen=True)
class Protocol:
    """What a number was measured on.

    Attributes:
        n_ctx: tokens in a window.
        windows, tokens: windows of the text, and positions scored in all of them.
        bos: whether a BOS stood at the start of each window.
        backend: the devices that llama.cpp used, `CPU` where there were none.
        text_sha256: of the text's UTF-8 bytes.
        parse_special: whether special tokens that the text spells out were taken as such.
    """

    n_ctx: int
    windows: int
    tokens: int
    bos: bool
    backend: str
    text_sha256: str
    parse_special: bool = False

    def as_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


@dataclass(frozen=True)
class Perplexity:
    """Perplexity of one file of `bytes` bytes."""

    path: Path
    bytes: int
    ppl: Estimate
    protocol: Protocol

    def as_dict(self) -> dict[str, Any]:
        """Plain values: bytes, ppl, ppl_err and the protocol's."""
        return file_facts(self.path, self.ppl) | self.protocol.as_dict()


class Options(TypedDict, total=False):
    """How models are run; what is left out is as `open_session` has it."""

    n_ctx: int
    threads: int | None
    n_gpu_layers: int
    backend: str | None
    n_ubatch: int
    devices: Sequence[int] | None
    parse_special: bool


def measure(
    path: Path,
    text: str,
    *,
    llama: Any,
    max_windows: int | None = None,
    progress: Progress | None = None,
    **options: Unpack[Options],
) -> Perplexity:
    """Perplexity of one file on `text`; arguments and errors as in `evaluate.compare_many`."""
    with open_session(llama, **options) as session, LoadedModel(session, path) as model:
        windows = model.windows(text, max_windows)
        nll = []
        for done, window in enumerate(windows):
            nll.append(model.scores(window)[1].nll)
            if progress:
                progress(done + 1, len(windows), "perplexity")
        protocol = model.protocol(windows, text)
    return Perplexity(path, path.stat().st_size, perplexity(np.concatenate(nll)), protocol)


def file_facts(path: Path, ppl: Estimate) -> dict[str, Any]:
    """What a report says of one file: its name, bytes and perplexity."""
    return {"file": path.name, "bytes": path.stat().st_size, "ppl": ppl.value, "ppl_err": ppl.error}


class _Log:
    """What llama.cpp logged: the devices that it used and its last errors."""

    def __init__(self) -> None:
        self.devices: dict[str, None] = {}
        self.errors: deque[str] = deque(maxlen=3)
        self._line, self._level = "", 0

    def write(self, level: int, text: bytes | None, _data: object) -> None:
        """llama.cpp's log callback."""
        if level != _LOG_CONTINUED:
            self._line, self._level = "", level
        self._line += (text or b"").decode("utf-8", "replace")
        if not self._line.endswith("\n"):
            return
        line = self._line.strip()
        if self._level == _LOG_ERROR and line:
            self.errors.append(line)
        if match := _DEVICE.search(line):
            self.devices[f"{match[1]} ({match[2].strip()})"] = None
        self._line = ""

    def backend(self) -> str:
        """The devices used, in order."""
        return ", ".join(self.devices) or "CPU"


@dataclass(frozen=True)
class Session:
    """llama.cpp and how models are run in it; fields as the arguments of `open_session`."""

    llama: Any
    log: _Log
    n_ctx: int
    threads: int
    n_gpu_layers: int
    backend: str | None
    n_ubatch: int
    devices: Sequence[int] | None
    parse_special: bool = False

    @property
    def first_scored(self) -> int:
        """The first position of a window that is scored; the last is n_ctx - 2."""
        return self.n_ctx // 2


@contextmanager
def open_session(
    llama: Any,
    *,
    n_ctx: int = 512,
    threads: int | None = None,
    n_gpu_layers: int = 0,
    backend: str | None = None,
    n_ubatch: int = 512,
    devices: Sequence[int] | None = None,
    parse_special: bool = False,
) -> Iterator[Session]:
    """A session whose log is collected, where it would go to stderr; afterwards it goes where it went before.

    Args:
        llama: the llama_cpp module, bound to the runtime that can read all the files.
        n_ctx: tokens in a window.
        threads: of the CPU; by default all that this process may use.
        n_gpu_layers: layers to put on a GPU; negative for all.
        backend: what the protocol is to call the backend; by default, the devices that llama.cpp reports.
        n_ubatch: tokens that are computed at once; 1 takes the way of generation.
        devices: ggml's handles of the GPUs to use: none where it is empty, by default all.
        parse_special: special tokens that a text spells out become special tokens, which llama-perplexity leaves them not;
            for conversations, whose chat template has written them.

    Raises GgufToolError for a context in which nothing is scored.
    """
    if n_ctx < 4:
        raise GgufToolError(f"a context of {n_ctx} tokens leaves nothing to score; take 4 or more")
    before, data = llama.llama_log_callback(), ctypes.c_void_p()
    llama.llama_log_get(ctypes.byref(before), ctypes.byref(data))
    log = _Log()
    callback = llama.llama_log_callback(log.write)
    llama.llama_log_set(callback, ctypes.c_void_p(0))
    try:
        llama.llama_backend_init()
        yield Session(
            llama, log, n_ctx, threads or usable_cpus(), n_gpu_layers, backend, n_ubatch, devices, parse_special
        )
    finally:
        llama.llama_log_set(before, data)


class Loaded:
    """A file that llama.cpp has loaded, with a context and a batch. A context manager: leaving it frees all three."""

    def __init__(self, session: Session, path: Path) -> None:
        self._session, self._llama, self._path = session, session.llama, path
        self._model: Any = None
        self._context: Any = None
        self._batch: Any = None

    def __enter__(self) -> Self:
        """Raises GgufToolError, with llama.cpp's own words, for a file that it cannot load."""
        try:
            self._load()
        except BaseException:
            self._free()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._free()

    def _free(self) -> None:
        if self._batch is not None:
            self._llama.llama_batch_free(self._batch)
        if self._context:
            self._llama.llama_free(self._context)
        if self._model:
            self._llama.llama_model_free(self._model)
        self._batch = self._context = self._model = None

    def _load(self) -> None:
        """Sets the three. Raises GgufToolError where llama.cpp gives none."""
        raise NotImplementedError

    def _last_errors(self) -> str:
        return "; ".join(self._session.log.errors) or "it gives no reason"


class LoadedModel(Loaded):
    """One that runs a window at a time.

    Attributes (inside the context): `n_vocab`; `bos`, the token that stands first in each window, or None.
    """

    def _load(self) -> None:
        llama, n_ctx = self._llama, self._session.n_ctx
        refuse_missing(self._path)
        self._session.log.errors.clear()
        params = llama.llama_model_default_params()
        params.n_gpu_layers = self._session.n_gpu_layers
        chosen = self._session.devices
        handles = (ctypes.c_void_p * (len(chosen or ()) + 1))(*(chosen or ()))  # ends with a null
        if chosen is not None:
            params.devices = ctypes.addressof(handles)
        self._model = llama.llama_model_load_from_file(os.fsencode(self._path), params)
        if not self._model:
            raise GgufToolError(f"{self._path}: llama.cpp cannot load it: {self._last_errors()}")
        self._vocab = llama.llama_model_get_vocab(self._model)
        self.n_vocab = int(llama.llama_vocab_n_tokens(self._vocab))
        self.bos = int(llama.llama_vocab_bos(self._vocab)) if llama.llama_vocab_get_add_bos(self._vocab) else None
        self._context = llama.llama_init_from_model(self._model, self._context_params())
        if not self._context:
            raise GgufToolError(f"{self._path}: no context of {n_ctx} tokens: {self._last_errors()}")
        self._batch = llama.llama_batch_init(n_ctx, 0, 1)
        self._fill_batch()

    def _context_params(self) -> Any:
        session = self._session
        params = self._llama.llama_context_default_params()
        params.n_ctx = params.n_batch = session.n_ctx
        params.n_ubatch = min(session.n_ctx, session.n_ubatch)
        params.n_outputs_max = session.n_ctx - session.first_scored
        params.n_threads = params.n_threads_batch = session.threads
        params.no_perf = True
        return params

    def _fill_batch(self) -> None:
        """Everything of the batch but the tokens, which alone change from window to window."""
        n_ctx, batch = self._session.n_ctx, self._batch
        batch.n_tokens = n_ctx
        for i in range(n_ctx):
            batch.pos[i] = i
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = 0
            batch.logits[i] = self._session.first_scored <= i < n_ctx - 1

    @property
    def context_bytes(self) -> int:
        """About what a model takes besides its weights: logits, the buffer they are computed in, the rest."""
        return 4 * self.n_vocab * self._session.n_ctx + (64 << 20)

    def windows(self, text: str, max_windows: int | None = None) -> Tokens:
        """The text's windows, [windows, n_ctx]. Raises GgufToolError for a text that does not fill one."""
        if max_windows is not None and max_windows < 1:
            raise GgufToolError(f"{max_windows} windows leave nothing to score; take 1 or more")
        tokens, n_ctx = self._tokens(text), self._session.n_ctx
        count = len(tokens) // n_ctx
        if count < 1:
            raise GgufToolError(
                f"the text has {len(tokens)} tokens, less than one window of {n_ctx}; "
                "give more text or a smaller context"
            )
        count = min(count, max_windows or count)
        return tokens[: count * n_ctx].reshape(count, n_ctx)

    def _tokens(self, text: str) -> Tokens:
        """The text's tokens, as llama-perplexity takes them from a file: without one newline at the end."""
        llama = self._llama
        if llama.llama_vocab_get_add_eos(self._vocab):
            raise GgufToolError(f"{self._path}: its tokenizer ends texts with EOS, for which the protocol has no place")
        data = text.removesuffix("\n").encode("utf-8")
        room = len(data) + 16
        tokens = (llama.llama_token * room)()
        count = llama.llama_tokenize(self._vocab, data, len(data), tokens, room, True, self._session.parse_special)
        if count < 0:
            raise GgufToolError(f"{self._path}: llama.cpp could not tokenize the text ({count})")
        return np.ctypeslib.as_array(tokens)[:count].astype(np.int32)

    def scores(self, window: Tokens) -> tuple[Logits, TokenScores]:
        """Runs a window, [n_ctx]: logits at its scored positions [scored, vocabulary], and what they say.

        The logits are a view, good until the next call.
        """
        llama, session = self._llama, self._session
        llama.llama_memory_clear(llama.llama_get_memory(self._context), True)
        np.ctypeslib.as_array(self._batch.token, (session.n_ctx,))[:] = window
        if self.bos is not None:
            self._batch.token[0] = self.bos
        if code := llama.llama_decode(self._context, self._batch):
            raise GgufToolError(f"{self._path}: llama_decode failed ({code}): {self._last_errors()}")
        shape = (session.n_ctx - 1 - session.first_scored, self.n_vocab)
        logits = np.ctypeslib.as_array(llama.llama_get_logits(self._context), shape)
        scores = score(logits, window[session.first_scored + 1 :])
        if not np.isfinite(scores.nll).all():
            raise GgufToolError(f"{self._path}: its logits are not finite; the file is damaged or was cut wrongly")
        return logits, scores

    def protocol(self, windows: Tokens, text: str) -> Protocol:
        """How the numbers of these windows were measured."""
        session = self._session
        return Protocol(
            n_ctx=session.n_ctx,
            windows=len(windows),
            tokens=len(windows) * (session.n_ctx - 1 - session.first_scored),
            bos=self.bos is not None,
            backend=session.backend or session.log.backend(),
            text_sha256=hashlib.sha256(text.encode("utf-8")).hexdigest(),
            parse_special=session.parse_special,
        )

    def check_same_vocabulary(self, other: LoadedModel) -> None:
        """Raises GgufToolError where `other` numbers its tokens in another way: its logits could not be compared."""
        if self.n_vocab != other.n_vocab:
            raise GgufToolError(
                f"{other._path} has {other.n_vocab} tokens, {self._path} {self.n_vocab}: they are not of one model"
            )
        if self._vocabulary_hash() != other._vocabulary_hash() or self.bos != other.bos:
            raise GgufToolError(f"{other._path} has other tokens than {self._path}: they are not of one model")

    def _vocabulary_hash(self) -> bytes:
        text = self._llama.llama_vocab_get_text
        digest = hashlib.sha256()
        for token in range(self.n_vocab):
            digest.update((text(self._vocab, token) or b"") + b"\0")
        return digest.digest()


def usable_cpus() -> int:
    """Processors that this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on this system
        return os.cpu_count() or 1

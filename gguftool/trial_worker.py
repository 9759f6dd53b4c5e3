"""A program: one GGUF under the built llama.cpp, tried out on request for the report. It talks as `bench_worker` does.

    python -m gguftool.trial_worker LIB_DIR MODEL.gguf '{"threads": 2, ...}'

Other than there, only the last token of a prompt has its logits computed, which is what a user's program asks for.
"""

from __future__ import annotations

import ctypes
import time
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .bench_worker import UBATCH, Session, serve


def fitted(tokens: NDArray[np.int32], room: int, keep: int) -> tuple[NDArray[np.int32], int]:
    """At most `room` of the tokens, and how many were left out.

    A model goes on from the end of a prompt, which with a chat template is the turn that it has to take: what is too much goes
    in front, but for the first `keep` tokens (that of the beginning).
    """
    if len(tokens) <= room:
        return tokens, 0
    left_out = len(tokens) - room
    return np.concatenate([tokens[:keep], tokens[keep + left_out :]]), left_out


class TrialSession(Session):
    """A loaded model that is timed, watched, and let talk."""

    def answer(self, question: dict[str, Any]) -> dict[str, Any]:
        """`do` is prompt or generate (n random tokens), memory, complete (a text by at most n tokens) or routes (of a text)."""
        kind, n = question["do"], int(question.get("n", 0))
        if kind == "memory":
            return self._memory()
        if kind == "complete":
            return self._complete(question["text"], n, bool(question["special"]), float(question["seconds"]))
        if kind == "routes":
            return self._routes(question["text"], n, bool(question["special"]))
        tokens = np.random.default_rng(question["seed"]).integers(0, self.n_vocab, max(n, 1)).astype(np.int32)
        self._forget()
        start = time.perf_counter()
        for position, chunk in enumerate(tokens[:, None] if kind == "generate" else tokens[None]):
            self._decode(chunk, position, every=False)
        self._last()
        return {"seconds": time.perf_counter() - start}

    def _complete(self, text: str, n: int, special: bool, seconds: float) -> dict[str, Any]:
        """The likeliest token again and again, until n are there, the model ends or the time is over."""
        vocab = self.llama.llama_model_get_vocab(self.model)
        keep = int(self.llama.llama_vocab_get_add_bos(vocab))
        tokens, left_out = fitted(self._tokens(text, special), UBATCH - n, keep)
        self._forget()
        self._decode(tokens, 0, every=False)
        found: list[int] = []
        start, stopped = time.perf_counter(), "length"
        while len(found) < n:
            token = int(np.ctypeslib.as_array(self._last(), (self.n_vocab,)).argmax())
            if self.llama.llama_vocab_is_eog(vocab, token):
                stopped = "end"
                break
            found.append(token)
            if time.perf_counter() - start > seconds:
                stopped = "time"
                break
            if len(found) < n:
                self._decode(np.array([token], dtype=np.int32), len(tokens) + len(found) - 1, every=False)
        written = b"".join(self._piece(vocab, token) for token in found).decode("utf-8", "replace")
        return {"tokens": found, "text": written, "stopped": stopped, "left_out": left_out}

    def _routes(self, text: str, n: int, special: bool) -> dict[str, Any]:
        """How often each row of each router was chosen on the first n tokens, in windows of UBATCH."""
        tokens = self._tokens(text, special)[:n]
        plain, self.context = self.context, self.new_context(watched=True)
        self.chosen = {}
        try:
            for start in range(0, len(tokens), UBATCH):
                self._forget()
                self._decode(tokens[start : start + UBATCH], 0)
            self._last()
            chosen = {str(layer): counts.tolist() for layer, counts in sorted(self.chosen.items())}
        finally:
            self.llama.llama_free(self.context)
            self.context, self.chosen = plain, None
        return {"chosen": chosen, "tokens": len(tokens)}

    def _tokens(self, text: str, special: bool) -> NDArray[np.int32]:
        vocab, data = self.llama.llama_model_get_vocab(self.model), text.encode("utf-8")
        room = len(data) + 16
        tokens = (self.llama.llama_token * room)()
        count = self.llama.llama_tokenize(vocab, data, len(data), tokens, room, True, special)
        if count < 1:
            raise RuntimeError(f"llama.cpp could not tokenize the text ({count})")
        return np.ctypeslib.as_array(tokens)[:count].astype(np.int32)

    def _piece(self, vocab: Any, token: int) -> bytes:
        room = 256
        buffer = (ctypes.c_char * room)()
        count = self.llama.llama_token_to_piece(vocab, token, buffer, room, 0, False)
        return buffer.raw[:count] if count > 0 else b""

    def _forget(self) -> None:
        self.llama.llama_memory_clear(self.llama.llama_get_memory(self.context), True)

    def _last(self) -> Any:
        """The logits of the last token; reading them waits until a device has finished."""
        return self.llama.llama_get_logits_ith(self.context, -1)


if __name__ == "__main__":
    serve(TrialSession)

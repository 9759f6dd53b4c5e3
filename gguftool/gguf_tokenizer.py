"""A GGUF's own vocabulary as the tokenizer that `corpus` asks: llama.cpp's, loaded without the weights."""

from __future__ import annotations

import os
import weakref
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from .chat import ChatTemplate, template_of_gguf
from .errors import GgufToolError
from .perplexity import open_session


class GgufTokenizer:
    """See `corpus.Tokenizer`. The vocabulary is freed with the object."""

    def __init__(self, llama: Any, path: Path) -> None:
        """`llama` is the llama_cpp module. Raises GgufToolError for a file whose vocabulary llama.cpp cannot load."""
        self._llama, self._path = llama, path
        params = llama.llama_model_default_params()
        params.vocab_only = True
        with open_session(llama) as session:
            model = llama.llama_model_load_from_file(os.fsencode(path), params)
            if not model:
                errors = "; ".join(session.log.errors) or "it gives no reason"
                raise GgufToolError(f"{path}: llama.cpp cannot load its vocabulary: {errors}")
        weakref.finalize(self, llama.llama_model_free, model)
        self._vocab = llama.llama_model_get_vocab(model)

    @property
    def bos_token_id(self) -> int | None:
        """The token that may stand before a text."""
        return self._known(self._llama.llama_vocab_bos(self._vocab))

    @property
    def eos_token_id(self) -> int | None:
        """The token that ends a text."""
        return self._known(self._llama.llama_vocab_eos(self._vocab))

    @cached_property
    def _template(self) -> ChatTemplate | None:
        return template_of_gguf(self._path)

    @property
    def chat_template(self) -> Mapping[str, str] | None:
        """See `chat.Chats`; from the file's metadata."""
        return self._template.sources if self._template else None

    @property
    def special_tokens_map(self) -> Mapping[str, Any]:
        """See `chat.Chats`."""
        return self._template.special if self._template else {}

    def encode(self, text: str, *, add_special_tokens: bool, **_: Any) -> list[int]:
        """The text's tokens; special tokens that it spells out become special tokens."""
        data = text.encode("utf-8")
        room = len(data) + 16
        tokens = (self._llama.llama_token * room)()
        count = self._llama.llama_tokenize(self._vocab, data, len(data), tokens, room, add_special_tokens, True)
        if count < 0:
            raise ValueError(f"llama.cpp could not tokenize it ({count})")
        found: list[int] = np.ctypeslib.as_array(tokens)[:count].tolist()
        return found

    @staticmethod
    def _known(token: int) -> int | None:
        return None if token < 0 else int(token)

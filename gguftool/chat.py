"""Conversations as a model reads them: messages in the two usual forms, and the model's own chat template.

A template comes from whatever holds a tokenizer (see `Chats`): a checkpoint's, or a GGUF's metadata.
"""

from __future__ import annotations

import hashlib
import json
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from .errors import GgufToolError
from .gguf_file import GgufFile
from .strict_json import GARBLED, parse

Message = dict[str, Any]

# ShareGPT's names of the speakers, and what templates call them. Roles of the other form are passed on as they are.
SPEAKERS = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "chatgpt": "assistant",
    "bot": "assistant", "model": "assistant", "system": "system", "tool": "tool", "observation": "tool",
    "function_response": "tool",
}  # fmt: skip
# Some templates write today's date into the system prompt. A text must be the same tomorrow, or no run could go on.
FIXED_DAY = (
    '{%- macro strftime_now(format) -%}{%- if format.startswith("%Y-") -%}2025-01-01{%- else -%}01 Jan 2025{%- endif -%}'
    "{%- endmacro %}\n"
)

# A conversation takes a template milliseconds.
SECONDS = 30.0


class _TooLong(BaseException):
    """Raised in the middle of a template; not an Exception, which what the template calls might catch."""


@contextmanager
def _limited(seconds: float) -> Iterator[None]:
    """Raises _TooLong in a block that takes longer. The sandbox of templates bounds a loop, not loops within loops.

    Nothing is bounded where there is no such alarm: on Windows, and outside of the main thread.
    """
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: object) -> None:
        raise _TooLong

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class Chats(Protocol):
    """What offers a chat template, as the tokenizers of transformers do."""

    @property
    def chat_template(self) -> str | Mapping[str, str] | None:
        """Jinja source; several by name where tools have one of their own ("default", "tool_use")."""

    @property
    def special_tokens_map(self) -> Mapping[str, Any]:
        """Spelling of `bos_token`, `eos_token` and others, which templates may write."""


@dataclass(frozen=True)
class ChatTemplate:
    """Chat templates by name, "default" among them, and the special tokens that they write."""

    sources: Mapping[str, str]
    special: Mapping[str, str]

    @property
    def fingerprint(self) -> str:
        """sha256 of the template; of all of them where there are several."""
        only = self.sources["default"] if len(self.sources) == 1 else json.dumps(dict(sorted(self.sources.items())))
        return hashlib.sha256(only.encode()).hexdigest()

    def render(
        self, messages: Sequence[Message], tools: Sequence[Any] | None, where: str, *, reply: bool = False
    ) -> str:  # fmt: skip
        """The text of a conversation, with `reply` up to where the model is to answer.

        Raises GgufToolError, which names `where`, if the template refuses it.
        """
        from jinja2 import TemplateError
        from transformers.utils.chat_template_utils import render_jinja_template

        source = self.sources["tool_use"] if tools and "tool_use" in self.sources else self.sources["default"]
        if "strftime_now" in source:
            source = FIXED_DAY + source
        try:
            with _limited(SECONDS):
                rendered, _ = render_jinja_template(
                    [list(messages)], tools=tools, chat_template=source, add_generation_prompt=reply, **self.special
                )
        except _TooLong as error:
            raise GgufToolError(f"{where}: the chat template ran longer than {SECONDS:g} s") from error
        except (TemplateError, *GARBLED) as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise GgufToolError(f"{where}: the chat template refuses the conversation ({reason})") from error
        return str(rendered[0])

    def ends(self, text: str) -> bool:
        """Whether a rendered conversation ends in the end-of-text token already."""
        end = self.special.get("eos_token")
        return bool(end) and text.rstrip().endswith(str(end))


def template_of(tokenizer: object) -> ChatTemplate | None:
    """The chat template of a tokenizer (see `Chats`), or None where it has none."""
    found = getattr(tokenizer, "chat_template", None)
    if not found:
        return None
    sources = {"default": found} if isinstance(found, str) else dict(found)
    if "default" not in sources:
        return None
    special = getattr(tokenizer, "special_tokens_map", {})
    return ChatTemplate(sources, {key: str(value) for key, value in special.items() if not isinstance(value, list)})


def template_of_gguf(path: Path) -> ChatTemplate | None:
    """The chat template in a GGUF's metadata, or None where it has none."""
    file = GgufFile(path)
    default = file.value("tokenizer.chat_template", None)
    if not default:
        return None
    names = file.value("tokenizer.chat_templates", None) or []
    named = {str(name): str(file.value(f"tokenizer.chat_template.{name}", "")) for name in names}
    tokens = file.value("tokenizer.ggml.tokens", None) or []
    special = {}
    for name in ("bos", "eos", "unk"):
        number = file.value(f"tokenizer.ggml.{'unknown' if name == 'unk' else name}_token_id", None)
        if isinstance(number, int) and 0 <= number < len(tokens):
            special[f"{name}_token"] = str(tokens[number])
    return ChatTemplate({name: text for name, text in named.items() if text} | {"default": str(default)}, special)


def conversation(document: Mapping[str, Any], field: str, where: str) -> tuple[list[Message], list[Any] | None]:
    """The messages of a document, as templates want them, and the tools that it offers.

    Takes role/content and ShareGPT's from/value. Content that is None becomes empty, parts of text are joined, arguments
    of tool calls that are written as JSON become values. A system prompt or tools may stand beside the messages.

    Raises GgufToolError, which names `where`, for what is no conversation.
    """
    value = document[field]
    if isinstance(value, Mapping):  # columns, as some datasets store a list of records
        lengths = {len(column) if isinstance(column, list) else -1 for column in value.values()}
        if len(lengths) != 1 or -1 in lengths:
            raise GgufToolError(f"{where}: {field!r} is no list of messages")
        value = [dict(zip(value, row, strict=True)) for row in zip(*value.values(), strict=True)]
    if not isinstance(value, list) or not value:
        raise GgufToolError(
            f"{where}: {field!r} is no list of messages" if value != [] else f"{where}: {field!r} is empty"
        )
    messages = [_message(raw, f"{where}, message {number}") for number, raw in enumerate(value, start=1)]
    system = document.get("system")
    if isinstance(system, str) and system and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system})
    return messages, _tools(document.get("tools"), where)


def _message(raw: Any, where: str) -> Message:
    if not isinstance(raw, Mapping):
        raise GgufToolError(f"{where}: {type(raw).__name__}, not an object with a role")
    message = {key: value for key, value in raw.items() if value is not None}
    if "role" not in message and "from" in message:
        speaker = message.pop("from")
        if speaker not in SPEAKERS:
            raise GgufToolError(f"{where}: 'from' is {speaker!r}, not one of {', '.join(SPEAKERS)}")
        message["role"] = SPEAKERS[speaker]
    if not isinstance(message.get("role"), str):
        raise GgufToolError(f"{where}: no 'role' (or 'from')")
    if not {"content", "value", "tool_calls"} & raw.keys():
        raise GgufToolError(f"{where}: no 'content' (or 'value')")
    message["content"] = _content(message.get("content", message.pop("value", None)), where)
    if message.get("tool_calls"):
        message["tool_calls"] = [_call(call, where) for call in _listed(message["tool_calls"], "tool_calls", where)]
    else:
        message.pop("tool_calls", None)
    return message


def _content(content: Any, where: str) -> str:
    """Text, or None, or parts of text."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else [None]
    texts = [part.get("text") if isinstance(part, Mapping) else part for part in parts]
    found = [text for text in texts if isinstance(text, str)]
    if len(found) < len(texts):
        raise GgufToolError(f"{where}: its content is neither text nor parts of text; images and sounds cannot be read")
    return "".join(found)


def _call(call: Any, where: str) -> dict[str, Any]:
    """A tool call; its arguments as values, which is how templates write them."""
    if not isinstance(call, Mapping):
        raise GgufToolError(f"{where}: a tool call is {type(call).__name__}, not an object")
    found = {key: value for key, value in call.items() if value is not None}
    target = dict(found["function"]) if isinstance(found.get("function"), Mapping) else found
    if isinstance(target.get("arguments"), str):
        with suppress(ValueError):  # else the template writes what the model wrote
            target["arguments"] = parse(target["arguments"], strict=False)
    return found | {"function": target} if target is not found else found


def _tools(tools: Any, where: str) -> list[Any] | None:
    """The tools of a document: a list, the same as JSON, or nothing."""
    return _listed(tools, "tools", where) or None if tools else None


def _listed(value: Any, name: str, where: str) -> list[Any]:
    if isinstance(value, str):
        try:
            value = parse(value, strict=False)
        except ValueError as error:
            raise GgufToolError(f"{where}: {name!r} is a string, and no JSON ({error})") from error
    if not isinstance(value, list):
        raise GgufToolError(f"{where}: {name!r} is no list")
    return value

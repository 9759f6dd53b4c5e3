"""What options and arguments name: files, models, texts, methods. Each says at once when it is not there, and is completed."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem

from .processes import process_count
from .sources import Source, check_model, check_texts, parse_source

FILE = click.Path(path_type=Path)


def _alone() -> bool:
    """Whether what is missing may end this process at once. Of several that work together the others have to hear of it, and
    they do once they have met."""
    return process_count() == 1


class ModelType(click.Path):
    """A model that is read: a checkpoint's directory, a GGUF, or a name of the hub."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        path = Path(str(super().convert(value, param, ctx)))
        if _alone():
            check_model(path)
        return path


class TextType(click.Path):
    """A text that is read whole."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        path = Path(str(super().convert(value, param, ctx)))
        if _alone():
            check_texts([path])
        return path


class SourceType(click.ParamType):
    """A calibration text as `sources.parse_source` reads it."""

    name = "source"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Source:
        source = value if isinstance(value, Source) else parse_source(value)
        if _alone():
            check_texts([source])
        return source

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        return [CompletionItem(incomplete, type="file")]


class NameType(click.ParamType):
    """One of the names that `known` gives, which loads what knows them and is asked when a shell completes. Whether a name is one
    is checked where it is used, with the near ones. `or_file`: it may be a file instead."""

    def __init__(self, name: str, known: Callable[[], Iterable[str]], *, or_file: bool = False) -> None:
        self.name, self._known, self._or_file = name, known, or_file

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        return str(value)

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        begun = incomplete.lower()
        found = [CompletionItem(known) for known in self._known() if known.lower().startswith(begun)]
        # A shell completes names or files, not both.
        return found or ([CompletionItem(incomplete, type="file")] if self._or_file else [])


def _methods() -> Iterable[str]:
    from .methods import METHODS

    return METHODS


def _encodings() -> Iterable[str]:
    from .encoding import TARGETS

    return TARGETS


def _recipes() -> Iterable[str]:
    from .recipe_file import shipped

    return shipped()


MODEL = ModelType(path_type=Path)
TEXT = TextType(path_type=Path)
SOURCE = SourceType()
METHOD = NameType("name", _methods)
ENCODING = NameType("type", _encodings)
RECIPE = NameType("file|name", _recipes, or_file=True)

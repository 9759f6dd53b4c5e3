"""What options and arguments name: files, models, texts, methods. Each says at once when it is not there, and is completed."""

from __future__ import annotations

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


class MethodType(click.ParamType):
    """A method's name, as `methods.method` or `variants.parse_variant` checks it."""

    name = "name"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        return str(value)

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        from .methods import METHODS

        return [CompletionItem(known) for known in METHODS if known.startswith(incomplete)]


class EncodingType(click.ParamType):
    """A quantization type, as `encoding.parse_target` checks it."""

    name = "type"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        return str(value)

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        from .encoding import TARGETS

        return [CompletionItem(known) for known in TARGETS if known.startswith(incomplete.upper())]


class RecipeType(click.ParamType):
    """A recipe file, or the name of a shipped one, as `recipe_file.find` reads it."""

    name = "file|name"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        return str(value)

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        from .recipe_file import shipped

        found = [CompletionItem(known) for known in shipped() if known.startswith(incomplete)]
        # A shell completes names or files, not both.
        return found or [CompletionItem(incomplete, type="file")]


MODEL = ModelType(path_type=Path)
TEXT = TextType(path_type=Path)
SOURCE = SourceType()
METHOD = MethodType()
ENCODING = EncodingType()
RECIPE = RecipeType()

"""A recipe file: one TOML file that holds a whole run of `compress`, by the names of its options.

    model = "Qwen3-30B-A3B"
    data = ["code.txt", "chat.jsonl:messages:2000"]
    eval = ["heldout.txt"]
    ratio = 0.4
    quant = "Q4_K_M"

Relative paths are relative to the file. What is not named takes the option's default. `compress` leaves the one that it
used beside its output, with every value written out and a table [made] that says what it met: versions and fingerprints.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from .durable import write_text
from .encoding import parse_target
from .errors import GgufToolError
from .recipe import Recipe
from .sources import HUB, Source, is_hub_id, parse_source, spell

SHIPPED = Path(__file__).parent / "recipes"
NAME = "recipe.toml"
REFITS = ("plain", "sequential")
DTYPES = ("auto", "float32", "bfloat16", "float16")
# Tokens of the context that `fit` counts.
FIT_CTX = 8192
BACKENDS = ("auto", "cpu", "cuda", "metal", "vulkan")
# What a Recipe takes over as it is; `quant` is its target.
_PRUNING = (
    "method", "criterion", "align", "max_tiers", "layout", "whole", "depth", "schedule", "mix", "calibration", "relative",
    "cut_router", "guard", "seed",
)  # fmt: skip
# Names that the same things have elsewhere, too far from their keys to be found by likeness.
_OTHER_NAMES = {"keep": "ratio (1 - keep)", "target": "quant", "n_ctx": "ctx", "evaluation": "eval"}


class WrongValue(GgufToolError):
    """A value of a recipe that cannot be. A command may call its `key` otherwise; `why` is what follows the name."""

    def __init__(self, key: str, why: str) -> None:
        super().__init__(f"{key}{why}")
        self.key, self.why = key, why


@dataclass(frozen=True)
class Found:
    """What a budget led to: the best file that fits.

    Attributes:
        quant: its type.
        ratio: share of routed-expert parameters that goes; None for the unpruned model.
        beside: types of the unpruned files that it is compared with.
    """

    quant: str
    ratio: float | None = None
    beside: tuple[str, ...] = ()


@dataclass(frozen=True)
class Made:
    """What a run met that a recipe does not choose.

    Attributes:
        gguftool, llama_cpp, runtime: versions, and the key of the build.
        threads: of torch: sums in another order round differently.
        model: the checkpoint's (or GGUF's) fingerprint.
        inputs: sha256 by path of every text.
        found: of a run that was given a budget, what was chosen; made again is that, without weighing anew.
    """

    gguftool: str
    llama_cpp: str
    runtime: str
    threads: int
    model: str
    inputs: Mapping[str, str] = field(default_factory=dict)
    found: Found | None = None


@dataclass(frozen=True)
class RunRecipe:
    """A whole run of `compress`. The attributes are its options; see `recipe.Recipe` and `prepare.Job` for what they mean.

    `about` is a line for people; `made` is there in the recipe that a run has left behind. `fit` and `fit_ctx` ask for the
    ratio and the type that fit into so much memory with so much context. `quant` is the type's own name, however it was
    written (q4_k).
    """

    about: str = ""
    model: Path | None = None
    data: tuple[Source, ...] = ()
    eval: tuple[Path, ...] = ()
    ratio: float | None = None
    quant: str | None = None
    fit: str | None = None
    fit_ctx: int | None = None
    refit: str | None = None
    method: str = "auto"
    criterion: str | None = None
    align: int | None = None
    max_tiers: int = 4
    layout: str = "auto"
    whole: float | None = None
    schedule: str = "trapezoid"
    depth: tuple[float, float] = (1.0, 2.0)
    mix: tuple[float, ...] | None = None
    calibration: str = "task"
    relative: bool = False
    cut_router: bool = False
    guard: bool = True
    seed: int = 0
    ctx: int = 512
    windows: int | None = None
    eval_windows: int | None = None
    pre_tokenizer: str | None = None
    device: str = "cpu"
    dtype: str = "auto"
    memory: str | None = None
    backend: str = "auto"
    made: Made | None = None

    def __post_init__(self) -> None:
        for name, known in (("refit", (None, *REFITS)), ("dtype", DTYPES), ("backend", BACKENDS)):
            if (value := getattr(self, name)) not in known:
                raise WrongValue(name, f" {value!r} is not one of {', '.join(str(one) for one in known if one)}")
        for name, least in (("ctx", 4), ("windows", 1), ("eval_windows", 1), ("fit_ctx", 1)):
            if (value := getattr(self, name)) is not None and value < least:
                raise WrongValue(name, f" {value} is less than {least}")
        if self.fit is not None and self.ratio is not None:
            raise GgufToolError("fit finds the ratio; leave ratio (--ratio, --keep) out")
        if self.fit_ctx is not None and self.ratio is not None:
            raise GgufToolError("fit_ctx (--fit-ctx) is the context of a budget, and a ratio has none; leave it out")
        # A Recipe checks the rest; where the ratio is still open, any will do.
        self._recipe(0.0 if self.ratio is None else self.ratio)
        if self.quant is not None:
            # Files, labels and a run's memory of what it made go by this name: another spelling would make all of it anew.
            object.__setattr__(self, "quant", parse_target(self.quant).name)

    def changed(self, given: Mapping[str, Any]) -> RunRecipe:
        """With other values. A ratio takes the place of a budget, and the other way round.

        A `quant` that stood beside a ratio goes with it: it was half of that answer, and a budget finds both halves. Beside a
        budget of the recipe's own it is a part of the question, and stays.
        """
        if given.get("fit") is not None:
            given = {"ratio": None, "quant": self.quant if self.fit is not None else None, **given}
        elif given.get("ratio") is not None:
            given = {"fit": None, "fit_ctx": None, **given}
        return replace(self, **given)

    def _recipe(self, ratio: float) -> Recipe:
        return Recipe(ratio=ratio, target=self.quant, **{name: getattr(self, name) for name in _PRUNING})

    @property
    def pruning(self) -> Recipe:
        """The pruning recipe; its ratio is 0 where `fit` finds it. Raises GgufToolError where no ratio has been named."""
        if self.fit is not None:
            return self._recipe(0.0)
        if self.ratio is None:
            raise GgufToolError("the recipe has no ratio; give --ratio or --keep")
        return self._recipe(self.ratio)


def _whole_number(value: Any, _: Path) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError("a whole number")
    return value


def _number(value: Any, _: Path) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError("a number")
    return float(value)


def _flag(value: Any, _: Path) -> bool:
    if not isinstance(value, bool):
        raise TypeError("true or false")
    return value


def _text(value: Any, _: Path) -> str:
    if not isinstance(value, str):
        raise TypeError("a text in quotes")
    return value


def _path(value: Any, folder: Path) -> Path:
    return folder / Path(_text(value, folder)).expanduser()


def _model(value: Any, folder: Path) -> Path:
    """A path relative to the recipe's folder, or a model of the hub, where no folder of that name is."""
    path = _path(value, folder)
    return Path(value) if not path.exists() and is_hub_id(value) else path


def _source(value: Any, folder: Path) -> Source:
    """A source as --data has it; a file, and a folder behind hf:, relative to the recipe's folder."""
    text = _text(value, folder)
    if not text.startswith(HUB):
        return parse_source(str(folder / Path(text).expanduser()))
    try:
        return parse_source(f"{HUB}{folder / text.removeprefix(HUB)}")
    except GgufToolError:  # no folder lies there, and its name is none of the hub
        return parse_source(text)


def _several(one: Callable[[Any, Path], Any], what: str, count: int | None = None) -> Callable[[Any, Path], Any]:
    def read(value: Any, folder: Path) -> tuple[Any, ...]:
        if not isinstance(value, list) or (count is not None and len(value) != count):
            raise TypeError(what)
        try:
            return tuple(one(item, folder) for item in value)
        except TypeError:
            raise TypeError(what) from None

    return read


_KINDS: dict[str, Callable[[Any, Path], Any]] = {
    "model": _model,
    "data": _several(_source, 'a list of texts, as ["code.txt", "chat.jsonl:messages"]'),
    "eval": _several(_path, 'a list of files, as ["heldout.txt"]'),
    "depth": _several(_number, "two numbers, as [1, 2]", 2),
    "mix": _several(_number, "a number for each text, as [2, 1]"),
    **dict.fromkeys(("ratio", "whole"), _number),
    **dict.fromkeys(("relative", "cut_router", "guard"), _flag),
    **dict.fromkeys(("fit_ctx", "align", "max_tiers", "seed", "ctx", "windows", "eval_windows"), _whole_number),
}


def loads(text: str, folder: Path, name: str = NAME) -> RunRecipe:
    """Reads a recipe whose relative paths are relative to `folder`; `name` is for what is said of it.

    Raises GgufToolError for text that is no TOML, and for a key that is unknown, of a wrong type or of a wrong value.
    """
    try:
        raw = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise GgufToolError(f"{name}: not TOML: {error}") from error
    values: dict[str, Any] = {}
    known = [one.name for one in fields(RunRecipe)]
    for key, value in raw.items():
        if key not in known:
            raise GgufToolError(f"{name}: no key {key!r}; {_near(key, known)}")
        try:
            values[key] = _made(value) if key == "made" else _KINDS.get(key, _text)(value, folder)
        except TypeError as error:
            raise GgufToolError(f"{name}: {key} = {json.dumps(value, default=str)} has to be {error}") from None
        except GgufToolError as error:
            raise GgufToolError(f"{name}: {key}: {error}") from error
    try:
        return RunRecipe(**values)
    except GgufToolError as error:
        raise GgufToolError(f"{name}: {error}") from error


def _near(key: str, known: list[str]) -> str:
    if key in _OTHER_NAMES:
        return f"did you mean {_OTHER_NAMES[key]}?"
    near = get_close_matches(key, known, n=1)
    return f"did you mean {near[0]}?" if near else f"known are {', '.join(sorted(known))}"


def _made(value: Any) -> Made:
    kinds = {**dict.fromkeys(("gguftool", "llama_cpp", "runtime", "model"), str), "threads": int, "inputs": dict}
    if not isinstance(value, dict) or set(value) - {"found"} != set(kinds):
        raise TypeError(f"the table that compress writes, with {', '.join(sorted(kinds))}")
    for key, kind in kinds.items():
        if type(value[key]) is not kind:
            raise TypeError(f"the table that compress writes, and its {key} is none of its own")
    if not all(isinstance(sha, str) for sha in value["inputs"].values()):
        raise TypeError("the table that compress writes, and its inputs are sha256 by path")
    return Made(**{**value, "found": _found(value["found"])} if "found" in value else value)


def _found(value: Any) -> Found:
    kinds = {"quant": str, "ratio": float, "beside": list}
    if not isinstance(value, dict) or not {"quant", "beside"} <= set(value) <= set(kinds):
        raise TypeError("the table that compress writes, and its found has not quant, beside and perhaps ratio")
    beside = value["beside"]
    if any(type(value[key]) is not kinds[key] for key in value) or not all(isinstance(one, str) for one in beside):
        raise TypeError("the table that compress writes, and its found is none of its own")
    return Found(value["quant"], value.get("ratio"), tuple(beside))


def load(path: Path) -> RunRecipe:
    """Reads a recipe file. Raises GgufToolError for a file that is missing or not UTF-8, and as `loads` does."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise GgufToolError(f"{path}: not a recipe file ({error})") from error
    return loads(text, path.absolute().parent, str(path))


def shipped() -> dict[str, Path]:
    """The recipes that come with gguftool, by name."""
    return {path.stem: path for path in sorted(SHIPPED.glob("*.toml"))}


def find(name: str) -> Path:
    """The file `name`, or the shipped recipe of that name. Raises GgufToolError, with the near names."""
    if Path(name).is_file():
        return Path(name)
    known = shipped()
    if name in known:
        return known[name]
    near = get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    raise GgufToolError(f"{name}: no such recipe file, nor one that is shipped; {hint}shipped are {', '.join(known)}")


def start(name: str) -> str:
    """The text of the recipe that `find` gives, to be kept as a file of one's own: a shipped one may then lie anywhere.

    Raises GgufToolError as `find` and `load` do.
    """
    path = find(name)
    load(path)
    text = path.read_text(encoding="utf-8").rstrip()
    if path in shipped().values():  # its texts lie beside its folder
        text = text.replace('"../', _toml(f"{SHIPPED.parent}/")[:-1])
    return text


def dumps(recipe: RunRecipe) -> str:
    """The recipe as TOML, every value that is not open written out, paths made absolute.

    Links stay links: a model is called by its folder's name, a text by its file's, and those names are in the outputs.
    """
    lines = [f"{one.name} = {_toml(value)}" for one in fields(recipe) if _is_named(value := getattr(recipe, one.name))]
    if recipe.made is not None:
        made = vars(recipe.made)
        lines += ["", "[made]"]
        lines += [f"{key} = {_toml(value)}" for key, value in made.items() if key not in ("inputs", "found")]
        if recipe.made.found is not None:
            found = {key: value for key, value in vars(recipe.made.found).items() if value is not None}
            lines += ["", "[made.found]", *(f"{key} = {_toml(value)}" for key, value in found.items())]
        lines += ["", "[made.inputs]"]
        lines += [f"{_toml(key)} = {_toml(value)}" for key, value in recipe.made.inputs.items()]
    return "\n".join(lines) + "\n"


def _is_named(value: Any) -> bool:
    return value is not None and value != "" and value != () and not isinstance(value, Made)


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return f"[{', '.join(_toml(item) for item in value)}]"
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, Source):
        value = spell(value if value.hub and not Path(value.place).is_dir() else _absolute(value))
    # JSON's strings are TOML's, but for the one control character that JSON leaves as it is.
    text = str(value if is_hub_id(value) else value.absolute()) if isinstance(value, Path) else value
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _absolute(source: Source) -> Source:
    return replace(source, place=str(Path(source.place).absolute()))


def save(recipe: RunRecipe, path: Path, head: str = "") -> None:
    """Writes the recipe to `path`, in one step; `head` are lines of comment for its beginning."""
    comment = "".join(f"# {line}\n" for line in head.splitlines())
    try:
        write_text(path, comment + dumps(recipe))
    except UnicodeEncodeError as error:
        raise GgufToolError(f"{path}: a path in the recipe is not UTF-8, which TOML cannot hold") from error

"""Building the files that `fit` weighs and measuring what they cost; only the best one is kept."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from . import __version__
from .budget import Memory, measure
from .chat import template_of_gguf
from .corpus import read_scored
from .durable import settle
from .evaluate import compare_many
from .fit_report import MEASURED, Weighed
from .fit_solve import SCRATCH, Choice
from .measurements import Store, digest, measured_facts, plain
from .perplexity import usable_cpus
from .pipeline import Built, build, quantize_base
from .planner import fingerprint
from .prepare import Job, Prepared
from .workspace import Workspace


class Bench:
    """Makes and measures candidates."""

    def __init__(self, job: Job, work: Workspace, source: Prepared, refit: str) -> None:
        self.job, self.work, self.source, self.refit = job, work, source, refit
        self.scratch = work.folder / SCRATCH
        self.store = Store(work.folder / "rows")
        self._facts = {
            "gguftool": __version__,
            "base": work.state.get("base.gguf"),
            "stats": fingerprint(source.stats),
            "runtime": job.runtime.path.name,
        }
        self._texts: dict[str, tuple[Path, str, bool]] = {}
        for path in job.evaluation:
            self._texts[path.stem] = (path, *read_scored(path, lambda: template_of_gguf(source.base)))

    def measure(self, choices: Sequence[Choice]) -> list[Weighed]:
        """Builds and measures what was not measured yet, all of them beside one run of the original."""
        missing = [choice for choice in choices if self._load(choice) is None]
        files = {self._digest(choice): self.file(choice) for choice in missing}
        for name, (path, text, special) in self._texts.items() if missing else ():
            job, todo = self.job, [c for c in missing if self.store.load(self._key(c, name)) is None]
            if not todo:
                continue
            job.progress(0, 1, f"measuring {len(todo)} models on {path.name}")
            found = compare_many(
                self.source.base, [files[self._digest(c)] for c in todo], text, llama=job.llama, n_ctx=job.n_ctx,
                max_windows=job.eval_windows, backend=job.runtime.backend, progress=job.progress,
                n_gpu_layers=job.runtime.n_gpu_layers, parse_special=special,
            )  # fmt: skip
            for choice, comparison in zip(todo, found, strict=True):
                file = files[self._digest(choice)]
                self.store.save(self._key(choice, name), measured_facts(file, [comparison], [path]))
        return [self._weighed(choice) for choice in choices]

    def file(self, choice: Choice) -> Path:
        """The file of a candidate, made unless it is there."""
        if choice.recipe is None and self.source.has_encoding(choice.target):
            return self.source.base
        path = self.scratch / f"{self._digest(choice)}.gguf"
        if not path.exists():
            folder = Workspace(self.scratch / self._digest(choice), self.work.say)
            folder.state["base.gguf"] = self.work.state["base.gguf"]
            if choice.recipe is None:
                made = quantize_base(self.job, folder, self.source, choice.target)
            else:
                made = build(self.job, folder, self.source, choice.recipe, refit=self.refit)
            facts = {"name": made.path.name, "notes": list(made.notes)}
            self.store.save({"name": self._model_key(choice)}, facts)
            settle(made.path, path)
            shutil.rmtree(folder.folder)
        return path

    def forget(self, kept: Choice) -> None:
        """Removes the files of all other candidates."""
        for path in self.scratch.glob("*.gguf"):
            if path.stem != self._digest(kept):
                path.unlink()

    def keep(self, choice: Choice) -> Built:
        """Gives a candidate's file the name that `compress` would give it, its plan beside it, and removes all other ones.

        Where the original itself was chosen, that is the file.
        """
        source, key = self.source, {"fit": self._model_key(choice)}
        if choice.recipe is None and source.has_encoding(choice.target):
            shutil.rmtree(self.scratch, ignore_errors=True)
            return Built(choice.label, None, source.encoding, source.base)
        if self._made(choice) is None:
            self.file(choice)
        made = self._made(choice)
        assert made is not None
        path = self.work.step(str(made["name"]), key, lambda path: settle(self.file(choice), path))
        if choice.plan is not None:
            self.work.step(f"{path.stem}.plan.json", key, choice.plan.save)
        shutil.rmtree(self.scratch, ignore_errors=True)
        kind = source.encoding if source.has_encoding(choice.target) else choice.target
        return Built(choice.label, choice.plan, kind, path, tuple(made.get("notes", ())))

    def took(self, choice: Choice, ctx: int) -> Memory:
        """What a candidate's file takes in memory, measured; once for each file."""
        key = {"took": self._model_key(choice), "ctx": ctx, "threads": usable_cpus()}
        if (known := self.store.load(key)) is None:
            self.job.progress(0, 1, f"what {choice.label} really takes in memory")
            memory = measure(self.job.runtime, self.file(choice), ctx)
            self.store.save(key, known := memory.as_dict())
        return Memory.of(known)

    def _made(self, choice: Choice) -> dict[str, Any] | None:
        return self.store.load({"name": self._model_key(choice)})

    def protocol(self) -> str:
        """How the numbers were measured."""
        windows = self.job.eval_windows
        texts = ", ".join(path.name for path, _, _ in self._texts.values())
        return (
            f"KL divergence to the original in nats by llama-perplexity's protocol, windows of {self.job.n_ctx} tokens"
            f"{f', at most {windows} a text' if windows else ''}; chosen by the mean over {texts}; ± is one standard error"
        )

    def _load(self, choice: Choice) -> dict[str, dict[str, Any]] | None:
        rows = {name: self.store.load(self._key(choice, name)) for name in self._texts}
        return None if None in rows.values() else {name: row for name, row in rows.items() if row is not None}

    def _weighed(self, choice: Choice) -> Weighed:
        rows = self._load(choice)
        assert rows is not None
        texts: dict[str, Mapping[str, float]] = {
            name: {
                "kld": row["kld"]["mean"], "kld_err": row["kld"]["err"], "ppl": row["ppl"], "ppl_err": row["ppl_err"],
                "same_top": row["same_top"],
            }
            for name, row in rows.items()
        }  # fmt: skip
        return Weighed(
            choice.label, choice.target, choice.ratio, choice.outline.file_bytes,
            choice.memory.peak if choice.memory else None, next(iter(rows.values()))["bytes"], texts, MEASURED,
        )  # fmt: skip

    def _model_key(self, choice: Choice) -> dict[str, Any]:
        """As `sweep` names a model, so that either finds what the other measured in the same folder."""
        if choice.recipe is None or choice.plan is None:
            return dict(plain(self._facts | {"unpruned": choice.target}))
        facts = {"recipe": asdict(choice.plan.recipe), "kept": choice.plan.kept_hash, "refit": self.refit}
        return dict(plain(self._facts | facts))

    def _digest(self, choice: Choice) -> str:
        return digest(self._model_key(choice))

    def _key(self, choice: Choice, name: str) -> dict[str, Any]:
        text = self._texts[name][1]
        group = {
            "texts": [hashlib.sha256(text.encode()).hexdigest()],
            "n_ctx": self.job.n_ctx,
            "windows": self.job.eval_windows,
            "backend": self.job.runtime.backend,
        }
        return {"model": self._model_key(choice), "group": group}

"""The side of bench_reap.py that runs public code: a process in an environment of that code, asked over pipes.

    python bench_reap_public.py '{"checkpoint": …, "windows": FILE.npy, "batch": 4, "threads": 2, "dtype": "float32", …}'

A question is a line of JSON, so is its answer: seconds, and for an observer the saliency of every expert. A process forked
for each question loads the model anew: llm-compressor prunes the one that it is given and was seen to hold it afterwards.
Loading, a run on a tiny model and a first window are not timed.
Nothing of gguftool is imported here. CPU seconds are those of all threads: they hold on a busy machine too.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import time
import traceback
from typing import Any, TextIO

import numpy as np
import torch
from torch import nn
from transformers import AutoModelForCausalLM

Batches = list[dict[str, torch.Tensor]]


def load(options: dict[str, Any]) -> nn.Module:
    """The checkpoint as transformers loads it, whole in memory."""
    model = AutoModelForCausalLM.from_pretrained(
        options["checkpoint"], torch_dtype=getattr(torch, options["dtype"]), local_files_only=True
    )
    return model.eval()


def warm(model: nn.Module, batches: Batches) -> None:
    """A window that is not timed: the first pass finds its memory."""
    forward(model, [{name: ids[:1] for name, ids in batches[0].items()}])


class Clock:
    """Seconds and CPU seconds since it was made."""

    def __init__(self) -> None:
        self.start = time.perf_counter(), time.process_time()

    def read(self) -> dict[str, Any]:
        """Both, by name."""
        return {"seconds": time.perf_counter() - self.start[0], "cpu": time.process_time() - self.start[1]}


@torch.inference_mode()
def forward(model: nn.Module, batches: Batches) -> dict[str, Any]:
    """What plain forward passes take."""
    clock = Clock()
    for batch in batches:
        model(**batch, use_cache=False)
    return clock.read()


def plain(options: dict[str, Any], batches: Batches) -> dict[str, Any]:
    """The forward pass of transformers with nothing attached."""
    model = load(options)
    warm(model, batches)
    return forward(model, batches)


def llmcompressor(options: dict[str, Any], batches: Batches) -> dict[str, Any]:
    """REAPPruningModifier through oneshot(), as its documentation calls it. Seconds of the whole call.

    `pipeline`: "independent", its default (each layer once to observe it and once more, pruned, for the next one's input),
    or "basic": one pass over the model. `all_experts`: its default True shows every token to every expert.
    """
    from llmcompressor import oneshot
    from llmcompressor.modeling.moe.linearize import linearize_moe
    from llmcompressor.modifiers.pruning.reap import REAPPruningModifier
    from llmcompressor.modifiers.pruning.reap.utils import REAPSaliencyTracker

    def observe(model: nn.Module) -> None:
        loader = torch.utils.data.DataLoader(batches, batch_size=None)
        oneshot(
            model=model, processor=object(), dataset=loader, recipe=[REAPPruningModifier(sparsity=0.5)],
            pipeline=options["pipeline"], moe_calibrate_all_experts=options["all_experts"],
        )  # fmt: skip

    found: list[list[float]] = []
    decide = REAPSaliencyTracker.compute_retained_experts

    def listen(tracker: Any, *args: Any) -> torch.Tensor:
        found.append(tracker.mean_saliency.tolist())
        return decide(tracker, *args)

    observe(linearize_moe(load(options | {"checkpoint": options["tiny"]})))
    model = linearize_moe(load(options))
    warm(model, batches)
    REAPSaliencyTracker.compute_retained_experts = listen
    clock = Clock()
    observe(model)
    times = clock.read()
    # It decides layer after layer in the order of their names, which for fewer than ten is their order.
    return times | {"saliency": found}


def cerebras(options: dict[str, Any], batches: Batches) -> dict[str, Any]:
    """The observer of the paper's authors with the settings of their pruning script: only what pruning needs."""
    sys.path.insert(0, options["source"])
    from reap.observer import OBSERVER_CONFIG_REGISTRY, MoETransformerObserver

    model = load(options)
    warm(model, batches)
    name = type(model).__name__
    config = OBSERVER_CONFIG_REGISTRY[name](
        distance_measure="cosine", renormalize_router_weights=getattr(model.config, "norm_topk_prob", False),
        record_pruning_metrics_only=True,
    )  # fmt: skip
    observer = MoETransformerObserver(model=model, hook_config=config)
    times = forward(model, batches)
    state = observer.report_state()
    found = [state[layer]["reap"].tolist() for layer in sorted(state)]
    observer.close_hooks()
    return times | {"saliency": found}


KINDS = {"plain": plain, "llmcompressor": llmcompressor, "cerebras": cerebras}


def answer(options: dict[str, Any], answers: TextIO) -> None:
    """Answers a question in a process of its own. Raises SystemExit where that fails; stderr has the reason."""
    child = os.fork()
    if child:
        if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]):
            raise SystemExit(1)
        return
    status = 1
    try:
        torch.set_num_threads(options["threads"])
        windows, size = torch.from_numpy(np.load(options["windows"])), options["batch"]
        few = windows[: options["n_windows"]]
        batches = [{"input_ids": few[first : first + size]} for first in range(0, len(few), size)]
        print(json.dumps(KINDS[options["kind"]](options, batches)), file=answers, flush=True)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def main() -> None:
    """Answers until its input ends. What libraries print goes to stderr. This process itself computes nothing."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    common = json.loads(sys.argv[1])
    if importlib.util.find_spec("llmcompressor"):
        importlib.import_module("llmcompressor")
    for line in sys.stdin:
        answer(common | json.loads(line), answers)


if __name__ == "__main__":
    main()

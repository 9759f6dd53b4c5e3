"""An example for every command: what `-h` ends in."""

from __future__ import annotations

import click

EXAMPLES: dict[str, tuple[str, ...]] = {
    "": ("gguftool doctor", "gguftool compress MODEL_DIR --recipe code -o out"),
    "fit": ("gguftool fit MODEL_DIR --memory 12GiB --ctx 8192 --data code.txt --eval held_out.txt -o out",),
    "compress": (
        "gguftool compress MODEL_DIR --ratio 0.4 --quant Q4_K_M --data code.txt --data chat.jsonl --eval wiki.txt -o out",
        "gguftool compress MODEL_DIR --fit 12GiB --fit-ctx 8192 --data code.txt --eval held_out.txt -o out",
        "gguftool compress MODEL_DIR --recipe code --ratio 0.25 -o out",
        "gguftool compress --recipe out/recipe.toml -o again",
    ),
    "recipes": ("gguftool recipes", "gguftool recipes code > mine.toml"),
    "verify": ("gguftool verify out", "gguftool verify out --fast"),
    "report": ("gguftool report out --open", "gguftool report out --base-model OWNER/NAME --quantized-by YOU"),
    "demo": ("gguftool demo -o demo-out",),
    "convert": ("gguftool convert MODEL_DIR -o base.gguf",),
    "calibrate": (
        "gguftool calibrate MODEL_DIR --data code.txt --data chat.jsonl:messages:2000 --memory 12GiB -o stats.safetensors",
    ),
    "stats": ("gguftool stats show stats.safetensors",),
    "stats merge": ("gguftool stats merge part1.safetensors part2.safetensors -o stats.safetensors",),
    "stats show": ("gguftool stats show stats.safetensors --layer 3",),
    "architectures": ("gguftool architectures",),
    "methods": ("gguftool methods",),
    "plan": ("gguftool plan stats.safetensors --method auto --ratio 0.4 --target Q4_K_M -o plan.json",),
    "refit": ("gguftool refit MODEL_DIR --plan plan.json --data code.txt --data chat.jsonl -o weights.safetensors",),
    "dern": ("gguftool dern MODEL_DIR --plan plan.json -o weights.safetensors",),
    "prune": ("gguftool prune base.gguf --plan plan.json --weights weights.safetensors -o pruned.gguf",),
    "expand": ("gguftool expand pruned.gguf -o stock.gguf",),
    "quantize": ("gguftool quantize pruned.gguf Q4_K_M -o pruned-Q4_K_M.gguf --imatrix stats.safetensors",),
    "inspect": ("gguftool inspect pruned-Q4_K_M.gguf --experts --check",),
    "validate": ("gguftool validate base.gguf pruned.gguf --data wiki.txt --windows 24",),
    "sensitivity": ("gguftool sensitivity base.gguf --stats stats.safetensors --data code.txt -o layers.json",),
    "sweep": (
        "gguftool sweep MODEL_DIR -o out --data code.txt --eval in:held_out.txt --eval out:news.txt --method auto "
        "--ratio 0.25 --ratio 0.4 --quant Q4_K_M",
    ),
    "runtime": ("gguftool runtime build",),
    "runtime build": ("gguftool runtime build --backend cuda",),
    "runtime info": ("gguftool runtime info",),
    "runtime selftest": ("gguftool runtime selftest",),
    "run": ("gguftool run pruned-Q4_K_M.gguf -c 8192",),
    "serve": ("gguftool serve pruned-Q4_K_M.gguf --port 8080",),
    "bench": ("gguftool bench runtime",),
    "bench runtime": ("gguftool bench runtime --model gpt-oss-20b --type Q4_K",),
    "bench calibrate": ("gguftool bench calibrate",),
    "doctor": ("gguftool doctor",),
    "completion": ("gguftool completion bash",),
}


def add_examples(command: click.Command, name: str = "") -> None:
    """Gives the command, and what is below it, its example. A command without one is an error of ours: KeyError."""
    lines = EXAMPLES[name]
    command.epilog = "\b\n" + "\n".join(
        ["Example:" if len(lines) == 1 else "Examples:", *(f"  {line}" for line in lines)]
    )
    for own, below in command.commands.items() if isinstance(command, click.Group) else ():
        add_examples(below, f"{name} {own}".strip())

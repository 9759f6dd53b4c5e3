"""Runs llama.cpp's own converter, told which pre-tokenizer a vocabulary has where it cannot know.

A program, not a library: `convert` starts it with the runtime's `convert_hf_to_gguf.py` on the path. llama.cpp knows
pre-tokenizers by a hash of what they make of a test text; a vocabulary of one's own has a hash that it never saw.

llama.cpp's converter loads tokenizers with trust_remote_code, and weights that are pickles. Here neither runs: code that lies
in a checkpoint is never executed, so that converting a checkpoint is no more than reading it.
"""

from __future__ import annotations

import functools
import os
import sys
from typing import Any, NoReturn

PRE_TOKENIZER = "GGUFTOOL_PRE_TOKENIZER"
FINGERPRINT = "GGUFTOOL_FINGERPRINT"
# Which checkpoint a converted file was made from, for `prune` and `quantize` to compare with plan and stats.
FINGERPRINT_KEY = "gguftool.checkpoint.fingerprint"


def main() -> None:
    """convert_hf_to_gguf.py with its arguments."""
    forbid_code()
    import convert_hf_to_gguf  # type: ignore[import-not-found]
    from conversion.base import ModelBase, TextModel  # type: ignore[import-not-found]

    if name := os.environ.get(PRE_TOKENIZER):
        TextModel.get_vocab_base_pre = lambda _self, _tokenizer: name
    if fingerprint := os.environ.get(FINGERPRINT):
        set_type = ModelBase.set_type

        def with_fingerprint(self: Any) -> None:
            set_type(self)
            self.gguf_writer.add_string(FINGERPRINT_KEY, fingerprint)

        ModelBase.set_type = with_fingerprint
    sys.argv[0] = "convert_hf_to_gguf.py"
    convert_hf_to_gguf.main()


def forbid_code() -> None:
    """Makes transformers refuse the code of a checkpoint, and torch its pickles, whatever they are asked for."""
    import torch
    from transformers import AutoConfig, AutoTokenizer, dynamic_module_utils

    for auto in (AutoConfig, AutoTokenizer):
        load = auto.from_pretrained

        @functools.wraps(load)
        def trusting_nobody(*args: Any, load: Any = load, **options: Any) -> Any:
            return load(*args, **{**options, "trust_remote_code": False})

        auto.from_pretrained = trusting_nobody
    # Whatever else asks for it ends up here.
    dynamic_module_utils.get_class_in_module = _refuse_code
    torch.load = _refuse_pickle


def _refuse_code(*_: object, **__: object) -> NoReturn:
    raise RuntimeError("error: this checkpoint needs code of its own to be run, and gguftool runs none")


def _refuse_pickle(*_: object, **__: object) -> NoReturn:
    raise RuntimeError("error: a pickle can run code when it is read, and gguftool reads none")


if __name__ == "__main__":
    main()

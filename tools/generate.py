#!/usr/bin/env python3
"""Continue a text with a trained checkpoint, token by token, in a chosen mode.

    python tools/generate.py RUN --prompt "def main(" --plan prompt:attention,new:recurrent
    torchrun --nproc-per-node 2 tools/generate.py RUN --prompt-file notes.txt --plan ratio:0.1 --new-tokens 200

RUN is a run folder (its newest checkpoint) or a checkpoint. Under torchrun the model is split over the ranks.
"""

from __future__ import annotations

if __name__ == "__main__" and not __package__:
    import checkout  # noqa: F401

import argparse
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from oryx_megatron import ranks
from oryx_megatron.cli import HelpFormatter, main_guard
from oryx_megatron.errors import ConfigError
from oryx_megatron.paths import expand_arguments

if TYPE_CHECKING:
    from oryx_megatron.data.tokenizer import Tokenizer


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("checkpoint", help="run folder or checkpoint; also s3://…")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", help="text to continue")
    source.add_argument("--prompt-file", type=Path, help="file with the text to continue")
    parser.add_argument("--plan", default="attention", help="mode plan (default: %(default)s)")
    parser.add_argument("--new-tokens", type=int, default=100, help="most tokens to add (default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0: most likely token (default: %(default)s)")
    parser.add_argument("--top-p", type=float, default=0.95, help="nucleus of the sampling (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling (default: %(default)s)")
    parser.add_argument("--tokenizer", help="tokenizer folder (default: the run's)")
    return parser


@main_guard
def main(argv: list[str] | None = None) -> int:
    """Parse, load, generate; the text goes to standard output as it is made."""
    arguments = _parser().parse_args(argv)
    expand_arguments(arguments, "checkpoint", urls=True)
    expand_arguments(arguments, "--prompt-file", "--tokenizer")
    if arguments.new_tokens < 1:
        raise ConfigError(f"--new-tokens: {arguments.new_tokens} should be at least 1")
    if arguments.temperature < 0 or not 0 < arguments.top_p <= 1:
        raise ConfigError("--temperature should not be negative and --top-p should be above 0 and at most 1")
    text = arguments.prompt if arguments.prompt is not None else _read(arguments.prompt_file)
    warnings.filterwarnings("ignore", module=r"(megatron|torch)\.")
    from oryx_megatron import parallel
    from oryx_megatron.data.tokenizer import check_tokenizer, load_tokenizer
    from oryx_megatron.eval.generation import generate, load_for_inference

    try:
        model = load_for_inference(arguments.checkpoint, tensor=ranks.world_size())
        tokenizer = load_tokenizer(arguments.tokenizer or model.run.data.tokenizer)
        check_tokenizer(tokenizer, model.manifest.tokenizer, str(model.folder))
        prompt = tokenizer.encode(text) or [tokenizer.eod_id]
        shown = _Printer(tokenizer, prompt) if parallel.is_main_rank() else None
        generate(
            model,
            prompt,
            arguments.new_tokens,
            plan=arguments.plan,
            temperature=arguments.temperature,
            top_p=arguments.top_p,
            seed=arguments.seed,
            stop=tokenizer.eod_id,
            on_token=shown,
        )
        if shown is not None:
            shown.flush()  # the prompt, when the model ended at once
            sys.stdout.write("\n")
    finally:
        parallel.destroy()
    return 0


class _Printer:
    """Writes text as it becomes certain: a character may need several tokens."""

    def __init__(self, tokenizer: Tokenizer, prompt: list[int]) -> None:
        self.tokenizer, self.tokens, self.written = tokenizer, list(prompt), 0

    def __call__(self, token: int) -> None:
        self.tokens.append(token)
        self.flush()

    def flush(self) -> None:
        """Write what is certain; nothing before the first call, so that an error comes before any text."""
        text = self.tokenizer.decode(self.tokens)
        if not text.endswith("�"):
            sys.stdout.write(text[self.written :])
            sys.stdout.flush()
            self.written = len(text)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--prompt-file: {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"--prompt-file: {path} is not UTF-8 (byte {error.start})") from None


if __name__ == "__main__":
    sys.exit(main())

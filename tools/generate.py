#!/usr/bin/env python3
"""Continue a text with a trained model, token by token, in a chosen mode.

    oryx generate RUN --prompt "def main(" --plan prompt:attention,new:recurrent
    oryx generate exports/mine --prompt "The " --plan runs:a0-25%,r25%-end
    torchrun --nproc-per-node 2 tools/generate.py RUN --prompt-file notes.txt --plan ratio:0.1 --new-tokens 200

RUN is a run folder (its newest checkpoint), a checkpoint, or a Hugging Face export. Under torchrun a checkpoint's model
is split over the ranks. In a terminal, tokens read by attention are orange; a line at the end counts them.
"""

from __future__ import annotations

if __name__ == "__main__" and not __package__:
    import checkout  # noqa: F401

import argparse
import os
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from oryx_megatron import ranks
from oryx_megatron.cli import Parser, main_guard, seed, text_of
from oryx_megatron.config.plans import HELP as PLANS
from oryx_megatron.paths import expand_arguments

if TYPE_CHECKING:
    from oryx_megatron.eval.text import TextCodec
    from oryx_megatron.modes import Plan

ORANGE, PLAIN = "\x1b[38;5;208m", "\x1b[0m"
"""Of a terminal: tokens read by attention, and by the recurrence."""


def _parser() -> argparse.ArgumentParser:
    parser = Parser(description=__doc__)
    parser.add_argument("checkpoint", metavar="RUN", help="run folder or checkpoint, also s3://…; or an export")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", help="text to continue")
    source.add_argument("--prompt-file", type=Path, help="file with the text to continue")
    parser.add_argument("--plan", help=f"{PLANS}, or of the prompt as 120c characters (default: the model's own)")
    parser.add_argument("--new-tokens", type=int, default=100, help="most tokens to add (default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0: most likely token (default: %(default)s)")
    parser.add_argument("--top-p", type=float, default=0.95, help="nucleus of the sampling (default: %(default)s)")
    parser.add_argument("--seed", type=seed, default=0, help="of the sampling (default: %(default)s)")
    parser.add_argument("--tokenizer", help="tokenizer folder (default: the run's)")
    parser.add_argument("--weights", choices=("trained", "ema"), default="trained", help="ema: their average")
    parser.add_argument(
        "--colour",
        choices=("auto", "always", "never"),
        default="auto",
        help="of modes; auto: in a terminal, no NO_COLOR",
    )
    return parser


@main_guard
def main(argv: list[str] | None = None) -> int:
    """Parse, load, generate; the text goes to standard output as it is made."""
    arguments = _parser().parse_args(argv)
    expand_arguments(arguments, "checkpoint", urls=True)
    expand_arguments(arguments, "--prompt-file", "--tokenizer")
    text = (
        arguments.prompt
        if arguments.prompt is not None
        else text_of(arguments.prompt_file, f"--prompt-file: {arguments.prompt_file}")
    )
    warnings.filterwarnings("ignore", module=r"(megatron|torch)\.")
    from oryx_megatron import parallel
    from oryx_megatron.eval.text import load

    try:
        model = load(
            arguments.checkpoint,
            tokenizer=arguments.tokenizer,
            tensor=ranks.world_size(),
            weights=arguments.weights,
        )
        printer = _Printer(model.tokenizer, _coloured(arguments.colour)) if parallel.is_main_rank() else None
        done = model.generate(
            text,
            arguments.new_tokens,
            plan=arguments.plan,
            temperature=arguments.temperature,
            top_p=arguments.top_p,
            seed=arguments.seed,
            on_token=printer,
        )
        if printer is not None:
            printer.end(done.plan, [*done.prompt_tokens, *done.tokens])
            sys.stderr.write(f"{done.summary()}\n")
    finally:
        parallel.destroy()
    return 0


def _coloured(asked: str) -> bool:
    return asked == "always" or (asked == "auto" and sys.stdout.isatty() and not os.environ.get("NO_COLOR"))


class _Printer:
    """Writes text as it becomes certain (a character may need several tokens), coloured by the mode of its last token:
    by attention where it is in some layer.

    Nothing before the first new token: an error comes before any text.
    """

    def __init__(self, tokenizer: TextCodec, coloured: bool) -> None:
        self.tokenizer, self.coloured = tokenizer, coloured
        self.tokens: list[int] = []
        self.shown = self.written = 0
        self.orange = False

    def __call__(self, plan: Plan, prompt: list[int], token: int) -> None:
        self.tokens = [*(self.tokens or prompt), token]
        self._show(plan.slice(0, min(len(self.tokens), plan.length)))

    def end(self, plan: Plan, tokens: list[int]) -> None:
        """What was not written yet: the prompt, when the model ended at once; a last token; the end of the line."""
        self.tokens = tokens
        self._show(plan)
        sys.stdout.write(self.tokenizer.decode(tokens)[self.written :])  # a character that was never completed
        self._colour(False)
        sys.stdout.write("\n")
        sys.stdout.flush()

    def _show(self, plan: Plan) -> None:
        """Write the tokens that `plan` knows, stretch by stretch of one mode."""
        start = self.shown
        for run in plan.slice(start, plan.length).anywhere.runs:
            self.shown = start + run.stop
            text = self.tokenizer.decode(self.tokens[: self.shown])
            if not text.endswith("�"):
                self._colour(bool(run.mode))
                sys.stdout.write(text[self.written :])
                self.written = len(text)
        sys.stdout.flush()

    def _colour(self, orange: bool) -> None:
        if self.coloured and orange != self.orange:
            sys.stdout.write(ORANGE if orange else PLAIN)
        self.orange = orange


if __name__ == "__main__":
    sys.exit(main())

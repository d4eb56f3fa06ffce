#!/usr/bin/env python3
"""Show which tokens of a text attend under a mode plan, and what attention gains there.

    oryx explain RUN notes.txt --plan router:0.1 --output notes.html
    oryx explain RUN notes.txt --plan ratio:0.1 --output notes.html

RUN is a run folder (its newest checkpoint) or a checkpoint. Writes a page with the text, attention tokens framed, each
token coloured by its gain: the nats by which attention mode at all tokens predicts the next token better than
recurrent mode at all tokens. Beside it, with the ending .json, the same numbers. Prints loss and share.
"""

from __future__ import annotations

if __name__ == "__main__" and not __package__:
    import checkout  # noqa: F401

import argparse
import html
import sys
import warnings
from pathlib import Path
from typing import Any

from oryx_megatron.cli import Parser, main_guard, text_of
from oryx_megatron.errors import ConfigError
from oryx_megatron.paths import expand_arguments

SOME = 2
"""Kind (`Plan.kinds`) of a token that attends in some layers."""
FULL = 4.0
"""Nats at which a colour is at its strongest."""


def _parser() -> argparse.ArgumentParser:
    from oryx_megatron.config.plans import HELP

    parser = Parser(description=__doc__)
    parser.add_argument("checkpoint", metavar="RUN", help="run folder or checkpoint")
    parser.add_argument("text", type=Path, metavar="TEXT", help="UTF-8 file")
    parser.add_argument("--plan", default="router:0.1", help=f"{HELP} (default: %(default)s)")
    parser.add_argument("--output", type=Path, required=True, metavar="PAGE.html", help="page to write")
    parser.add_argument("--tokens", type=int, default=4096, help="most tokens to read (default: %(default)s)")
    parser.add_argument("--tokenizer", help="tokenizer folder (default: the run's)")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier page and its numbers")
    return parser


@main_guard
def main(argv: list[str] | None = None) -> int:
    """Parse, read the text three times, write page and numbers."""
    arguments = _parser().parse_args(argv)
    expand_arguments(arguments, "checkpoint", "text", "--output", "--tokenizer")
    if arguments.tokens < 2:
        raise ConfigError(f"--tokens: {arguments.tokens} should be at least 2")
    if arguments.output.suffix != ".html":
        raise ConfigError(f"--output: {arguments.output} should end in .html")
    warnings.filterwarnings("ignore", module=r"(megatron|torch)\.")
    from oryx_megatron import parallel
    from oryx_megatron.data.files import check_output, has_keys, is_marked, replacing, write_json

    numbers = arguments.output.with_suffix(".json")
    inputs = [arguments.text]
    check_output(arguments.output, ours=is_marked, overwrite=arguments.overwrite, inputs=inputs, error=ConfigError)
    ours = has_keys("plan", "tokens", "attention_share")
    check_output(numbers, ours=ours, overwrite=arguments.overwrite, inputs=inputs, error=ConfigError)
    try:
        found = explain(
            arguments.checkpoint,
            text_of(arguments.text, str(arguments.text)),
            arguments.plan,
            arguments.tokens,
            arguments.tokenizer,
        )
    finally:
        parallel.destroy()
    with replacing(arguments.output) as temporary:
        temporary.write_text(page(found, arguments.text.name), encoding="utf-8")
    write_json(numbers, found)
    gap = found["loss"]["recurrent"] - found["loss"]["attention"]
    closed = f", {(found['loss']['recurrent'] - found['loss']['plan']) / gap:.0%} of the gap" if gap > 1e-6 else ""
    sys.stdout.write(
        f"{len(found['tokens'])} tokens, {found['attention_share']:.1%} of them in attention mode\n"
        f"loss {found['loss']['plan']:.4f} under {arguments.plan}{closed}; "
        f"{found['loss']['attention']:.4f} under attention, {found['loss']['recurrent']:.4f} under recurrent\n"
        f"written: {arguments.output}, {numbers}\n"
    )
    return 0


def explain(checkpoint: str, text: str, plan: str, tokens: int, tokenizer: str | None = None) -> dict[str, Any]:
    """Tokens of a text with mode and gain, and the losses of the text; all of it JSON.

    Raises:
        ConfigError: the plan does not parse, there is no router, or the text is shorter than two tokens.
    """
    import torch

    from oryx_megatron.data.tokenizer import check_tokenizer, load_tokenizer
    from oryx_megatron.eval.generation import load_for_inference
    from oryx_megatron.eval.router_training import losses_of
    from oryx_megatron.modes import Mode, ModePlan, Plan

    model = load_for_inference(checkpoint)
    if not model.run.model.takes_plans:
        raise ConfigError(f"{checkpoint}: no layer of the model reads a mode plan")
    spoken = load_tokenizer(tokenizer or model.run.data.tokenizer)
    check_tokenizer(spoken, model.manifest.tokenizer, str(model.folder))
    ids = torch.tensor(spoken.encode_open(text)[:tokens])
    if len(ids) < 2:
        raise ConfigError(f"the text has {len(ids)} tokens; at least 2 are needed")
    length = len(ids)
    plans: dict[str, Plan] = {
        "plan": model.plans(plan).of(plan, ids),
        "attention": ModePlan.uniform(Mode.ATTENTION, length),
        "recurrent": ModePlan.uniform(Mode.RECURRENT, length),
    }
    labels = torch.cat((ids[1:], ids[-1:]))
    losses = {name: losses_of(model, ids[None], labels[None], of)[0, :-1] for name, of in plans.items()}
    gains = [*(losses["recurrent"] - losses["attention"]).tolist(), None]  # nothing follows the last token
    attends = plans["plan"].anywhere.is_attention().tolist()
    layers = plans["plan"].kinds() == SOME
    pieces = _pieces(spoken, ids.tolist())
    return {
        "plan": plan,
        "attention_share": plans["plan"].attention_share,
        "loss": {name: float(loss.double().mean()) for name, loss in losses.items()},
        "tokens": [
            {"id": token, "text": piece, "attends": attend, "in_some_layers": some, "gain": gain}
            for token, piece, attend, some, gain in zip(ids.tolist(), pieces, attends, layers.tolist(), gains)
        ],
    }


def _pieces(tokenizer: Any, ids: list[int]) -> list[str]:
    """What each token adds to the text; characters of several tokens stand at their last one."""
    pieces = []
    for i in range(1, len(ids) + 1):
        start = max(0, i - 64)  # a token's text depends on few tokens before it
        text, before = tokenizer.decode(ids[start:i]), tokenizer.decode(ids[start : i - 1])
        pieces.append("" if text.endswith("\ufffd") else text[len(before.rstrip("\ufffd")) :])
    return pieces


def page(found: dict[str, Any], name: str) -> str:
    """A page that stands alone: the text, a legend, no script, nothing from elsewhere."""
    from oryx_megatron.data.files import mark

    spans = []
    for token in found["tokens"]:
        gain = token["gain"]
        shown = html.escape(token["text"]).replace("\n", "↵\n")
        what = "the last token" if gain is None else f"gain {gain:+.2f} nats"
        mode = "attention" if token["attends"] else "recurrent"
        mode += " in some layers" if token["in_some_layers"] else ""
        kind = "s" if token["in_some_layers"] else "a"
        classes = f' class="{kind}"' if token["attends"] else ""
        spans.append(f'<span{classes} style="background:{_colour(gain)}" title="{mode}, {what}">{shown or "·"}</span>')
    loss = found["loss"]
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="generator" content="{html.escape(mark("svg")["Creator"])}">
<title>{html.escape(found["plan"])}: {html.escape(name)}</title>
<style>
body {{ font: 15px/1.9 ui-monospace, monospace; max-width: 60em; margin: 2em auto; padding: 0 1em; color: #222 }}
span {{ border-radius: 3px; white-space: pre-wrap }}
.a {{ box-shadow: inset 0 0 0 1.5px #1a1a1a }}
.s {{ outline: 1.5px dashed #1a1a1a; outline-offset: -1.5px }}
p {{ font-family: system-ui, sans-serif; line-height: 1.5 }}
</style></head><body>
<p><b>{html.escape(name)}</b> under <b>{html.escape(found["plan"])}</b>:
{found["attention_share"]:.1%} of the tokens in attention mode.
Loss {loss["plan"]:.4f}; all attention {loss["attention"]:.4f}, all recurrent {loss["recurrent"]:.4f}.</p>
<p><span class="a">&nbsp;framed&nbsp;</span> attends, <span class="s">&nbsp;dashed&nbsp;</span> in some layers.
<span style="background:{_colour(FULL)}">&nbsp;red&nbsp;</span> attention predicts the next token better,
<span style="background:{_colour(-FULL)}">&nbsp;blue&nbsp;</span> recurrence does.
Hold the pointer over a token for its gain.</p>
<div>{"".join(spans)}</div>
</body></html>
"""


def _colour(gain: float | None) -> str:
    strength = min(abs(gain or 0.0) / FULL, 1.0) * 0.75
    return f"rgba({'214,39,40' if (gain or 0.0) > 0 else '31,119,180'},{strength:.2f})"


if __name__ == "__main__":
    sys.exit(main())

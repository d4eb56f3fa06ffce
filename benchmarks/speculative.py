#!/usr/bin/env python3
"""Tokens per second of greedy decoding with drafts of the model's own heads, against plain decoding, in one run.

    python benchmarks/speculative.py EXPORT --text notes.txt --drafts 1 2 --plans attention recurrent ratio:0.5

EXPORT is a Hugging Face folder of a model trained with `model.mtp`. Prompts are cut from the text, or random tokens.
Both ways take turns on each prompt, over growing caches, and plain decoding over a static cache too, which on a GPU
replays CUDA graphs. `same` counts texts that are equal token by token; in bf16 a near tie may fall the other way.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer

from oryx_megatron.cli import HelpFormatter, main_guard
from oryx_megatron.data.files import replacing
from oryx_megatron.errors import ConfigError, DataError
from oryx_megatron.hf.folders import recognised
from oryx_megatron.hf.modeling_oryx import OryxForCausalLM

COLUMNS = (
    "plan",
    "drafts",
    "acceptance",
    "tokens/pass",
    "plain tok/s",
    "static tok/s",
    "drafts tok/s",
    "ratio",
    "same",
)
"""`ratio` is of drafts to the faster plain way."""


def prompts_of(arguments: argparse.Namespace, vocabulary: int) -> list[Tensor]:
    """Prompts [1, n] of tokens.

    Raises:
        DataError: the text is too short.
    """
    count, length = arguments.prompts, arguments.prompt
    if arguments.text is None:
        generator = torch.Generator().manual_seed(0)
        return [torch.randint(0, vocabulary, (1, length), generator=generator) for _ in range(count)]
    tokenizer = AutoTokenizer.from_pretrained(arguments.export, trust_remote_code=False)
    tokens = tokenizer(arguments.text.read_text(encoding="utf-8"), return_tensors="pt").input_ids[0]
    if len(tokens) < count * length:
        raise DataError(
            f"{arguments.text}: {len(tokens)} tokens, {count} prompts of {length} need {count * length}; "
            "lower --prompts or --prompt"
        )
    return list(tokens[: count * length].view(count, 1, length))


def timed(model: Any, prompt: Tensor, new: int, plan: str, **more: Any) -> tuple[list[int], float, Any]:
    """New tokens, seconds, and what `generate` returned."""
    if prompt.is_cuda:
        torch.cuda.synchronize()
    begun = time.perf_counter()
    out = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=new, do_sample=False, mode_plan=plan,
        pad_token_id=0, eos_token_id=None, **more,
    )  # fmt: skip
    if prompt.is_cuda:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - begun
    text = out if isinstance(out, Tensor) else out.sequences
    return text[0, prompt.shape[1] :].tolist(), seconds, out


def measure(model: Any, prompts: list[Tensor], new: int, plan: str, drafts: int) -> dict[str, Any]:
    """Figures of one plan and number of drafted tokens."""
    ways: dict[str, dict[str, Any]] = {
        "plain": {},
        "static": {"cache_implementation": "static"},
        "drafts": {"speculative": drafts, "return_dict_in_generate": True},
    }
    seconds, tokens = dict.fromkeys(ways, 0.0), 0
    done, same = {"drafted": 0, "accepted": 0, "passes": 0, "tokens": 0}, 0
    for more in ways.values():
        timed(model, prompts[0], min(new, 8), plan, **more)  # warm
    for prompt in prompts:
        texts = {}
        for way, more in ways.items():
            texts[way], taken, out = timed(model, prompt, new, plan, **more)
            seconds[way] += taken
        for name in done:
            done[name] += getattr(out.speculation, name)
        tokens += new
        same += texts["plain"] == texts["drafts"]
    speed = {way: tokens / taken for way, taken in seconds.items()}
    return {
        "plan": plan,
        "drafts": drafts,
        "acceptance": done["accepted"] / max(done["drafted"], 1),
        "tokens_per_pass": done["tokens"] / max(done["passes"], 1),
        **{f"{way}_tokens_per_second": value for way, value in speed.items()},
        "ratio": speed["drafts"] / max(speed["plain"], speed["static"]),
        "same": same,
        "texts": len(prompts),
    }


@main_guard
def main(argv: list[str] | None = None) -> int:
    """Parse and measure; see --help."""
    parser = argparse.ArgumentParser(prog="speculative.py", description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("export", type=Path, help="Hugging Face folder of a model with heads")
    parser.add_argument("--plans", nargs="+", default=["attention", "recurrent"], help="mode plans")
    parser.add_argument("--drafts", nargs="+", type=int, default=[1], help="tokens drafted in a round")
    parser.add_argument("--text", type=Path, help="file to cut prompts from; default: random tokens")
    parser.add_argument("--prompts", type=int, default=4, help="number of prompts")
    parser.add_argument("--prompt", type=int, default=64, help="tokens of a prompt")
    parser.add_argument("--new", type=int, default=64, help="new tokens of each")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="format of the weights")
    parser.add_argument("--output", type=Path, help="JSON file for the figures")
    arguments = parser.parse_args(argv)
    if min(arguments.prompts, arguments.prompt, arguments.new - 1, *arguments.drafts) < 1:
        raise ConfigError("--prompts, --prompt and --drafts should be above 0, --new above 1")
    recognised(arguments.export)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[arguments.dtype]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model: Any = OryxForCausalLM.from_pretrained(arguments.export, dtype=dtype)
    model = model.to(device).eval()
    if not model.config.num_nextn_predict_layers:
        raise ConfigError(f"{arguments.export}: has no heads to draft with; train it with model.mtp")
    prompts = [prompt.to(device) for prompt in prompts_of(arguments, model.config.vocab_size)]
    where = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    sys.stdout.write(f"{where}, {arguments.dtype}, {len(prompts)} × {arguments.new} new tokens\n")
    sys.stdout.write(f"{COLUMNS[0]:<34}" + "".join(f"{name:>14}" for name in COLUMNS[1:]) + "\n")
    results = []
    for plan in arguments.plans:
        for drafts in arguments.drafts:
            found = measure(model, prompts, arguments.new, plan, drafts)
            results.append(found)
            speeds = (found[f"{way}_tokens_per_second"] for way in ("plain", "static", "drafts"))
            sys.stdout.write(
                f"{plan:<34}{drafts:>14}{found['acceptance']:>14.1%}{found['tokens_per_pass']:>14.2f}"
                + "".join(f"{speed:>14.1f}" for speed in speeds)
                + f"{found['ratio']:>14.2f}{found['same']:>8} of {found['texts']}\n"
            )
            sys.stdout.flush()
    if arguments.output is not None:
        text = json.dumps({"where": where, "dtype": arguments.dtype, "results": results}, indent=2)
        with replacing(arguments.output) as temporary:
            temporary.write_text(text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

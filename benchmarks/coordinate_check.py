"""Do activations change alike at every width? A coordinate check of muP (arXiv 2203.03466, appendix D.1), on CPUs too.

    python benchmarks/coordinate_check.py --picture docs/images/coordinate-check.png

Tiny models of growing width train for a few steps on the same text, with and without muP. Plotted is how far a block's
output, and the logits, have moved since the start: the mean absolute change over the entries of one batch. With muP the
lines of the blocks are level and those of the logits do not rise (their random part falls with the root of the width);
without, all rise with the width: the learning rate of a narrow model is too high for a wide one.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
import warnings
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from oryx_megatron import platform
from oryx_megatron.cli import main_guard
from oryx_megatron.config.schema import ModelConfig, MoEConfig, RunConfig
from oryx_megatron.errors import ConfigError
from oryx_megatron.modes import ModePlan
from oryx_megatron.testing.layouts import session, tiny_run

PARTS = ("first block", "last block", "logits")
ROUTER = "router"
"""The fourth part of a model with experts: the logits of the last layer's router."""


def run_of(
    width: int,
    optimizer: Literal["adamw", "muon"],
    *,
    mup: bool,
    mixer: str = "gdn",
    lr: float | None = None,
    experts: int = 0,
) -> RunConfig:
    """A tiny run, `width` times as wide as the base model by more heads; `mup` scales it.

    `experts`: in place of every MLP; wider experts, not more of them. Their balance is left alone.
    """
    run = tiny_run(mixer)
    moe = MoEConfig(experts=experts, ffn_hidden_size=width * 32, aux_loss=0.0) if experts else None
    model = dataclasses.replace(
        run.model,
        hidden_size=width * run.model.hidden_size,
        ffn_hidden_size=width * run.model.ffn_hidden_size,
        num_heads=width * run.model.num_heads,
        num_kv_heads=width * run.model.kv_heads,
        moe=moe,
        mup_base_hidden_size=run.model.hidden_size if mup else None,
        init_std=0.1,  # of fan-ins of 32: about 1 / √32
    )
    muon = optimizer == "muon"
    settings = dataclasses.replace(run.optimizer, name=optimizer, lr=lr or (2e-2 if muon else 1e-2))
    return dataclasses.replace(run, model=model, optimizer=settings)


def parts_of(model: ModelConfig) -> tuple[str, ...]:
    """What is looked at."""
    return PARTS if model.moe is None else (*PARTS, ROUTER)


def changes(run: RunConfig, steps: int) -> list[dict[str, float]]:
    """Mean absolute change of each of `parts_of` since the start, after each step, on the first batch."""
    with session(run) as opened:
        (batch, *_) = opened.stream.next_batches()
        before = _activations(opened.chunks[0], batch.get("tokens"), run)
        found = []
        for _ in range(steps):
            opened.step()
            after = _activations(opened.chunks[0], batch.get("tokens"), run)
            found.append({part: float((after[part] - before[part]).abs().mean()) for part in parts_of(run.model)})
    return found


@torch.no_grad()
def _activations(chunk: Any, tokens: Tensor, run: RunConfig) -> dict[str, Tensor]:
    from oryx_megatron.model import SequenceInfo

    held: dict[str, Tensor] = {}
    layers = chunk.module.decoder.layers
    hooks = [
        module.register_forward_hook(lambda m, i, output, part=part: held.__setitem__(part, output[0].clone()))
        for part, module in zip(PARTS, (layers[0], layers[-1], chunk.module.output_layer), strict=True)
    ]
    if run.model.moe is not None:
        router = layers[-1].mlp.router
        hooks.append(
            router.register_forward_hook(lambda m, i, o: held.__setitem__(ROUTER, i[0].float() @ m.weight.float().T))
        )
    mask = torch.arange(tokens.shape[1]) % 16 < 8  # both modes
    sequence = SequenceInfo.build(ModePlan.from_mask(mask.numpy()), device=platform.device())
    chunk(tokens.to(platform.device()), None, None, packed_seq_params=sequence)
    for hook in hooks:
        hook.remove()
    return held


def slope(found: dict[int, float]) -> float:
    """Exponent of the power of the width that fits best."""
    xs, ys = [math.log(width) for width in found], [math.log(value) for value in found.values()]
    mean_x, mean_y = sum(xs) / len(xs), sum(ys) / len(ys)
    return sum((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys)) / sum((x - mean_x) ** 2 for x in xs)


@main_guard
def main(argv: list[str] | None = None) -> int:
    """Train, print and draw."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--widths", type=int, nargs="+", default=[1, 2, 4, 8], help="times the base width of 32")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--optimizer", choices=("adamw", "muon"), default="adamw")
    parser.add_argument("--mixer", choices=("gdn", "mamba2"), default="gdn")
    parser.add_argument("--experts", type=int, default=0, help="experts in place of every MLP (model.moe)")
    parser.add_argument("--lr", type=float, help="at the base width")
    parser.add_argument("--picture", type=Path, help="PNG")
    a = parser.parse_args(argv)
    if len(a.widths) < 2 or min(a.widths) < 1 or a.steps < 1:
        raise ConfigError("--widths, --steps: give two widths of at least 1, and a step")
    if a.experts < 0 or a.experts == 1:
        raise ConfigError(f"--experts: {a.experts} should be 0 or at least 2, of which a token takes 2")
    warnings.simplefilter("ignore")
    platform.install()
    found = {
        mup: {
            w: changes(run_of(w, a.optimizer, mup=mup, mixer=a.mixer, lr=a.lr, experts=a.experts), a.steps)
            for w in a.widths
        }
        for mup in (False, True)
    }
    for mup, by_width in found.items():
        sys.stdout.write(f"{'with' if mup else 'without'} muP, {a.optimizer}, step {a.steps}: change by width\n")
        for part in by_width[a.widths[0]][-1]:
            values = {width: steps[-1][part] for width, steps in by_width.items()}
            row = "".join(f"{value:10.4f}" for value in values.values())
            sys.stdout.write(f"  {part:<12}{row}   ∝ width^{slope(values):.2f}\n")
    if a.picture:
        draw(found, a.optimizer, a.picture)
        sys.stderr.write(f"wrote {a.picture}\n")
    return 0


def draw(found: dict[bool, dict[int, list[dict[str, float]]]], optimizer: str, path: Path) -> None:
    """A panel for each part and kind; a line for each step."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import NullFormatter

    parts = list(next(iter(found[True].values()))[0])
    figure, rows = plt.subplots(2, len(parts), figsize=(3.5 * len(parts), 5.6), dpi=140, sharex=True, sharey="col")
    for row, (mup, by_width) in zip(rows, found.items(), strict=True):
        for axes, part in zip(row, parts, strict=True):
            widths = list(by_width)
            for step in range(len(by_width[widths[0]])):
                color = plt.get_cmap("viridis")(0.85 * step / max(len(by_width[widths[0]]) - 1, 1))
                values = [by_width[width][step][part] for width in widths]
                axes.plot(widths, values, "o-", color=color, markersize=4, label=f"step {step + 1}")
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            axes.yaxis.set_minor_formatter(NullFormatter())
            axes.set_title(f"{part}, {'with' if mup else 'without'} muP", fontsize=10)
            axes.grid(alpha=0.3)
            axes.set_xticks(widths, [str(width) for width in widths])
    for axes in rows[-1]:
        axes.set_xlabel("width over base width")
    for row in rows:
        row[0].set_ylabel("mean |change| since the start")
    handles, labels = rows[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", fontsize=9)
    figure.suptitle(f"Coordinate check, {optimizer}: level lines carry a learning rate over to other widths", size=11)
    figure.set_layout_engine("constrained")
    figure.savefig(path)
    plt.close(figure)


if __name__ == "__main__":
    sys.exit(main())

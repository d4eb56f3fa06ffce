"""Evaluate a model under mode plans: `perplexity` over an indexed dataset, `retrieval` on made-up look-up tasks.

    torchrun --nproc-per-node 2 -m oryx_megatron.eval perplexity RUN --data data/stdlib --plans attention recurrent
    oryx eval retrieval MODEL --tasks mqar needle --lengths 512 2048 --output results/

RUN is a run folder or a checkpoint; MODEL may also be a Hugging Face folder.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from oryx_megatron import ranks
from oryx_megatron.cli import Parser, main_guard, seed
from oryx_megatron.config.plans import HELP as PLAN
from oryx_megatron.config.schema import ModesConfig, ParallelConfig, RunConfig
from oryx_megatron.display import log_lines, shown
from oryx_megatron.errors import ConfigError
from oryx_megatron.paths import expand_arguments, is_url
from oryx_megatron.storage import named

if TYPE_CHECKING:
    from oryx_megatron.eval.routed import Plans

TASKS = ["mqar", "needle", "phonebook"]
PLANS = ["attention", "recurrent", "ratio:0.1", "ratio:0.25", "ratio:0.5"]


def _parser() -> argparse.ArgumentParser:
    parser = Parser("oryx_megatron.eval", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    perplexity = commands.add_parser(
        "perplexity",
        help="loss, perplexity and bits per byte per plan",
        description="Loss, perplexity and bits per byte per plan.\n\n"
        "    oryx eval perplexity runs/mine --plans attention recurrent ratio:0.1",
    )
    perplexity.add_argument("model", help="run folder or checkpoint")
    perplexity.add_argument(
        "--data", help="prefix of an indexed dataset, read whole (default: the run's validation part)"
    )
    perplexity.add_argument("--plans", nargs="+", help=f"{PLAN} (default: the run's evaluation.plans)")
    perplexity.add_argument("--batches", type=int, help="global batches to read (default: all of --data)")
    perplexity.add_argument("--batch-size", type=int, default=1, help="sequences per pass and rank (default: 1)")
    perplexity.add_argument("--sequence-length", type=int, help="tokens per sequence (default: the run's)")
    for size in ("tensor", "pipeline", "context"):
        perplexity.add_argument(f"--{size}", type=int, default=1, help=f"{size}-parallel size (default: 1)")
    retrieval = commands.add_parser(
        "retrieval",
        help="share of answers found, over tasks × lengths × plans",
        description="Share of answers found, over tasks × lengths × plans.\n\n"
        "    oryx eval retrieval runs/mine --tasks mqar --lengths 512 --plans attention ratio:0.1",
    )
    retrieval.add_argument("model", help="run folder, checkpoint or Hugging Face folder")
    retrieval.add_argument("--tasks", nargs="+", default=TASKS, help=f"(default: {' '.join(TASKS)})")
    retrieval.add_argument("--lengths", nargs="+", type=int, default=[256, 1024], help="tokens (default: 256 1024)")
    retrieval.add_argument("--plans", nargs="+", default=PLANS, help=f"{PLAN} (default: {' '.join(PLANS)})")
    retrieval.add_argument("--examples", type=int, default=64, help="texts per task and length (default: 64)")
    retrieval.add_argument("--batch-size", type=int, default=16, help="texts per pass (default: 16)")
    retrieval.add_argument("--seed", type=seed, default=0, help="of the texts (default: 0)")
    for command in (perplexity, retrieval):
        command.add_argument(
            "--weights", choices=("trained", "ema"), default="trained", help="of a checkpoint; ema: their average"
        )
        command.add_argument("--tokenizer", help="tokenizer folder (default: the run's)")
        command.add_argument("--output", type=Path, help="folder for the JSON (and PNG)")
        command.add_argument("--overwrite", action="store_true", help="replace earlier results in --output")
    return parser


@main_guard
def main(argv: list[str] | None = None) -> int:
    """Parse, evaluate, print, write."""
    arguments = _parser().parse_args(argv)
    _check_sizes(arguments)
    expand_arguments(arguments, "model", urls=True)
    expand_arguments(arguments, "--tokenizer", "--output")
    if arguments.command == "perplexity":
        expand_arguments(arguments, "--data", urls=True)
    log_lines()
    for category in (UserWarning, FutureWarning, DeprecationWarning):
        warnings.filterwarnings("ignore", category=category, module=r"(megatron|torch)\.")
    from oryx_megatron import parallel

    _check_outputs(arguments)
    try:
        return _perplexity(arguments) if arguments.command == "perplexity" else _retrieval(arguments)
    finally:
        parallel.destroy()


def check(arguments: Sequence[str], run: RunConfig) -> None:
    """Hold arguments without the model against the config of a run that is not trained yet.

    Raises:
        ConfigError: the evaluation of such a run fails: an option, a number, a task, a mode plan, no average.
    """
    from oryx_megatron.config.plans import layer_plans, parse_runs
    from oryx_megatron.config.validate_modes import check_modes
    from oryx_megatron.hf.plans_oryx import routed_share

    command, *options = arguments
    parsed = _parser().parse_args([command, run.output_dir, *options])
    _check_sizes(parsed)
    if parsed.weights == "ema" and run.train.ema is None:
        raise ConfigError("--weights: ema, but the run keeps no average; set train.ema")
    if command == "perplexity":
        plans = tuple(run.evaluation.plans if parsed.plans is None else parsed.plans)
        length = run.data.sequence_length if parsed.sequence_length is None else parsed.sequence_length
        data = dataclasses.replace(run.data, sequence_length=length)
        modes = ModesConfig(chunk=run.modes.chunk, fixed=run.model.single_mode)
        evaluation = dataclasses.replace(run.evaluation, plans=plans)
        check_modes(dataclasses.replace(run, data=data, modes=modes, evaluation=evaluation))
        return
    if unknown := [task for task in parsed.tasks if task not in TASKS]:
        raise ConfigError(f"--tasks: {unknown[0]} is unknown; known: {', '.join(TASKS)}")
    for spec in parsed.plans:
        if routed_share(spec) is None:
            for part in layer_plans(spec, run.model.num_layers) or (spec,):
                for length in parsed.lengths:
                    parse_runs(part, length, chunk=run.modes.chunk)


def _check_sizes(arguments: argparse.Namespace) -> None:
    """Raise ConfigError, with the option's name, for a number below 1."""
    for name, value in vars(arguments).items():
        for number in value if isinstance(value, list) else [value]:
            if type(number) is int and number < 1 and name != "seed":
                raise ConfigError(f"--{name.replace('_', '-')}: {number} should be above 0")


def _check_outputs(arguments: argparse.Namespace) -> None:
    """Refuse to replace what is no earlier result of this command, before anything is computed."""
    from oryx_megatron.data.files import check_output, has_keys, is_marked

    if arguments.output is None:
        return
    outputs = {"perplexity.json": has_keys("checkpoint", "iteration", "results")}
    if arguments.command == "retrieval":
        outputs = {"retrieval.json": has_keys("model", "seed", "cells"), "retrieval.png": is_marked}
    for name, ours in outputs.items():
        check_output(arguments.output / name, ours=ours, overwrite=arguments.overwrite)


def _perplexity(arguments: argparse.Namespace) -> int:
    from oryx_megatron import parallel
    from oryx_megatron.data.files import write_json
    from oryx_megatron.eval.perplexity import evaluate_checkpoint

    done = evaluate_checkpoint(
        arguments.model,
        arguments.plans and tuple(arguments.plans),
        data=arguments.data,
        batches=arguments.batches,
        batch_size=arguments.batch_size,
        sequence_length=arguments.sequence_length,
        layout=ParallelConfig(tensor=arguments.tensor, pipeline=arguments.pipeline, context=arguments.context),
        tokenizer=arguments.tokenizer,
        weights=arguments.weights,
        world_size=ranks.world_size(),
    )
    if not parallel.is_main_rank():
        return 0
    sys.stdout.write(f"{shown(named(done.checkpoint))}, iteration {done.manifest.iteration}\n")
    sys.stdout.write(
        f"{'dataset':<16}{'plan':<24}{'attention':>10}{'loss':>9}{'perplexity':>12}{'bits/byte':>11}{'tokens':>11}\n"
    )
    for r in done.results:
        sys.stdout.write(
            f"{shown(r.dataset):<16}{shown(r.plan):<24}{r.attention_share:>10.1%}{r.loss:>9.4f}{r.perplexity:>12.3f}{r.bits_per_byte:>11.4f}{r.tokens:>11,}\n"
        )
    if arguments.output is not None:
        results = [result.to_dict() for result in done.results]
        about = {"checkpoint": named(done.checkpoint), "iteration": done.manifest.iteration, "results": results}
        write_json(arguments.output / "perplexity.json", about)
    return 0


def _retrieval(arguments: argparse.Namespace) -> int:
    from oryx_megatron import parallel
    from oryx_megatron.eval.grid import Cell, plot_cells, run_grid, write_cells
    from oryx_megatron.eval.retrieval import retrieval_task

    predict, codec, vocabulary, plans, name = _load(arguments)
    tasks = [retrieval_task(task, codec) for task in arguments.tasks]
    tasks = [dataclasses.replace(task, vocab_size=vocabulary) if task.name == "mqar" else task for task in tasks]  # type: ignore[type-var]

    def show(cell: Cell) -> None:
        if parallel.is_main_rank():
            sys.stdout.write(
                f"{cell.task:<12}{cell.length:>8}  {cell.plan:<24}{cell.attention_share:>7.1%} attention"
                f"{cell.accuracy:>9.1%} found\n"
            )
            sys.stdout.flush()

    cells = run_grid(
        predict,
        tasks,
        arguments.lengths,
        arguments.plans,
        chunk=plans.chunk,
        examples=arguments.examples,
        batch_size=arguments.batch_size,
        seed=arguments.seed,
        on_cell=show,
        text_plans=plans.of_texts(arguments.plans),
        layers=plans.layers,
    )
    if arguments.output is not None and parallel.is_main_rank():
        write_cells(cells, arguments.output / "retrieval.json", model=name, seed=arguments.seed)
        plot_cells(cells, arguments.output / "retrieval.png", title=name)
        written = (arguments.output / name for name in ("retrieval.json", "retrieval.png"))
        sys.stdout.write(f"written: {', '.join(map(shown, written))}\n")
    return 0


def _load(arguments: argparse.Namespace) -> tuple[Any, Any, int, Plans, str]:
    """Prediction function, codec, vocabulary, plans and name of the model asked for."""
    from oryx_megatron.checkpoint.remote import fetch_model
    from oryx_megatron.data.tokenizer import Tokenizer, check_tokenizer, load_tokenizer
    from oryx_megatron.eval.grid import predict_with_checkpoint, predict_with_export
    from oryx_megatron.eval.retrieval import Pieces
    from oryx_megatron.eval.routed import Plans

    folder = fetch_model(arguments.model) if is_url(arguments.model) else Path(arguments.model)
    if folder is not None and (folder / "config.json").is_file():
        from oryx_megatron.eval.export import load_export

        if arguments.weights != "trained":
            raise ConfigError(f"--weights: {arguments.model} is an export, which holds one kind of weights; remove it")
        model, own = load_export(folder, arguments.tokenizer)
        codec = Pieces(own) if isinstance(own, Tokenizer) else own
        plans = Plans.of_export(model)
        return predict_with_export(model), codec, model.config.vocab_size, plans, folder.resolve().name
    from oryx_megatron.eval.generation import load_for_inference

    loaded = load_for_inference(arguments.model, tensor=ranks.world_size(), weights=arguments.weights)
    spoken = load_tokenizer(arguments.tokenizer or loaded.run.data.tokenizer)
    check_tokenizer(spoken, loaded.manifest.tokenizer, str(loaded.folder))
    model, plans = loaded.run.model, loaded.plans(*arguments.plans)
    return predict_with_checkpoint(loaded), Pieces(spoken), model.vocab_size, plans, model.name


if __name__ == "__main__":
    sys.exit(main())

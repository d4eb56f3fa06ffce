#!/usr/bin/env python3
"""Turn a Hugging Face folder into a checkpoint: an Oryx export, or a Llama as the start of an Oryx model.

    oryx convert from-hf EXPORT RUN --verify
    oryx convert from-hf EXPORT RUN --run configs/run/quickstart.yaml train.iterations=500
    oryx convert from-hf LLAMA RUN --run configs/run/pretrain-1.4b-gdn.yaml

The checkpoint lies in RUN/checkpoints and loads under any layout; RUN/config.yaml is the run that resumes from it. An
export made by convert_to_hf.py knows its run; for others, and for another run, --run (with key=value overrides) gives
it, its model replaced by the folder's, but for model.rope_theta and model.rope_scaling in overrides. A run config can
also name the folder itself: init_from (docs/operations.md).
Of a Llama, the attention path is copied and the recurrent path initialised (our own extension; docs/huggingface.md).
"""

from __future__ import annotations

if __name__ == "__main__" and not __package__:
    import checkout  # noqa: F401

import argparse
import sys
import warnings
from pathlib import Path

from oryx_megatron.cli import Parser, main_guard, seed
from oryx_megatron.display import shown
from oryx_megatron.errors import ConfigError, ConversionError
from oryx_megatron.paths import expand_arguments, is_url
from oryx_megatron.storage import named

CHANGEABLE = ("rope_theta", "rope_scaling")
"""Fields of a model that change none of its weights (hf/fields.py: ROPE)."""


def _parser() -> argparse.ArgumentParser:
    parser = Parser(description=__doc__)
    parser.add_argument("folder", help="Hugging Face folder with config.json and safetensors")
    parser.add_argument("output", help="run folder to make")
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value", help="changes to --run")
    parser.add_argument("--run", help="run config that the checkpoint shall belong to")
    parser.add_argument(
        "--mixer",
        choices=("gdn", "mamba2"),
        help="recurrence of a Llama start (default: that of --run)",
    )
    parser.add_argument("--seed", type=seed, default=0, help="of the new gates of a Llama start (default: %(default)s)")
    parser.add_argument(
        "--verify", action="store_true", help="compare logits of both sides; OUTPUT appears when they agree"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace OUTPUT")
    return parser


def _own_fields(overrides: list[str]) -> list[str]:
    """Fields of the model that overrides set in place of the folder's; ConfigError for those that change weights."""
    from oryx_megatron.config.schema import RENAMED

    own = []
    for override in overrides:
        key, _, field = override.partition("=")[0].strip().partition(".")
        name = field.partition(".")[0]
        name = RENAMED["ModelConfig"].get(name, name)
        if key == "model" and name not in CHANGEABLE:
            raise ConfigError(
                f"`{override}` has no effect: the model is the folder's, all but {' and '.join(CHANGEABLE)}; change it "
                "in a run that starts from the folder (init_from)"
            )
        own += [name] if key == "model" else []
    return own


@main_guard
def main(argv: list[str] | None = None) -> int:
    """Parse, convert, verify, report."""
    arguments = _parser().parse_intermixed_args(argv)  # overrides may stand before and after options
    expand_arguments(arguments, "folder", urls=True)
    expand_arguments(arguments, "output", "--run")
    if arguments.overrides and arguments.run is None:
        raise ConfigError(f"`{arguments.overrides[0]}` changes a run config; give it with --run")
    own = _own_fields(arguments.overrides)
    if own and arguments.verify:
        raise ConfigError(f"--verify compares equal models; with model.{own[0]} they differ; leave one out")
    warnings.filterwarnings("ignore", module=r"(megatron|torch)\.")
    from oryx_megatron.checkpoint.remote import fetch_model
    from oryx_megatron.config import load_run
    from oryx_megatron.hf.convert import import_, import_llama
    from oryx_megatron.hf.folders import hf_model_type
    from oryx_megatron.hf.verify import verify

    lines: list[str] = []
    run = load_run(arguments.run, arguments.overrides) if arguments.run is not None else None
    folder = fetch_model(arguments.folder) if is_url(arguments.folder) else arguments.folder
    if folder is None:
        raise ConversionError(f"{arguments.folder} holds no config.json; give a Hugging Face folder")
    llama = hf_model_type(folder) == "llama"
    if llama:
        if run is None:
            raise ConfigError("a Llama folder says nothing of a run to come; give a run config with --run")
        if arguments.verify:
            raise ConfigError("--verify compares equal models; a Llama and the Oryx that starts from it are not equal")
        done = import_llama(
            folder,
            arguments.output,
            run,
            mixer=arguments.mixer or run.model.mixer,
            seed=arguments.seed,
            own=own,
            overwrite=arguments.overwrite,
        )
    else:

        def check(checkpoint: Path) -> None:
            lines.extend(map(str, verify(checkpoint, folder, names=(arguments.output, arguments.folder))))

        done = import_(
            folder,
            arguments.output,
            run,
            own=own,
            overwrite=arguments.overwrite,
            check=check if arguments.verify else None,
        )
    what = f"{named(Path(done.source))} → {done.target}: {done.model.name}"
    print(f"{shown(what)}, {done.tensors} tensors, {done.bytes / 1e6:.1f} MB")
    for line in lines:
        print(line)
    if run is None:
        print(f"to resume, set the paths in {shown(f'{done.target}/config.yaml')}: an export names no folders")
    else:
        print(f"train it: python -m oryx_megatron.train {shown(f'{done.target}/config.yaml')}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

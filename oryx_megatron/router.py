"""`oryx router`: train the router of a model, which chooses the mode of every token.

    oryx router RUN
    torchrun --nproc-per-node 8 -m oryx_megatron.router RUN --texts 4096

The model stays as it is. Texts of the run's training data are read twice, all in attention mode and all in recurrent
mode; the router learns to predict from the tokens so far how many nats attention gains at each token. Thresholds for
every share of attention tokens come from validation texts. Writes RUN/router.safetensors; from then on `router:R` is a
mode plan wherever this model is evaluated, and an export carries the router.
"""

from __future__ import annotations

import dataclasses
import re
import sys
import warnings

from oryx_megatron.cli import Parser, main_guard
from oryx_megatron.config.schema import RouterConfig
from oryx_megatron.config.validate_modes import check_router_sizes
from oryx_megatron.errors import ConfigError
from oryx_megatron.paths import expand_arguments


@main_guard
def main(argv: list[str] | None = None) -> int:
    """Parse, train, print the table, write."""
    parser = Parser("oryx_megatron.router", description=__doc__)
    parser.add_argument("run", metavar="RUN", help="run folder, or one checkpoint")
    parser.add_argument("--overwrite", action="store_true", help="replace the run's router")
    docs = {
        "texts": "training texts", "held_out": "validation texts", "epochs": "times every text is used",
        "batch_size": "texts per update and rank", "lr": "peak learning rate", "weight_decay": "of AdamW",
        "width": "of the router", "layers": "of the router", "heads": "of the router",
        "table": "entries for counts of tokens that follow each other in training text; 0: none",
        "counted": "further texts per text that are read for these counts alone", "seed": "of weights and order",
    }  # fmt: skip
    for field in dataclasses.fields(RouterConfig):
        default = field.default
        parser.add_argument(
            _flag(field.name), type=type(default), default=default, help=f"{docs[field.name]} (default: {default})"
        )
    arguments = parser.parse_args(argv)
    expand_arguments(arguments, "run")
    warnings.filterwarnings("ignore", module=r"(megatron|torch)\.")
    values = {field.name: getattr(arguments, field.name) for field in dataclasses.fields(RouterConfig)}
    options = RouterConfig(**values)
    try:
        check_router_sizes(options)
    except ConfigError as error:
        raise ConfigError(re.sub(r"router\.(\w+)", lambda field: _flag(field[1]), str(error))) from None
    from oryx_megatron.eval.router_training import table, train_router

    rows, path = train_router(arguments.run, options, overwrite=arguments.overwrite)
    if path is not None:
        sys.stdout.write(table(rows))
        sys.stdout.write(f"written: {path}\n")
    return 0


def _flag(field: str) -> str:
    return f"--{field.replace('_', '-')}"


if __name__ == "__main__":
    sys.exit(main())

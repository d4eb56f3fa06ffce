"""oryx COMMAND …: everything that oryx_megatron does. `oryx COMMAND --help` explains each.

    oryx train configs/run/own-text.yaml --dry-run
    oryx data preprocess --help
    eval "$(oryx --completion bash)"

The same commands are `python -m oryx_megatron.train` and so on, and in a checkout `python tools/….py`.
"""

from __future__ import annotations

import difflib
import importlib
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from oryx_megatron import __version__, environment
from oryx_megatron.cli import Parser, main_guard
from oryx_megatron.errors import ConfigError

COMMANDS = {
    "train": ("oryx_megatron.train.__main__", "pretrain, or resume; on this process"),
    "launch": ("launch/local.sh", "train on all GPUs of this machine, with restarts"),
    "submit": ("launch/submit.py", "train, evaluate, convert as Slurm jobs"),
    "data preprocess": ("oryx_megatron.tools.preprocess_data", "text to tokens"),
    "data inspect": ("oryx_megatron.tools.inspect_dataset", "look into tokens, check and compare them"),
    "data merge": ("oryx_megatron.tools.merge_datasets", "several datasets to one"),
    "data split": ("oryx_megatron.tools.split_dataset", "one dataset to several"),
    "tokenizer": ("oryx_megatron.tools.train_tokenizer", "train a tokenizer, or adopt one"),
    "eval": ("oryx_megatron.eval.__main__", "perplexity and retrieval under mode plans"),
    "generate": ("oryx_megatron.tools.generate", "continue a text with a checkpoint"),
    "convert to-hf": ("oryx_megatron.tools.convert_to_hf", "checkpoint to Hugging Face"),
    "convert from-hf": ("oryx_megatron.tools.convert_from_hf", "Hugging Face to checkpoint"),
    "convert from-deepspeed": ("oryx_megatron.tools.convert_from_deepspeed", "DeepSpeed's to a checkpoint"),
    "inspect": ("oryx_megatron.tools.inspect_checkpoint", "look into a checkpoint"),
    "plan": ("oryx_megatron.tools.plan", "layouts on a cluster: memory, speed"),
    "arch": ("oryx_megatron.arch", "parameters and FLOPs of a model"),
    "config": ("oryx_megatron.config.__main__", "every field of a run"),
    "router": ("oryx_megatron.router", "train the router, which chooses modes by itself"),
    "explain": ("oryx_megatron.tools.explain_modes", "which tokens attend, and what it gains"),
    "doctor": ("oryx_megatron.doctor", "what this machine has, and what is missing"),
    "health": ("oryx_megatron.health", "check the nodes of a job, name the bad one"),
    "warmup": ("oryx_megatron.warmup", "compile the kernels of a run ahead"),
    "monitor": ("oryx_megatron.monitor", "follow runs in the terminal"),
    "plot": ("oryx_megatron.tools.plot_run", "draw runs"),
    "replay": ("oryx_megatron.train.replay", "do a bad step again"),
}
"""Command: its module with `main(argv)`, or its launch script; what it does."""
BASH = """_oryx() {{
    local typed="${{COMP_WORDS[*]:1:COMP_CWORD}}" command first=() second=()
    while IFS= read -r command; do
        if [[ $COMP_CWORD == 1 && $command == "$typed"* ]]; then first+=("${{command%% *}}"); fi
        if [[ $COMP_CWORD == 2 && $command == "$typed"* && $command == *" "* ]]; then second+=("${{command#* }}"); fi
    done <<<{commands}
    mapfile -t COMPREPLY < <(printf '%s\\n' "${{first[@]}}" "${{second[@]}}" | sort -u | sed '/^$/d')
}}
complete -o default -F _oryx oryx
"""
ZSH = """_oryx() {{
    local command
    local -aU first second
    for command in "${{(@f)$(printf '%s' {commands})}}"; do
        first+=("${{command%% *}}")
        if [[ $command == "$words[2] "* ]]; then second+=("${{command#* }}"); fi
    done
    if (( CURRENT == 2 )); then
        compadd -a first
    elif (( CURRENT == 3 && $#second )); then
        compadd -a second
    else
        _files
    fi
}}
(( $+functions[compdef] )) || {{ autoload -Uz compinit && compinit }}
compdef _oryx oryx
"""
COMPLETION = {"bash": BASH, "zsh": ZSH}


@main_guard
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that the first words name."""
    words = list(sys.argv[1:] if argv is None else argv)
    name = next((name for name in (" ".join(words[:2]), *words[:1]) if name in COMMANDS), None)
    if name is None:
        return _other(words)
    where, rest = COMMANDS[name][0], words[len(name.split()) :]
    if where.startswith("launch/"):
        _launch(where, rest)
    if name != "doctor":  # it says more about what is missing
        environment.check()
    sys.argv = [f"oryx {name}", *rest]  # what usage, logs and manifests call this process
    return importlib.import_module(where).main(rest) or 0


def _other(words: list[str]) -> int:
    """Help, version, completion; or what is wrong."""
    listed = "\n".join(f"  {name:<24}{what}" for name, (_, what) in COMMANDS.items())
    parser = Parser(prog="oryx", description=__doc__, epilog=f"commands:\n{listed}")
    parser.add_argument("--version", action="version", version=f"oryx_megatron {__version__}")
    parser.add_argument("--completion", choices=COMPLETION, help='for your shell: eval "$(oryx --completion bash)"')
    parser.add_argument("command", nargs="?", metavar="COMMAND", help="see below")
    if words and not words[0].startswith("-"):
        group = [name for name in COMMANDS if name.startswith(f"{words[0]} ")]
        if group and set(words[1:]) & {"-h", "--help"}:
            sys.stdout.write("".join(f"oryx {name:<24}{COMMANDS[name][1]}\n" for name in group))
            sys.stdout.write(f"oryx {words[0]} COMMAND --help explains each.\n")
            return 0
        if group:
            wanted = " or ".join(f"`oryx {name}`" for name in group)
            near = difflib.get_close_matches(" ".join(words[:2]), group, 1, 0.8) if words[1:] else ()
            if near:
                raise ConfigError(f"oryx: no command `{' '.join(words[:2])}`; did you mean `{near[0]}`?")
            raise ConfigError(f"oryx {words[0]}: expected {wanted}" + (f", got `{words[1]}`" if words[1:] else ""))
        near = difflib.get_close_matches(words[0], {name.split()[0] for name in COMMANDS}, 1)
        raise ConfigError(
            f"oryx: no command `{words[0]}`" + (f"; did you mean `{near[0]}`?" if near else "; see oryx --help")
        )
    if shell := parser.parse_args(words).completion:
        sys.stdout.write(COMPLETION[shell].format(commands="$'" + "\\n".join(COMMANDS) + "'"))
        return 0
    parser.print_help()
    return 0


def _launch(script: str, rest: list[str]) -> NoReturn:
    """Become a launch script that uses this interpreter."""
    from oryx_megatron.resources import folder

    path = folder("launch") / script.removeprefix("launch/")
    program = [sys.executable] if path.suffix == ".py" else ["bash"]
    command = [*program, str(path), *rest]
    environment = {"PYTHON": sys.executable, **os.environ}
    sys.stdout.flush()
    os.execvpe(command[0], command, environment)  # signals reach the script, which knows what to do with them


if __name__ == "__main__":
    sys.exit(main())

#!/usr/bin/env python
"""Write and submit the Slurm job of a run: batch script from a run config and a cluster profile.

Examples:
    oryx submit configs/run/pretrain-1.4b-gdn.yaml \\
        --cluster configs/cluster/h100-infiniband.yaml parallel.tensor=2 --print
    oryx submit RUN.yaml --cluster PROFILE \\
        --preprocess "--input corpus/ --tokenizer T --output data/pretrain" \\
        --shards 16 --evaluate "perplexity --plans attention recurrent" \\
        --convert=--verify

    oryx submit preprocess --cluster PROFILE --shards 16 \\
        --input corpus/ --tokenizer tokenizers/mine --output data/pretrain

`preprocess` submits the preprocessing alone: an array of shards and their merge.
Submitted again, it runs the shards that are missing. Scripts and logs go to
OUTPUT_DIR/slurm, those of `preprocess` to OUTPUT.slurm. The job puts itself back into the queue
when it is preempted or nears its time limit, and resumes from the checkpoint.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.append(str(Path(__file__).resolve().parents[1] / "tools"))
    import checkout  # noqa: F401

from cluster import Profile, Side, load_profile, one_line

from oryx_megatron.cli import Parser, main_guard
from oryx_megatron.config import load_run, told_with_place, validate
from oryx_megatron.config.schema import RunConfig
from oryx_megatron.data.files import read_json, replacing, shard_prefix, write_json
from oryx_megatron.errors import ConfigError, DataError
from oryx_megatron.paths import expand_arguments, is_url

REPOSITORY = Path(__file__).resolve().parents[1]
RETRIES = 2
"""How often a shard that failed is tried again by itself."""
SUBMITTED = "submitted.json"
"""Beside the scripts: Slurm's numbers of the jobs, by name."""
_ONE_THREAD = "export OMP_NUM_THREADS=1"


@dataclass(frozen=True)
class Job:
    """One batch script."""

    name: str
    """Unique here; also the script's file name."""
    script: str
    after: tuple[str, ...] = ()
    """Jobs that must have ended well before this one starts."""


@main_guard
def main(argv: list[str] | None = None) -> int:
    """Parse, check, and print or submit."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["preprocess"]:
        return _preprocess(argv[1:])
    a = _parser().parse_intermixed_args(argv)
    expand_arguments(a, "config", "--cluster")
    profile = load_profile(a.cluster, nodes=a.nodes, time_limit=a.time_limit)
    run = load_run(a.config, a.overrides)
    if not a.no_train:
        with told_with_place(a.config, a.overrides):
            validate(run, profile.nodes * profile.ranks)
    jobs = make_jobs(
        run,
        profile,
        (str(Path(a.config).resolve()), *a.overrides),
        preprocess=a.preprocess,
        shards=a.shards,
        train=not a.no_train,
        evaluate=a.evaluate,
        convert=a.convert,
    )
    if not a.no_train:
        _check_after(run, a.evaluate, [] if a.convert is None else [a.convert])
    if not jobs:
        raise ConfigError("--no-train: leaves nothing to submit; add --preprocess, --evaluate or --convert")
    if a.print:
        sys.stdout.write("\n".join(_described(job) for job in jobs))
    else:
        submit(jobs, folder_of(run) / "slurm", a.after)
    return 0


def _preprocess(argv: list[str]) -> int:
    """`submit.py preprocess`: the shards that are missing, and their merge."""
    a, arguments = _preprocess_parser().parse_known_args(argv)
    expand_arguments(a, "--cluster")
    profile = load_profile(a.cluster, nodes=1, time_limit=a.time_limit)
    parsed = importlib.import_module("oryx_megatron.tools.preprocess_data").parse_args(arguments)
    if is_url(parsed.output):
        raise ConfigError(f"--output: {parsed.output}: datasets are made on this machine's file systems; copy it after")
    expand_arguments(parsed, "--input", urls=True)  # as the jobs do
    expand_arguments(parsed, "--tokenizer", "--output")
    prefix = Path(parsed.output).absolute()
    if not parsed.overwrite and (prefix.parent / f"{prefix.name}.idx").exists():
        raise ConfigError(f"--output: dataset {prefix} exists already; choose another name or pass --overwrite")
    folder = prefix.with_name(f"{prefix.name}.slurm")
    _check_lines([*argv, str(folder)])
    if not a.print:
        _check_queue(folder)
    missing = missing_shards(prefix, a.shards, parsed)
    make = _Scripts(profile, folder, logs=folder, name=prefix.name)
    jobs = make.preprocess(arguments, a.shards, missing)
    there = a.shards - len(missing)
    if there and not a.print:
        sys.stdout.write(f"{there} of {a.shards} shards are there already\n")
    if a.print:
        sys.stdout.write("\n".join(_described(job) for job in jobs))
    else:
        submit(jobs, folder, a.after)
    return 0


def missing_shards(prefix: Path, shards: int, parsed: argparse.Namespace) -> list[int]:
    """Numbers, from 1, of the shards of a dataset that are not there; all of them where they are to be made anew.

    Args:
        prefix: Of the dataset.
        shards: How many there shall be.
        parsed: Arguments of tools/preprocess_data.py.

    Raises:
        ConfigError: a shard is there that is damaged, or of another corpus or tokenizer.
    """
    from oryx_megatron.data.indexed import file_of, open_dataset

    if parsed.overwrite or parsed.restart:
        return list(range(1, shards + 1))
    missing: list[int] = []
    for number in range(1, shards + 1):
        part = shard_prefix(prefix, (number, shards))
        files = [path for end in ("bin", "idx", "json", "skipped.jsonl") if (path := file_of(part, end)).exists()]
        if not files or file_of(part, "work").exists():  # resumed where it was killed
            missing.append(number)
            continue
        try:
            why = _other(open_dataset(part, content=False).manifest or {}, (number, shards), parsed)
        except DataError as error:
            why = f"is not whole ({error})"
        if why is not None:
            names = " ".join(shlex.quote(str(path)) for path in files)
            raise ConfigError(f"--output: {part} {why}; `rm {names}`, or pass --overwrite to make all shards anew")
    return missing


def _other(manifest: dict[str, Any], shard: tuple[int, int], parsed: argparse.Namespace) -> str | None:
    """Why a dataset is not the shard that these arguments make; None when it is, as far as its manifest tells."""
    from oryx_megatron.data.tokenizer import difference

    if manifest.get("shard") != list(shard):
        return f"is no shard {shard[0]}/{shard[1]}"
    if (why := difference(manifest["tokenizer"], _described_tokenizer(parsed.tokenizer))) is not None:
        return f"was made with {why}"
    if _places(source := manifest["source"]) != _places(parsed.input):
        return f"was made from {' '.join(source)}, not {' '.join(parsed.input)}"
    return None


@functools.cache
def _described_tokenizer(folder: str) -> dict[str, Any]:
    from oryx_megatron.data.tokenizer import load_tokenizer

    return load_tokenizer(folder).describe()


def _places(inputs: list[str]) -> list[str]:
    return [text if is_url(text) else str(Path(text).absolute()) for text in inputs]


def _check_queue(folder: Path) -> None:
    """Raise ConfigError while jobs that were submitted from a folder of scripts are queued or running."""
    try:
        known = read_json(folder / SUBMITTED)
    except DataError:
        return
    command = ["squeue", "--noheader", "--format=%F"]
    try:
        queue = subprocess.run(command, capture_output=True, text=True, check=False).stdout.split()
    except OSError:
        return  # sbatch will be missing, too
    if left := {name: number for name, number in known.items() if number in queue}:
        names = ", ".join(f"{number} ({name})" for name, number in left.items())
        raise ConfigError(
            f"--output: job {names} of this dataset is still queued or running; wait for it, or `scancel "
            f"{' '.join(left.values())}` first"
        )


def folder_of(run: RunConfig) -> Path:
    """Where scripts and logs of a run go: output_dir, or runs/NAME for one on object storage."""
    if is_url(run.output_dir):
        return Path("runs", run.output_dir.rstrip("/").rpartition("/")[2]).absolute()
    return Path(run.output_dir).absolute()


def make_jobs(
    run: RunConfig,
    profile: Profile,
    arguments: tuple[str, ...],
    *,
    preprocess: str | None = None,
    shards: int = 1,
    train: bool = True,
    evaluate: Sequence[str] = (),
    convert: str | None = None,
) -> list[Job]:
    """The jobs of a run in the order of submission.

    Args:
        arguments: Path of the run config and overrides, as oryx_megatron.train takes them.
        preprocess: Arguments of tools/preprocess_data.py without --shard; None: no preprocessing.
        shards: Array tasks of the preprocessing.
        train: Whether to train.
        evaluate: For each evaluation the arguments of oryx_megatron.eval without the model.
        convert: Arguments of tools/convert_to_hf.py without the checkpoint; None: no conversion.

    Raises:
        ConfigError: a path or an argument cannot stand in a batch script, or an argument is missing.
    """
    folder = folder_of(run)
    _check_lines([*arguments, str(folder), run.output_dir, preprocess or "", convert or "", *evaluate])
    if "\\" in str(folder):
        raise ConfigError(f"output_dir: {folder}: Slurm gives a backslash in the path of a log a meaning of its own")
    make = _Scripts(profile, folder, run=run.output_dir if is_url(run.output_dir) else None)
    jobs: list[Job] = []
    before: tuple[str, ...] = ()
    if preprocess is not None:
        jobs += make.preprocess(_split("--preprocess", preprocess), shards)
        before = (jobs[-1].name,)
    elif shards != 1:
        raise ConfigError("--shards: needs --preprocess")
    if train:
        jobs.append(make.pretrain(arguments, before))
        before = ("pretrain",)
    for number, text in enumerate(evaluate, 1):
        name = "evaluate" if len(evaluate) == 1 else f"evaluate-{number}"
        jobs.append(make.evaluate(name, _split("--evaluate", text), before))
    if convert is not None:
        jobs.append(make.convert(_split("--convert", convert), before))
    return jobs


def _check_lines(texts: Sequence[str]) -> None:
    for text in (*texts, str(Path.cwd()), str(REPOSITORY)):
        if not one_line(text):
            raise ConfigError(f"{text!r} holds a line break or a control character, which a batch script cannot hold")


class _Scripts:
    """Writes the text of batch scripts.

    Args:
        profile: Of the cluster.
        folder: Of the run, on a file system that all nodes see.
        logs: Folder of the logs; None: slurm/ in `folder`.
        name: Of the jobs; None: the folder's.
        run: What evaluation and conversion read; None: `folder`.
    """

    def __init__(
        self,
        profile: Profile,
        folder: Path,
        *,
        logs: Path | None = None,
        name: str | None = None,
        run: str | None = None,
    ) -> None:
        self.profile, self.folder = profile, folder
        self.logs, self.name, self.run = logs or folder / "slurm", name or folder.name, run or str(folder)

    def pretrain(self, arguments: tuple[str, ...], before: tuple[str, ...]) -> Job:
        profile = self.profile
        options = {
            "nodes": profile.nodes,
            "time": profile.time_limit,
            "signal": f"B:USR1@{profile.signal_lead}",
            "exclusive": profile.exclusive,
            "requeue": True,
        }
        health = [f"--gpus={profile.gpus_per_node}", *profile.health_options] if profile.health else []
        side = Side(gpus_per_node=profile.gpus_per_node)
        body = [f"HEALTH=({_words(health)})", f"{_words(['pretrain', *arguments])}"]
        return Job("pretrain", self._script("pretrain", side, options, body), before)

    def preprocess(self, arguments: list[str], shards: int, missing: Sequence[int] | None = None) -> list[Job]:
        """The shards as an array, and the merge of several; `missing`: those to make, None: all."""
        if shards < 1:
            raise ConfigError(f"--shards: {shards} should be at least 1")
        known, _ = _options("output").parse_known_args(arguments)
        if known.output is None:
            raise ConfigError("--preprocess: `--output PREFIX` is missing among the arguments")
        if any(argument.partition("=")[0] == "--shard" for argument in arguments):
            raise ConfigError("--preprocess: leave out --shard and say --shards N")
        side = self.profile.jobs.preprocess
        if not any(argument.partition("=")[0] == "--processes" for argument in arguments):
            arguments = [*arguments, f"--processes={side.cpus_per_task or self.profile.cpus_per_task}"]
        if shards == 1:
            command = _words(["tool", "preprocess_data", *arguments])
            return [Job("preprocess", self._script("preprocess", side, {"nodes": 1}, [_ONE_THREAD, command]))]
        tasks = f"1-{shards}" if missing is None or len(missing) == shards else ",".join(map(str, missing))
        array = self._script(
            "preprocess",
            side,
            {"nodes": 1, "array": tasks, "requeue": True},
            [_ONE_THREAD, _words(["shard", str(shards), *arguments])],
        )
        parts = [str(shard_prefix(known.output, (shard, shards))) for shard in range(1, shards + 1)]
        replace = ["--overwrite"] if "--overwrite" in arguments else []
        merge = self._script(
            "merge",
            side,
            {"nodes": 1},
            [_words(["tool", "merge_datasets", f"--output={known.output}", *replace, *parts])],
        )
        if missing is not None and not missing:
            return [Job("merge", merge)]
        return [Job("preprocess", array), Job("merge", merge, ("preprocess",))]

    def evaluate(self, name: str, arguments: list[str], before: tuple[str, ...]) -> Job:
        if not arguments or arguments[0] not in ("perplexity", "retrieval"):
            raise ConfigError("--evaluate: begin with `perplexity` or `retrieval`, then options of oryx_megatron.eval")
        command, *rest = arguments
        if not any(argument.partition("=")[0] == "--output" for argument in rest):
            rest += ["--output", str(self.folder / name), "--overwrite"]  # of an earlier job; only its own results
        side = self.profile.jobs.evaluate
        if side.gpus_per_node is None:
            side = dataclasses.replace(side, gpus_per_node=min(1, self.profile.gpus_per_node))
        body = [_words(["evaluate", command, self.run, *rest])]
        return Job(name, self._script(name, side, {"nodes": 1}, body), before)

    def convert(self, arguments: list[str], before: tuple[str, ...]) -> Job:
        if not arguments or arguments[0].startswith("-"):
            arguments = [f"{self.run}/hf", *arguments]
        body = [_words(["tool", "convert_to_hf", self.run, *arguments])]
        return Job("convert", self._script("convert", self.profile.jobs.convert, {"nodes": 1}, body), before)

    # ------------------------------------------------------------------------------------------------- internals

    def _script(self, name: str, side: Side, options: dict[str, object], body: list[str]) -> str:
        profile = self.profile
        gpus = side.gpus_per_node or 0
        log = _escaped(str(self.logs)) + f"/{name}-%{'A_%a' if 'array' in options else 'j'}.log"
        requested: dict[str, object] = {
            "job-name": f"{self.name}-{name}",
            "account": profile.account,
            "partition": side.partition or profile.partition,
            "qos": profile.qos,
            "reservation": profile.reservation,
            "constraint": side.constraint or profile.constraint,
            "exclude": profile.exclude,
            "ntasks-per-node": 1,
            "cpus-per-task": side.cpus_per_task or profile.cpus_per_task,
            "mem": side.memory or profile.memory,
            "time": side.time_limit or profile.time_limit,
            "chdir": str(Path.cwd()),
            "output": log,
            "open-mode": "append",
            **options,
        }
        if gpus:
            kind = f"{profile.gpu_type}:" if profile.gpu_type else ""
            requested[profile.gpu_option] = f"{'gpu:' if profile.gpu_option == 'gres' else ''}{kind}{gpus}"
        ranks = gpus or (profile.ranks if name == "pretrain" else 1)
        lines = ["#!/bin/bash"]
        lines += [f"#SBATCH {_option(key, value)}" for key, value in requested.items() if value not in (None, False)]
        lines += [f"#SBATCH {_sbatch_word(option)}" for option in profile.sbatch]
        lines += [
            "# Written by launch/submit.py: topology and environment. What is trained stands in the run config.",
            "# shellcheck disable=SC1091,SC2016,SC2034",
            "set -eo pipefail",
            *profile.setup,
        ]
        if profile.modules:
            lines.append(f"module load {_words(profile.modules)}")
        if profile.venv is not None and not profile.container.image:
            lines.append(f"source {_words([f'{profile.venv}/bin/activate'])}")
        environment = {
            **_network(profile),
            **profile.environment,
            "ORYX_PYTHON": _python(profile),
            "ORYX_RANKS": str(ranks),
            "ORYX_RESTARTS": str(profile.max_restarts if name == "pretrain" else 0),
            "ORYX_REQUEUES": str(RETRIES if name == "preprocess" else profile.max_requeues),
            "ORYX_NUMA": profile.numa if gpus else "none",
            "ORYX_END_WAIT": str(profile.end_wait),
            **({} if profile.heartbeat is None else {"ORYX_HEARTBEAT": str(profile.heartbeat)}),
        }
        lines += [f"export {key}={shlex.quote(value)}" for key, value in environment.items()]
        srun, inside = self._container(gpus)
        lines += [
            f"RUN_FOLDER={shlex.quote(str(self.folder))}",
            f"SRUN=({_words([*srun, *profile.srun])})",
            f"INSIDE=({_words(inside)})",
            f"source {shlex.quote(str(REPOSITORY / 'launch' / 'slurm.sh'))}",
            *body,
        ]
        return "\n".join(lines) + "\n"

    def _container(self, gpus: int) -> tuple[list[str], list[str]]:
        """Options of srun, and the command that enters the container."""
        container = self.profile.container
        if not container.image:
            return [], []
        here = str(Path.cwd())
        own = list(dict.fromkeys([str(REPOSITORY), here, str(self.folder)]))
        for path in own:
            if set(path) & set(":,"):
                raise ConfigError(f"{path}: a path with a colon or a comma cannot be mounted into a container")
        mounts = [*container.mounts, *(path for path in own if not _mounted(path, container.mounts))]
        if container.runtime == "pyxis":
            full = [mount if ":" in mount else f"{mount}:{mount}" for mount in mounts]
            flags = [f"--container-image={container.image}", f"--container-mounts={','.join(full)}"]
            return [*flags, f"--container-workdir={here}", *container.options], []
        binds = [f"--bind={mount}" for mount in mounts]
        gpu = ["--nv"] if gpus else []
        return [], ["apptainer", "exec", *gpu, *binds, f"--pwd={here}", *container.options, container.image]


def submit(jobs: list[Job], folder: Path, after: str | None = None) -> list[str]:
    """Write the scripts into `folder`, submit them, and say what was done; returns Slurm's numbers of the jobs.

    Raises:
        ConfigError: there is no sbatch here, or it refused a script. Those before it stay submitted, and are named.
    """
    if shutil.which("sbatch") is None:
        raise ConfigError("sbatch is not here: submit from a login node of the cluster, or see the script by --print")
    numbers: dict[str, str] = {}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for job in jobs:
            path = folder / f"{job.name}.sbatch"
            with replacing(path) as temporary:
                temporary.write_text(job.script, encoding="utf-8")
            before = [numbers[name] for name in job.after] or ([after] if after else [])
            dependency = [f"--dependency=afterok:{':'.join(before)}", "--kill-on-invalid-dep=yes"] if before else []
            done = subprocess.run(
                ["sbatch", "--parsable", *dependency, str(path)], capture_output=True, text=True, check=False
            )
            if done.returncode:
                said = " ".join(done.stderr.split()) or f"exit code {done.returncode}"
                earlier = f"; submitted before: {', '.join(numbers.values())}" if numbers else ""
                raise ConfigError(f"{path}: {said}{earlier}")
            numbers[job.name] = done.stdout.strip().partition(";")[0]
            write_json(folder / SUBMITTED, numbers)
            waits = f", after {', '.join(before)}" if before else ""
            sys.stdout.write(f"job {numbers[job.name]}: {job.name}{waits}; {path}\n")
    except OSError as error:
        raise ConfigError(f"{folder}: scripts cannot be written: {error.strerror}") from None
    sys.stdout.write(f"logs: {folder}/*.log\n")
    return list(numbers.values())


def _network(profile: Profile) -> dict[str, str]:
    """NCCL's and gloo's environment."""
    network, found = profile.network, {}
    if network.interface is not None:
        found["NCCL_SOCKET_IFNAME"] = network.interface
        if not network.interface.startswith("^"):  # gloo knows whole names only
            found["GLOO_SOCKET_IFNAME"] = network.interface.removeprefix("=")
    if network.kind == "ethernet":
        found["NCCL_IB_DISABLE"] = "1"
    if network.hca is not None:
        found["NCCL_IB_HCA"] = network.hca
    if network.gid_index is not None:
        found["NCCL_IB_GID_INDEX"] = str(network.gid_index)
    if network.listen == "any":
        found["ORYX_LISTEN"] = "any"
    return found


def _python(profile: Profile) -> str:
    if profile.python is not None:
        return profile.python
    if profile.venv is not None:
        return f"{profile.venv}/bin/python"
    return "python3" if profile.container.image else sys.executable


def _mounted(path: str, mounts: Iterable[str]) -> bool:
    """Whether one of the mounts makes `path` visible under its own name."""
    for mount in mounts:
        outside, _, rest = mount.partition(":")
        if (rest.partition(":")[0] or outside) == outside and Path(path).is_relative_to(outside):
            return True
    return False


def _words(words: Iterable[str]) -> str:
    # shellcheck takes a bare comma in an array for a mistake.
    return " ".join(f"'{word}'" if "," in word and shlex.quote(word) == word else shlex.quote(word) for word in words)


def _sbatch_word(text: str) -> str:
    """A word as sbatch reads it in an #SBATCH line: bare, or in double quotes with backslashes."""
    if re.fullmatch(r"[A-Za-z0-9_./:@,=+%&|*\[\]-]*", text):
        return text
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _option(name: str, value: object) -> str:
    return f"--{name}" if value is True else f"--{name}={_sbatch_word(str(value))}"


def _escaped(path: str) -> str:
    """A path in which Slurm replaces nothing."""
    return path.replace("%", "%%")


def _check_after(run: RunConfig, evaluate: Sequence[str], convert: Sequence[str]) -> None:
    """Raise ConfigError where what is to follow a run would fail when that has been trained."""
    modules = {"--evaluate": "oryx_megatron.eval.__main__", "--convert": "oryx_megatron.tools.convert_to_hf"}
    for option, text in [*(("--evaluate", text) for text in evaluate), *(("--convert", text) for text in convert)]:
        try:
            importlib.import_module(modules[option]).check(_split(option, text), run)
        except ConfigError as error:
            raise ConfigError(f"{option}: `{text}`: {error}") from None


def _split(option: str, text: str) -> list[str]:
    try:
        return shlex.split(text)
    except ValueError as error:
        raise ConfigError(f"{option}: `{text}`: {error}") from None


def _options(*names: str) -> argparse.ArgumentParser:
    """Finds a few options among another program's."""
    parser = Parser(prog="oryx submit", add_help=False, allow_abbrev=False)
    for name in names:
        parser.add_argument(f"--{name}")
    return parser


def _described(job: Job) -> str:
    waits = f"  (starts after: {', '.join(job.after)})" if job.after else ""
    first, rest = job.script.split("\n", 1)
    return f"{first}\n# ---- {job.name}{waits}\n{rest}"


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="oryx submit", description=__doc__)
    parser.add_argument("config", metavar="RUN.yaml", help="run config")
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="key=value", help="fields to change, e.g. parallel.tensor=2"
    )
    parser.add_argument("--cluster", required=True, metavar="PROFILE", help="cluster profile (YAML)")
    parser.add_argument("--nodes", type=int, help="instead of the profile's")
    parser.add_argument("--time-limit", metavar="HH:MM:SS", help="instead of the profile's")
    parser.add_argument("--preprocess", metavar="ARGS", help="first run tools/preprocess_data.py with these arguments")
    parser.add_argument("--shards", type=int, default=1, metavar="N", help="as an array of N jobs, and merge")
    parser.add_argument("--no-train", action="store_true", help="leave out the training")
    parser.add_argument(
        "--evaluate", action="append", default=[], metavar="ARGS", help="then run oryx_megatron.eval; may be repeated"
    )
    parser.add_argument(
        "--convert", metavar="ARGS", help='then run tools/convert_to_hf.py, e.g. "--verify" or "OUT --dtype bf16"'
    )
    parser.add_argument("--after", metavar="JOB", help="start when this Slurm job has ended well")
    parser.add_argument("--print", action="store_true", help="show the scripts and do nothing")
    return parser


def _preprocess_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="oryx submit preprocess",
        description="Submit an array of shards, and their merge. Other options are tools/preprocess_data.py's.",
        allow_abbrev=False,
    )
    parser.add_argument("--cluster", required=True, metavar="PROFILE", help="cluster profile (YAML)")
    parser.add_argument("--shards", type=int, default=1, metavar="N", help="as an array of N jobs, and merge")
    parser.add_argument("--time-limit", metavar="HH:MM:SS", help="instead of the profile's")
    parser.add_argument("--after", metavar="JOB", help="start when this Slurm job has ended well")
    parser.add_argument("--print", action="store_true", help="show the scripts and do nothing")
    return parser


if __name__ == "__main__":
    sys.exit(main())

"""A cluster profile (configs/cluster/*.yaml): what a batch script must know of a cluster. No hyper-parameters.

Every fault is one ConfigError line that names the file and the field.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from oryx_megatron.config import from_dict
from oryx_megatron.config.loading import config_text, expand_paths
from oryx_megatron.config.types import LocalPath, PathOrName
from oryx_megatron.config.yaml_text import parse_yaml
from oryx_megatron.errors import ConfigError
from oryx_megatron.paths import expand


@dataclass(frozen=True, kw_only=True)
class Network:
    """How ranks of different nodes talk: becomes NCCL's and gloo's environment."""

    kind: Literal["infiniband", "roce", "ethernet", "auto"] = "auto"
    """ethernet: NCCL_IB_DISABLE=1; auto: NCCL finds out. Anything else goes under `environment`."""
    interface: str | None = None
    """NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME, e.g. `ib0` or `=bond0` or `^lo,docker`; null: they choose."""
    hca: str | None = None
    """NCCL_IB_HCA, e.g. `mlx5` or `=mlx5_0:1,mlx5_1:1`; infiniband and roce only."""
    gid_index: int | None = None
    """NCCL_IB_GID_INDEX; roce only."""
    listen: Literal["address", "any"] = "address"
    """Where the rendezvous listens: on the first node's address as Slurm knows it, or on all of its interfaces."""


@dataclass(frozen=True, kw_only=True)
class Container:
    """Image that the ranks run in. The repository, the working folder and the output folder are mounted as well."""

    runtime: Literal["none", "pyxis", "apptainer"] = "none"
    """pyxis: `srun --container-image`; apptainer: `apptainer exec`."""
    image: PathOrName = ""
    """Image file, or a name that the runtime understands."""
    mounts: tuple[PathOrName, ...] = ()
    """`/path`, `/path:/inside` or `/path:/inside:ro`."""
    options: tuple[str, ...] = ()
    """More options of srun (pyxis) or of `apptainer exec`."""


@dataclass(frozen=True, kw_only=True)
class Side:
    """Resources of a job on one node beside training; null: as for training."""

    partition: str | None = None
    """Partition."""
    constraint: str | None = None
    """Node features."""
    gpus_per_node: int | None = None
    """GPUs; null: none for preprocessing and conversion, one for evaluation where there are GPUs."""
    cpus_per_task: int | None = None
    """CPUs."""
    memory: str | None = None
    """Memory, as `64G`."""
    time_limit: str | None = None
    """Time limit."""


@dataclass(frozen=True, kw_only=True)
class Jobs:
    """Resources of the jobs beside training."""

    preprocess: Side = Side()
    """Each shard of tools/preprocess_data.py, and the merge."""
    evaluate: Side = Side()
    """oryx_megatron.eval."""
    convert: Side = Side()
    """tools/convert_to_hf.py."""


@dataclass(frozen=True, kw_only=True)
class Profile:
    """One cluster, or one way of using it."""

    nodes: int
    """Nodes of the training job."""
    gpus_per_node: int
    """GPUs, and ranks, per node; 0: ranks on CPUs."""
    ranks_per_node: int | None = None
    """Ranks per node where there are no GPUs; null: 1."""
    cpus_per_task: int
    """CPUs per node: Slurm's task is the torchrun agent with all ranks of its node."""
    time_limit: str
    """`HH:MM:SS` or `D-HH:MM:SS`, in quotes."""
    signal_lead: int = 300
    """Seconds before the time limit at which Slurm tells the job to save and requeue."""
    end_wait: int = 120
    """Seconds that torchrun's agents may take to end once one of them has (srun --wait)."""
    account: str | None = None
    """--account."""
    partition: str | None = None
    """--partition."""
    qos: str | None = None
    """--qos."""
    reservation: str | None = None
    """--reservation."""
    constraint: str | None = None
    """--constraint: node features."""
    exclude: str | None = None
    """--exclude: nodes to stay away from."""
    memory: str | None = None
    """--mem per node; `0`: all."""
    exclusive: bool = True
    """--exclusive: no other job on the nodes of the training job."""
    gpu_option: Literal["gres", "gpus-per-node"] = "gres"
    """How to ask for GPUs: --gres=gpu:N or --gpus-per-node=N."""
    gpu_type: str | None = None
    """Kind of GPU, as in gpu:h100:8."""
    sbatch: tuple[str, ...] = ()
    """More options of sbatch, e.g. `--switches=1`."""
    srun: tuple[str, ...] = ()
    """More options of every srun."""
    max_restarts: int = 3
    """Times that torchrun restarts the ranks after one died."""
    heartbeat: int | None = None
    """Have nvidia-resiliency-ext (which must be installed) start the ranks, and end one that makes no progress for this
    many seconds, ten times as many before its first step; null: torchrun, and faults.hang_timeout in the run config."""
    max_requeues: int = 1000
    """Times that the job puts itself back into the queue."""
    numa: Literal["node", "socket", "exclusive", "core-complex", "none"] = "node"
    """CPUs that a rank is bound to, by the place of its GPU (torchrun --numa-binding); without GPUs no effect."""
    health: bool = True
    """Run oryx_megatron.health before training."""
    health_options: tuple[str, ...] = ()
    """Options of oryx_megatron.health, e.g. `--min-gbps=20`."""
    network: Network = Network()
    """Between nodes."""
    container: Container = Container()
    """Image."""
    modules: tuple[str, ...] = ()
    """`module load` these."""
    venv: LocalPath | None = None
    """Virtual environment to activate (without a container) and whose Python to use."""
    python: LocalPath | None = None
    """Interpreter; null: the venv's, in a container python3, else the one that submits."""
    setup: tuple[str, ...] = ()
    """Lines of shell, run as they are before anything else on the first node. For what needs expansion."""
    environment: dict[str, str] = field(default_factory=dict)
    """Environment variables, taken literally."""
    jobs: Jobs = Jobs()
    """Resources of the jobs beside training."""

    @property
    def ranks(self) -> int:
        """Ranks per node."""
        return self.gpus_per_node or self.ranks_per_node or 1


def load_profile(path: str | Path, **changes: Any) -> Profile:
    """The profile in a YAML file, with some fields replaced.

    Raises:
        ConfigError: unreadable, an unknown or a missing field, a value of the wrong type or out of range.
    """
    path = expand(str(path), "--cluster")
    source = path
    data = parse_yaml(config_text(Path(path)), source)
    if not isinstance(data, dict):
        raise ConfigError(f"{source}: expected `name: value` lines of a cluster profile")
    _quoted_times(data, source)
    data |= {name: value for name, value in changes.items() if value is not None}
    profile = expand_paths(from_dict(Profile, data, source=source), source)
    _check(profile, source)
    return profile


def seconds(limit: str) -> int | None:
    """Seconds of a Slurm time limit (`MM`, `MM:SS`, `HH:MM:SS`, `D-HH`, `D-HH:MM`, `D-HH:MM:SS`); None: no such."""
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", limit)
    if match is None:
        return None
    days, first, second, third = (int(part) if part is not None else None for part in match.groups())
    if days is not None:
        return ((days * 24 + (first or 0)) * 60 + (second or 0)) * 60 + (third or 0)
    if third is not None:
        return ((first or 0) * 60 + (second or 0)) * 60 + third
    return (first or 0) * 60 + (second or 0)


def texts(value: Any, name: str = "") -> Iterable[tuple[str, str]]:
    """Every text in a config object with the name of its field."""
    if isinstance(value, str):
        yield name, value
    elif dataclasses.is_dataclass(value):
        for member in dataclasses.fields(value):
            yield from texts(getattr(value, member.name), f"{name}.{member.name}" if name else member.name)
    elif isinstance(value, dict):
        for key, entry in value.items():
            yield f"{name} (a key)", key
            yield from texts(entry, f"{name}.{key}")
    elif isinstance(value, tuple):
        for i, entry in enumerate(value):
            yield from texts(entry, f"{name}[{i}]")


def one_line(text: str) -> bool:
    """Whether a text can stand in a line of a script: no line breaks, no control characters."""
    return text.isprintable()


def _quoted_times(data: dict[str, Any], source: str) -> None:
    """YAML 1.1 reads 24:00:00 as a number to the base 60."""
    jobs = data.get("jobs")
    sides = {f"jobs.{name}.": side for name, side in jobs.items()} if isinstance(jobs, dict) else {}
    for prefix, mapping in {"": data, **sides}.items():
        limit = mapping.get("time_limit") if isinstance(mapping, dict) else None
        if isinstance(limit, int):
            raise ConfigError(f'{source}: {prefix}time_limit: put it in quotes, as "24:00:00": YAML reads a number')


def _check(profile: Profile, source: str) -> None:
    def wrong(why: str) -> ConfigError:
        return ConfigError(f"{source}: {why}")

    for name, text in texts(profile):
        if not one_line(text):
            raise wrong(f"{name}: {text!r} holds a line break or a control character")
    least = {"nodes": 1, "cpus_per_task": 1, "signal_lead": 1, "end_wait": 1, "gpus_per_node": 0}
    for name, number in {**least, "max_restarts": 0, "max_requeues": 0}.items():
        if getattr(profile, name) < number:
            raise wrong(f"{name}: {getattr(profile, name)} should be at least {number}")
    if profile.heartbeat is not None and profile.heartbeat < 1:
        raise wrong(f"heartbeat: {profile.heartbeat} should be at least 1, or null")
    if profile.ranks_per_node is not None:
        if profile.gpus_per_node and profile.ranks_per_node != profile.gpus_per_node:
            raise wrong(f"ranks_per_node: {profile.ranks_per_node}, but there is one rank for each of gpus_per_node")
        if profile.ranks_per_node < 1:
            raise wrong(f"ranks_per_node: {profile.ranks_per_node} should be at least 1")
    if profile.cpus_per_task < profile.ranks:
        raise wrong(f"cpus_per_task: {profile.cpus_per_task} CPUs are fewer than the {profile.ranks} ranks of a node")
    limits = {"time_limit": profile.time_limit}
    for name in ("preprocess", "evaluate", "convert"):
        side: Side = getattr(profile.jobs, name)
        if side.time_limit is not None:
            limits[f"jobs.{name}.time_limit"] = side.time_limit
        if side.gpus_per_node is not None and side.gpus_per_node < 0:
            raise wrong(f"jobs.{name}.gpus_per_node: {side.gpus_per_node} should not be negative")
        if side.cpus_per_task is not None and side.cpus_per_task < 1:
            raise wrong(f"jobs.{name}.cpus_per_task: {side.cpus_per_task} should be at least 1")
    for name, limit in limits.items():
        if not seconds(limit):
            raise wrong(f"{name}: `{limit}` is no time limit like 24:00:00 or 2-00:00:00")
    if profile.signal_lead >= (seconds(profile.time_limit) or 0):
        raise wrong(f"signal_lead: {profile.signal_lead} s are not less than time_limit {profile.time_limit}")
    for name in profile.environment:
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            raise wrong(f"environment: `{name}` is no name of a variable")
    network = profile.network
    if network.hca is not None and network.kind not in ("infiniband", "roce"):
        raise wrong(f"network.hca: is for infiniband and roce, not for kind {network.kind}")
    if network.gid_index is not None and network.kind != "roce":
        raise wrong(f"network.gid_index: is for roce, not for kind {network.kind}")
    for i, option in enumerate(profile.sbatch):
        if not option.startswith("-"):
            raise wrong(f"sbatch[{i}]: `{option}` is no option; write --name=value")
    if (profile.container.runtime == "none") == bool(profile.container.image):
        raise wrong("container: an image needs a runtime, pyxis or apptainer, and the other way round")
    if profile.container.image:
        for i, mount in enumerate(profile.container.mounts):
            if not re.fullmatch(r"/[^:,]*(:/[^:,]*(:[a-z,]+)?)?", mount):
                raise wrong(f"container.mounts[{i}]: `{mount}` is not like /path, /path:/inside or /path:/inside:ro")

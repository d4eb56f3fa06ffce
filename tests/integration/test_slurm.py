"""launch/submit.py on a real Slurm: two nodes on this machine, started and stopped by a fixture (no systemd needed).

Needs root and Debian's packages slurm-wlm and munge; without them the tests skip.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from oryx_megatron.checkpoint import list_checkpoints
from oryx_megatron.ports import free_port
from oryx_megatron.testing.project import synthetic_texts, tiny_project
from oryx_megatron.train import __main__ as train

REPOSITORY = Path(__file__).parents[2]
MISSING = [name for name in ("munged", "slurmctld", "slurmd", "sbatch") if shutil.which(name) is None]
pytestmark = [
    pytest.mark.skipif(bool(MISSING), reason=f"no {', '.join(MISSING)}: apt-get install slurm-wlm munge"),
    pytest.mark.skipif(os.geteuid() != 0, reason="slurmctld and slurmd of the test run as root"),
    pytest.mark.xdist_group("slurm"),
]
HOSTILE = 'it\'s "a" $(touch pwned) & ; #x %j'
CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=10
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/ctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/log/ctld.log
SlurmdLogFile={folder}/log/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=1,sched_min_interval=100000,batch_sched_delay=0,bf_interval=1
ReturnToService=2
JobRequeue=1
MpiDefault=none
SlurmdTimeout=6
KillWait=60
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=1 RealMemory=4000
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=1 RealMemory=4000
PartitionName=main Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP OverTimeLimit=0
"""


class Slurm:
    """Two nodes, n1 and n2, of one CPU each."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.configuration = folder / "slurm.conf"
        ports = [free_port() for _ in range(3)]
        for name in ("state", "spool/n1", "spool/n2", "log", "munge"):
            (folder / name).mkdir(parents=True)
        self.configuration.write_text(CONFIGURATION.format(host=socket.gethostname(), folder=folder, ports=ports))

    def start(self) -> None:
        """Start all daemons and wait for the nodes."""
        munge = self.folder / "munge"
        (munge / "key").write_bytes(os.urandom(128))
        (munge / "key").chmod(0o400)
        for path in (munge, munge / "key"):
            shutil.chown(path, "munge", "munge")
        names = {"socket": "socket", "key-file": "key", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        options = [f"--{option}={munge / name}" for option, name in names.items()]
        run("runuser", "-u", "munge", "--", "munged", "--force", *options)
        run("slurmctld", "-c", "-f", str(self.configuration))
        for node in ("n1", "n2"):
            self.start_node(node)
        wait(lambda: self.output("sinfo", "-h", "-o", "%D %T") == "2 idle", 60, lambda: self.output("sinfo"))

    def start_node(self, node: str) -> None:
        """Start a node's slurmd."""
        run("slurmd", "-N", node, "-f", str(self.configuration))

    def kill_node(self, node: str) -> None:
        """What a power failure does to a node: its slurmd and all it started are gone."""
        slurmd = int((self.folder / f"{node}.pid").read_text())
        own = {b"SLURMD_NODENAME=" + node.encode(), b"SLURM_CONF=" + os.fsencode(self.configuration)}
        tasks = [int(path.name) for path in Path("/proc").glob("[0-9]*") if own <= environment_of(path)]
        steps = {int((Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[1]) for pid in tasks}
        steps = {pid for pid in steps if Path(f"/proc/{pid}/comm").read_text().startswith("slurmstepd")}
        for pid in (slurmd, *steps, *tasks):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def stop(self) -> None:
        """End every job, then every daemon by its pid file."""
        self.output("scancel", "--full", "--signal=KILL", "--user=root")
        self.output("scancel", "--user=root")
        with contextlib.suppress(TimeoutError):
            wait(lambda: not self.output("squeue", "-h"), 20)
        for name in ("n1.pid", "n2.pid", "ctld.pid", "munge/pid"):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError, ValueError):
                pid = int((self.folder / name).read_text())
                os.kill(pid, signal.SIGTERM)
                wait(lambda pid=pid: not Path(f"/proc/{pid}").exists(), 20)

    def environment(self) -> dict[str, str]:
        """For Slurm's commands, and for the jobs they submit."""
        own = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "PYTEST"))}
        return own | {"SLURM_CONF": str(self.configuration), "OMP_NUM_THREADS": "1"}

    def output(self, *command: str) -> str:
        """What a Slurm command prints."""
        return subprocess.run(
            command, env=self.environment(), capture_output=True, text=True, timeout=60, check=False
        ).stdout.strip()

    def job(self, number: str) -> dict[str, str]:
        """Fields of `scontrol show job`."""
        words = self.output("scontrol", "show", "job", number, "--oneliner").split()
        return dict(word.partition("=")[::2] for word in words if "=" in word)

    def wait_for(self, number: str, *states: str, seconds: float = 240) -> dict[str, str]:
        """A job's fields once it is in one of the states."""
        wait(
            lambda: self.job(number).get("JobState") in states,
            seconds,
            lambda: f"{self.output('scontrol', 'show', 'job', number)}\n{self.logs()}",
        )
        return self.job(number)

    def logs(self) -> str:
        """The end of the controller's log."""
        return "\n".join((self.folder / "log" / "ctld.log").read_text().splitlines()[-40:])


def run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"


def environment_of(process: Path) -> set[bytes]:
    """Environment of a process, by its folder in /proc."""
    try:
        return set((process / "environ").read_bytes().split(b"\0"))
    except OSError:
        return set()


def wait(done: Callable[[], bool], seconds: float, explain: Callable[[], str] = str) -> None:
    deadline = time.monotonic() + seconds
    while not done():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {seconds:g} s\n{explain()}")
        time.sleep(0.1)


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    folder = Path(tempfile.mkdtemp(prefix="oryx-slurm-"))
    folder.chmod(0o755)  # munged runs as another user
    cluster = Slurm(folder)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
        shutil.copytree(folder / "log", tmp_path_factory.mktemp("slurm") / "log")  # to look at after a failure
        shutil.rmtree(folder, ignore_errors=True)


# ------------------------------------------------------------------------------------------------------------- runs

PROFILE = {
    "nodes": 2,
    "gpus_per_node": 0,
    "cpus_per_task": 1,
    "time_limit": "00:20:00",
    "exclusive": False,
    "health": False,
}
SMALL = (
    *("model.num_layers=1", "train.iterations=80", "data.split=[9,1,0]", "evaluation.plans=[attention]"),
    *("evaluation.batches=1", "checkpoint.keep=1"),
)


class Project:
    """A run config in a folder of its own, its cluster profile, and what its run wrote."""

    def __init__(self, slurm: Slurm, folder: Path, data: Path) -> None:
        self.slurm, self.folder = slurm, folder
        folder.mkdir()
        fields = yaml.safe_load(data.read_text())
        self.config, self.profile, self.out = folder / "run.yaml", folder / "profile.yaml", folder / "out"
        self.config.write_text(yaml.safe_dump(fields | {"output_dir": str(self.out)}))

    def submit(self, *arguments: str, **changes: object) -> dict[str, str]:
        """Submit through launch/submit.py; numbers of the jobs by name."""
        self.profile.write_text(yaml.safe_dump(PROFILE | changes))
        command = [sys.executable, str(REPOSITORY / "launch/submit.py"), str(self.config), f"--cluster={self.profile}"]
        done = subprocess.run(
            [*command, *SMALL, *arguments], env=self.slurm.environment(), cwd=self.folder, capture_output=True,
            text=True, timeout=120, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        lines = [line for line in done.stdout.splitlines() if line.startswith("job ")]
        return {name.strip(): number.removeprefix("job ") for number, name in (
            line.partition(";")[0].partition(",")[0].split(":") for line in lines
        )}  # fmt: skip

    def losses(self) -> dict[int, float]:
        """Loss by iteration; a repeated iteration must have given the same one."""
        found: dict[int, float] = {}
        if not (self.out / "metrics.jsonl").exists():
            return found
        for line in (self.out / "metrics.jsonl").read_text().splitlines():
            entry = json.loads(line)
            if entry.get("kind") == "step":
                assert found.setdefault(entry["iteration"], entry["loss"]) == pytest.approx(entry["loss"], abs=1e-4)
        return found

    def log(self, name: str = "pretrain") -> str:
        return "\n".join(path.read_text() for path in sorted((self.out / "slurm").glob(f"{name}-*.log")))

    def wait_for_steps(self, count: int = 3) -> None:
        wait(lambda: len(self.losses()) >= count, 240, lambda: self.log() + self.slurm.logs())

    def finish(self, number: str) -> dict[str, str]:
        """Wait for the job's end, which must be a good one."""
        job = self.slurm.wait_for(number, "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        assert job["JobState"] == "COMPLETED", self.log()
        return job


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """run.yaml beside tokenizer and dataset."""
    return tiny_project(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def expected(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    """Losses of the run on one rank of this machine, undisturbed."""
    out = tmp_path_factory.mktemp("local") / "out"
    assert train.main([str(data), *SMALL, f"output_dir={out}"]) == 0
    entries = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return {entry["iteration"]: entry["loss"] for entry in entries if entry.get("kind") == "step"}


@pytest.fixture
def project(slurm: Slurm, data: Path, tmp_path: Path) -> Project:
    return Project(slurm, tmp_path / "project", data)


def test_preempted_requeued_finished(slurm, data, expected, tmp_path) -> None:
    """Health check, training on two nodes, USR1 to the batch script, checkpoint, requeue, the rest; a hostile path."""
    project = Project(slurm, tmp_path / HOSTILE, data)
    lenient = ["--min-free-gb=0", "--min-write-mbs=0", "--write-mb=1", "--reduce-mb=0.1"]
    number = project.submit(health=True, health_options=lenient)["pretrain"]
    project.wait_for_steps()
    slurm.output("scancel", "--signal=USR1", "--batch", number)
    job = project.finish(number)
    assert job["Restarts"] == "1"
    log = project.log()
    assert "health: 2 nodes, 2 ranks: all well" in log
    assert f"requeue job {number}" in log
    assert "start 2: n[1-2], 1 ranks per node, rendezvous 127.0.0.1:" in log
    assert "resumed from iteration" in log
    assert project.losses() == pytest.approx(expected, abs=1e-4)
    assert sorted(p.name for p in tmp_path.iterdir()) == [HOSTILE]
    assert not list(tmp_path.rglob("pwned"))


@pytest.mark.slow
def test_time_limit(slurm, project, expected) -> None:
    """Near its time limit a run saves and goes back into the queue; every start gets on, here by two steps."""
    number = project.submit("faults.time_margin=1200", "train.exit_after=5")["pretrain"]  # all of the job's 20 minutes
    job = project.finish(number)
    assert job["Restarts"] == "2"
    assert project.log().count("(time limit); checkpoint saved") == 2
    assert project.losses() == pytest.approx({i: expected[i] for i in range(1, 6)}, abs=1e-4)


@pytest.mark.slow
def test_cancel_is_final(slurm, project) -> None:
    """scancel: the ranks save, the job ends and does not come back."""
    number = project.submit()["pretrain"]
    project.wait_for_steps()
    slurm.output("scancel", number)
    job = slurm.wait_for(number, "CANCELLED", "COMPLETED", "FAILED", "PENDING")
    wait(lambda: not slurm.output("squeue", "-h"), 120)
    job = slurm.job(number)
    assert (job["JobState"], job["Restarts"]) == ("CANCELLED", "0")
    assert "requeue job" not in project.log()
    assert len(project.losses()) < 80
    assert list_checkpoints(project.out / "checkpoints")  # it had KillWait to save


@pytest.mark.slow
def test_node_dies(slurm, project, expected) -> None:
    """A node and all on it gone: Slurm requeues, the run continues from its last checkpoint when the node is back."""
    number = project.submit("checkpoint.interval=5", max_restarts=0)["pretrain"]
    project.wait_for_steps(12)
    slurm.kill_node("n2")
    slurm.wait_for(number, "PENDING")
    slurm.start_node("n2")
    job = project.finish(number)
    assert job["Restarts"] == "1"
    assert "resumed from iteration" in project.log()
    assert project.losses() == pytest.approx(expected, abs=1e-4)


@pytest.mark.slow
def test_preprocessing_alone(slurm, project, data) -> None:
    """A task whose process is killed runs again alone; the merge waits for it, and is as one run without shards."""
    corpus, tokenizer = project.folder / "corpus", data.parent / "tokenizer"
    corpus.mkdir()
    for i, text in enumerate(synthetic_texts(1200)):
        (corpus / f"{i:04d}.txt").write_text(text)
    once = project.folder / "once"
    # The first start of the second task dies as a process that the system killed for memory does.
    setup = f"if [[ ${{SLURM_ARRAY_TASK_ID:-}} == 2 ]] && mkdir {once} 2>/dev/null; then srun() {{ return 137; }}; fi"
    project.profile.write_text(yaml.safe_dump(PROFILE | {"nodes": 1, "setup": [setup]}))
    options = ["--input", str(corpus), "--tokenizer", str(tokenizer), "--output", "x", "--quiet"]
    command = [sys.executable, str(REPOSITORY / "launch/submit.py"), "preprocess", f"--cluster={project.profile}"]
    done = subprocess.run(
        [*command, "--shards", "2", *options], env=slurm.environment(), cwd=project.folder, capture_output=True,
        text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    again = subprocess.run([*command, "--shards", "2", *options], env=slurm.environment(), cwd=project.folder,
                           capture_output=True, text=True, timeout=120, check=False)  # fmt: skip
    assert again.returncode == 2
    assert "of this dataset is still queued or running" in again.stderr
    array, merge = (line.split()[1].rstrip(":") for line in done.stdout.splitlines() if line.startswith("job "))

    def log() -> str:
        return "\n".join(path.read_text() for path in sorted((project.folder / "x.slurm").glob("*.log")))

    wait(lambda: slurm.job(merge).get("JobState") in ("COMPLETED", "FAILED", "CANCELLED"), 400, log)
    assert slurm.job(merge)["JobState"] == "COMPLETED", log()
    assert log().count(f"requeue job {array}_2") == 1
    assert f"requeue job {array}_1" not in log()
    tool = [sys.executable, str(REPOSITORY / "tools/preprocess_data.py"), *options]
    subprocess.run([*tool, "--output", "whole"], cwd=project.folder, check=True, timeout=240)
    for end in ("bin", "idx"):
        assert (project.folder / f"x.{end}").read_bytes() == (project.folder / f"whole.{end}").read_bytes()


@pytest.mark.slow
def test_from_text_to_export(slurm, project, data) -> None:
    """An array of shards, their merge, training that is preempted, evaluation and conversion: each after the other."""
    corpus = project.folder / "corpus"
    corpus.mkdir()
    for i, text in enumerate(synthetic_texts(1200)):  # above 128 KiB, for two shards
        (corpus / f"{i:04d}.txt").write_text(text)
    prefix = project.folder / "tokens"
    tokenizer = data.parent / "tokenizer"
    jobs = project.submit(
        f"data.blend=[{prefix}]",
        *("--preprocess", f"--input {corpus} --tokenizer {tokenizer} --output {prefix}", "--shards", "2"),
        *("--evaluate", "perplexity --plans attention --batches 2", "--convert=--dtype bf16"),
    )
    assert list(jobs) == ["preprocess", "merge", "pretrain", "evaluate", "convert"]
    project.wait_for_steps()
    slurm.output("scancel", "--signal=USR1", "--batch", jobs["pretrain"])
    wait(lambda: slurm.job(jobs["pretrain"]).get("Restarts") == "1", 240, project.log)
    for name in ("evaluate", "convert"):
        assert slurm.job(jobs[name])["JobState"] == "PENDING"  # a requeued job has not ended
    for name in ("pretrain", "evaluate", "convert"):
        wait(lambda name=name: slurm.job(jobs[name]).get("JobState") == "COMPLETED", 400, lambda: project.log("*"))
    assert sorted(project.losses()) == list(range(1, 81))
    results = json.loads((project.out / "evaluate" / "perplexity.json").read_text())
    assert results["iteration"] == 80
    assert (project.out / "hf" / "config.json").exists()
    assert len(list(project.folder.glob("tokens-*.idx"))) == 2

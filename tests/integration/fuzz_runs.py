"""Targets of the fuzz: checkpoints, exports, run configs and the files of a run's folder, as our commands read them."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from oryx_megatron import monitor
from oryx_megatron.checkpoint import find_checkpoint, read_manifest
from oryx_megatron.checkpoint.inspect import summarize
from oryx_megatron.config import load_run, to_yaml, validate
from oryx_megatron.config.schema import RunConfig
from oryx_megatron.data.files import sha256_of
from oryx_megatron.errors import OryxError
from oryx_megatron.hf.convert import export, import_, import_llama
from oryx_megatron.hf.fields import to_hf_config
from oryx_megatron.hf.modeling_oryx import OryxForCausalLM
from oryx_megatron.testing.fuzz import Target
from oryx_megatron.testing.layouts import tiny_run
from oryx_megatron.tools import inspect_checkpoint, plot_run
from oryx_megatron.train.callbacks import MetricsFile
from oryx_megatron.train.callbacks.weights_and_biases import run_id
from oryx_megatron.train.history import Events, read_events, summary_lines
from oryx_megatron.train.history import summarize as summarize_run
from oryx_megatron.train.replay import read_record, report


def make_checkpoint(project: Path, folder: Path) -> None:
    """RUN with a checkpoint, made of a Hugging Face folder with random weights: no training, no process groups."""
    run = load_run(project / "run.yaml")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = OryxForCausalLM(to_hf_config(run.model, mode_chunk=run.modes.chunk))
    theirs = folder.parent / "theirs"
    model.save_pretrained(theirs)
    import_(theirs, folder / "run", run)
    shutil.rmtree(theirs)
    (folder / "run" / ".oryx-files.json").unlink(missing_ok=True)


def _weights(folder: Path) -> str:
    """sha256 of the weights of an export."""
    return sha256_of(folder / "model.safetensors")


def read_checkpoint(folder: Path) -> Any:
    """As tools/inspect_checkpoint.py and tools/convert_to_hf.py read it."""
    found = find_checkpoint(folder / "run")
    summary = summarize(found)
    about = summary.to_dict()
    run = read_manifest(found).run()
    out = folder.parent / "exported"
    shutil.rmtree(out, ignore_errors=True)
    export(folder / "run", out)
    return [about["tensors"], about["parts"], about["config"], run, _weights(out), (out / "config.json").read_text()]


def make_export(project: Path, folder: Path) -> None:
    make_checkpoint(project, folder)
    export(folder / "run", folder / "hf")
    shutil.rmtree(folder / "run")
    shutil.copytree(project / "tokenizer", folder / "tokenizer")  # an export does not say where it was


def read_export(folder: Path) -> Any:
    """As tools/convert_from_hf.py reads it."""
    out = folder.parent / "imported"
    shutil.rmtree(out, ignore_errors=True)
    import_(folder / "hf", out)
    again = folder.parent / "again"
    shutil.rmtree(again, ignore_errors=True)
    export(out, again, tokenizer=folder / "tokenizer")
    return [read_manifest(find_checkpoint(out)).run(), _weights(again)]


def evaluate_export(folder: Path) -> Any:
    """As `oryx_megatron.eval retrieval` reads it."""
    from oryx_megatron.eval.export import load_export

    model, codec = load_export(folder / "hf")
    with torch.inference_mode():
        logits = model(torch.arange(24)[None], use_cache=False).logits
    return [logits.tolist(), codec.encode("some words and 1234 é"), codec.vocab_size]


def make_first_checkpoint(project: Path, folder: Path) -> None:
    """As the first version wrote it: its manifest has no checksum of its own."""
    make_checkpoint(project, folder)
    _without_checksum(find_checkpoint(folder / "run") / "manifest.json")


def make_first_export(project: Path, folder: Path) -> None:
    """As the first version wrote it: nothing tells which files it had."""
    make_export(project, folder)
    _without_checksum(folder / "hf" / "oryx_manifest.json", files={})


def _without_checksum(path: Path, **changed: Any) -> None:
    fields = json.loads(path.read_text())
    del fields["checksum"]
    path.write_text(json.dumps(fields | changed))


def read_first_checkpoint(folder: Path) -> Any:
    """Whether it reads: what its manifest says beside the files, nobody can check."""

    found = find_checkpoint(folder / "run")
    summary = summarize(found)
    inspect_checkpoint._report(summary, "all", None)
    json.dumps(summary.to_dict())
    out = folder.parent / "exported"
    shutil.rmtree(out, ignore_errors=True)
    export(folder / "run", out)
    return True


def read_first_export(folder: Path) -> Any:
    """Whether it reads."""
    out = folder.parent / "imported"
    shutil.rmtree(out, ignore_errors=True)
    import_(folder / "hf", out)
    return True


def make_llama(project: Path, folder: Path) -> None:
    """A Transformer of another project, with shards and an index."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=320, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=False,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder / "llama", max_shard_size="40KB")
    shutil.copytree(project / "tokenizer", folder / "tokenizer")
    shutil.copy(project / "run.yaml", folder)


def read_llama(folder: Path) -> Any:
    """Whether it reads: nothing tells what its weights should be."""
    out = folder.parent / "imported"
    shutil.rmtree(out, ignore_errors=True)
    run = load_run(folder / "run.yaml", [f"data.tokenizer={folder}/tokenizer"])
    import_llama(folder / "llama", out, run)
    return True


def make_config(project: Path, folder: Path) -> None:
    run = load_run(project / "run.yaml")
    (folder / "model.yaml").write_text(to_yaml(run.model))
    text = to_yaml(run)
    start = text.index("model:")
    stop = text.index("data:")
    (folder / "run.yaml").write_text(text[:start] + "model: model.yaml\n" + text[stop:])


def read_config(folder: Path) -> Any:
    """Whether it reads: a changed letter of a YAML text may mean another run, which no reader can know."""
    run = load_run(folder / "run.yaml")
    validate(run, 1)
    return isinstance(run, RunConfig)


STEPS = 12


def make_run_folder(project: Path, folder: Path) -> None:
    """What a run of 12 steps leaves, with one that was bad."""
    lines: list[dict[str, Any]] = []
    for i in range(1, STEPS + 1):
        lines.append({"kind": "step", "iteration": i, "loss": 5 - i / 10, "grad_norm": 1.0, "lr": 1e-3, "tokens": 100,
                      "attention_share": 0.5, "consumed_samples": i, "seconds": 1.0, "data_seconds": 0.1,
                      "forward_backward_seconds": 0.8, "optimizer_seconds": 0.1, "model_flops": 1e9,
                      "skipped": i == 5})  # fmt: skip
    lines += [
        {"kind": "evaluation", "iteration": STEPS, "dataset": "valid", "plan": plan, "loss": 4.0, "bits_per_byte": 1.0}
        for plan in ("attention", "recurrent")
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    events = [{"event": kind, "time": 1e9 + i, "iteration": i, "seconds": 0.5} for i, kind in
              enumerate(("start", "checkpoint", "skip", "evaluation", "end"))]  # fmt: skip
    (folder / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    (folder / "config.yaml").write_text((project / "run.yaml").read_text())
    (folder / "requeue").write_text(json.dumps({"code": 75, "reason": "SIGTERM", "iteration": STEPS, "time": 1e9}))
    (folder / "wandb.json").write_text(json.dumps({"id": "a" * 16, "path": "/nowhere", "time": 1e9}))
    rank = {
        "rank": 0, "host": "a", "data_rank": 0, "gradients_not_finite": {"count": 1, "first": ["embedding"]},
        "microbatches": [{"samples": [1, 2], "plan": "a0-48", "loss": "nan"}],
    }  # fmt: skip
    record = {
        "iteration": 5, "reason": "loss is nan", "loss": "nan", "grad_norm": "inf", "seed": 1, "consumed_samples": 16,
        "skipped_samples": 0, "samples": 4, "ranks": [rank],
    }  # fmt: skip
    (folder / "faults").mkdir()
    (folder / "faults" / "batch-0000005.json").write_text(json.dumps(record))


def read_run_folder(folder: Path) -> Any:
    """Every reader of a run's folder works, or says in one line why not; a changed digit in a line nobody can know."""
    problems = []
    for read in (_follow, _sum_up, _plot, _resume, _replay):
        try:
            read(folder)
        except OryxError as error:
            problems.append(error)
    if problems:
        raise problems[0]
    return True


def _follow(folder: Path) -> None:
    out = io.StringIO()
    assert monitor.main([str(folder), str(folder / "missing"), "--once"], out) == 0
    assert all(line.isprintable() and len(line) <= 80 for line in out.getvalue().splitlines())
    followed = monitor.Followed(folder, "run")
    followed.look()
    assert len(monitor.table([followed], 2e9)) >= 2


def _sum_up(folder: Path) -> None:
    summary = summarize_run(folder, peak_flops=1e12)
    assert all(len(line) <= 120 for line in summary_lines(summary))
    json.dumps(summary)


def _plot(folder: Path) -> None:
    plot_run.read_curves(folder / "metrics.jsonl", "tokens", "run")
    page = plot_run._page("<svg></svg>", [plot_run.read_curves(folder / "metrics.jsonl", "iteration", "run")])
    assert page.count("<tr>") >= 2


def _resume(folder: Path) -> None:
    """As a start of the run does."""
    metrics = MetricsFile(folder / "metrics.jsonl")
    metrics.on_start(tiny_run(), STEPS - 1)
    metrics.on_end()
    before = len(read_events(folder))
    Events(folder).start(STEPS - 1)
    assert len(read_events(folder)) > before
    assert len(run_id(folder)) == 16


def _replay(folder: Path) -> None:
    record = read_record(folder / "faults" / "batch-0000005.json")
    report(record, {"loss": 1.0, "grad_norm": 1.0, "reason": None, "start": 0, "other_samples": False})
    load_run(folder / "config.yaml")


TARGETS: list[tuple[Target, Callable[[Path, Path], None]]] = [
    (Target("checkpoint", read_checkpoint, ["run/**/*"]), make_checkpoint),
    (Target("export, imported", read_export, ["hf/*.json", "hf/*.safetensors"]), make_export),
    (Target("export, evaluated", evaluate_export, ["hf/*.json", "hf/*.safetensors", "hf/tokenizer*"]), make_export),
    (Target("checkpoint, format 1.0", read_first_checkpoint, ["run/**/manifest.json"]), make_first_checkpoint),
    (Target("export, format 1.0", read_first_export, ["hf/*.json"]), make_first_export),
    (Target("Llama's folder", read_llama, ["llama/*"]), make_llama),
    (Target("run config", read_config), make_config),
    (Target("run folder", read_run_folder), make_run_folder),
]

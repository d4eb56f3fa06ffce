"""Heads of multi-token prediction in an export: what they compute, and the model without them."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hf_checkpoints import CASES, run_of

from oryx_megatron import parallel, platform
from oryx_megatron.checkpoint import find_checkpoint, load_model_weights
from oryx_megatron.config.schema import ParallelConfig, PrecisionConfig
from oryx_megatron.hf.convert import export
from oryx_megatron.hf.heads_oryx import head_modes
from oryx_megatron.hf.modeling_oryx import OryxForCausalLM, OryxModel
from oryx_megatron.hf.modes_oryx import TokenModes
from oryx_megatron.model import SequenceInfo, build_model
from oryx_megatron.modes import ModePlan

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("case", [case for case, (changes, *_) in CASES.items() if "mtp" in changes])
def test_heads_of_an_export_compute_what_those_of_the_checkpoint_do(
    case: str, hf_project: Path, tmp_path: Path
) -> None:
    """The losses of every head at every token, and of the model; the model alone loads without a word of them."""
    source, run = hf_project.parent / case, run_of(hf_project, case)
    export(source, tmp_path / "hf", with_tokenizer=False)
    model = OryxForCausalLM.from_pretrained(tmp_path / "hf").float().eval()
    heads, length = run.model.mtp_layers, 37
    assert len(model.mtp) == heads
    tokens = torch.randint(0, run.model.vocab_size, (2, length + 1), generator=torch.Generator().manual_seed(3))
    plan = ModePlan.from_mask(torch.rand(length, generator=torch.Generator().manual_seed(4)).numpy() < 0.5)
    text, labels = tokens[:, :-1], tokens[:, 1:]
    parallel.initialize(ParallelConfig(), seed=0)
    try:
        (chunk,) = build_model(run.model, ParallelConfig(), PrecisionConfig(dtype="fp32"), seed=0)
        load_model_weights(find_checkpoint(source), [chunk])
        info = SequenceInfo.build(plan, device=platform.device())
        info = info.with_futures(text, labels, torch.ones(text.shape), heads, slice(length))
        with torch.no_grad():
            wanted = chunk(text, None, None, labels=labels, packed_seq_params=info)[[0, *range(2, 2 + heads)]]
    finally:
        parallel.destroy()
    attends = torch.from_numpy(plan.is_attention())
    kind = model.config.modes_of(model.config.num_hidden_layers)
    with torch.no_grad():
        states = model.model(text, mode_plan=attends).last_hidden_state
        for k in range(heads + 1):
            own = length - k
            if k:
                modes = TokenModes.from_mask(attends[None, :own], text.device)
                embedded = model.model.embed_tokens(text[:, k:])
                kinds = {kind: head_modes(model.config, modes, own)}
                context = model.model.contexts(kinds, torch.arange(own)[None], 0, embedded)[kind]
                states = model.mtp[k - 1](embedded, states[:, :own], context)
            losses = F.cross_entropy(model.logits_of(states).transpose(1, 2), labels[:, k:], reduction="none")
            torch.testing.assert_close(losses, wanted[k, :, :own], atol=2e-4, rtol=1e-4)
            assert (wanted[k, :, own:] == 0).all()
    alone, told = OryxModel.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert set(told["unexpected_keys"]) <= {"lm_head.weight"}
    assert not told["missing_keys"]
    assert not any(name.startswith("mtp") for name, _ in alone.named_parameters())


def test_benchmark(hf_project: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """benchmarks/speculative.py: a line for each plan and number of drafts, and what it refuses."""
    spec = importlib.util.spec_from_file_location("speculative", ROOT / "benchmarks" / "speculative.py")
    assert spec is not None
    assert spec.loader is not None
    speculative = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(speculative)
    export(hf_project.parent / "mixed tp2", tmp_path / "hf", with_tokenizer=False)
    few = ["--prompts", "2", "--prompt", "9", "--new", "12", "--drafts", "1", "3", "--plans", "ratio:0.5", "recurrent"]
    assert speculative.main([str(tmp_path / "hf"), *few, "--output", str(tmp_path / "figures.json")]) == 0
    lines = capsys.readouterr().out.splitlines()[2:]
    assert len(lines) == 4
    assert all(line.endswith(" 2 of 2") for line in lines)
    results = json.loads((tmp_path / "figures.json").read_text())["results"]
    assert [(found["plan"], found["drafts"], found["same"]) for found in results] == [
        (plan, drafts, 2) for plan in ("ratio:0.5", "recurrent") for drafts in (1, 3)
    ]
    export(hf_project.parent / "hybrid pp2", tmp_path / "plain", with_tokenizer=False)
    assert speculative.main([str(tmp_path / "plain")]) == 2
    assert "plain: has no heads to draft with; train it with model.mtp" in capsys.readouterr().err

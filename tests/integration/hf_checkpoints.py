"""Checkpoints of tiny models under several layouts, for the tests of conversion."""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path

import torch

from oryx_megatron.config import load_run, to_dict
from oryx_megatron.config.schema import (
    MoEConfig,
    MTPConfig,
    ParallelConfig,
    PrecisionConfig,
    RopeScalingConfig,
    RunConfig,
)
from oryx_megatron.data.tokenizer import load_tokenizer

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
"""For texts of 64 tokens: the model's samples have 48, what both sides are compared on has more."""
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 20}
LLAMA3 |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}

CASES = {
    "gdn tp2": ({}, ParallelConfig(tensor=2), "bf16"),
    "mamba2 pp2": (
        {
            "mixer": "mamba2",
            "tie_embeddings": False,
            "num_kv_heads": None,
            "v_head_dim": 12,
            "qk_norm": False,
            "mtp": MTPConfig(layers=2, loss_weight=0.2),
        },
        ParallelConfig(pipeline=2),
        "fp32",
    ),
    "shared tp2": (
        {
            "shared_query": True,
            "rotary": "both",
            "conv_width": 0,
            "output_gate": False,
            "logit_softcap": 0.5,
            "rope_scaling": RopeScalingConfig(attention_factor=1.5, **YARN),
        },
        ParallelConfig(tensor=2, sequence=False),
        "fp32",
    ),
    "attention pp2": (
        {"modes": "attention", "rope_scaling": RopeScalingConfig(**LLAMA3), "rope_theta": 500.0},
        ParallelConfig(pipeline=2),
        "bf16",
    ),
    "hybrid pp2": ({"pattern": ("recurrent*2", "recurrent", "attention")}, ParallelConfig(pipeline=2), "bf16"),
    "mixed tp2": (
        {
            "pattern": ("recurrent", "both"),
            "mixer": "mamba2",
            "rope_scaling": RopeScalingConfig(**YARN),
            "mtp": MTPConfig(),
        },
        ParallelConfig(tensor=2),
        "fp32",
    ),
    "experts ep2": (
        {
            "moe": MoEConfig(experts=6, top_k=3, ffn_hidden_size=24, score="sigmoid", bias_update_rate=0.1),
            "mtp": MTPConfig(),
        },
        ParallelConfig(expert=2),
        "fp32",
    ),
    "experts pp2": (
        {"moe": MoEConfig(experts=4, ffn_hidden_size=16, shared_ffn_hidden_size=8, first_dense=1, capacity_factor=1.2)},
        ParallelConfig(pipeline=2),
        "bf16",
    ),
    "recurrent tp2": ({"modes": "recurrent", "mixer": "mamba2"}, ParallelConfig(tensor=2), "fp32"),
}
"""Changes to the tiny model, layout and format of each checkpoint; all are written by two processes."""


def run_of(config: Path, case: str) -> RunConfig:
    changes, _, dtype = CASES[case]
    run = load_run(config, [])
    model = dataclasses.replace(run.model, name=case.replace(" ", "-"), **changes)
    return dataclasses.replace(
        run, model=model, precision=PrecisionConfig(dtype=dtype), output_dir=str(config.parent / case)
    )


def _manifest(run: RunConfig, folder: Path) -> None:
    from oryx_megatron.checkpoint import Manifest
    from oryx_megatron.checkpoint.manifest import file_digest, package_versions, write_manifest

    files = {path.name: file_digest(path) for path in sorted(folder.iterdir())}
    evaluation = {"dataset": "valid", "loss": 2.5, "bits_per_byte": 1.25, "tokens": 99, "perplexity": 12.18}
    write_manifest(
        folder,
        Manifest(
            iteration=7,
            consumed_samples=28,
            config=to_dict(run),
            layout={"tp": 1, "pp": 1, "vpp": 1, "cp": 1, "dp": 1},
            rng={"seed": run.seed},
            data={"train": None, "tokenizer": dict(load_tokenizer(run.data.tokenizer).describe())},
            evaluations=[{"iteration": 7, "plan": plan, **evaluation} for plan in ("attention", "recurrent")],
            versions=package_versions(),
            commit="0" * 40,
            files=files,
        ),
    )


def _save(run: RunConfig, chunks: list, folder: Path) -> None:
    from megatron.core import dist_checkpointing

    from oryx_megatron.checkpoint.state import sharded_state

    if torch.distributed.get_rank() == 0:
        folder.mkdir(parents=True)
    torch.distributed.barrier()
    dist_checkpointing.save(sharded_state(chunks, None), str(folder))
    torch.distributed.barrier()
    if torch.distributed.get_rank() == 0:
        _manifest(run, folder)
    torch.distributed.barrier()


def _build(run: RunConfig, layout: ParallelConfig) -> list:
    from oryx_megatron import parallel
    from oryx_megatron.model import build_model

    warnings.simplefilter("ignore")
    parallel.initialize(layout, seed=1)
    return build_model(run.model, layout, run.precision, seed=1)


def write_all(config: Path) -> None:
    """On two ranks: a checkpoint of every case, with weights off their initial values."""
    from megatron.core import parallel_state

    for case, (_, layout, _) in CASES.items():
        run = run_of(config, case)
        chunks = _build(run, layout)
        with torch.no_grad():
            for chunk in chunks:
                for name, parameter in chunk.named_parameters():
                    if "norm" in name:  # replicated over tensor-parallel ranks: drawn alike there
                        generator = torch.Generator().manual_seed(len(name))
                        parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter) * 0.3)
                    elif parameter.dim() > 1:
                        parameter.mul_(8.0)
                for name, bias in chunk.named_buffers():
                    if name.endswith("expert_bias"):
                        bias.copy_(torch.linspace(-0.3, 0.4, len(bias)))
        _save(run, chunks, Path(run.output_dir) / "checkpoints" / "iteration_0000007")
        parallel_state.destroy_model_parallel()


def resave(config: Path, case: str, source: Path, target: Path, layout: ParallelConfig) -> None:
    """On two ranks: load a checkpoint under another layout and save it again."""
    from oryx_megatron.checkpoint import load_model_weights

    run = run_of(config, case)
    chunks = _build(run, layout)
    load_model_weights(source, chunks)
    _save(run, chunks, target)

"""The average of the weights: an fp64 loop under every layout, exact resumes, other layouts, and beside a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from oryx_megatron.checkpoint import list_checkpoints, load_model_weights
from oryx_megatron.config.schema import EmaConfig, MoEConfig, ParallelConfig, PrecisionConfig, RunConfig
from oryx_megatron.hf.tensors import CheckpointReader
from oryx_megatron.testing import run_distributed
from oryx_megatron.testing.layouts import Worlds, session, tiny_run
from oryx_megatron.train import optimizer
from oryx_megatron.train.batches import training_batches
from oryx_megatron.train.engine import run_step

DECAY, START = 0.75, 2
UNSHARDED = {"distributed_optimizer": False}
EXPERTS = MoEConfig(experts=4, top_k=3, ffn_hidden_size=20, score="sigmoid", aux_loss=0.0, bias_update_rate=0.05)
CASES: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "one": (1, {}, {}),
    "data": (2, {}, {}),
    "overlap": (2, {"overlap": True}, {}),
    "tensor": (2, {"tensor": 2}, {}),
    "pipeline": (2, {"pipeline": 2}, {}),
    "unsharded": (2, UNSHARDED, {}),
    "overlap bf16": (2, {"overlap": True}, {"precision__dtype": "bf16"}),
    "unsharded bf16": (2, UNSHARDED, {"precision__dtype": "bf16"}),
    "frozen": (2, {}, {"train__freeze": ("embedding.*", "decoder.layers.[01].*", "*query_recurrent")}),
    "frozen unsharded": (2, UNSHARDED, {"train__freeze": ("embedding.*", "decoder.layers.[01].*")}),
    "experts": (2, {"expert": 2, "overlap": True}, {"model__moe": EXPERTS}),
    "experts unsharded": (2, {"expert": 2} | UNSHARDED, {"model__moe": EXPERTS}),
    "experts muon": (2, {"expert": 2}, {"model__moe": EXPERTS, "optimizer__name": "muon"}),
    "muon": (2, {}, {"optimizer__name": "muon"}),
    "muon bf16": (2, {}, {"optimizer__name": "muon", "precision__dtype": "bf16"}),
    "muon tensor bf16": (2, {"tensor": 2}, {"optimizer__name": "muon", "precision__dtype": "bf16"}),
}
BESIDE = ("data", "overlap bf16", "unsharded bf16", "muon bf16")
"""Compared with a run that keeps no average."""
ELSEWHERE = (("data", "tensor"), ("muon bf16", "muon tensor bf16"))


def run_of(name: str, *, ema: bool = True) -> RunConfig:
    _, layout, changes = CASES[name]
    settings = EmaConfig(decay=DECAY, start=START) if ema else None
    changes = {"precision": PrecisionConfig(dtype="fp32"), **changes}
    return tiny_run("gdn", parallel=ParallelConfig(**layout), train__ema=settings, **changes)


def weights(opened: Any) -> dict[str, Tensor]:
    """This rank's weights, whole, as they are now on every data-parallel rank."""
    from oryx_megatron.checkpoint.state import gather_weights

    gather_weights(opened.chunks)
    return {f"{i} {n}": p.detach().clone() for i, c in enumerate(opened.chunks) for n, p in c.named_parameters()}


def averages(opened: Any) -> dict[str, Tensor]:
    """The model's weights while it holds the average."""
    with opened.engine.averaged() as there:
        assert there
        return weights(opened)


def masters(opened: Any) -> list[Tensor]:
    return [part.master.double() for part in opened.engine.average.parts]


def bad_step(opened: Any) -> None:
    """A step whose update is left out."""
    run = opened.run
    batches = training_batches(
        opened.stream.next_batches(), run.modes, seed=run.seed, iteration=opened.iteration,
        data_rank=opened.data_rank, data_size=opened.layout.dp,
    )  # fmt: skip
    assert run_step(opened.engine, batches, limit=0.0).bad
    opened.iteration += 1


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def against_a_loop(name: str, root: Path) -> dict[str, Any]:
    """Seven steps with the loop beside them, one step left out; a save after four of them, and the rest again."""
    found: dict[str, Any] = {}
    run = run_of(name)
    dtype = torch.bfloat16 if run.precision.dtype == "bf16" else torch.float32
    expected = None
    if name in BESIDE:
        with session(run_of(name, ema=False)) as plain:
            expected = plain.steps(3)
            bad_step(plain)
            expected += plain.steps(3)
    with session(run) as opened:
        steps, loop, whole = [], [], {}
        for number in range(1, 8):
            if number == 4:
                before = averages(opened)
                bad_step(opened)
                assert same(averages(opened), before)
                manager = opened.checkpoints(root / name)
                assert manager.save(opened.iteration, opened.manifest) or manager.wait()
                continue
            steps.append(opened.step())
            if number < START:
                assert not opened.engine.average.begun
            elif number == START:
                loop, whole = masters(opened), {key: tensor.double() for key, tensor in weights(opened).items()}
            else:
                loop = [DECAY * old + (1 - DECAY) * new for old, new in zip(loop, masters(opened), strict=True)]
                now = weights(opened)
                whole = {key: DECAY * old + (1 - DECAY) * now[key].double() for key, old in whole.items()}
        assert expected in (None, steps)  # neither an average nor a look at it changes what is trained
        for part, wanted in zip(opened.engine.average.parts, loop, strict=True):
            assert part.average.dtype == torch.float32
            torch.testing.assert_close(part.average.double(), wanted, rtol=3e-7, atol=1e-8)
        shown = averages(opened)
        if dtype == torch.float32:  # weights are the masters: the loop of all ranks' weights is the average on each
            for key, tensor in shown.items():
                torch.testing.assert_close(tensor.double(), whole[key], rtol=3e-7, atol=1e-8)
        else:  # the fp32 average, rounded once
            for key, tensor in shown.items():
                torch.testing.assert_close(tensor.double(), whole[key], rtol=2**-7, atol=1e-4)
        kept, found["parts"] = weights(opened), sum(part.average.numel() for part in opened.engine.average.parts)
        moved = [key for key in kept if not torch.equal(kept[key], shown[key])]
        found["moved"] = len(moved) / len(kept)
    with session(run, iteration=4) as opened:
        assert opened.checkpoints(root / name).load() is not None
        assert same(averages(opened), before)
        assert opened.steps(3) == steps[3:]
        assert same(averages(opened), shown)
        assert same(weights(opened), kept)
    return found


def elsewhere(source: str, target: str, root: Path) -> None:
    """An average of one layout is the same number by number in a checkpoint that another layout writes of it."""
    name = f"{source} to {target}"
    with session(run_of(target), iteration=4) as opened:
        manager = opened.checkpoints(root / source)
        assert manager.load() is not None
        shown = averages(opened)
        copy = opened.checkpoints(root / name)
        assert copy.save(opened.iteration, opened.manifest) or copy.wait()
        folder = list_checkpoints(root / source)[-1]
        load_model_weights(folder, opened.chunks, "ema")
        assert same(weights(opened), shown)
        load_model_weights(folder, opened.chunks)
        assert not same(weights(opened), shown)


def under_layouts(root: str) -> dict[str, Any]:
    worlds, found = Worlds(), {}
    optimizer.BUCKET = 3000
    for size in (2, 1):
        for name in worlds.share(size, [name for name, (ranks, *_) in CASES.items() if ranks == size]):
            with worlds.of(size, f"{size} {name}"):
                found[name] = against_a_loop(name, Path(root))
    with worlds.of(2, "elsewhere"):
        for source, target in ELSEWHERE:
            elsewhere(source, target, Path(root))
    return found


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("layouts")


@pytest.fixture(scope="module")
def found(root: Path) -> dict[str, list[Any]]:
    results: dict[str, list[Any]] = {}
    for rank in run_distributed(under_layouts, 2, str(root), timeout=600):
        for name, value in rank.items():
            results.setdefault(name, []).append(value)
    return results


def stored(folder: Path) -> dict[str, Tensor]:
    """The averages in the newest checkpoint of a folder."""
    reader = CheckpointReader(list_checkpoints(folder)[-1])
    return {name: reader.read(name) for name in reader.shapes() if name.startswith("ema.")}


@pytest.mark.timeout(700)
def test_averages_are_equal_between_layouts_and_divided_over_ranks(found: dict[str, list[Any]], root: Path) -> None:
    """Against the loop in every world (in the ranks); equal between layouts; divided over data-parallel ranks."""
    assert set(found) == set(CASES)
    (one,) = found["one"]
    assert one["moved"] == 1.0
    assert sum(rank["parts"] for rank in found["data"]) == one["parts"]
    assert max(rank["parts"] for rank in found["data"]) < 0.6 * one["parts"]
    assert max(rank["parts"] for rank in found["muon"]) < 0.6 * one["parts"]
    assert [rank["parts"] for rank in found["unsharded"]] == [one["parts"]] * 2
    for layout in ("data", "overlap", "tensor", "unsharded"):
        other = stored(root / layout)
        for name, tensor in stored(root / "one").items():
            assert (other[name] - tensor).norm() < 1e-3 * tensor.norm(), (layout, name)
    for source, target in ELSEWHERE:
        assert same(stored(root / source), stored(root / f"{source} to {target}"))


def test_every_weight_has_an_average_in_the_checkpoint(found: dict[str, list[Any]], root: Path) -> None:
    """Also frozen ones, whose average they are, so that an export finds all; in fp32."""
    for name in ("overlap bf16", "frozen", "frozen unsharded", "pipeline"):
        reader = CheckpointReader(list_checkpoints(root / name)[-1])
        shapes = reader.shapes()
        own = {n: shape for n, shape in shapes.items() if not n.startswith(("optimizer.", "ema."))}
        assert {f"ema.{n}": shape for n, shape in own.items()} == {n: s for n, s in shapes.items() if n[:4] == "ema."}
        assert {reader.dtype(f"ema.{n}") for n in own} == {torch.float32}
        if name.startswith("frozen"):
            for n in own:
                pair = reader.read(n), reader.read(f"ema.{n}")
                if n.startswith("embedding") or n.endswith("query_recurrent"):
                    assert torch.equal(*pair) == (name == "frozen" or n.startswith("embedding")), n
                elif n.startswith("decoder.layers"):
                    assert torch.equal(pair[0][:2], pair[1][:2]), n
                    assert not torch.equal(pair[0][2:], pair[1][2:]), n

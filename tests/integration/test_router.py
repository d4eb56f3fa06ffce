"""The router as its users meet it: trained from a run on several ranks, evaluated under every layout, decoded."""

from __future__ import annotations

import dataclasses
import gc
import json
import logging
import shutil
import warnings
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from oryx_megatron.checkpoint import find_checkpoint, read_manifest
from oryx_megatron.config import load_run, validate
from oryx_megatron.config.schema import ParallelConfig, RouterConfig
from oryx_megatron.errors import CheckpointError, ConfigError, DataError
from oryx_megatron.eval import router_recipe, router_training
from oryx_megatron.eval.routed import Plans
from oryx_megatron.eval.text import load
from oryx_megatron.hf.convert import export, import_
from oryx_megatron.hf.modeling_oryx import OryxForCausalLM
from oryx_megatron.hf.router import NAME, load_router, save_router
from oryx_megatron.hf.router_oryx import OryxRouter
from oryx_megatron.router import main
from oryx_megatron.testing import run_distributed
from oryx_megatron.train import collector, trainer
from oryx_megatron.train.session import fit
from oryx_megatron.train.signals import MARKER

RUNS = Path(__file__).resolve().parents[2] / "configs" / "run"
SPEC = "router:0.3"
OPTIONS = RouterConfig(texts=8, held_out=4, epochs=2, batch_size=2, width=16)
LAYOUTS = (ParallelConfig(), ParallelConfig(tensor=2), ParallelConfig(pipeline=2), ParallelConfig(context=2))


def train_and_evaluate(run: Path) -> dict[str, Any]:
    """On two ranks: a router, then perplexity under its plan with every layout."""
    warnings.simplefilter("ignore")
    from megatron.core import parallel_state

    from oryx_megatron.eval.perplexity import evaluate_checkpoint

    rows, path = router_training.train_router(run, OPTIONS)
    parallel_state.destroy_model_parallel()
    found = []
    for layout in LAYOUTS:
        dp = 2 // (layout.tensor * layout.pipeline * layout.context)
        batches = 4 // (dp * layout.pipeline)
        done = evaluate_checkpoint(run, (SPEC, "attention"), batches=batches, layout=layout, world_size=2)
        found.append([(r.plan, r.loss, r.attention_share, r.tokens) for r in done.results])
        parallel_state.destroy_model_parallel()
    return {"rows": [(row.plan, row.share, row.loss) for row in rows], "path": path, "found": found}


def train_again(run: Path) -> list[str]:
    """A run that has ended, under its own layout, whose config asks for a router; its log."""
    warnings.simplefilter("ignore")
    logging.getLogger("oryx_megatron").setLevel(logging.INFO)
    logging.getLogger().addHandler(kept := Kept())
    config = read_manifest(find_checkpoint(run)).run()
    evaluation = dataclasses.replace(config.evaluation, plans=("recurrent", SPEC), batches=2)
    config = dataclasses.replace(config, output_dir=str(run), router=OPTIONS, evaluation=evaluation)
    recipe = router_recipe.recipe(config)
    assert recipe is not None

    def after(*about: Any) -> None:
        kept.lines.append(f"marker: {(run / MARKER).is_file()}")
        recipe(*about)

    built, train_router = weakref.WeakSet[Any](), router_training.train_router
    build = trainer.build_engine

    def build_engine(*about: Any) -> Any:
        built.update([(engine := build(*about)).optimizer, *engine.chunks])
        return engine

    def train(*about: Any, **more: Any) -> Any:
        kept.lines.append(f"left of the trained model: {len(built)}")
        return train_router(*about, **more)

    trainer.build_engine, router_training.train_router = build_engine, train
    gc.unfreeze()  # this rank began with frozen imports
    with collector.put_off():
        assert fit(config, validate(config, 2), after=after) is None
    return kept.lines


class Kept(logging.Handler):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def decode(run: Path) -> dict[str, Any]:
    """One rank: validation texts token by token, each decision before the layers see the token; a text written."""
    warnings.simplefilter("ignore")
    from oryx_megatron.eval.generation import generate, load_for_inference, logits_of

    model = load_for_inference(run)
    held = RouterConfig(texts=1, held_out=4, width=16)
    streams = router_training.texts_of(model, held)
    next(streams)
    _, stream, count = next(streams)
    plans = Plans.of_checkpoint(model.folder, model.run.modes.chunk, (SPEC,))
    losses, attended, tokens = 0.0, 0, 0
    for _ in range(count):
        (batch,) = stream.next_batches()
        states: dict[int, Any] = {}
        follow = plans.follow(SPEC)
        for i, token in enumerate(batch["tokens"][0].split(1)):
            plan = follow(token)
            logits = logits_of(model.chunk, token[None], plan, states, i)[0, 0].float()
            losses -= float(logits.log_softmax(-1)[batch["labels"][0, i]] * batch["loss_mask"][0, i])
            attended, tokens = attended + plan.attention_tokens, tokens + 1
    written = generate(model, batch["tokens"][0, :9].tolist(), 12, plan=SPEC, temperature=0)
    return {"loss": losses / tokens, "share": attended / tokens, "written": written}


@pytest.fixture(scope="module")
def trained(hf_project: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    run = tmp_path_factory.mktemp("router") / "run"
    shutil.copytree(hf_project.parent / "gdn tp2", run)
    return run, run_distributed(train_and_evaluate, 2, run)


def test_a_run_gets_a_router(trained: tuple[Path, list[dict[str, Any]]]) -> None:
    run, (first, second) = trained
    assert (first["path"], second["path"]) == (run / NAME, None)
    assert first["rows"] == second["rows"]
    shares = {plan: share for plan, share, _ in first["rows"]}
    assert (shares["attention"], shares["recurrent"]) == (1, 0)
    assert shares["router:0.25"] == pytest.approx(0.25, abs=0.02)  # of the very texts that the thresholds are from
    made, about = load_router(run / NAME)
    assert made.shape.width == 16
    assert about["held_out"][0]["plan"] == "attention"
    assert {"iteration", "checkpoint", "options"} < set(about)


def test_a_run_that_asks_for_a_router(
    trained: tuple[Path, list[dict[str, Any]]], hf_project: Path, tmp_path: Path
) -> None:
    """Trained once when the run has ended, as the command does it; its plans are evaluated then, once."""
    run = tmp_path / "run"
    shutil.copytree(hf_project.parent / "gdn tp2", run)
    (lines, _), (again, _) = (run_distributed(train_again, 2, run) for _ in range(2))
    made, about = load_router(run / NAME)
    by_hand, of_hand = load_router(trained[0] / NAME)
    assert all(torch.equal(a, b) for a, b in zip(made.state_dict().values(), by_hand.state_dict().values()))
    assert about == of_hand
    assert sum("router: epoch 2 of 2" in line for line in lines) == 1
    assert "left of the trained model: 0" in lines
    assert "marker: True" in lines  # killed then, a launch script starts it again
    assert not (run / MARKER).exists()
    assert sum(line.startswith("router: router:0.1 ") for line in lines) == 1
    assert f"router: {run}/{NAME} is of this checkpoint already" in again
    assert not any("router: epoch" in line or SPEC in line for line in again)
    lines_of = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    (found,) = (line for line in lines_of if line.get("plan") == SPEC)
    assert (found["kind"], found["iteration"]) == ("evaluation", about["iteration"])
    assert 0 < found["attention_share"] < 1
    assert f"valid under {SPEC}: loss {found['loss']:.4f}, " in "\n".join(lines)


def test_what_a_recipe_refuses(tmp_path: Path) -> None:
    config = load_run(RUNS / "quickstart.yaml", ["router={}", f"output_dir={tmp_path}"])
    assert router_recipe.recipe(config) is not None
    assert router_recipe.recipe(dataclasses.replace(config, router=None)) is None
    (tmp_path / NAME).write_text("mine")
    with pytest.raises(DataError, match=f"{tmp_path}/{NAME} exists and is not an earlier output"):
        router_recipe.recipe(config)  # before the run begins


def test_one_pass_is_what_decoding_does(trained: tuple[Path, list[dict[str, Any]]]) -> None:
    """Loss and share of one pass under every layout, of whole texts, against one token at a time."""
    run, (first, second) = trained
    (alone,) = run_distributed(decode, 1, run)
    assert first["found"] == second["found"]
    for layout, ((spec, loss, share, tokens), (_, attention, whole, _)) in zip(LAYOUTS, first["found"]):
        assert (spec, whole, tokens) == (SPEC, 1.0, 4 * 48), layout
        assert share == pytest.approx(alone["share"], abs=1e-9), layout
        assert 0.1 < share < 0.6
        assert loss == pytest.approx(alone["loss"], rel=2e-3), layout  # bf16
        assert loss != pytest.approx(attention, rel=1e-5)
    assert len(alone["written"]) == 12


def test_missing_and_foreign_routers_are_named(
    hf_project: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = hf_project.parent / "gdn tp2"
    found = sorted((run / "checkpoints").iterdir())[-1]
    with pytest.raises(ConfigError, match=rf"plan router:0\.1: {run}/{NAME} is missing; train a router: oryx router"):
        Plans.of_checkpoint(found, 8, ("attention", "router:0.1"))
    copied = tmp_path / "run"
    shutil.copytree(run, copied)
    (copied / NAME).write_text("mine")
    assert main([str(copied)]) == 2
    assert f"{copied}/{NAME}" in capsys.readouterr().err
    assert (copied / NAME).read_text() == "mine"
    with pytest.raises(DataError):
        router_training.train_router(copied, OPTIONS, overwrite=True)
    assert main(["/nowhere"]) == 2
    assert "/nowhere does not exist" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda about: about | {"model": about["model"] | {"num_layers": 99}}, r"num_layers 99, not \d+"),
        (lambda about: about | {"tokenizer": "0" * 64}, "another tokenizer"),
        (None, r"vocab_size 77, not \d+"),
    ],
)
def test_a_router_of_another_model(
    trained: tuple[Path, list[dict[str, Any]]], tmp_path: Path, change: Any, told: str
) -> None:
    """Named wherever it would be used; the same without what older ones do not say."""
    run = tmp_path / "run"
    shutil.copytree(trained[0], run)
    made, about = load_router(run / NAME)
    found = sorted((run / "checkpoints").iterdir())[-1]
    save_router(made, run / NAME, {name: about[name] for name in ("checkpoint", "iteration")})
    assert Plans.of_checkpoint(found, 8, (SPEC,)).router is not None
    if change is None:
        made, change = OryxRouter(dataclasses.replace(made.shape, vocab_size=77)), dict
    save_router(made, run / NAME, change(about))
    for use in (lambda: Plans.of_checkpoint(found, 8, (SPEC,)), lambda: export(run, tmp_path / "hf")):
        with pytest.raises(
            CheckpointError, match=rf"{run}/{NAME} is the router of another model \({told}\); train this"
        ):
            use()
    assert not (tmp_path / "hf").exists()


def test_the_table_shows_shares_losses_and_the_gap() -> None:
    rows = [
        router_training.Row("attention", 1.0, 2.0),
        router_training.Row("recurrent", 0.0, 3.0),
        router_training.Row("router:0.1", 0.1, 2.4),
    ]
    assert router_training.table(rows).splitlines() == [
        "plan           attention     loss  of the gap",
        "attention         100.0%   2.0000      100.0%",
        "recurrent           0.0%   3.0000        0.0%",
        "router:0.1         10.0%   2.4000       60.0%",
    ]
    equal = [router_training.Row("attention", 1.0, 2.0), router_training.Row("recurrent", 0.0, 2.0)]
    assert router_training.table(equal).splitlines()[1].endswith(" -")


def test_it_travels_with_an_export(trained: tuple[Path, list[dict[str, Any]]], tmp_path: Path) -> None:
    """To Hugging Face and back, unchanged; the export's plan is the run's."""
    run, _ = trained
    export(run, tmp_path / "hf", dtype="fp32")
    made, of_run = load_router(run / NAME)
    model = OryxForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.bfloat16)
    for name, tensor in model.model.mode_router.state_dict().items():
        assert torch.equal(tensor, made.state_dict()[name]), name  # fp32, whatever the model's format
    text = torch.randint(5, 300, (40,), generator=torch.Generator().manual_seed(0))
    plan = Plans(8, made).of(SPEC, text)
    assert model.model.route(0.3, text[None])[0].tolist() == plan.is_attention().tolist()
    assert 0 < plan.attention_tokens < 40
    written = load(tmp_path / "hf").generate("maan rolit", 8, plan=SPEC, temperature=0)
    known = Plans(8, made).of(SPEC, torch.tensor([*written.prompt_tokens, *written.tokens]))
    assert written.plan.is_attention()[:-1].tolist() == known.is_attention()[:-1].tolist()  # the last one is never read
    import_(tmp_path / "hf", tmp_path / "back")
    back, about = load_router(tmp_path / "back" / NAME)
    assert all(torch.equal(a, b) for a, b in zip(made.state_dict().values(), back.state_dict().values()))
    assert about["iteration"] == of_run["iteration"]


def explained(run: Path, folder: Path) -> list[int]:
    """Exit codes of the tool: a page, again without --overwrite, with it, and of a fixed plan."""
    from oryx_megatron.tools import explain_modes

    text = folder / "text.txt"
    text.write_text("<b>&amp;</b>\nétat, été: maan rolit maan rolit " * 3, encoding="utf-8")
    page, fixed = folder / "page.html", folder / "fixed.html"
    common = [str(run), str(text), "--plan", SPEC, "--output", str(page)]
    codes = [explain_modes.main(common), explain_modes.main(common), explain_modes.main([*common, "--overwrite"])]
    codes.append(explain_modes.main([str(run), str(text), "--plan", "ratio:0.5", "--output", str(fixed)]))
    layers = ["--plan", "layers:0=attention,rest=recurrent", "--output", str(folder / "layers.html")]
    codes.append(explain_modes.main([str(run), str(text), *layers]))
    codes.append(explain_modes.main([str(run), str(folder / "none.txt"), "--output", str(folder / "none.html")]))
    return codes


def test_modes_explained(trained: tuple[Path, list[dict[str, Any]]], tmp_path: Path) -> None:
    run, _ = trained
    (codes,) = run_distributed(explained, 1, run, tmp_path)
    assert codes == [0, 2, 0, 0, 0, 2]
    found = json.loads((tmp_path / "page.json").read_text())
    text = (tmp_path / "text.txt").read_text()
    assert "".join(token["text"] for token in found["tokens"]).strip() == text.strip()
    assert found["tokens"][-1]["gain"] is None
    gains = [token["gain"] for token in found["tokens"][:-1]]
    assert sum(gains) / len(gains) == pytest.approx(found["loss"]["recurrent"] - found["loss"]["attention"], abs=1e-4)
    attended = [token["attends"] for token in found["tokens"]]
    assert found["attention_share"] == pytest.approx(sum(attended) / len(attended))
    page = (tmp_path / "page.html").read_text()
    assert page.count('<span class="a" style') == sum(attended)
    assert "<b>&amp;</b>" not in page  # what the text holds is text, not markup
    assert "http" not in page
    assert "<script" not in page
    assert not any(token["in_some_layers"] for token in found["tokens"])
    assert "<br>" not in page  # lines end where the text's do: white-space: pre-wrap
    layers = json.loads((tmp_path / "layers.json").read_text())
    assert layers["attention_share"] == pytest.approx(0.25)  # one of four layers
    assert all(token["attends"] and token["in_some_layers"] for token in layers["tokens"])
    assert (tmp_path / "layers.html").read_text().count('<span class="s" style') == len(layers["tokens"])
    assert json.loads((tmp_path / "fixed.json").read_text())["attention_share"] == pytest.approx(0.5, abs=0.1)
    assert not (tmp_path / "none.html").exists()

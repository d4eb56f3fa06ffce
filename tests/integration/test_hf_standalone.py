"""An exported folder on a machine that has torch and transformers and nothing of ours."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

import oryx_megatron.hf
from oryx_megatron.hf.configuration_oryx import OryxConfig
from oryx_megatron.hf.modeling_oryx import OryxForCausalLM

# Runs without this project and without everything that only this project needs.
PREAMBLE = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"oryx_megatron", "megatron", "fla", "mamba_ssm", "causal_conv1d"}:
            raise ModuleNotFoundError(f"No module named {name!r} on this machine", name=name)
sys.meta_path.insert(0, Blocked())
sys.path.insert(0, {place!r})  # of the transformers under test
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
folder = sys.argv[1]
"""


def run_elsewhere(code: str, folder: Path, tmp_path: Path) -> str:
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(tmp_path / "home"),
        "HF_MODULES_CACHE": str(tmp_path / "modules"),
        "OMP_NUM_THREADS": "1",
    }
    environment.pop("PYTHONPATH", None)
    place = str(Path(transformers.__file__).parents[1])
    command = [sys.executable, "-I", "-c", PREAMBLE.replace("{place!r}", repr(place)) + code, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def small(mixer: str, **changes) -> OryxForCausalLM:
    torch.manual_seed(0)
    fields = {"vocab_size": 61, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "head_dim": 8}
    fields |= {"num_attention_heads": 4, "num_key_value_heads": 2, "value_head_dim": 6, "initializer_range": 0.3}
    return OryxForCausalLM(OryxConfig(mixer=mixer, **fields, **changes)).eval()


IDS = [[3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5]]


@pytest.mark.parametrize("mixer", ["gdn", "mamba2"])
def test_folder_loads_and_generates_alone(mixer: str, tmp_path: Path) -> None:
    model = small(mixer)
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    shipped = {path.name for path in Path(oryx_megatron.hf.__file__).parent.glob("*_oryx.py")}
    assert {"config.json", "model.safetensors", *shipped} <= {path.name for path in folder.iterdir()}
    assert all(len(path.read_text(encoding="utf-8").splitlines()) <= 600 for path in folder.glob("*.py"))
    code = f"""
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
assert type(model).__module__.startswith("transformers_modules"), type(model)
ids = torch.tensor({IDS})
with torch.no_grad():
    logits = model(ids, mode_plan="runs:a0-4,r4-9,a9-11").logits
text = model.generate(ids, max_new_tokens=7, do_sample=False, mode_plan="prompt:attention,new:recurrent")
loss = model(ids, labels=ids).loss
loss.backward()

bf16 = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.bfloat16)
kinds = {{name: str(p.dtype) for name, p in bf16.named_parameters()}}
assert bf16(ids, mode_plan="recurrent").logits.dtype == torch.bfloat16
eager = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, attn_implementation="eager")
with torch.no_grad():
    assert torch.allclose(eager(ids, mode_plan="runs:a0-4,r4-9,a9-11").logits, logits, atol=1e-4)
mapped = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, device_map="cpu", mode_plan="recurrent")
assert mapped.config.default_plan == "recurrent"
with torch.no_grad():
    assert torch.allclose(mapped(ids).logits, model(ids, mode_plan="recurrent").logits)
base = AutoModel.from_pretrained(folder, trust_remote_code=True)
assert base(ids).last_hidden_state.shape == (1, 11, 24)
assert AutoConfig.from_pretrained(folder, trust_remote_code=True).mixer == "{mixer}"

again = folder + "_again"
model.save_pretrained(again)
import pathlib
assert {{p.name for p in pathlib.Path(again).glob("*.py")}} == {{p.name for p in pathlib.Path(folder).glob("*.py")}}
back = AutoModelForCausalLM.from_pretrained(again, trust_remote_code=True)
for (name, a), (other, b) in zip(model.named_parameters(), back.named_parameters()):
    assert name == other and torch.equal(a, b), name

import json
print(json.dumps([logits.tolist(), text.tolist(), kinds]))
"""
    logits, text, kinds = json.loads(run_elsewhere(code, folder, tmp_path).splitlines()[-1])
    ids = torch.tensor(IDS)
    with torch.no_grad():
        ours = model(ids, mode_plan="runs:a0-4,r4-9,a9-11").logits
    torch.testing.assert_close(torch.tensor(logits), ours, atol=1e-5, rtol=0)
    expected = model.generate(ids, max_new_tokens=7, do_sample=False, mode_plan="prompt:attention,new:recurrent")
    assert text == expected.tolist()
    small_ones = {"a_log", "dt_bias", "d_skip"}
    for name, kind in kinds.items():
        assert kind == ("torch.float32" if name.split(".")[-1] in small_ones else "torch.bfloat16"), name


ROOT = Path(__file__).resolve().parents[2]


def test_other_versions_are_refused_in_one_line(tmp_path: Path) -> None:
    """Each as a machine that has it would see it; the promised ends are those that `make test` installs."""
    folder = tmp_path / "model"
    small("gdn").save_pretrained(folder)
    code = """
import transformers, shutil
from transformers.dynamic_module_utils import get_class_from_dynamic_module
def attempt(version, load, number):
    transformers.__version__ = version
    shutil.copytree(folder, f"{folder}{number}")  # modules are loaded once for a folder
    try:
        load(f"{folder}{number}")
        print("fine")
    except ImportError as error:
        print(error)
load = lambda path: AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True)
model = lambda path: get_class_from_dynamic_module("modeling_oryx.OryxForCausalLM", path)
versions = ("4.57.6", "5.13.1", "5.25.0.dev0", "5.25.0", "6.0.0", "5.14.0", "5.24.7")
for number, version in enumerate(versions):
    attempt(version, model if number % 2 else load, number)
"""
    first, last, above = "5.14", "5.24", "5.25"
    lines = run_elsewhere(code, folder, tmp_path).splitlines()
    assert len(lines) == 7
    assert lines[5:] == ["fine"] * 2
    for line, version in zip(lines, ("4.57.6", "5.13.1", "5.25.0.dev0", "5.25.0", "6.0.0")):
        assert line == (
            f"Oryx runs with transformers {first} to {last}, not {version}: "
            f"pip install 'transformers>={first},<{above}'"
        )
    assert f"\nENDS := {first} {last}\n" in (ROOT / "Makefile").read_text()
    for end in (first, last):
        assert f"\ntransformers=={end}." in (ROOT / "tests" / f"transformers-{end}.txt").read_text()
        assert end in (ROOT / "docs" / "huggingface.md").read_text()


def test_wrong_folders_give_one_clear_line(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    small("gdn").save_pretrained(folder, max_shard_size="8KB")
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 2
    shards[1].unlink()
    code = f"""
def message(call):
    try:
        call()
    except Exception as error:
        return type(error).__name__ + ": " + str(error)
load = AutoModelForCausalLM.from_pretrained
print(message(lambda: load(folder, trust_remote_code=True)))
print(message(lambda: load({str(tmp_path / "nowhere")!r}, trust_remote_code=True)).splitlines()[0])
from transformers.dynamic_module_utils import get_class_from_dynamic_module
OryxConfig = get_class_from_dynamic_module("configuration_oryx.OryxConfig", folder)
import json, os
other = {str(tmp_path / "other")!r}
os.mkdir(other)
json.dump({{"model_type": "llama", "hidden_size": 8}}, open(other + "/config.json", "w"))
print(message(lambda: OryxConfig.from_pretrained(other)))
"""
    missing, nowhere, foreign = run_elsewhere(code, folder, tmp_path).splitlines()
    assert shards[1].name in missing
    assert "nowhere" in nowhere
    assert foreign.startswith("ValueError: this is the config of a model type `llama`")

"""transformers' own common model tests with Oryx plugged in: `make hf-suite` fetches and runs them.

test_modeling_common.py, test_training_mixin.py and test_configuration_common.py of transformers' source distribution,
of the version installed, once per mixer and mode plan. The distribution leaves out the folders tests/generation and
tests/exporters: generation.py asks what the first would. With TRANSFORMERS_TESTS naming the tests folder of a checkout
of that version, transformers' own mixins of those folders run too.
"""

from __future__ import annotations

import importlib
import os
import sys
import types
import unittest
from pathlib import Path
from unittest.mock import patch

import pytest
import transformers
from generation import GenerationCases

from oryx_megatron.hf.configuration_oryx import OryxConfig
from oryx_megatron.hf.modeling_oryx import OryxForCausalLM, OryxModel

FETCHED = Path(__file__).parents[2] / "build/hf-suite" / f"transformers-{transformers.__version__}" / "tests"
TESTS = Path(os.environ.get("TRANSFORMERS_TESTS", FETCHED))
MIXERS = ("gdn", "mamba2")
PLANS = {"attention": "attention", "recurrent": "recurrent", "mixed": "every:2"}
EXPECTED: dict[str, str] = {}
"""Tests that fail, and why; docs/huggingface.md lists them too."""
SKIPS = (
    r"test requires (accelerator|multiple accelerators|MPS|Flash Attention|the kernels library)",
    r"(is not a composite|is not composite|No subconfigs|OryxModel does not support SDPA$)",  # no sub-models
    r"(axial RoPE|position embeddings|RoPE scaling|does not have RoPE|sliding window|sparse experts|router_logits)",
    r"(does not support grouped_mm|sequence-to-sequence|No conversion found|does not have a TP plan)",
)
"""Reasons for which a test may be skipped: what a machine or a model of this kind lacks. Any other is a failure."""


def _import_suite() -> dict[str, types.ModuleType]:
    """The tests' modules, of a package in which missing folders hold empty mixins."""
    if not (TESTS / "test_modeling_common.py").is_file():
        raise FileNotFoundError(f"{TESTS}/test_modeling_common.py not found; run `make hf-suite`, which fetches it")
    package = types.ModuleType("transformers_tests")
    package.__path__ = [str(TESTS)]
    sys.modules[package.__name__] = package
    absent = {
        "generation.test_utils": {"GenerationTesterMixin": type("GenerationTesterMixin", (), {})},
        "exporters.test_export": {"ExportTesterMixin": type("ExportTesterMixin", (), {})},
        "utils.test_configuration_utils": {
            "config_common_kwargs": {"return_dict": False, "output_hidden_states": True, "problem_type": "regression"}
            | {"dtype": "float16", "id2label": {0: "label"}, "label2id": {"label": 0}, "use_cache": False}
        },
    }
    for name, members in absent.items():
        if (TESTS / name.split(".")[0]).is_dir():
            continue
        module = types.ModuleType(f"transformers_tests.{name}")
        module.__dict__.update(members)
        sys.modules[module.__name__.rpartition(".")[0]] = types.ModuleType(module.__name__.rpartition(".")[0])
        sys.modules[module.__name__] = module
    names = ("test_modeling_common", "test_training_mixin", "test_configuration_common", "generation.test_utils")
    # It would load a second transformers from beside the tests.
    with patch("transformers.utils.direct_transformers_import", return_value=transformers):
        return {name: importlib.import_module(f"transformers_tests.{name}") for name in names}


suite = _import_suite()
common = suite["test_modeling_common"]

# What the tests look up by name: which class takes labels, which one is the base.
transformers.AutoConfig.register("oryx", OryxConfig, exist_ok=True)
transformers.AutoModel.register(OryxConfig, OryxModel, exist_ok=True)
transformers.AutoModelForCausalLM.register(OryxConfig, OryxForCausalLM, exist_ok=True)
common.MODEL_MAPPING_NAMES["oryx"] = OryxModel.__name__
common.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["oryx"] = OryxForCausalLM.__name__


class OryxTester:
    """Tiny configs and inputs, of the sizes that transformers' own causal-LM tester takes."""

    is_training = True
    base_model_class, causal_lm_class = OryxModel, OryxForCausalLM
    batch_size, seq_length = 13, 7
    num_hidden_layers, hidden_size, num_attention_heads, vocab_size = 2, 32, 4, 99

    def __init__(self, mixer: str, plan: str) -> None:
        self.mixer, self.plan = mixer, plan

    def get_config(self) -> OryxConfig:
        return OryxConfig(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=37,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            num_key_value_heads=2,
            head_dim=8,
            value_head_dim=8,
            mixer=self.mixer,
            mode_plan=self.plan,
            mode_chunk=2,
            recurrence_chunk=4,
            max_position_embeddings=512,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )

    def prepare_config_and_inputs_for_common(self):
        ids = common.ids_tensor([self.batch_size, self.seq_length], self.vocab_size)
        return self.get_config(), {"input_ids": ids, "attention_mask": ids.new_ones(ids.shape).tril()}


class Case(
    GenerationCases,
    common.ModelTesterMixin,
    suite["generation.test_utils"].GenerationTesterMixin,
    suite["test_training_mixin"].TrainingTesterMixin,
):
    """What runs for one mixer and one plan."""

    mixer: str
    plan: str
    all_model_classes = (OryxModel, OryxForCausalLM)
    test_can_init_all_missing_weights_before_2023 = True  # it reads the model's year from a header that ours lacks
    _torch_compile_train_cls = OryxForCausalLM
    model_tester = None

    def setUp(self) -> None:
        self.model_tester = OryxTester(self.mixer, self.plan)

    def test_config(self) -> None:
        sizes = {"hidden_size": 32, "num_attention_heads": 4, "mixer": self.mixer, "mode_plan": self.plan}
        suite["test_configuration_common"].ConfigTester(self, config_class=OryxConfig, **sizes).run_common_tests()

    def test_model(self) -> None:
        config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        out = OryxModel(config).to(common.torch_device).eval()(**inputs)
        assert out.last_hidden_state.shape == (*inputs["input_ids"].shape, config.hidden_size)


for test, why in EXPECTED.items():
    setattr(Case, test, pytest.mark.xfail(reason=why, strict=True)(getattr(Case, test)))

for mixer in MIXERS:
    for name, plan in PLANS.items():
        case = f"Test_{mixer}_{name}"
        globals()[case] = type(case, (Case, unittest.TestCase), {"mixer": mixer, "plan": plan})

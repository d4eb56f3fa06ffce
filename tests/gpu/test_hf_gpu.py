"""The Hugging Face model on a GPU: fast kernels against plain torch, and decoding as CUDA graphs without waiting."""

from __future__ import annotations

import copy

import pytest
import torch

from oryx_megatron.hf import layers_oryx
from oryx_megatron.hf.configuration_oryx import OryxConfig
from oryx_megatron.hf.modeling_oryx import OryxCache, OryxDecoder, OryxForCausalLM, plan_mask
from oryx_megatron.hf.modes_oryx import TokenModes

MIXERS = ("gdn", "mamba2")


def small(mixer: str, dtype: torch.dtype = torch.bfloat16, **changes) -> OryxForCausalLM:
    torch.manual_seed(0)
    fields = {"vocab_size": 512, "hidden_size": 256, "intermediate_size": 320, "num_hidden_layers": 3, "mode_chunk": 16}
    fields |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "value_head_dim": 64}
    config = OryxConfig(mixer=mixer, initializer_range=0.06, **(fields | changes))
    return OryxForCausalLM(config).to("cuda", dtype).eval()


def random_ids(*shape: int) -> torch.Tensor:
    return torch.randint(0, 512, shape, generator=torch.Generator().manual_seed(1)).cuda()


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("padded", [False, True])
def test_fast_kernels_compute_what_plain_torch_does(mixer: str, padded: bool) -> None:
    """bf16, random plan, prefill in two pieces (so with an initial state), against the same model in fp32."""
    needed = layers_oryx.chunk_gated_delta_rule if mixer == "gdn" else layers_oryx.mamba_chunk_scan_combined
    if needed is None:
        pytest.skip(f"no fast kernel for {mixer}")
    ids, modes = random_ids(3, 333), torch.rand(333, generator=torch.Generator().manual_seed(2)) < 0.4
    mask = torch.ones_like(ids)
    if padded:
        mask[1, :100] = 0
        mask[2, 300:] = 0
    fast = small(mixer)
    plain = copy.deepcopy(fast).float()
    for layer in plain.model.layers:
        layer.mixer.kernels = False
        layer.mixer.conv.kernels = False
    with torch.no_grad():
        want = plain(ids, attention_mask=mask, mode_plan=modes).logits
        cache = OryxCache(fast.config)
        first = fast(ids[:, :200], attention_mask=mask[:, :200], past_key_values=cache, mode_plan=modes[:200]).logits
        second = fast(ids[:, 200:], attention_mask=mask, past_key_values=cache, mode_plan=modes[200:]).logits
    got = torch.cat([first, second], 1).float()[mask == 1]
    want = want[mask == 1]
    assert ((got - want).norm() / want.norm()).item() < 0.03


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("keep_kv", [True, False])
def test_graphs_compute_what_eager_steps_do(mixer: str, keep_kv: bool) -> None:
    """Compiled and replayed steps of every kind, fp32, without one synchronisation of the host."""
    model = small(mixer, torch.float32, kernels="torch")
    ids = random_ids(2, 40)
    attends = (torch.arange(40) % 3 == 0) & torch.tensor(keep_kv)
    with torch.no_grad():
        whole = model(ids, mode_plan=attends).logits[:, 8:]
        cache = OryxCache(model.config, 64, keep_kv)
        model(ids[:, :8], past_key_values=cache, mode_plan=attends[:8])
        decoder = OryxDecoder(model, cache, torch.full((2, 1), 8, device="cuda"))
        steps = []
        for t in range(8, 40):
            if t == 24:
                torch.cuda.synchronize()
                torch.cuda.set_sync_debug_mode("error")
            kind: TokenModes | str = "attention" if attends[t] else "recurrent"
            steps.append(decoder.step(ids[:, t], kind).clone())
        torch.cuda.set_sync_debug_mode("default")
    assert set(decoder.graphs) == ({"attention", "recurrent"} if keep_kv else {"recurrent"})
    torch.testing.assert_close(torch.stack(steps, 1), whole, atol=2e-3, rtol=1e-3)  # TF32-free, other orders of sums


@pytest.mark.parametrize("mixer", MIXERS)
def test_generate_over_a_static_cache_equals_the_dynamic_one(mixer: str) -> None:
    model = small(mixer, torch.float32, kernels="torch")
    ids, mask = random_ids(3, 20), torch.ones(3, 20, dtype=torch.long, device="cuda")
    mask[1, :7] = 0
    for plan in ("recurrent", "every:2", "prompt:attention,new:recurrent"):
        common = {
            "attention_mask": mask,
            "max_new_tokens": 40,
            "mode_plan": plan,
            "do_sample": False,
            "pad_token_id": 0,
        }
        dynamic = model.generate(ids, **common)
        static = model.generate(ids, cache_implementation="static", **common)
        assert torch.equal(dynamic, static), plan
        stop = dynamic[:, 30].unique().tolist()
        ended = model.generate(ids, cache_implementation="static", eos_token_id=stop, **common)
        assert torch.equal(ended, model.generate(ids, eos_token_id=stop, **common)), plan


def test_flex_attention_agrees() -> None:
    ids, modes = random_ids(2, 130), plan_mask("ratio:0.5", 130, chunk=16)
    sdpa = small("gdn", kernels="torch")
    flex = small("gdn", kernels="torch", attn_implementation="flex_attention")
    with torch.no_grad():
        one, two = (model(ids, mode_plan=modes).logits.float() for model in (sdpa, flex))
    assert ((one - two).norm() / one.norm()).item() < 0.02

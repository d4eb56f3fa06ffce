"""The CPU layer, each part in a fresh interpreter: what it redirects is process-wide."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the CPU layer refuses to work beside a GPU")

PREAMBLE = """
import warnings
warnings.simplefilter("ignore")
import torch
from oryx_megatron import platform
from oryx_megatron.compat import torch as cpu
"""


def run(code: str) -> str:
    """Output of `code` in a new interpreter that must end without error."""
    done = subprocess.run([sys.executable, "-c", PREAMBLE + code], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_redirects() -> None:
    """Each thing megatron-core asks of CUDA, redirected once however often the layer is installed."""
    run("""
assert not cpu.cpu_installed()
platform.install()
assert cpu.cpu_installed()
names = [*((torch, name) for name in (*cpu.FACTORIES, "compile")), (torch.Tensor, "to"), (torch.Tensor, "type"),
         (torch.cuda, "current_device"), (torch.cuda, "Stream"), (torch.cuda, "default_generators")]
before = [getattr(owner, name) for owner, name in names]
platform.install()
cpu.install_cpu()
assert all(getattr(owner, name) is old for (owner, name), old in zip(names, before))

assert platform.device() == torch.device("cpu") and platform.backend() == "gloo"
assert torch.cuda.current_device() == torch.device("cpu")
cpu_only = torch.device("cpu")

# device literals, in every way they are written
for cuda in ("cuda", "cuda:0", torch.device("cuda"), torch.device("cuda", 3), torch.cuda.current_device()):
    made = [
        torch.empty(2, 3, device=cuda), torch.zeros((2, 3), device=cuda), torch.ones(2, device=cuda),
        torch.full((2,), 7.0, device=cuda), torch.tensor([1, 2], device=cuda, dtype=torch.int32),
        torch.arange(3, device=cuda), torch.rand(2, device=cuda), torch.randn(2, device=cuda),
        torch.randint(0, 5, (2,), device=cuda), torch.eye(2, device=cuda),
        *(like(torch.ones(2), device=cuda) for like in (torch.empty_like, torch.zeros_like, torch.ones_like)),
        torch.full_like(torch.ones(2), 3.0, device=cuda),
        torch.ones(2).to(cuda), torch.ones(2).to(device=cuda), torch.ones(2).to(cuda, torch.float64),
    ]
    assert all(tensor.device == cpu_only for tensor in made)
assert made[-1].dtype == torch.float64 and made[4].dtype == torch.int32 and made[3].tolist() == [7.0, 7.0]
assert torch.ones(1).cuda().device == cpu_only and torch.nn.Linear(2, 2).cuda().weight.device == cpu_only
assert torch.nn.Linear(2, 2).to("cuda").weight.device == cpu_only
assert torch.ones(1, device="meta").is_meta and torch.ones(1).to("meta").is_meta  # nothing else is redirected

# type names
for dtype, name in ((torch.float32, "Float"), (torch.bfloat16, "BFloat16"), (torch.float16, "Half")):
    assert torch.zeros(1, dtype=dtype).type() == f"torch.cuda.{name}Tensor"
assert torch.zeros(1).type(torch.float64).dtype == torch.float64
assert torch.zeros(1).type("torch.DoubleTensor").dtype == torch.float64

# random states: one generator behind all names
torch.cuda.manual_seed(3)
first = torch.rand(3)
state = torch.cuda.get_rng_state()
second = torch.rand(3)
torch.cuda.random.set_rng_state(state, device="cuda:0")
assert torch.equal(torch.rand(3), second) and not torch.equal(first, second)
torch.manual_seed(3)
assert torch.equal(torch.rand(3), first)
assert torch.cuda.default_generators[0] is torch.cuda.default_generators[torch.device("cpu")]
from megatron.core import tensor_parallel
tensor_parallel.model_parallel_cuda_manual_seed(5, tp_rank=0, ep_rank=0, etp_rank=0)
tracker = tensor_parallel.get_cuda_rng_tracker()
def forked():
    with tracker.fork():
        return torch.rand(3)
states = tracker.get_states()
outside = torch.get_rng_state()
a, b = forked(), forked()
assert torch.equal(torch.get_rng_state(), outside) and not torch.equal(a, b)
tracker.set_states(states)
assert torch.equal(forked(), a)

# streams and events: everything has happened already
stream, event = torch.cuda.Stream(), torch.cuda.Event(enable_timing=True)
with torch.cuda.stream(stream):
    event.record(stream)
torch.cuda.current_stream().wait_stream(stream)
torch.cuda.default_stream().wait_event(event)
event.synchronize()
torch.cuda.synchronize()
torch.cuda.empty_cache()
torch.cuda.nvtx.range_push("x")
torch.cuda.nvtx.range_pop()
torch.cuda.set_device(0)
assert not torch.cuda.is_available()  # nobody is led to believe in a GPU
""")


def test_never_beside_a_gpu() -> None:
    """With a GPU it refuses, installed before or not; `platform.install` then chooses the GPU of the local rank."""
    run("""
import os
chosen = []
untouched = {name: getattr(torch, name) for name in cpu.FACTORIES}
torch.cuda.is_available = lambda: True
torch.cuda.set_device, torch.cuda.device_count = chosen.append, lambda: 4
os.environ |= {"RANK": "6", "WORLD_SIZE": "8", "LOCAL_RANK": "6", "LOCAL_WORLD_SIZE": "8"}
platform.install()
assert chosen == [2] and not cpu.cpu_installed()
assert platform.backend() == "cpu:gloo,cuda:nccl"
def refuses():
    try:
        cpu.install_cpu()
    except RuntimeError as error:
        return "GPU" in str(error)
assert refuses() and not cpu.cpu_installed()
assert all(getattr(torch, name) is function for name, function in untouched.items())
assert torch.zeros(1).type() == "torch.FloatTensor"
torch.cuda.is_available = lambda: False
platform.install()
torch.cuda.is_available = lambda: True
assert refuses()
""")


STEP = """
import torch.distributed
from oryx_megatron import parallel
from oryx_megatron.config.schema import ModelConfig, ParallelConfig, PrecisionConfig
parallel.initialize(ParallelConfig(), seed=1)
assert cpu.cpu_installed()
from oryx_megatron.model import SequenceInfo, build_model
from oryx_megatron.modes import parse_plan
model = ModelConfig(name="t", mixer="gdn", num_layers=1, hidden_size=16, ffn_hidden_size=16, num_heads=2, qk_head_dim=8,
                    v_head_dim=8, vocab_size=32)
(chunk,) = build_model(model, ParallelConfig(recompute="full"), PrecisionConfig(dtype="bf16"), seed=3)
tokens = torch.arange(24).view(1, 24)
info = SequenceInfo.build(parse_plan("ratio:0.5", 24, chunk=4), device=torch.device("cpu"))
loss = chunk(tokens, None, None, labels=tokens.roll(-1, 1), packed_seq_params=info).float().mean()
loss.backward()
grads = sum(float(p.grad.double().abs().sum()) for p in chunk.parameters())
print(loss.item(), grads)
parallel.destroy()
"""


def test_order_of_imports_does_not_matter() -> None:
    """megatron-core imported before or after the layer is installed: the same model, the same numbers."""
    late = "import megatron.core.tensor_parallel.random\nfrom megatron.core.models.gpt import GPTModel\n"
    assert run(late + STEP) == run("platform.install()\n" + STEP)

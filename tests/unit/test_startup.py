"""What a command loads before it works: nothing heavy for --help, and of megatron-core and torch only what is used.

Held by what is in sys.modules, not by a clock; benchmarks/startup.py has the seconds.
"""

import ast
import importlib.util
import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "oryx_megatron"
HEAVY = (
    *("torch", "megatron", "transformers", "tokenizers", "sentencepiece", "deepspeed", "triton", "numpy", "scipy"),
    *("matplotlib", "pandas", "pyarrow", "tensorboard", "setuptools", "sympy"),
)
UNUSED = (
    *("torch._dynamo", "torch._inductor", "sympy", "setuptools", "torch.utils.tensorboard", "tensorboard", "triton"),
    *("transformers", "matplotlib", "deepspeed", "pyarrow", "pandas", "networkx"),
)


def commands() -> list[str]:
    """Everything that can be started: scripts by path, modules of the package by name."""
    found = [path for folder in ("tools", "launch", "oryx_megatron") for path in sorted((ROOT / folder).rglob("*.py"))]
    started = [path.relative_to(ROOT) for path in found if '__name__ == "__main__"' in path.read_text(encoding="utf-8")]
    modules = [path for path in started if path.parts[0] == PACKAGE.name]
    names = [".".join(path.with_suffix("").parts).removesuffix(".__main__") for path in modules]
    return [*(str(path) for path in started if path not in modules), *names]


def loaded(code: str, names: tuple[str, ...]) -> list[str]:
    """Which of `names` are loaded in a new interpreter after `code`."""
    code += f"\nimport sys, json\nprint(json.dumps([name for name in {names!r} if name in sys.modules]))"
    result = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def test_commands_are_found() -> None:
    assert {"tools/generate.py", "oryx_megatron.train", "oryx_megatron.doctor", "launch/submit.py"} <= set(commands())


@pytest.mark.parametrize("command", commands())
def test_help_loads_nothing_heavy(command: str) -> None:
    start = "run_path" if command.endswith(".py") else "run_module"
    code = f"""
import contextlib, io, os, runpy, sys
os.environ["COLUMNS"] = "80"
sys.argv = [{command!r}, "--help"]
sys.path[0] = {str((ROOT / command).parent)!r}
with contextlib.redirect_stdout(io.StringIO()) as shown, contextlib.suppress(SystemExit):
    runpy.{start}({str(ROOT / command) if start == "run_path" else command!r}, run_name="__main__")
lines = shown.getvalue().splitlines()
assert len(lines) > 3, lines
assert not [line for line in lines if len(line) > 80], "too wide"
internal = {command.endswith("agent")}
assert internal or any(line.startswith("    ") and line[4] != " " for line in lines), "no example"
"""
    assert loaded(code, HEAVY) == []


def test_the_trainer_and_a_step_load_nothing_unused() -> None:
    """Optimizer and schedules, evaluation, checkpoints; a step on a CPU."""
    code = """
import oryx_megatron.train.trainer, oryx_megatron.eval.generation, oryx_megatron.eval.perplexity, torch
weight = torch.nn.Parameter(torch.ones(3))
for kind in (torch.optim.AdamW, torch.optim.Adam, torch.optim.SGD):
    optimizer = kind([weight], lr=0.1)
    weight.grad = torch.ones(3)
    optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.zero_grad()
assert weight.requires_grad and torch.is_grad_enabled() and float(weight[0]) < 0.9, weight
"""
    unused = [name for name in UNUSED if name != "triton" or importlib.util.find_spec("triton") is None]
    assert loaded(code, tuple(unused)) == []  # megatron-core itself imports Triton where it is installed
    muon = "import oryx_megatron.platform, deepspeed.runtime.zero.muon.original_muon"
    assert loaded(muon, ("torch._dynamo", "torch._inductor")) == []


def test_a_backward_pass_from_a_gradient_loads_nothing_unused() -> None:
    """As kernels are warmed and graphs captured; the same gradients as torch.autograd's."""
    code = """
from oryx_megatron import compat
import torch
a, b, unused = (torch.randn(3, 5, requires_grad=True) for _ in range(3))
y, seed = (a * b).sin(), torch.randn(3, 5)
found = compat.torch.run_backward(y, seed, [a, unused])
assert b.grad is None and a.grad is None and found[1] is None
compat.torch.run_backward((a * b).sin(), seed)
wanted = seed * (a * b).cos()
assert torch.allclose(found[0], wanted * b) and torch.allclose(b.grad, wanted * a) and torch.equal(found[0], a.grad)
"""
    assert loaded(code, ("torch._dynamo", "sympy")) == []
    as_torch_does = code.replace(
        "compat.torch.run_backward(y, seed, [a, unused])", "(*torch.autograd.grad(y, a, seed), None)"
    )
    assert loaded(as_torch_does, ("sympy",)) == ["sympy"]  # else this is no longer needed


def test_what_is_put_off_works_when_it_is_used() -> None:
    """The original names come back with symbolic_shapes; fused functions compile at the first call beside a GPU."""
    code = """
import oryx_megatron.platform
import torch, torch.distributed.tensor._collective_utils as user
from torch.distributed.tensor import _decompositions
from megatron.core.fusions import fused_bias_swiglu
from megatron.core import nccl_allocator
from oryx_megatron.compat import megatron

stand_in = user.guard_or_false
assert stand_in(torch.ones(1).shape[0] == 1) is True and stand_in(False) is False
from torch.fx.experimental import symbolic_shapes
assert user.guard_or_false is symbolic_shapes.guard_or_false is not stand_in
assert _decompositions.GuardOnDataDependentSymNode is symbolic_shapes.GuardOnDataDependentSymNode
assert callable(torch.utils.cpp_extension.load_inline)  # loads it

x = torch.randn(2, 8)
expected = torch.nn.functional.silu(x[:, :4]) * x[:, 4:]
assert torch.allclose(fused_bias_swiglu.swiglu(x), expected)  # on a CPU as it is
compiled = []
def compiler(function):
    compiled.append(function.__name__)
    return function
torch.cuda.is_available, torch.compile, original = lambda: True, compiler, torch.compile
fused = megatron.compiled_on_first_use(fused_bias_swiglu.swiglu.__wrapped__)
assert compiled == []
for _ in range(2):
    assert torch.allclose(fused(x), expected)
assert compiled == ["swiglu"], compiled
fused_bias_swiglu.bias_swiglu(x, torch.zeros(8))
assert compiled == ["swiglu", "bias_swiglu"], compiled  # the swiglu that it calls had its first call on the CPU
torch.cuda.is_available, torch.compile = lambda: False, original
outer = torch.compile(lambda y: fused(y) + 1, backend="eager", fullgraph=True)  # part of the outer graph
assert torch.allclose(outer(x), expected + 1) and compiled == ["swiglu", "bias_swiglu"], compiled

weight = torch.nn.Parameter(torch.ones(3))  # now that there is a dynamo: torch's own
optimizer = torch.optim.AdamW([weight], lr=0.1)
weight.grad = torch.ones(3)
optimizer.step()
optimizer.zero_grad()
assert float(weight.detach()[0]) < 1
"""
    assert "sympy" in loaded(code, UNUSED)


def test_putting_off_is_still_needed() -> None:
    """When one of these is no longer loaded in vain, its patch in compat/ should go."""
    code = """
import sys, torch, torch.distributed.tensor
assert "sympy" in sys.modules
assert "torch._dynamo" not in sys.modules
torch.optim.AdamW([torch.nn.Parameter(torch.ones(3))])
assert "torch._dynamo" in sys.modules
assert "torch._inductor.compile_fx" not in sys.modules
import deepspeed.runtime.zero.muon.original_muon
assert "torch._inductor.compile_fx" in sys.modules
assert "torch.utils.tensorboard" not in sys.modules
import megatron.core.jit, megatron.core.nccl_allocator, megatron.core.inference.unified_memory as unified_memory
assert megatron.core.jit.jit_fuser is torch.compile
assert megatron.core.nccl_allocator.cpp_extension is sys.modules["torch.utils.cpp_extension"]
assert unified_memory.load_inline is megatron.core.nccl_allocator.cpp_extension.load_inline
from megatron.core.transformer.moe import moe_utils
from importlib.metadata import version
assert hasattr(moe_utils, "te_general_gemm") == (not version("megatron-core").startswith("0.16."))
assert torch.is_tensor(moe_utils.maybe_move_tensor_to_cpu(torch.ones(2), as_numpy=True))
"""
    assert loaded(code, ("torch.utils.tensorboard",)) == ["torch.utils.tensorboard"]


def test_packages_with_megatron_core_prepare_for_it() -> None:
    """Their __init__, or the module itself, imports oryx_megatron.platform before anything can import megatron-core."""
    faults = []
    for path in PACKAGE.rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        names = [n.module or "" for n in tree.body if isinstance(n, ast.ImportFrom)]
        names += [alias.name for n in tree.body if isinstance(n, ast.Import) for alias in n.names]
        if any(name.split(".")[0] == "megatron" for name in names):
            package = ast.parse((path.parent / "__init__.py").read_text(encoding="utf-8"))
            firsts = [*package.body[1:2], *tree.body[2:3]]  # after the docstring; after that and __future__
            if not any(isinstance(n, ast.Import) and n.names[0].name == "oryx_megatron.platform" for n in firsts):
                faults.append(str(path.relative_to(PACKAGE)))
    assert faults == []


def test_benchmark_of_startup(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """It prints both sides and the ratio; here of two light modules."""
    monkeypatch.setattr(sys, "argv", ["startup.py"])
    bench = runpy.run_path(str(ROOT / "benchmarks" / "startup.py"))
    assert bench["main"](["--repeat", "1", "--base", "json", "--imports", "argparse", "--helps", "tools/plan.py"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any("import json" in line for line in lines)
    assert any("import argparse" in line and "×" in line for line in lines)
    assert any("tools/plan.py --help" in line for line in lines)


@pytest.mark.parametrize(("version", "left_out"), [("0.6.0", True), ("0.5.1", False)])
def test_fla_comes_without_its_layers(tmp_path: Path, version: str, left_out: bool) -> None:
    """They load transformers and mamba_ssm. Before 0.6 fla cannot be imported without them."""
    optional = """
import importlib
for name in ("fla.layers", "fla.models"):
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
"""
    for folder in ("layers", "models", "modules/activations"):
        (tmp_path / "fla" / folder).mkdir(parents=True)
    for folder in ("layers", "modules", "modules/activations"):
        (tmp_path / "fla" / folder / "__init__.py").touch()
    (tmp_path / "fla/__init__.py").write_text(optional if left_out else "import fla.layers\n")
    (tmp_path / "fla/layers/abc.py").touch()
    (tmp_path / "fla/models/__init__.py").write_text("import fla.layers.abc\n")
    (tmp_path / "fla/modules/activations/ops.py").write_text(
        "import torch\n@torch.compile\ndef twice(x):\n    return 2 * x\n"
    )
    package = tmp_path / f"fla_core-{version}.dist-info"
    package.mkdir()
    (package / "METADATA").write_text(f"Metadata-Version: 2.1\nName: fla-core\nVersion: {version}\n")
    code = f"""
import sys
sys.path.insert(0, {str(tmp_path)!r})
import oryx_megatron.platform
import fla.modules.activations.ops as ops
print("fla.layers" in sys.modules, "torch._inductor.compile_fx" in sys.modules)
import fla.models
print(fla.layers.__file__)
"""
    result = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=300)
    assert result.stdout.split() == [str(not left_out), "False", str(tmp_path / "fla/layers/__init__.py")], (
        result.stderr
    )


def test_of_fla_what_is_used_is_loaded(tmp_path: Path) -> None:
    """One recurrence of many, and no compiler of torch's; what it must not trace, it does not once it is there."""
    files = {
        "fla/__init__.py": "",
        "fla/ops/__init__.py": "from .gla import chunk_gla\n__all__ = ['chunk_gla']\n",
        "fla/ops/gla.py": "def chunk_gla():\n    return 'gla'\n",
        "fla/ops/gated_delta_rule/__init__.py": "from fla.ops.gated_delta_rule.chunk import chunk\n",
        "fla/ops/gated_delta_rule/chunk.py": """
import torch
@torch.compiler.disable
def chunk(x):
    \"\"\"In chunks.\"\"\"
    return x + 1
@torch.compiler.disable(recursive=False)
def other(x):
    return x + 1
""",
        "flash_qla/__init__.py": "from flash_qla.math import twice\n",
        "flash_qla/math.py": "import torch\n@torch.compile(backend='eager')\ndef twice(x):\n    return 2 * x\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    code = f"""
import sys
sys.path.insert(0, {str(tmp_path)!r})
import oryx_megatron.platform
import torch
disable = torch.compiler.disable
from fla.ops.gated_delta_rule import chunk
from fla.ops.gated_delta_rule.chunk import chunk, other
import fla.ops, flash_qla
assert torch.compiler.disable is disable
assert not hasattr(fla.ops, "__wrapped__")
for name in ("fla.ops.gla", "torch._dynamo", "torch._inductor"):
    assert name not in sys.modules, name
x = torch.zeros(2)
assert chunk(x).equal(x + 1) and other(x).equal(x + 1) and chunk.__doc__ == "In chunks."
assert "torch._dynamo" not in sys.modules
from fla.ops import *
assert chunk_gla() == fla.ops.chunk_gla() == "gla"
assert not hasattr(fla.ops, "none_such")
assert flash_qla.twice(x).equal(2 * x)
assert "torch._dynamo" in sys.modules
traced = []
def count(graph, inputs):
    traced.append(len([node for node in graph.graph.nodes if node.op == "call_function"]))
    return graph
assert torch.compile(lambda y: chunk(y * 3) * 5, backend=count)(x).equal(x * 15 + 5)
assert torch.compile(lambda y: other(y * 7) + 2, backend=count)(x).equal(x * 7 + 3)
assert traced == [1, 1, 1, 1], traced  # what stands before and after them
"""
    result = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr


def test_transformer_engine_comes_without_dynamo(tmp_path: Path) -> None:
    """And without its exporter; what it says to dynamo is said when something else loads that."""
    files = {
        "__init__.py": "import transformer_engine.pytorch\n",
        "pytorch/__init__.py": """
import torch
from transformer_engine.pytorch import export, jit, linear
torch._dynamo.config.error_on_nested_jit_trace = False
""",
        "pytorch/export.py": """
import torch
from .onnx_extensions import onnx_gemm, te_translation_table
def is_in_onnx_export_mode():
    return False
""",
        "pytorch/onnx_extensions.py": "te_translation_table = {1: 2}\ndef onnx_gemm():\n    return 'gemm'\n",
        "pytorch/jit.py": """
import torch
try:
    from torch._dynamo.comptime import comptime
except ImportError:
    comptime = None
import torch._dynamo
def no_torch_dynamo(function):
    return torch._dynamo.disable(function, recursive=True)
@torch.compiler.assume_constant_result
def supported():
    return True
""",
        "pytorch/linear.py": """
import torch
from torch.fx.experimental.symbolic_shapes import guard_scalar
from .jit import no_torch_dynamo
@no_torch_dynamo
def forward(x):
    return x + 1
class Linear:
    @torch._dynamo.disable
    def forward(self, x):
        return x + 1
""",
    }
    for name, text in files.items():
        (tmp_path / "transformer_engine" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "transformer_engine" / name).write_text(text)
    code = f"""
import sys
sys.path.insert(0, {str(tmp_path)!r})
import oryx_megatron.platform
import torch
torch.cuda.is_available = lambda: True
import transformer_engine.pytorch as te
torch.cuda.is_available = lambda: False
x = torch.zeros(2)
assert te.linear.forward(x).equal(x + 1) and te.linear.Linear().forward(x).equal(x + 1)
assert te.jit.supported() and not te.export.is_in_onnx_export_mode()
for name in ("torch._dynamo", "torch._dynamo.comptime", "sympy", "transformer_engine.pytorch.onnx_extensions"):
    assert name not in sys.modules, name
assert not hasattr(te.export, "nothing")
from transformer_engine.pytorch.export import onnx_gemm
assert onnx_gemm() == "gemm" and te.export.te_translation_table == {{1: 2}}

assert te.linear.guard_scalar(3) == 3
from torch.fx.experimental import symbolic_shapes
assert te.linear.guard_scalar is symbolic_shapes.guard_scalar
import torch._dynamo
assert torch._dynamo.config.error_on_nested_jit_trace is False
assert te.jit.supported._dynamo_marked_constant
for kept in (te.linear.forward, te.linear.Linear().forward):
    assert torch.compile(lambda y: kept(y * 3) * 5, backend="eager")(x).equal(x * 15 + 5)
    try:
        torch.compile(lambda y: kept(y * 3) * 5, backend="eager", fullgraph=True)(x)
    except torch._dynamo.exc.Unsupported:
        continue
    raise SystemExit("traced")
"""
    result = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr


def test_dynamo_is_loaded_for_what_it_cannot_be_stood_for(tmp_path: Path) -> None:
    """While TransformerEngine is imported as well, and modules of dynamo."""
    for name, line in (("asks", "explain = torch._dynamo.explain"), ("imports", "import torch._dynamo.utils")):
        folder = tmp_path / name / "transformer_engine" / "pytorch"
        folder.mkdir(parents=True)
        (folder.parent / "__init__.py").touch()
        (folder / "__init__.py").write_text(f"import torch\n{line}\n")
        code = f"""
import sys
sys.path.insert(0, {str(tmp_path / name)!r})
import oryx_megatron.platform
import torch
torch.cuda.is_available = lambda: True
import transformer_engine.pytorch
assert sys.modules["torch._dynamo"].__file__ and torch._dynamo.utils and torch._dynamo.explain
"""
        assert loaded(code, ("torch._dynamo.comptime", "sympy")) == ["torch._dynamo.comptime", "sympy"]

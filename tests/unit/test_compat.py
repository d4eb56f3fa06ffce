"""Every patch in oryx_megatron/compat is still needed: each test shows what the upstream does without it.

One that fails says that the installed version of the upstream no longer needs the patch, which should then go.
What compat puts off at import is held by test_startup.py.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import io
import os
import pickle
import queue
import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from oryx_megatron import compat
from oryx_megatron.testing import run_distributed

NEW = compat.megatron.since(0, 19)


class Bomb:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.folder),)


def text_of(module: Any) -> str:
    return Path(inspect.getfile(module)).read_text(encoding="utf-8")


def run(code: str, **environment: str) -> str:
    """Output of `code` in a new interpreter that must end without error."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        **{"capture_output": True, "text": True, "timeout": 200, "env": {**os.environ, **environment}},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("name", ["torch", "megatron", "deepspeed", "transformer_engine", "fla", "tilelang"])
def test_every_patch_has_its_reason(name: str) -> None:
    """The table at the top of each file names every function that others call, and no other."""
    module = getattr(compat, name)
    listed = set(re.findall(r"`(\w+)`", module.__doc__.split("\n\nOn GPUs")[0]))
    own = {
        key
        for key, value in vars(module).items()
        if not key.startswith("_") and getattr(value, "__module__", None) == module.__name__
    }
    plain = {"singles", "since", "cpu_installed", "compiled_on_first_use"}  # of use to the others
    assert own - plain == listed & own, own ^ listed
    assert re.search(r"\d+\.\d+", module.__doc__.splitlines()[0])  # the versions


# --------------------------------------------------------------------------------------------------------------- torch


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_megatron_core_asks_for_cuda() -> None:
    from megatron.core.optimizer import distrib_optimizer, optimizer
    from megatron.core.tensor_parallel import layers, random

    assert "'torch.cuda.HalfTensor', 'torch.cuda.BFloat16Tensor'" in text_of(distrib_optimizer)
    assert "device='cuda'" in text_of(optimizer).replace('"', "'")
    assert "torch.cuda.current_device()" in text_of(layers)
    assert "torch.cuda.default_generators[idx]" in text_of(random)


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
@pytest.mark.parametrize("build", ["as it is", "with CUDA"])
def test_no_gpu_after_deepspeed_is_imported(build: str) -> None:
    """torch's default wheel, with CUDA, on a machine without a GPU: with NVML checks it counts devices."""
    code = f"""
import os, torch
original = torch.cuda.is_available
if {build == "with CUDA"}:
    torch.cuda._is_compiled = lambda: True
    torch.cuda._device_count_nvml = torch._C._cuda_getDeviceCount = lambda: 0
assert not torch.cuda.is_available()
from oryx_megatron import compat, platform
platform.install()
deepspeed = compat.deepspeed.import_deepspeed()
assert os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] == "1"
assert original() == {build == "with CUDA" or torch.version.cuda is not None}  # what the patch is for
assert not torch.cuda.is_available() and not platform.has_gpu() and platform.backend() == "gloo"
from deepspeed.accelerator import get_accelerator
assert get_accelerator().device_name() == "cpu"
"""
    run(code)


def test_the_agents_store_is_shared_by_all_starts() -> None:
    """torch gives every start the same store, without a prefix of its own."""
    from torch.distributed.rendezvous import _create_c10d_store

    assert "PrefixStore" not in inspect.getsource(_create_c10d_store)


# ------------------------------------------------------------------------------------------------------- megatron-core


@contextlib.contextmanager
def without(*names: str) -> Any:
    """Some patches of megatron-core do nothing."""
    nothing: dict[str, Callable[..., Any]] = dict.fromkeys(names, lambda *arguments: None)
    kept = {name: getattr(compat.megatron, name) for name in names}
    for name, function in nothing.items():
        setattr(compat.megatron, name, function)
    try:
        yield
    finally:
        for name, function in kept.items():
            setattr(compat.megatron, name, function)


def raised(action: Callable[[], Any]) -> str:
    try:
        return f"returned {action()}"
    except Exception as error:  # noqa: BLE001 - whichever it is
        return f"{type(error).__name__}: {error}"


def two_models(forget: bool) -> str | None:
    """Trains one of a layer with experts, then one of two, as a notebook does; what stopped it."""
    from oryx_megatron.config.schema import MoEConfig
    from oryx_megatron.testing.layouts import session, tiny_run

    warnings.simplefilter("ignore")
    if not forget:
        compat.megatron.forget_models = lambda: None
    for layers in (1, 2):
        run = tiny_run(model__num_layers=layers, model__moe=MoEConfig(experts=4, ffn_hidden_size=20))
        try:
            with session(run) as opened:
                opened.steps(1)
        except IndexError as error:
            return str(error)
    return None


def test_compiled_functions_forget_the_widths_that_they_met() -> None:
    compiled: list[int] = []

    def backend(graph: Any, inputs: list[Any]) -> Any:
        compiled.append(len(inputs))  # a width of any size is an input of its own
        return graph.forward

    @torch.compile(backend=backend)
    def twice(x: torch.Tensor) -> torch.Tensor:
        return x + x

    for width in (4, 6):
        twice(torch.ones(2, width))
    compat.torch.forget_compiled()
    twice(torch.ones(2, 8))
    assert compiled == [1, 2, 1]


def test_a_second_model_with_more_experts() -> None:
    assert run_distributed(two_models, 1, True) == [None]
    assert run_distributed(two_models, 1, False) == ["index 1 is out of bounds for dimension 0 with size 1"]


def facts_of_optimizers() -> dict[str, Any]:
    """What megatron-core's optimizers do without each patch; of one rank."""
    warnings.simplefilter("ignore")
    from megatron.core.dist_checkpointing.dict_utils import merge
    from megatron.core.dist_checkpointing.mapping import ShardedTensor
    from megatron.core.dist_checkpointing.utils import extract_sharded_base
    from megatron.core.optimizer import optimizer as optimizers
    from torch.distributed import distributed_c10d

    from oryx_megatron.testing.layouts import session, tiny_run

    found: dict[str, Any] = {"group keys": optimizers.param_group_identifier_keys}
    whole = {"parallel__distributed_optimizer": False, "model__num_layers": 1}

    def describe(opened: Any, *, loading: bool = False) -> type:
        state = opened.chunks[0].module.sharded_state_dict(metadata={})
        metadata = {"distrib_optim_sharding_type": "fully_reshardable"}
        return type(opened.optimizer.sharded_state_dict(state, is_loading=loading, metadata=metadata))

    with session(tiny_run(precision__dtype="bf16", **whole)) as opened:
        opened.step()
        found["numbering"] = raised(lambda: describe(opened))
    with without("fp32_apart"), session(tiny_run(precision__dtype="bf16", model__num_layers=1)) as opened:
        opened.step()
        (single,) = compat.megatron.singles(opened.optimizer)
        masters = single._get_main_param_and_optimizer_states
        found["another's state"] = [
            name
            for name, weight in opened.chunks[0].module.named_parameters()
            if masters(weight)["param"].shape != weight.flatten().shape
            or not torch.equal(masters(weight)["param"].to(weight.dtype), weight.flatten())
        ]
    with session(tiny_run(model__num_layers=1)) as opened:
        found["never stepped"] = raised(lambda: describe(opened, loading=True))
        opened.step()
        (single,) = compat.megatron.singles(opened.optimizer)
        single.load_state_dict(single.state_dict())
        states = single.optimizer.state.values()
        found["steps"] = (len({id(state["step"]) for state in states}), len(states))
        found["groups of the world"] = len(distributed_c10d._world.pg_map)
        from megatron.core import parallel_state

        parallel_state.destroy_model_parallel()
        found["groups left"] = len(distributed_c10d._world.pg_map)
    tensor = ShardedTensor.from_rank_offsets("x", torch.ones(1))
    sharded, common = extract_sharded_base({"groups": [[tensor], [], [tensor]]})
    found["lists"] = raised(lambda: merge(common, sharded))
    return found


@pytest.fixture(scope="module")
def optimizers() -> dict[str, Any]:
    return run_distributed(facts_of_optimizers, 1)[0]


def test_optimizers(optimizers: dict[str, Any]) -> None:
    assert "shape" in optimizers["numbering"], "numbering_all_parameters"
    assert optimizers["never stepped"].startswith("AssertionError"), "allocate_torch_state"
    steps, states = optimizers["steps"]
    assert steps == 1 < states, "own_steps"
    assert len(optimizers["another's state"]) > 1, "fp32_apart"
    assert ("max_lr" in optimizers["group keys"]) == NEW, "identify_groups"
    assert "two lists with different lengths" in optimizers["lists"], "keep_groups, lists_of_groups"
    assert optimizers["groups left"] == optimizers["groups of the world"] > 1, "destroy_groups"


def test_buckets_are_reduced_when_they_are_complete() -> None:
    from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBucketGroup

    source = inspect.getsource(_ParamAndGradBucketGroup.register_grad_ready)
    assert re.search(r"self\.start_grad_sync\(", source)


def test_the_offloading_optimizer() -> None:
    from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer

    source = text_of(inspect.getmodule(HybridDeviceOptimizer))
    assert "self.param_update_in_fp32 and param.dtype != torch.float32" in source, "count_fp32_as_copied"
    assert '"cpu_optimizer_cls": cpu_optimizer_cls,' in source, "without_classes"
    view = torch.nn.Parameter(torch.ones(2)).view(-1)
    with pytest.raises(ValueError, match="non-leaf"):
        torch.optim.AdamW([view])  # without_gradients
    with compat.megatron.without_gradients():
        torch.optim.AdamW([torch.nn.Parameter(torch.ones(2)).view(-1)])


@pytest.mark.parametrize("name", compat.megatron.QUIET)
def test_what_it_warns_of(name: str) -> None:
    found = compat.megatron.QUIET[name] in text_of(__import__(f"megatron.core.{name}", fromlist=["x"]))
    assert found == ((name == "transformer.transformer_layer") != NEW)


def test_it_unpickles_what_a_checkpoint_holds(tmp_path: Path) -> None:
    """read_checkpoints_by: .metadata, small objects, and (until 0.19) common.pt when the environment says so."""
    from megatron.core.dist_checkpointing.strategies import torch as strategies
    from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader

    (tmp_path / ".metadata").write_bytes(pickle.dumps(Bomb(tmp_path / "one")))
    with contextlib.suppress(AttributeError):
        FileSystemReader(str(tmp_path)).read_metadata()
    data = io.BytesIO()
    torch.save(Bomb(tmp_path / "two"), data)
    data.seek(0)
    planner = SimpleNamespace(flatten_state_dict=False, state_dict={})
    item = SimpleNamespace(dest_index=SimpleNamespace(fqn="object"))
    DefaultLoadPlanner.load_bytes(planner, item, data)  # type: ignore[arg-type]
    assert (tmp_path / "one").is_dir()
    assert (tmp_path / "two").is_dir()
    assert "FileSystemReader(checkpoint_dir)" in text_of(strategies)
    assert issubclass(strategies.MCoreLoadPlanner, DefaultLoadPlanner)


@pytest.mark.skipif(NEW, reason="since 0.19 the writers write the common state")
def test_a_failure_of_rank_0_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron.core.dist_checkpointing import serialization
    from megatron.core.dist_checkpointing.strategies.common import TorchCommonSaveStrategy

    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    with pytest.raises(RuntimeError, match="does not exist"):
        TorchCommonSaveStrategy("torch", 1).save_common({}, tmp_path / "missing")
    assert "common_strategy.save_common(state_dict" in text_of(serialization)


def report_of_a_writer(folder: Path, patched: bool) -> str:
    """What a writer reports that cannot open its file."""
    from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync as Writer

    plain = Writer.write_preloaded_data
    if patched:
        compat.megatron.keep_causes()
    try:
        reports: queue.Queue[Any] = queue.Queue()
        bucket = (str(folder), "key", ([], []))
        write = Writer.write_preloaded_data_multithread if NEW else Writer.write_preloaded_data_multiproc
        write([], False, 0, [bucket], reports)
        return str(reports.get_nowait())
    finally:
        Writer.write_preloaded_data = staticmethod(plain)


def test_indices_are_built_on_rank_0() -> None:
    from megatron.core.datasets.gpt_dataset import GPTDataset

    assert "torch.distributed.get_rank() == 0" in inspect.getsource(GPTDataset)
    real = torch.distributed.get_rank
    with compat.megatron.as_rank_0():
        assert torch.distributed.get_rank() == 0
    assert torch.distributed.get_rank is real


def test_what_a_writer_reports(tmp_path: Path) -> None:
    # Without the patch in a process of its own: in this one another test may have had it.
    code = "import pathlib, sys; sys.path.insert(0, sys.argv[1]); import test_compat; "
    code += "print(test_compat.report_of_a_writer(pathlib.Path(sys.argv[2]), patched=False))"
    command = [sys.executable, "-W", "ignore", "-c", code, str(Path(__file__).parent), str(tmp_path)]
    plain = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300).stdout
    assert ("Is a directory" in plain) != NEW
    assert "Is a directory" in report_of_a_writer(tmp_path, patched=True)


def test_writers_report_to_a_server_process() -> None:
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    assert re.search(r"get_context\(.*\)\n\s+_results_queue = ctx\.Manager\(\)\.Queue\(\)", text_of(filesystem_async))


# ----------------------------------------------------------------------------------------------------------- DeepSpeed


@pytest.fixture(scope="module")
def deepspeed() -> Any:
    return compat.deepspeed.import_deepspeed()


def test_deepspeed_on_this_machine(deepspeed: Any) -> None:
    from deepspeed.runtime.engine import DeepSpeedEngine

    checks = inspect.getsource(DeepSpeedEngine._do_args_sanity_check)
    assert 'assert "LOCAL_RANK" in os.environ' in checks
    assert "PYTORCH_NVML_BASED_CUDA_CHECK" in text_of(deepspeed)
    assert "self.shm_comm_op = build_shm_op()" in text_of(importlib.import_module("deepspeed.comm.torch"))


def test_zero_still_needs_these_patches(deepspeed: Any) -> None:
    from deepspeed.runtime.engine import DeepSpeedEngine
    from deepspeed.runtime.zero import stage3, stage_1_and_2

    assert "return BFLOAT16" in inspect.getsource(DeepSpeedEngine._do_optimizer_sanity_check), "always_zero"
    source = text_of(stage_1_and_2)
    assert "self.reduce_independent_p_g_buckets_and_remove_grads(param, i)" in source, "reduce_in_order"
    for module in (stage_1_and_2, stage3):
        assert re.search(r"self\._update_scale\(self\.overflow\)", text_of(module)), "discard_when"
    assert "self.clip_grad = checkpoint_clip_grad" in source, "keep_clip_grad"


def test_checkpoints_of_deepspeed(deepspeed: Any, tmp_path: Path) -> None:
    from deepspeed.comm import comm
    from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine
    from deepspeed.runtime.engine import DeepSpeedEngine

    torch.save(Bomb(tmp_path / "made"), tmp_path / "file.pt")
    TorchCheckpointEngine.load(SimpleNamespace(), str(tmp_path / "file.pt"))  # type: ignore[arg-type]
    assert (tmp_path / "made").is_dir(), "only_read_by"
    assert "dist.barrier()" in inspect.getsource(DeepSpeedEngine.save_checkpoint), "keep_failures"
    assert "cdb = None" not in inspect.getsource(DeepSpeedEngine.destroy) + text_of(comm).split("cdb = None", 1)[1]


# --------------------------------------------------------------------------------------------------- TransformerEngine


def test_transformer_engine() -> None:
    te = pytest.importorskip("transformer_engine.pytorch", reason="TransformerEngine is not installed")
    from megatron.core.extensions import transformer_engine as extensions
    from transformer_engine.pytorch.module import base

    assert "pickle.dumps" in inspect.getsource(base.TransformerEngineBaseModule.get_extra_state), "scales"
    assert "fuse_wgrad_accumulation" in inspect.getsource(te.Linear), "accumulate_into_main_gradients"
    given = {"out_dtype", "accumulate", "layout", "out", "use_split_accumulator", "grad"}
    assert given <= inspect.signature(te.cpp_extensions.general_gemm).parameters.keys(), "add_weight_gradient"
    assert re.search(r'parallel_mode == "duplicated"', inspect.getsource(extensions.TELinear)), "own_rows"


def test_transformer_engine_without_a_gpu(tmp_path: Path) -> None:
    """Installed on a machine whose GPUs are hidden: megatron-core takes its own optimizer, norm and clipping."""
    package = tmp_path / "transformer_engine"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('no CUDA driver')")
    told = run(
        """
from oryx_megatron import platform
import torch
from megatron.core import optimizer, utils
from megatron.core.extensions import transformer_engine as extensions
assert optimizer.Adam is torch.optim.AdamW and not extensions.HAVE_TE
assert not platform.installed("transformer_engine.pytorch")
assert platform.transformer_engine_missing() == "there is no GPU"
try:
    import transformer_engine
except ModuleNotFoundError as error:
    print(error)
""",
        PYTHONPATH=str(tmp_path),
        CUDA_VISIBLE_DEVICES="",
    )
    assert told == "transformer_engine is installed, but there is no GPU\n"

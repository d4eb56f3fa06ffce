"""TransformerEngine (2.11 to 2.20): scales in checkpoints, and gradients of its linears.

| patch | why |
|---|---|
| `scales`, `fill_scales` | its extra state is a pickle of its own classes, which 2.20 refuses to load: checkpoints hold the tensors |
| `own_rows` | a "duplicated" linear marks its weight as the same on all tensor-parallel ranks |
| `begin_at` | masters of weights in FP8 begin at what its own initialisation drew, which is off here: at whatever memory held |
| `accumulate_into_main_gradients` | megatron-core's `gradient_accumulation_fusion` needs an apex extension for its own linears |
| `add_weight_gradient` | the product of its linears for that buffer, for weights that no module of its own reads (model/projections.py) |
| `plain_weight_gradients` | without megatron-core's wrapper there is no fp32 buffer to add to |
| `AROUND`: its import loads dynamo (compat/torch.py), and onnxscript with sympy | of no use to a run: half of the import's time |
| `AROUND`: not importable where torch sees no GPU | megatron-core takes its optimizers and norms wherever it is installed; on a CPU they fail in the first step, or at import |
"""  # noqa: E501

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from types import ModuleType
from typing import Any

from oryx_megatron.compat.hook import Around, StandIn, instead
from oryx_megatron.compat.torch import without_dynamo

PARTS = {
    "scale_fwd": ("scaling_fwd", "scale"),
    "amax_history_fwd": ("scaling_fwd", "amax_history"),
    "scale_bwd": ("scaling_bwd", "scale"),
    "amax_history_bwd": ("scaling_bwd", "amax_history"),
}
"""Name in a checkpoint → where TransformerEngine keeps it: `module.fp8_meta[…].…`."""


def scales(module: Any) -> dict[str, Any]:
    """The tensors of a module with delayed FP8 scaling that has run; of others none."""
    meta = getattr(module, "fp8_meta", {})
    found = {part: getattr(meta.get(where), what, None) for part, (where, what) in PARTS.items()}
    return found if all(tensor is not None for tensor in found.values()) else {}


def fill_scales(module: Any, tensors: dict[str, Any], config: Any) -> None:
    """Give a module the tensors of `scales`; one in another format has no use for them."""
    if getattr(config, "fp8", None) is None or not hasattr(module, "init_fp8_meta_tensors"):
        return
    from megatron.core.fp8_utils import get_fp8_recipe

    # Three of each product's forward pass: input, weight, output. A module learns its number of products when it runs.
    module.fp8_meta.setdefault("num_gemms", len(tensors["scale_fwd"]) // 3)
    module.init_fp8_meta_tensors(get_fp8_recipe(config))
    own = scales(module)  # none when the run now scales otherwise
    for part, tensor in own.items():
        tensor.copy_(tensors[part])


def own_rows(linear: Any) -> None:
    """The weight of a linear with parallel_mode "duplicated" is this rank's: each holds its own rows."""
    linear.weight.sequence_parallel = False


def begin_at(weight: Any, values: Any) -> None:
    """Let the optimizer's fp32 master of a weight in FP8 begin at the values that it was rounded from, as in bf16.

    megatron-core takes them from `get_high_precision_init_val`, which such a weight has.
    """
    weight._high_precision_init_val = values.to("cpu", weight.dtype)


def accumulate_into_main_gradients(chunk: Any) -> None:
    """Let every TransformerEngine linear add its weight gradient to the fp32 buffer inside its matrix product.

    megatron-core's `gradient_accumulation_fusion` asks the same of its own linears (the output layer), which need an
    apex extension for it; hence module by module. Call before the chunk is wrapped for data parallelism.
    """
    from transformer_engine.pytorch.module.base import TransformerEngineBaseModule

    for module in chunk.modules():
        if isinstance(module, TransformerEngineBaseModule) and hasattr(module, "fuse_wgrad_accumulation"):
            module.fuse_wgrad_accumulation = True


def add_weight_gradient(main_grad: Any, gradient: Any, x: Any) -> None:
    """main_grad [width, d] += gradientᵀ x, in the product, for gradient [n, width] and x [n, d], both contiguous.

    As the backward pass of its Linear calls it with `fuse_wgrad_accumulation`, in every version from 2.11 to 2.20. On a
    CPU, where it is not, in the precision of main_grad.
    """
    if not main_grad.is_cuda:
        main_grad.addmm_(gradient.t().to(main_grad.dtype), x.to(main_grad.dtype))
        return
    from transformer_engine.pytorch.cpp_extensions import general_gemm

    general_gemm(
        x,
        gradient,
        out_dtype=main_grad.dtype,
        accumulate=True,
        layout="NT",
        out=main_grad,
        use_split_accumulator=True,
        grad=True,
    )


def plain_weight_gradients(model: Any) -> None:
    """Let every linear return its weight gradient: without megatron-core's wrapper there is no fp32 buffer."""
    for module in model.modules():
        if hasattr(module, "fuse_wgrad_accumulation"):
            module.fuse_wgrad_accumulation = False


@contextlib.contextmanager
def _with_a_gpu(module: ModuleType) -> Iterator[None]:
    """Import it as long as there is a GPU. ModuleNotFoundError otherwise: who imports it has another way for that."""
    import torch

    if not torch.cuda.is_available():
        raise ModuleNotFoundError(f"{module.__name__} is installed, but there is no GPU", name=module.__name__)
    yield


@contextlib.contextmanager
def _with_late_exporter(module: ModuleType) -> Iterator[None]:
    """What it takes from the exporter to ONNX is taken when it is asked for."""
    exporter = f"{module.__name__.rpartition('.')[0]}.onnx_extensions"
    later = object()
    with instead(exporter, StandIn(exporter, lambda name: later)):
        yield
    names = [name for name, value in vars(module).items() if value is later]
    for name in names:
        delattr(module, name)

    def of_exporter(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"module {module.__name__!r} has no attribute {name!r}")
        return getattr(importlib.import_module(exporter), name)

    module.__getattr__ = of_exporter  # type: ignore[method-assign]


AROUND: dict[str, Around] = {
    "transformer_engine": _with_a_gpu,
    "transformer_engine.pytorch": without_dynamo,
    "transformer_engine.pytorch.export": _with_late_exporter,
}

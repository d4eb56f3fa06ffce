"""TransformerEngine's linears as mixers with separate queries need them. Import only where it is installed."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.extensions.transformer_engine import TELinear
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group, make_sharded_tensors_for_checkpoint

from oryx_megatron.compat.transformer_engine import own_rows
from oryx_megatron.model.config import OryxTransformerConfig


class TELocalLinear(TELinear):
    """Column shard of a linear layer whose input is whole on every tensor-parallel rank; FP8 where the layer is."""

    def __init__(
        self,
        input_size: int,
        output_size: int,
        *,
        config: OryxTransformerConfig,
        init_method: Any,
        tp_group: torch.distributed.ProcessGroup,
        **unused: Any,
    ) -> None:
        super().__init__(
            input_size,
            output_size // tp_group.size(),
            parallel_mode="duplicated",  # no communication
            config=config,
            init_method=init_method,
            bias=False,
            skip_bias_add=False,
            skip_weight_param_allocation=False,
        )
        own_rows(self)
        self.shards = tp_group

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        """The weight with its place in the whole one."""
        metadata = ensure_metadata_has_dp_cp_group(metadata)
        groups = {"tp_group": self.shards, "dp_cp_group": metadata["dp_cp_group"]}
        state = self.state_dict(prefix="", keep_vars=True)
        return make_sharded_tensors_for_checkpoint(state, prefix, {"weight": 0}, sharded_offsets, **groups)


def fp8_attention(heads: int, groups: int, widths: tuple[int, int], tp_group: torch.distributed.ProcessGroup) -> Any:
    """Causal attention of one layer, q [b, s, H, N], k, v → [b, s, H P], in FP8 inside TransformerEngine's context."""
    from transformer_engine.pytorch import DotProductAttention

    return DotProductAttention(
        heads,
        widths,
        num_gqa_groups=groups,
        qkv_format="bshd",
        attn_mask_type="causal",
        tp_size=1,  # heads and groups are this rank's already
        tp_group=tp_group,
    )

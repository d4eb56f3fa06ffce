"""Multi-token prediction: megatron-core's heads around an Oryx layer (DeepSeek-V3, arXiv 2412.19437, section 2.2).

Head k reads at token t what the head before it (the model itself for k = 1) made of t, and the embedding of the token
k further on; it predicts the token after that one:

    h_t^k = layer(W [norm(embedding(x_{t+k})); norm(h_t^{k-1})])        p(x_{t+k+1}) = output(norm(h_t^k))

Embedding and output are the model's own. A head's layer has the modes of the model's last layer, and reads token t in
the mode that the plan of that one gives t: rows keep their order through the heads, and a draft knows its mode without
a guess.

megatron-core finds the tokens further on by rolling its rows, and would mix up documents and rows that are sorted by
mode. Here they come with the microbatch (`SequenceInfo.futures`), cut from whole sequences: so context parallelism
needs no exchange for them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from megatron.core.dist_checkpointing.utils import apply_prefix_mapping
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.multi_token_prediction import (
    MultiTokenPredictionBlockSubmodules,
    MultiTokenPredictionLayer,
    MultiTokenPredictionLayerSubmodules,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import Tensor

from oryx_megatron import compat
from oryx_megatron.model.sequence import SequenceInfo

STORED = "transformer_layer"
"""A head's layer in checkpoints, as megatron-core 0.16 calls it."""


def mtp_spec(heads: int, layer: ModuleSpec, *, norm: type, linear: type) -> MultiTokenPredictionBlockSubmodules:
    """`heads` heads around layers of this kind."""
    submodules = MultiTokenPredictionLayerSubmodules(
        **{compat.megatron.mtp_layer(): layer}, enorm=norm, hnorm=norm, eh_proj=linear, layer_norm=norm
    )
    return MultiTokenPredictionBlockSubmodules(layer_specs=[ModuleSpec(module=MTPLayer, submodules=submodules)] * heads)


class MTPLayer(MultiTokenPredictionLayer):
    """One of megatron-core's heads, which takes its tokens from the microbatch."""

    @property
    def layer(self) -> Any:
        """The TransformerLayer inside."""
        return getattr(self, compat.megatron.mtp_layer())

    def _get_embeddings(
        self, *, embedding: Callable[..., Tensor], packed_seq_params: SequenceInfo, **given: Any
    ) -> tuple[Any, ...]:
        """Rolls nothing: `embedding` of this head's tokens, in the place of the rolled ones."""
        tokens = packed_seq_params.futures[self.layer_number - 1].tokens
        return compat.megatron.mtp_inputs(given, embedding(input_ids=tokens, position_ids=None))

    def _checkpointed_forward(self, *args: Any, **given: Any) -> Tensor:
        """0.16 hands all arguments to a function that takes tensors alone, and a microbatch is none."""
        if compat.megatron.since(0, 19):
            return super()._checkpointed_forward(*args, **given)
        (forward,) = args
        tensors = [given.pop(name) for name in ("hidden_states", "decoder_input")]
        return super()._checkpointed_forward(
            lambda hidden, ahead: forward(hidden_states=hidden, decoder_input=ahead, **given), *tensors
        )

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        """Under the names of megatron-core 0.16."""
        state = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        apply_prefix_mapping(state, {f"{prefix}{compat.megatron.mtp_layer()}.": f"{prefix}{STORED}."})
        return state


def heads(model: MegatronModule) -> list[MTPLayer]:
    """The heads of a model chunk."""
    return list(model.mtp.layers) if getattr(model, "mtp_process", False) else []


def blocks(model: MegatronModule) -> Iterator[tuple[str, str, Any]]:
    """The TransformerLayers of a model chunk, its heads' too.

    Each with the start of its parameters' names in this chunk, and that in the whole model.
    """
    for i, layer in enumerate(model.decoder.layers):
        yield f"decoder.layers.{i}.", f"decoder.layers.{layer.layer_number - 1}.", layer
    for i, head in enumerate(heads(model)):
        yield f"mtp.layers.{i}.{compat.megatron.mtp_layer()}.", f"mtp.layers.{i}.{STORED}.", head.layer

"""What becomes of the logits: soft-capped always, and in training a penalty on their normaliser beside the loss.

Heads of multi-token prediction (mtp.py) make logits of their own in training, whose losses come beside the model's.

Shapes: s sequence, b micro batch, V vocabulary, t tensor-parallel ranks, m heads of multi-token prediction.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel.mappings import reduce_from_tensor_model_parallel_region
from torch import Tensor


class OryxGPTModel(GPTModel):
    """megatron-core's GPTModel with `logit_softcap` and, where the config has a weight for it, the z-loss."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        if self.mtp_process and not self.pre_process and self.share_embeddings_and_output_weights:
            self.output_layer.weight = None  # the stage has the embedding, which megatron-core reads in its place
        if self.post_process and (cap := self.config.oryx.logit_softcap) is not None:
            self.output_layer.register_forward_hook(partial(_cap_output, cap))

    def _postprocess(self, hidden_states: Tensor, labels: Tensor | None = None, **given: Any) -> Tensor:
        """Logits [b, s, V/t], or with labels [b, s] the loss as `compute_language_model_loss` gives it.

        With heads of multi-token prediction, in training: [2 + m, b, s], after the loss and the z-loss those of the
        heads, zero where they do not count. Else the heads are not computed; megatron-core would compute them always,
        and leaves their losses to a hook of autograd that reads a tensor outside of CUDA graphs.
        """
        if not self.mtp_process:
            return super()._postprocess(hidden_states=hidden_states, labels=labels, **given)
        weight = self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else None

        def logits_of(states: Tensor) -> Tensor:
            gather = given.get("runtime_gather_output")
            return self.output_layer(states, weight=weight, runtime_gather_output=gather)[0]

        if labels is None:
            return logits_of(hidden_states).transpose(0, 1).contiguous()
        if not self.training:
            return self.compute_language_model_loss(labels, logits_of(hidden_states))
        info = given["packed_seq_params"]
        states = self.mtp(
            input_ids=given["input_ids"],
            position_ids=None,
            hidden_states=hidden_states,
            attention_mask=None,
            packed_seq_params=replace(info.of_layer(-1), futures=info.futures),
            embedding=self.embedding,
        )
        hidden_states, *ahead = states.chunk(1 + len(info.futures))
        loss = self.compute_language_model_loss(labels, logits_of(hidden_states)).float()
        own = loss if loss.dim() > labels.dim() else torch.stack((loss, torch.zeros_like(loss)))
        losses = [
            super(OryxGPTModel, self).compute_language_model_loss(future.labels, logits_of(state)).float() * future.mask
            for future, state in zip(info.futures, ahead, strict=True)
        ]
        return torch.cat((own, torch.stack(losses)))

    def compute_language_model_loss(self, labels: Tensor, logits: Tensor) -> Tensor:
        """Cross-entropy of labels [b, s] under logits [s, b, V/t]: [b, s]; with z-loss in training [2, b, s].

        z-loss (PaLM, arXiv 2204.02311): weight · log² Z, Z the normaliser of the softmax. Since cross-entropy is log Z
        minus the label's logit, log Z needs no pass of its own over the vocabulary.
        """
        if not (self.training and self.config.z_loss):
            return super().compute_language_model_loss(labels, logits)
        label_logits = _LabelLogits.apply(logits, labels.T.contiguous())  # before the loss overwrites logits
        loss = super().compute_language_model_loss(labels, logits)
        normaliser = loss.float() + reduce_from_tensor_model_parallel_region(label_logits).T
        return torch.stack((loss.float(), self.config.z_loss * normaliser.square()))


def softcapped(logits: Tensor, cap: float) -> Tensor:
    """cap · tanh(logits / cap), in fp32 and back (Gemma 2, arXiv 2408.00118)."""
    return _SoftCap.apply(logits, cap)


def _cap_output(cap: float, module: torch.nn.Module, inputs: Any, output: tuple[Tensor, Any]) -> tuple[Tensor, Any]:
    return softcapped(output[0], cap), output[1]


class _SoftCap(torch.autograd.Function):
    """Keeps the logits alone: the backward pass of tanh in fp32 would keep twice as much, and less exactly in bf16."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, cap: float) -> Tensor:
        ctx.save_for_backward(logits)
        ctx.cap = cap
        return _wide(logits).div(cap).tanh_().mul_(cap).to(logits.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (logits,) = ctx.saved_tensors
        slope = _wide(logits).div(ctx.cap).cosh_().square_().reciprocal_()
        return slope.mul_(gradient).to(gradient.dtype), None


class _LabelLogits(torch.autograd.Function):
    """The logit of each label where it lies on this tensor-parallel rank, else 0.

    torch's gather would keep the logits, which megatron-core's loss overwrites.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor) -> Tensor:
        size = logits.shape[-1]
        local = labels - parallel_state.get_tensor_model_parallel_rank() * size
        own = (local >= 0) & (local < size)
        place = torch.where(own, local, 0).unsqueeze(-1)
        ctx.save_for_backward(place, own)
        ctx.size, ctx.dtype = size, logits.dtype
        return _wide(logits.gather(-1, place).squeeze(-1)) * own

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        place, own = ctx.saved_tensors
        result = gradient.new_zeros((*own.shape, ctx.size), dtype=ctx.dtype)
        return result.scatter_(-1, place, (gradient * own).to(ctx.dtype).unsqueeze(-1)), None


def _wide(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor

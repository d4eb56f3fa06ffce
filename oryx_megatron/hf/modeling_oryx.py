"""Oryx for Hugging Face transformers 5: a language model that reads each token by attention or by a recurrence.

The `*_oryx.py` files stand alone: an export copies them beside the weights, and nothing but torch and transformers is
needed to load them (`trust_remote_code=True`). Read in this order: plans, router, modes (which token attends), states,
cache, recurrences, norm_conv, rotary, experts, layers, heads, generation, speculation, this.

Model: "Multi-Mixer Models: Flexible Sequence Modeling with Shared Representations", arXiv 2605.28769. Recurrences:
Mamba-2 (SSD), arXiv 2405.21060, and Gated DeltaNet, arXiv 2412.06464.

Shapes: b batch, s tokens of this call, t tokens so far.

Every layer keeps both states in step whatever the mode of a token: keys and values, and the recurrent state
S [b, H, N, P] fp32 with the window [b, c, w - 1] of the convolutions. The mode only chooses which query reads which.
"""

from __future__ import annotations

import re
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# First: it says in one line which versions of transformers serve, where the imports below would fail.
from .configuration_oryx import OryxConfig

# isort: split
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, causal_mask_function
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import can_return_tuple, logging
from transformers.utils.output_capturing import capture_outputs

from .cache_oryx import OryxCache
from .experts_oryx import OryxExpertRouter, OryxExperts
from .generation_oryx import CACHE, OryxDecoder, OryxGenerationMixin, one_cache
from .heads_oryx import OryxHead
from .layers_oryx import (
    OryxContext,
    OryxDecoderLayer,
    OryxRMSNorm,
    OryxShortConv,
    OryxTokenMixer,
    compiled_block,
)
from .modes_oryx import FirstSlots, LayerModes, ModePlan, TokenModes, distinct_plans, plan_mask
from .plans_oryx import FORMS, parse_runs, routed_share
from .recurrences_oryx import wide
from .router_oryx import OryxRouter, Routed, shape_of

logger = logging.get_logger(__name__)


def check_default_plan(config: OryxConfig) -> None:
    """Raise ValueError when the plan of calls that give none cannot be followed, whatever the text."""
    plan = config.default_plan
    if not isinstance(plan, str):
        raise ValueError(f"OryxConfig.mode_plan is {plan!r}; a plan is one of {FORMS}")
    if routed_share(plan) is not None:
        if config.router is None:
            raise ValueError(f"mode plan `{plan}`: this model has no router")
        return
    single, (plans, _) = config.single_mode, distinct_plans(plan, config.num_hidden_layers)
    for own in plans:
        parse_runs(own, 0, chunk=1, prompt=0, shorter=True)
    if single is not None and not {*plans} <= {single, f"prompt:{single},new:{single}"}:
        raise ValueError(f"mode plan `{plan}`: this model has {single} mode only; its plan is `{single}`")


LOSS_ARGUMENTS = ("num_items_in_batch", "ignore_index", "shift_labels")
PACKING_ARGUMENTS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")
"""What collators for packed documents give beside position_ids that restart, which say it all."""
NO_MATTER = ("output_hidden_states", "return_dict", "token_type_ids")
"""The first two are read by transformers' wrappers of `forward`; there is one type of token."""
AS_ALWAYS = {"is_causal": (None, True), "output_router_logits": (None, False)}
"""Arguments whose other values ask for what Oryx has not."""


def _check_arguments(name: str, kwargs: dict[str, Any], may_be_packed: bool) -> None:
    """Raise for what `forward` was given beside its own arguments and will not do: nothing is dropped in silence."""
    for key, value in kwargs.items():
        if key in NO_MATTER or value is None:
            continue
        if key in PACKING_ARGUMENTS:
            if not may_be_packed:
                raise ValueError(
                    f"{name}: {key} is of packed documents; they are marked by position_ids that restart, and take no "
                    "attention_mask and no cache"
                )
        elif key not in AS_ALWAYS:
            raise TypeError(f"{name}.forward() got an unexpected keyword argument '{key}'")
        elif value not in AS_ALWAYS[key]:
            raise ValueError(f"{name} cannot do {key}={value}")


class OryxPreTrainedModel(PreTrainedModel):
    """Loading, saving and initialisation."""

    config: OryxConfig
    config_class = OryxConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["OryxDecoderLayer"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values", "cache", "context"]  # noqa: RUF012
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _is_stateful = True
    _keys_to_ignore_on_load_unexpected = [r"^mtp\."]  # noqa: RUF012 - heads, for OryxModel alone
    _can_record_outputs = {"hidden_states": OryxDecoderLayer, "attentions": OryxTokenMixer}  # noqa: RUF012

    def __init__(self, config: OryxConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        self._keep_in_fp32_modules_strict = {*config.fp32_parameters, "expert_bias", "mode_router"}
        check_default_plan(config)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        config, std = self.config, self.config.initializer_range
        if isinstance(module, nn.Linear | nn.Embedding):
            # Residual branches start small: std / sqrt(2 layers).
            small = getattr(module, "residual", False)
            init.normal_(module.weight, 0.0, std / (2 * config.num_hidden_layers) ** 0.5 if small else std)
        elif isinstance(module, OryxRMSNorm):
            init.ones_(module.weight)
        elif isinstance(module, OryxExpertRouter):
            init.normal_(module.weight, 0.0, std)
            if module.expert_bias is not None:
                init.zeros_(module.expert_bias)
        elif isinstance(module, OryxExperts):
            init.normal_(module.gate_up_proj, 0.0, std)
            init.normal_(module.down_proj, 0.0, std / (2 * config.num_hidden_layers) ** 0.5)
        elif isinstance(module, OryxShortConv):
            bound = module.weight.shape[1] ** -0.5  # torch's own default for a depthwise convolution
            init.uniform_(module.weight, -bound, bound)
        elif isinstance(module, OryxTokenMixer) and module.recurs:
            a = torch.empty_like(module.a_log, dtype=torch.float32).uniform_(*config.decay_init)
            init.copy_(module.a_log, a.log())
            low, high = torch.tensor(config.dt_init).log().tolist()
            dt = torch.empty_like(module.dt_bias, dtype=torch.float32).uniform_(low, high).exp()
            init.copy_(module.dt_bias, dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus
            if config.mixer == "mamba2":
                init.ones_(module.d_skip)


class OryxModel(OryxPreTrainedModel, Routed):
    """Embedding, blocks and final norm."""

    def __init__(self, config: OryxConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([OryxDecoderLayer(config, i) for i in range(config.num_hidden_layers)])
        self.norm = OryxRMSNorm(config.hidden_size, config.rms_norm_eps)
        if config.router is not None:
            self.mode_router = OryxRouter(shape_of(config.router))
        self.gradient_checkpointing = False
        self.compiled = False
        self.post_init()

    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        mode_plan: ModePlan | TokenModes | LayerModes | None = None,
        output_attentions: bool | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Hidden states of input_ids [b, s] or inputs_embeds [b, s, d].

        attention_mask [b, t], over the cached tokens too, is false for padding, which enters neither attention nor
        recurrence nor convolution, wherever it stands. `mode_plan` is a spec or function over the real tokens of each
        row up to the end of this call, or a mask [s], [b, s] or [layers, b or 1, s] over the tokens of this call;
        default `config.default_plan`. Without mask and cache, `position_ids` that restart mark packed documents, which
        are kept apart. `past_key_values` and `cache` are two names of one argument. Raises ValueError with one line on
        what does not fit, TypeError for an argument that is not known here.
        """
        cache = one_cache(past_key_values, cache)
        _check_arguments("OryxModel", kwargs, position_ids is not None and attention_mask is None and cache is None)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        b, s = x.shape[:2]
        if s == 0:
            raise ValueError("the text is empty: input_ids need at least one token")
        use_cache = (self.config.use_cache and not self.training) if use_cache is None else use_cache
        if self.gradient_checkpointing and self.training:
            if cache is not None:
                raise ValueError("gradient checkpointing recomputes layers and cannot continue from past_key_values")
            use_cache = False
        if attention_mask is None and position_ids is not None and cache is None and s > 1:
            starts = (position_ids.diff(dim=1) != 1) & (position_ids[:, 1:] == 0)
            if torch.compiler.is_exporting():  # one graph for all texts, without a branch: it checks itself
                torch._assert_async(~starts.any(), "an exported Oryx takes no packed documents: position_ids restart")
            elif bool(starts.any()):  # under torch.compile the graph ends here; with fullgraph=True this is an error
                return self._forward_packed(x, input_ids, starts.expand(b, -1), mode_plan, output_attentions)
        if cache is None and use_cache:
            cache = OryxCache(self.config)
        cache = OryxCache.of(cache, self.config)

        past, slots = _places(cache, s, x.device)
        mask, valid = _padding(attention_mask, b, s, past, slots, cache)
        if position_ids is None:
            position_ids = _positions(mask, past, slots, s, x.device)
        if mode_plan is None and attention_mask is None and b > 1 and s > 1 and not self.training:
            self._check_ends_known(b)
        if (share := self.routed_share(mode_plan)) is not None:
            mode_plan = self.route(share, input_ids, valid, cache)
        modes = self._modes(mode_plan, mask, past, slots, b, s, x.device)
        keys, of_layers = self._of_layers(modes, s)
        attends, recurs = (any(values) for values in zip(*((m.runs, m.recurs) for m in of_layers.values())))
        if attends and cache is not None and not cache.keep_kv and cache.started:
            raise ValueError(
                "keep_kv=False: the keys and values that attention would read were dropped; use recurrent mode"
            )
        if isinstance(s, torch.SymInt) and torch.compiler.is_exporting() and (recurs or cache is not None):
            raise ValueError(
                "torch.export with a dynamic length: the recurrence loops over its chunks as often as the text it is "
                "exported with needs; export one length, or use_cache=False and mode_plan='attention'"
            )
        output_attentions = self.config.output_attentions if output_attentions is None else output_attentions
        if output_attentions and self.config._attn_implementation != "eager":
            logger.warning_once(
                f"`{self.config._attn_implementation}` attention keeps no weights: output_attentions=True gives none; "
                "use attn_implementation='eager'"
            )
            output_attentions = False
        contexts = self.contexts(
            of_layers, position_ids, past, x, mask, cache, valid, output_attentions=bool(output_attentions)
        )
        for i, layer in enumerate(self.layers):
            memory, context = None if cache is None else cache.layers[i], contexts[keys[i]]
            # One compiled block serves all layers of the same modes: nothing in it depends on which layer it is.
            x = layer(x, context, memory) if not self.compiled else compiled_block()(layer, x, context, memory)
        return BaseModelOutputWithPast(last_hidden_state=self.norm(x), **{CACHE: cache if use_cache else None})

    def _check_ends_known(self, b: int) -> None:
        """Refuse, or warn of, a default plan that counts from the end of each of b texts that may be padded."""
        plan = self.config.default_plan
        parts, _ = distinct_plans(plan, len(self.layers))
        found = (re.match(r"\s*(prompt:)?\s*last:", part) for part in parts)
        if (counted := next((match for match in found if match is not None), None)) is not None:
            why = (
                f"mode plan `{plan}` counts from the end of each text, and no attention_mask says where the {b} "
                "texts of this batch end; give one, or one text per call (lm-eval: --batch_size 1)"
            )
            if counted[1] is None:  # lm-eval scores so: modes, and scores, would depend on the batch size
                raise ValueError(why)
            logger.warning_once(why)

    def contexts(
        self,
        of_layers: dict[int | str, TokenModes],
        position_ids: Tensor,
        past: int | Tensor,
        x: Tensor,
        mask: Tensor | None = None,
        cache: Cache | None = None,
        valid: Tensor | None = None,
        *,
        output_attentions: bool = False,
    ) -> dict[int | str, OryxContext]:
        """What layers need to know of a call, by key (`_of_layers`); `past` tokens are cached, x is [b, s, d]."""
        rotary = rotary_recurrent = None
        if self.config.rotary != "none":
            rope, width = self.config.rope, self.config.head_dim
            rotary = rope.tables(position_ids, width, wide(x.dtype))
            if self.config.rotary == "both":
                rotary_recurrent = rope.tables(position_ids, width, wide(x.dtype), attention=False)
        found: dict[int | str, OryxContext] = {}
        for kind, own in of_layers.items():
            masks, key_counts = self._masks(own, mask, past, cache, x)
            found[kind] = OryxContext(own, masks, key_counts, rotary, rotary_recurrent, valid, output_attentions)
        return found

    def _of_layers(self, modes: TokenModes | LayerModes, s: int) -> tuple[list[int | str], dict[int | str, TokenModes]]:
        """A key for every layer, and modes of the tokens by key.

        A layer that has a single mode, beside others, ignores the plan.
        """
        by_layer = isinstance(modes, LayerModes)
        keys: list[int | str] = list(modes.of_layer) if by_layer else [0] * len(self.layers)
        found: dict[int | str, TokenModes] = dict(enumerate(modes.distinct)) if by_layer else {0: modes}
        if self.config.layer_modes is not None:
            found |= {"attention": TokenModes.uniform(True, s), "recurrent": TokenModes.uniform(False, s)}
            keys = [kind if kind in found else key for kind, key in zip(self.config.layer_modes, keys)]
        return keys, {key: found[key] for key in dict.fromkeys(keys)}

    def _forward_packed(
        self,
        x: Tensor,
        input_ids: Tensor | None,
        starts: Tensor,
        plan: ModePlan | TokenModes | LayerModes | None,
        output_attentions: bool | None,
    ) -> BaseModelOutputWithPast:
        """Documents packed into rows, unpacked into one row each, and put back."""
        b, s = x.shape[:2]
        if isinstance(plan, TokenModes | LayerModes) or output_attentions:
            raise ValueError("packed documents take a mode plan as spec, function or mask, and no output_attentions")
        first = torch.cat([starts.new_ones(b, 1), starts], 1).flatten()
        document = first.long().cumsum(0) - 1
        offset = torch.arange(b * s, device=x.device) - first.nonzero().flatten()[document]
        shape = (int(document[-1]) + 1, int(offset.max()) + 1)
        rows = x.new_zeros(*shape, x.shape[-1]).index_put((document, offset), x.flatten(0, 1))
        valid = torch.zeros(shape, dtype=torch.bool, device=x.device)
        valid[document, offset] = True
        if (share := self.routed_share(plan)) is not None:
            if input_ids is not None:
                input_ids = input_ids.new_zeros(shape).index_put((document, offset), input_ids.flatten())
            plan = self.route(share, input_ids, valid)
        elif plan is not None and not isinstance(plan, str) and not callable(plan):
            flat = self._token_mask(plan, b, s).to(x.device).flatten(-2)
            plan = valid.new_zeros(*flat.shape[:-1], *shape)
            plan[..., document, offset] = flat
        out = self(inputs_embeds=rows, attention_mask=valid, use_cache=False, mode_plan=plan)
        return BaseModelOutputWithPast(last_hidden_state=out.last_hidden_state[document, offset].unflatten(0, (b, s)))

    def _token_mask(self, plan: Any, b: int, s: int) -> Tensor:
        """A mask over this call's tokens, [s], [b, s] or [layers, b or 1, s] → CPU bool [b, s] or [layers, b, s]."""
        mask = plan if isinstance(plan, Tensor) else torch.as_tensor(plan)
        mask = mask.detach().to("cpu").bool()
        layers = len(self.layers)
        if mask.shape not in ((s,), (b, s), (layers, b, s), (layers, 1, s)):
            raise ValueError(f"mode plan of shape {list(mask.shape)} does not fit {s} tokens in {b} rows")
        return mask.expand(*mask.shape[:-2], b, s)

    def _modes(
        self,
        plan: ModePlan | TokenModes | LayerModes | None,
        mask: Tensor | None,
        past: int | Tensor,
        slots: Tensor | None,
        b: int,
        s: int,
        device: torch.device,
        by_default: bool = False,
    ) -> TokenModes | LayerModes:
        """Modes of this call's tokens. To the default plan `prompt:PLAN,new:PLAN` they are all prompt."""
        if isinstance(plan, FirstSlots):
            plan = plan.modes(s)
        elif plan is None:
            plan, by_default = self.config.default_plan, True
        if isinstance(plan, str):
            plans, of_layer = distinct_plans(plan, len(self.layers))
            plan = plan if of_layer is None else LayerModes(tuple(plans), of_layer)
        if isinstance(plan, LayerModes):
            given = (mask, past, slots, b, s, device, by_default)
            return LayerModes(tuple(self._modes(own, *given) for own in plan.distinct), plan.of_layer)
        if by_default and isinstance(plan, str) and plan.startswith("prompt:"):
            check_default_plan(self.config)  # it may have been set since
            plan = plan.removeprefix("prompt:").partition(",new:")[0].strip()
        if isinstance(plan, TokenModes):
            modes = plan
        elif isinstance(plan, str) and plan in ("attention", "recurrent"):
            modes = TokenModes.uniform(plan == "attention", s)
        elif torch.compiler.is_exporting():
            raise ValueError(
                f"mode plan `{plan if isinstance(plan, str) else 'of a function or mask'}` under torch.export: which "
                "tokens attend is decided on the host; export with mode_plan='attention' or 'recurrent'"
            )
        elif isinstance(plan, str) or callable(plan):
            real = mask if mask is None or slots is None else mask[:, : int(past) + s]
            rows = _rows_of(plan, real, past, s, chunk=self.config.mode_chunk, shorter=by_default)
            modes = TokenModes.from_mask(rows, device)
        elif (rows := self._token_mask(plan, b, s)).dim() == 3:
            plan = LayerModes.from_masks(rows, device)
            return self._modes(plan, mask, past, slots, b, s, device)
        else:
            modes = TokenModes.from_mask(rows, device)
        if modes.runs and not self.config.has_attention:
            raise ValueError("the mode plan asks for attention, but this model has recurrent mode only")
        if modes.recurs and not self.config.has_recurrence:
            raise ValueError("the mode plan asks for recurrence, but this model has attention mode only")
        return modes

    def _masks(
        self, modes: TokenModes, mask: Tensor | None, past: int | Tensor, cache: Cache | None, x: Tensor
    ) -> tuple[tuple[Any, ...], tuple[int | None, ...]]:
        """Attention mask of each run, and how many keys it is over."""
        name = self.config._attn_implementation
        if not modes.runs or name not in ALL_MASK_ATTENTION_FUNCTIONS:
            return (None,) * len(modes.runs), (None,) * len(modes.runs)
        make = ALL_MASK_ATTENTION_FUNCTIONS[name]
        masks, counts = [], []
        for start, stop in modes.runs:
            if isinstance(past, int):
                keys, count = past + stop, past + stop
            else:  # one token, somewhere in a static cache
                keys, count = cache.get_max_length(), None
            seen = None if mask is None else mask[:, :keys]
            if count is None and "flash" in name:  # which takes no causal mask, but drops keys marked as padding
                ahead = torch.arange(keys, device=x.device) > past
                seen = ~ahead.expand(x.shape[0], -1) if seen is None else seen & ~ahead
            masks.append(
                make(
                    batch_size=x.shape[0],
                    q_length=stop - start,
                    kv_length=keys,
                    q_offset=past + start,
                    kv_offset=0,
                    mask_function=causal_mask_function,
                    attention_mask=seen,
                    allow_is_causal_skip=count is not None,
                    dtype=x.dtype,
                    config=self.config,
                    device=x.device,
                )
            )
            counts.append(count)
        return tuple(masks), tuple(counts)


def _rows_of(plan: ModePlan, mask: Tensor | None, past: int | Tensor, s: int, *, chunk: int, shorter: bool) -> Tensor:
    """Bool [1 or b, s] on the host: which of a call's tokens attend; `mask` [b, past + s] is true for real tokens.

    A plan counts the real tokens of each row: those of a padded batch are texts of different lengths.
    """
    if mask is None:
        return plan_mask(plan, int(past) + s, chunk=chunk, shorter=shorter)[None, -s:]
    index = (mask.long().cumsum(1) - 1)[:, -s:].clamp(min=0).cpu()
    lengths = mask.sum(1).tolist()
    tables = {n: plan_mask(plan, n, chunk=chunk, shorter=shorter) for n in set(lengths) if n}
    tables[0] = torch.zeros(1, dtype=torch.bool)
    return torch.stack([tables[n][i] for n, i in zip(lengths, index)])


def _places(cache: Cache | None, s: int, device: torch.device) -> tuple[int | Tensor, Tensor | None]:
    """How many tokens are cached, and the slots of this call's s tokens in a static cache; None in another."""
    past = cache.get_seq_length() if cache is not None and cache.started else 0
    if cache is None or not cache.layers[0].is_compileable:
        return past, None
    # A tensor on the device; reading it on the host is left to calls of several tokens.
    past = int(past) if s > 1 else past
    limit = cache.get_max_length()
    if limit >= 0 and isinstance(past, int) and past + s > limit:
        raise ValueError(f"the static cache has room for {limit} tokens, not for {past} + {s}")
    return past, torch.arange(s, device=device) + past


def _positions(mask: Tensor | None, past: int | Tensor, slots: Tensor | None, s: int, device: torch.device) -> Tensor:
    """Positions [1 or b, s] of this call's tokens in their texts, where padding counts for nothing."""
    if mask is None:
        return (torch.arange(s, device=device) + past)[None]
    count = mask.long().cumsum(1) - 1
    return (count[:, -s:] if slots is None else count[:, slots]).clamp(min=0)


def _padding(
    attention_mask: Tensor | None, b: int, s: int, past: int | Tensor, slots: Tensor | None, cache: Cache | None
) -> tuple[Tensor | None, Tensor | None]:
    """The mask over all cache slots, bool [b, t], and over this call's tokens [b, s]; None without padding."""
    if attention_mask is None:
        return None, None
    if attention_mask.dim() != 2 or attention_mask.shape[0] != b:
        raise ValueError(
            f"attention_mask of shape {list(attention_mask.shape)}: Oryx needs [{b}, tokens so far], false for "
            "padding; a recurrence cannot follow a mask of pairs (position_ids that restart mark packed documents)"
        )
    mask = attention_mask.bool()
    limit = cache.get_max_length() if slots is not None else -1
    if limit >= 0 and mask.shape[1] < limit:
        mask = F.pad(mask, (0, limit - mask.shape[1]), value=True)  # what lies ahead, causality hides
    if isinstance(past, int) and mask.shape[1] not in (past + s, limit):
        raise ValueError(f"attention_mask covers {mask.shape[1]} tokens, not {past} cached ones and {s} new ones")
    if s > 1 and not torch.compiler.is_compiling() and bool(mask.all()):
        return None, None
    valid = mask[:, -s:] if slots is None or mask.shape[1] != limit else mask[:, slots]
    return mask, valid


class OryxForCausalLM(OryxPreTrainedModel, OryxGenerationMixin):
    """Language model; `generate` takes `mode_plan` and `keep_kv` beside its usual arguments."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012
    _auto_class = "AutoModelForCausalLM"  # save_pretrained copies this file into the folder

    def __init__(self, config: OryxConfig) -> None:
        super().__init__(config)
        self.model = OryxModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.num_nextn_predict_layers:
            self.mtp = nn.ModuleList([OryxHead(config, k) for k in range(config.num_nextn_predict_layers)])
        self.post_init()

    def logits_of(self, hidden: Tensor) -> Tensor:
        """Logits [b, s, vocabulary] of what the model, or a head, made of tokens [b, s, d]."""
        logits = self.lm_head(hidden)
        if (cap := self.config.final_logit_softcapping) is not None:
            logits = (torch.tanh(logits.to(wide(logits.dtype)) / cap) * cap).to(logits.dtype)
        return logits

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        mode_plan: ModePlan | TokenModes | LayerModes | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits [b, s, vocabulary], and with `labels` [b, s] (-100: ignored) the next-token loss.

        Arguments and errors as in `OryxModel.forward`; `logits_to_keep` last tokens (0: all), or the tokens it indexes.
        The loss takes transformers' `num_items_in_batch`, `ignore_index` and `shift_labels` too.
        """
        of_loss = {name: kwargs.pop(name) for name in LOSS_ARGUMENTS if name in kwargs}
        if output_hidden_states is not None:
            kwargs["output_hidden_states"] = output_hidden_states
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            mode_plan=mode_plan,
            cache=one_cache(past_key_values, cache),
            output_attentions=output_attentions if output_attentions is not None else self.config.output_attentions,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) and logits_to_keep else logits_to_keep
        x = outputs.last_hidden_state
        if self.training and torch.is_grad_enabled() and self.config.num_nextn_predict_layers:
            # Nothing reads the heads here; data-parallel trainers want a gradient for every parameter.
            x = x + sum(0.0 * parameter.sum().to(x) for parameter in self.mtp.parameters())
        logits = self.logits_of(x if isinstance(kept, int) else x[:, kept])
        loss = None
        if labels is not None or of_loss.get("shift_labels") is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.vocab_size, **of_loss)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            **{CACHE: getattr(outputs, CACHE)},
        )


__all__ = ["OryxCache", "OryxDecoder", "OryxForCausalLM", "OryxModel", "OryxPreTrainedModel", "plan_mask"]

"""Configuration of the Hugging Face Oryx model. Stands alone: it is copied into exported folders."""

from __future__ import annotations

from typing import ClassVar

import transformers

SUPPORTED = (5, 14), (5, 24)
"""First and last minor version of transformers that this model computes right values with; both are tested."""


def _refuse_other_versions(version: str) -> None:
    """Raise ImportError outside of `SUPPORTED`: other versions name arguments otherwise or drop them."""
    (low, high), minor = SUPPORTED, tuple(int(number) for number in version.split(".")[:2])
    if not low <= minor <= high or "dev" in version:
        first, last, above = (f"{major}.{number}" for major, number in (low, high, (high[0], high[1] + 1)))
        fix = f"pip install 'transformers>={first},<{above}'"
        raise ImportError(f"Oryx runs with transformers {first} to {last}, not {version}: {fix}", name="transformers")


_refuse_other_versions(transformers.__version__)
from transformers import PreTrainedConfig  # noqa: E402

from .rotary_oryx import Rope  # noqa: E402


class OryxConfig(PreTrainedConfig):
    """Architecture of an Oryx model (arXiv 2605.28769), or of a baseline with one of its two modes.

    Every token is read by softmax attention or by a linear recurrence; keys and values serve both. Raises ValueError,
    naming the field, when fields do not fit together.

    Fields (H heads, G key/value heads, N key width, P value width):
        mixer: recurrence of the recurrent mode, `gdn` (Gated DeltaNet) or `mamba2` (SSD).
        modes: `both`, or `attention` / `recurrent` for a baseline without the other mode's parameters.
        layer_modes: modes of each layer where layers differ, e.g. three `recurrent` and one `attention` in turn; null:
            `modes` in all. A layer of one mode ignores the mode plan.
        num_attention_heads, num_key_value_heads: H and G; G divides H, null means G = H.
        head_dim, value_head_dim: N and P.
        intermediate_size: hidden width of the SwiGLU.
        moe: experts in the place of the SwiGLU, null for none: `experts` of width `ffn_hidden_size`, `top_k` of which a
            token goes to by its `score` (softmax or sigmoid), with a `bias` of the choice or not; a SwiGLU of
            `shared_ffn_hidden_size` for all (0: none); in every `frequency`-th layer after the `first_dense` ones.
        num_nextn_predict_layers: heads of multi-token prediction, which draft where `generate` is told `speculative`.
        conv_width: taps of the causal convolutions over keys and values; 0 for none.
        output_gate: gate the normalised mixer output by SiLU(W_g x).
        qk_norm: RMSNorm per head on the attention query and on the key that attention reads.
        rotary: whose queries and keys get rotary position embedding, `attention`, `both` or `none`.
        rope_parameters: `rope_theta` and, for longer texts, `rope_type` `linear`, `yarn` or `llama3` with its keys, as
            transformers has them; a recurrence of rotary `both` takes the frequencies, not the attention factor.
        final_logit_softcapping: c where logits become c · tanh(logits / c); null: they stay as they are.
        shared_query: one query projection for both modes.
        decay_init, dt_init: ranges of exp(a_log), uniform, and of softplus(dt_bias), log-uniform, at initialisation.
        recurrence_chunk: tokens per chunk of the recurrence in plain torch; a matter of speed only.
        mode_plan: plan used where a call gives none; null means `attention` (`recurrent` for a recurrent baseline). Of
            `prompt:PLAN,new:PLAN`, calls outside of generate() follow the prompt's plan.
        mode_chunk: tokens per chunk of the plans `ratio:R` and `every:K`.
        keep_kv: whether caches keep keys and values; without them attention cannot read earlier calls' tokens.
        kernels: `auto` uses fla, mamba_ssm and causal_conv1d on a GPU where they are installed, `torch` never does.
        router: sizes of the router (`router_oryx.RouterShape`) that the plan `router:R` asks; null: there is none.
        max_position_embeddings: length the model was trained on; longer texts are allowed.
    """

    model_type = "oryx"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values", "cache"]
    _auto_class = "AutoConfig"  # save_pretrained copies this file into the folder

    vocab_size: int = 32768
    hidden_size: int = 2048
    intermediate_size: int = 5504
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    num_key_value_heads: int | None = None
    head_dim: int = 128
    value_head_dim: int = 128
    mixer: str = "gdn"
    modes: str = "both"
    layer_modes: list[str] | tuple[str, ...] | None = None
    moe: dict | None = None
    num_nextn_predict_layers: int = 0
    conv_width: int = 4
    output_gate: bool = True
    qk_norm: bool = True
    rotary: str = "attention"
    rope_parameters: dict | None = None
    shared_query: bool = False
    tie_word_embeddings: bool = True
    rms_norm_eps: float = 1e-5
    final_logit_softcapping: float | None = None
    initializer_range: float = 0.02
    decay_init: list[float] | tuple[float, ...] = (1.0, 16.0)
    dt_init: list[float] | tuple[float, ...] = (1e-3, 0.1)
    recurrence_chunk: int = 64
    mode_plan: str | None = None
    mode_chunk: int = 256
    keep_kv: bool = True
    kernels: str = "auto"
    router: dict[str, int] | None = None
    max_position_embeddings: int = 2048
    use_cache: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs):
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        self.layer_modes = None if self.layer_modes is None else list(self.layer_modes)
        self.decay_init = list(self.decay_init)
        self.dt_init = list(self.dt_init)
        if (model_type := kwargs.get("model_type", self.model_type)) != self.model_type:
            raise ValueError(f"this is the config of a model type `{model_type}`, not of `{self.model_type}`")
        if (base := kwargs.pop("rotary_base", None)) is not None:  # its name in exports of version 0.2
            kwargs.setdefault("rope_theta", base)
        kwargs.setdefault(
            "auto_map",
            {
                "AutoConfig": "configuration_oryx.OryxConfig",
                "AutoModel": "modeling_oryx.OryxModel",
                "AutoModelForCausalLM": "modeling_oryx.OryxForCausalLM",
            },
        )
        super().__post_init__(**kwargs)
        self.check()

    def has_experts(self, layer: int) -> bool:
        """Whether a layer, counted from 0, has experts; those of heads, behind the last one, have none."""
        if self.moe is None or layer >= self.num_hidden_layers or layer < self.moe["first_dense"]:
            return False
        return (layer - self.moe["first_dense"]) % self.moe["frequency"] == 0

    def modes_of(self, layer: int) -> str:
        """Modes of a layer, counted from 0; those of heads, behind the last one, have that one's."""
        return self.modes if self.layer_modes is None else self.layer_modes[min(layer, self.num_hidden_layers - 1)]

    @property
    def reads_plans(self) -> tuple[bool, ...]:
        """For every layer, whether it reads mode plans: not where it has one mode and others have others."""
        modes = [self.modes_of(layer) for layer in range(self.num_hidden_layers)]
        return tuple(self.layer_modes is None or mode == "both" for mode in modes)

    @property
    def kinds(self) -> set[str]:
        """Modes of layers that occur."""
        return {self.modes} if self.layer_modes is None else set(self.layer_modes)

    @property
    def has_attention(self) -> bool:
        """Whether any layer has the attention mode."""
        return self.kinds != {"recurrent"}

    @property
    def has_recurrence(self) -> bool:
        """Whether any layer has the recurrent mode."""
        return self.kinds != {"attention"}

    @property
    def single_mode(self) -> str | None:
        """The mode that all layers have alone, or None."""
        return self.modes if self.layer_modes is None and self.modes != "both" else None

    @property
    def default_plan(self) -> str:
        """Plan of a call that gives none."""
        if self.mode_plan is not None:
            return self.mode_plan
        return "attention" if self.has_attention else "recurrent"

    @property
    def rope(self) -> Rope:
        """Rotary embedding of `rope_parameters`."""
        return Rope.of(self.rope_parameters or {})

    @property
    def layer_types(self) -> list[str]:
        """As transformers names them: every layer holds keys and values beside a recurrent state."""
        return ["hybrid"] * self.num_hidden_layers

    @property
    def fp32_parameters(self) -> tuple[str, ...]:
        """Parameters of a mixer, one number per head, that stay in fp32 in a half-precision model."""
        names = ("a_log", "dt_bias", "d_skip") if self.mixer == "mamba2" else ("a_log", "dt_bias")
        return names if self.has_recurrence else ()

    def _check_experts(self) -> None:
        at_least = dict.fromkeys(("experts", "top_k", "ffn_hidden_size", "frequency"), 1)
        at_least |= {"first_dense": 0, "shared_ffn_hidden_size": 0}
        moe = self.moe
        if set(moe) != {*at_least, "score", "bias"}:
            raise ValueError(
                f"OryxConfig.moe has the fields {', '.join(moe)}; it needs {', '.join(at_least)}, score, bias"
            )
        for name, least in at_least.items():
            if type(moe[name]) is not int or moe[name] < least:
                raise ValueError(f"OryxConfig.moe.{name} is {moe[name]!r}, not a whole number of at least {least}")
        if moe["top_k"] > moe["experts"]:
            raise ValueError(f"OryxConfig.moe.top_k {moe['top_k']} is more than moe.experts {moe['experts']}")
        if moe["score"] not in ("softmax", "sigmoid") or type(moe["bias"]) is not bool:
            raise ValueError(f"OryxConfig.moe: score {moe['score']!r} or bias {moe['bias']!r} is not one that there is")

    def check(self) -> None:
        """Raise ValueError with the field at fault."""
        if self.moe is not None:
            self._check_experts()
        choices = {
            "mixer": ("gdn", "mamba2"),
            "modes": ("both", "attention", "recurrent"),
            "rotary": ("attention", "both", "none"),
            "kernels": ("auto", "torch"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"OryxConfig.{name} is {getattr(self, name)!r}, not one of {', '.join(allowed)}")
        at_least = {
            "vocab_size": 1,
            "hidden_size": 1,
            "intermediate_size": 1,
            "num_hidden_layers": 1,
            "num_attention_heads": 1,
            "num_key_value_heads": 1,
            "num_nextn_predict_layers": 0,
            "head_dim": 1,
            "value_head_dim": 1,
            "conv_width": 0,
            "recurrence_chunk": 1,
            "mode_chunk": 1,
        }
        for name, least in at_least.items():
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise ValueError(f"OryxConfig.{name} is {value!r}, not a whole number of at least {least}")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"OryxConfig.num_attention_heads {self.num_attention_heads} is not a multiple of num_key_value_heads "
                f"{self.num_key_value_heads}"
            )
        if self.rotary != "none" and self.head_dim % 2:
            raise ValueError(f"OryxConfig.head_dim is {self.head_dim}; rotary embedding needs an even width")
        try:
            self.rope  # noqa: B018 - it checks
        except ValueError as error:
            raise ValueError(f"OryxConfig.rope_parameters: {error}") from None
        if self.layer_modes is not None:
            if self.modes != "both":
                raise ValueError(f"OryxConfig.modes is `{self.modes}`, but layer_modes has those of each layer")
            if len(self.layer_modes) != self.num_hidden_layers:
                raise ValueError(
                    f"OryxConfig.layer_modes has {len(self.layer_modes)} entries for num_hidden_layers "
                    f"{self.num_hidden_layers}"
                )
            if wrong := [mode for mode in self.layer_modes if mode not in choices["modes"]]:
                raise ValueError(f"OryxConfig.layer_modes holds {wrong[0]!r}, not one of {', '.join(choices['modes'])}")
        if self.shared_query and "both" not in self.kinds:
            raise ValueError(f"OryxConfig.shared_query needs modes `both`, not `{', '.join(sorted(self.kinds))}`")


__all__ = ["OryxConfig"]

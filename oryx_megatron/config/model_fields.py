"""Fields of `model`: what decides the weights and what they compute. See schema.py."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, Literal

from oryx_megatron.config.bounds import Range
from oryx_megatron.config.pattern import Modes, layer_modes, period
from oryx_megatron.config.types import Count, Index, NotNegative, Positive, Size


@dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """Mixture of experts in the place of the SwiGLU: megatron-core's MoE layer."""

    experts: Annotated[int, Range(ge=1, le=1 << 14)]
    """Routed experts of a layer."""
    top_k: Count = 2
    """Experts that each token goes to."""
    ffn_hidden_size: Annotated[int, Range(ge=1, le=1 << 26)]
    """Hidden width of one expert's SwiGLU."""
    shared_ffn_hidden_size: Annotated[int, Range(ge=0, le=1 << 26)] = 0
    """Hidden width of the SwiGLU that every token goes through beside its experts; 0: none."""
    first_dense: Index = 0
    """First layers that keep the dense SwiGLU of model.ffn_hidden_size."""
    frequency: Count = 1
    """Of the layers after those, every frequency-th has experts, beginning with the first."""
    score: Literal["softmax", "sigmoid"] = "softmax"
    """Router scores: softmax over the chosen experts (over all with top_k 1), or sigmoids that are then normalised."""
    aux_loss: NotNegative = 0.01
    """Coefficient of the load-balancing loss (Switch Transformer, arXiv 2101.03961, eq. 4); 0: none."""
    aux_loss_over: Literal["microbatch", "sequence"] = "microbatch"
    """Tokens over which that loss balances the load."""
    bias_update_rate: NotNegative = 0.0
    """Step of the per-expert bias that balances load without a loss (arXiv 2408.15664), sigmoid only; 0: no bias."""
    z_loss: NotNegative = 0.0
    """Coefficient of the router's z-loss (ST-MoE, arXiv 2202.08906, eq. 5); 0: none."""
    capacity_factor: Positive | None = None
    """Tokens that an expert takes from a rank's microbatch, over their even share; more are dropped. null: dropless."""

    def in_layer(self, layer: int) -> bool:
        """Whether a layer, counted from 0, has experts."""
        return layer >= self.first_dense and (layer - self.first_dense) % self.frequency == 0


@dataclass(frozen=True, kw_only=True)
class MTPConfig:
    """Multi-token prediction: heads behind the model that each predict one token further (docs/mtp.md)."""

    layers: Annotated[int, Range(ge=1, le=16)] = 1
    """Heads; head k predicts the token k + 1 further on from a token."""
    loss_weight: Annotated[float, Range(gt=0, le=10)] = 0.1
    """Weight of the heads' mean loss beside the model's own (DeepSeek-V3, arXiv 2412.19437, eq. 25)."""


@dataclass(frozen=True, kw_only=True)
class RopeScalingConfig:
    """Rotary frequencies for longer texts, as transformers writes them in config.json (docs/long-context.md)."""

    rope_type: Literal["linear", "yarn", "llama3"]
    """Positions over `factor` (arXiv 2306.15595), YaRN (arXiv 2309.00071), or Llama 3.1's (arXiv 2407.21783)."""
    factor: Annotated[float, Range(ge=1)]
    """How many times longer texts become."""
    original_max_position_embeddings: Count | None = None
    """Tokens of a text in pretraining (yarn, llama3)."""
    rope_theta: Positive | None = None
    """As in a config.json; equal to model.rope_theta, which null stands for."""
    beta_fast: Positive | None = None
    """yarn: frequencies of more turns within the original length stay; null: 32."""
    beta_slow: Positive | None = None
    """yarn: frequencies of fewer turns are divided by `factor`; null: 1."""
    attention_factor: Positive | None = None
    """yarn: factor of cosines and sines, a temperature of the softmax; null: 0.1 ln(factor) + 1."""
    mscale: Positive | None = None
    """yarn: with mscale_all_dim, attention_factor is the ratio of 0.1 m ln(factor) + 1 at the two."""
    mscale_all_dim: Positive | None = None
    """yarn: see mscale."""
    truncate: bool | None = None
    """yarn: the bounds of the blend are whole dimensions; null: true."""
    low_freq_factor: Positive | None = None
    """llama3: frequencies of fewer turns within the original length are divided by `factor`."""
    high_freq_factor: Positive | None = None
    """llama3: frequencies of more turns stay."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Architecture of one Oryx model, or of a baseline with one mode only (see `modes`)."""

    name: str
    """Name of the preset, for logs and exports."""
    mixer: Literal["gdn", "mamba2"]
    """Recurrence of the recurrent mode: Gated DeltaNet (arXiv 2412.06464) or Mamba-2 (arXiv 2405.21060)."""
    modes: Modes = "both"
    """Modes the model has. `both` is Oryx; one mode alone builds a baseline without the other's parameters."""
    pattern: tuple[str, ...] = ()
    """Modes layer by layer, repeated to num_layers, e.g. `[recurrent*3, attention]`; `[]`: `modes` in every layer."""
    num_layers: Annotated[int, Range(ge=1, le=1 << 14)]
    """Number of blocks (mixer + SwiGLU)."""
    hidden_size: Annotated[int, Range(ge=1, le=1 << 24)]
    """Width d of the residual stream."""
    ffn_hidden_size: Annotated[int, Range(ge=1, le=1 << 26)]
    """Hidden width of the SwiGLU (the width of each of its two input halves)."""
    num_heads: Size
    """Number of query heads H; also the number of recurrent states per layer."""
    num_kv_heads: Size | None = None
    """Number of key/value heads G; divides num_heads. null: as many as num_heads."""
    qk_head_dim: Size = 128
    """Width N of a key or query head."""
    v_head_dim: Size = 128
    """Width P of a value head."""
    vocab_size: Annotated[int, Range(ge=1, le=1 << 31)] = 32768
    """Rows of the embedding. At least the tokenizer's size; divisible by the tensor-parallel size."""
    conv_width: Annotated[int, Range(ge=0, le=1 << 16)] = 4
    """Taps of the causal depthwise convolutions over keys and values; 0: no convolution."""
    output_gate: bool = True
    """Gate the normalised mixer output by SiLU(W_g x) (paper eq. 2)."""
    qk_norm: bool = True
    """RMSNorm per head on the attention query and on the key that attention reads."""
    rotary: Literal["attention", "both", "none"] = "attention"
    """Which mode's queries and keys get rotary position embedding."""
    rope_theta: Positive = 10000.0
    """Base of the rotary frequencies."""
    rope_scaling: RopeScalingConfig | None = None
    """Scaling of the rotary frequencies for texts longer than those of pretraining; null: none."""
    shared_query: bool = False
    """One query projection for both modes (the paper: +0.17 perplexity) instead of one each."""
    tie_embeddings: bool = True
    """Use the embedding matrix as output projection."""
    norm_epsilon: Positive = 1e-5
    """Epsilon of every RMSNorm."""
    logit_softcap: Positive | None = None
    """Logits become cap · tanh(logits / cap), in training and after (exports: final_logit_softcapping); null: off."""
    init_std: Positive = 0.02
    """Standard deviation of weight initialisation; output projections use init_std / sqrt(2 num_layers)."""
    mup_base_hidden_size: Count | None = None
    """Width at which init_std and optimizer.lr were found, for muP (docs/model.md); null: no scaling with width."""
    decay_init: tuple[float, float] = (1.0, 16.0)
    """Range of A = exp(A_log), drawn uniformly."""
    dt_init: tuple[float, float] = (1e-3, 0.1)
    """Range of softplus(dt_bias), drawn log-uniformly."""
    recurrence_chunk: Count = 64
    """Tokens per chunk of the chunked recurrence kernels (a matter of speed only)."""
    moe: MoEConfig | None = None
    """Experts; null: a dense SwiGLU in every layer."""
    mtp: MTPConfig | None = None
    """Heads that predict further tokens in training, and draft when decoding; null: none."""

    @property
    def expert_layers(self) -> int:
        """Number of layers with experts."""
        return 0 if self.moe is None else sum(map(self.moe.in_layer, range(self.num_layers)))

    @property
    def kv_heads(self) -> int:
        """Number of key/value heads G."""
        return self.num_kv_heads if self.num_kv_heads is not None else self.num_heads

    @property
    def width_multiplier(self) -> float:
        """Width over muP's base width; 1 without muP."""
        return self.hidden_size / self.mup_base_hidden_size if self.mup_base_hidden_size else 1.0

    @property
    def kinds(self) -> frozenset[Modes]:
        """Modes of layers that occur."""
        return frozenset(period(self.pattern) if self.pattern else (self.modes,))

    @property
    def layer_modes(self) -> tuple[Modes, ...]:
        """Modes of every layer; ConfigError when the pattern does not make num_layers."""
        return layer_modes(self.pattern, self.num_layers) if self.pattern else (self.modes,) * self.num_layers

    @property
    def has_attention(self) -> bool:
        """Whether any layer has the attention mode."""
        return self.kinds != {"recurrent"}

    @property
    def has_recurrence(self) -> bool:
        """Whether any layer has the recurrent mode."""
        return self.kinds != {"attention"}

    @property
    def takes_plans(self) -> bool:
        """Whether any layer has both modes; the others ignore mode plans."""
        return "both" in self.kinds

    @property
    def single_mode(self) -> Modes | None:
        """The mode that all layers have alone, or None: Oryx models and hybrids."""
        return next(iter(self.kinds)) if len(self.kinds) == 1 and not self.takes_plans else None

    @property
    def reads_plans(self) -> tuple[bool, ...]:
        """For every layer, whether it reads mode plans: not where it has one mode and others have others."""
        if not self.pattern or self.single_mode is not None:
            return (True,) * self.num_layers
        return tuple(modes == "both" for modes in self.layer_modes)

    @property
    def ignores_plans(self) -> bool:
        """Whether layers differ and none of them reads a mode plan."""
        return not self.takes_plans and self.single_mode is None

    @property
    def mtp_layers(self) -> int:
        """Number of heads of multi-token prediction."""
        return 0 if self.mtp is None else self.mtp.layers

    @property
    def mtp_modes(self) -> Modes:
        """Modes of those heads: the last layer's."""
        return self.layer_modes[-1]

    def with_modes(self, modes: Modes) -> ModelConfig:
        """This architecture with `modes` in every layer: that of a layer of a hybrid."""
        return replace(self, modes=modes, pattern=(), shared_query=self.shared_query and modes == "both")

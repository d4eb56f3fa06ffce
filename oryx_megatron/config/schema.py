"""Every field a run can set: name, type, bounds, default, unit and meaning.

Bounds of single numbers are part of their types (bounds.py); rules across fields are in validate.py.

The classes are frozen: what was validated is what runs, and what the checkpoint's manifest records.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal, get_args

from oryx_megatron.config.bounds import Range
from oryx_megatron.config.model_fields import ModelConfig
from oryx_megatron.config.model_fields import MoEConfig as MoEConfig
from oryx_megatron.config.model_fields import MTPConfig as MTPConfig
from oryx_megatron.config.model_fields import RopeScalingConfig as RopeScalingConfig
from oryx_megatron.config.types import (
    Beta,
    Count,
    Index,
    LocalPath,
    NotNegative,
    PathOrUrl,
    Positive,
    Probability,
    Size,
)

RENAMED = {
    "ModelConfig": {"key_width": "qk_head_dim", "value_width": "v_head_dim", "rotary_base": "rope_theta"},
    "FaultsConfig": {"returns": "max_rollbacks"},
}
"""Keys of 0.1, by class, that run files and checkpoints still hold; read with a note until 0.4 (config/loading.py)."""
REMOVED = {"MoEConfig": ("freeze",)}
"""Keys that had no effect, by class: checkpoints hold them, empty."""


@dataclass(frozen=True, kw_only=True)
class BlendEntry:
    """One indexed dataset of a blend."""

    path: PathOrUrl
    """Prefix of the .bin/.idx pair; also on object storage (docs/storage.md)."""
    weight: Positive = 1.0
    """Relative share of samples."""


@dataclass(frozen=True, kw_only=True)
class DataStage:
    """A blend that takes over at a step."""

    start: Index
    """First iteration of the stage."""
    blend: tuple[BlendEntry, ...]
    """Datasets and weights from then on."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What to train on."""

    sequence_length: Annotated[int, Range(ge=1, le=1 << 27)]
    """Tokens per sample."""
    tokenizer: LocalPath
    """Folder with tokenizer files and manifest.json (see tokenizers/)."""
    blend: tuple[BlendEntry, ...] = ()
    """Datasets to train on; each is divided by `split` into train, validation and test."""
    stages: tuple[DataStage, ...] = ()
    """Blends that replace `blend` from given iterations on."""
    split: tuple[float, float, float] = (98.0, 2.0, 0.0)
    """Relative sizes of train, validation and test parts of every dataset, by documents."""
    validation: dict[str, tuple[BlendEntry, ...]] = field(default_factory=dict)
    """Further validation sets by name, used whole; the split's own part is called `valid`."""
    documents: Literal["joined", "isolated"] = "joined"
    """`isolated`: neither attention nor recurrence nor convolution crosses the end of a document."""
    cache_dir: LocalPath | None = None
    """Where sample indices are cached; null: next to the datasets, or for a dataset on object storage in the cache."""
    num_workers: Annotated[int, Range(ge=0, le=1024)] = 0
    """Loader processes per rank; 0 reads in the training process with one thread of prefetch."""


@dataclass(frozen=True, kw_only=True)
class MixStage:
    """Mixing probabilities from an iteration on."""

    start: Index
    """First iteration of the stage."""
    p_attention: Probability
    """Probability that a whole microbatch is in attention mode."""
    p_recurrent: Probability
    """Probability that a whole microbatch is in recurrent mode."""
    p_prompt: Probability = 0.0
    """Probability that the texts of a microbatch are split as `modes.prompt` says."""
    p_layers: Probability = 0.0
    """Probability that groups of layers have plans of their own."""


@dataclass(frozen=True, kw_only=True)
class ModesConfig:
    """How training draws the mode plan of a microbatch (paper: mixed training; details ours)."""

    chunk: Count = 256
    """Tokens per run of one mode; divides the sequence length."""
    p_attention: Probability = 0.25
    """Probability that a whole microbatch is in attention mode."""
    p_recurrent: Probability = 0.25
    """Probability that a whole microbatch is in recurrent mode; else a ratio ~ U(0, 1) is drawn per microbatch."""
    p_prompt: Probability = 0.0
    """Probability that each text of a microbatch has the plan `prompt`, split at a chunk that is drawn for it."""
    prompt: str = "prompt:attention,new:recurrent"
    """What `p_prompt` draws: a plan for the beginning of a text, and one for the rest."""
    p_layers: Probability = 0.0
    """Probability that each of `layer_groups` groups of layers draws a ratio and a plan of its own."""
    layer_groups: Annotated[int, Range(ge=2)] = 2
    """Groups of neighbouring layers, as equal as can be, for `p_layers`; at most model.num_layers."""
    align: Literal["sequence", "documents"] = "sequence"
    """What counts as a text: a whole sequence, or each document in it (with data.documents: isolated)."""
    schedule: tuple[MixStage, ...] = ()
    """Probabilities that replace those above from given iterations on."""
    fixed: str | None = None
    """A plan for every text instead of drawing, e.g. `ratio:0.5`; `file:PATH` reads it, here and in all plans."""


@dataclass(frozen=True, kw_only=True)
class BatchStage:
    """A batch size from an iteration on."""

    start: Index
    """First iteration of the stage."""
    global_batch_size: Count
    """Sequences per step from then on."""


@dataclass(frozen=True, kw_only=True)
class EmaConfig:
    """Exponential moving average of the weights: evaluated, in the checkpoint, exported by choice."""

    decay: Beta = 0.9999
    """Of the average, what stays at each applied step; the rest comes from the new weights."""
    start: Count = 1
    """Step with whose weights the average begins."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Length and batch of the run."""

    iterations: Count
    """Optimizer steps in all."""
    global_batch_size: Count
    """Sequences per step over all ranks; divisible by micro_batch_size × data-parallel size."""
    batch_schedule: tuple[BatchStage, ...] = ()
    """Batch sizes that replace `global_batch_size` in training from given iterations on (ramp-up)."""
    micro_batch_size: Count = 1
    """Sequences per forward pass on a rank."""
    freeze: tuple[str, ...] = ()
    """Patterns (`*`, `?`) of parameters that do not train; `!PATTERN` trains what an earlier one freezes."""
    z_loss: NotNegative = 0.0
    """Weight of log² Z beside the loss (Z: normaliser of the softmax), e.g. 1e-4; 0: off."""
    ema: EmaConfig | None = None
    """Average of the weights beside them, e.g. `{decay: 0.9999, start: 1000}`; null: off."""
    exit_after: Count | None = None
    """Stop (with a checkpoint) after this iteration although the schedule runs to `iterations`."""


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Optimizer; no weight decay on norms, A_log, dt_bias, D."""

    name: Literal["adamw", "muon"] = "adamw"
    """Update rule; muon orthogonalises updates of matrices, and AdamW keeps the rest (docs/parallelism.md)."""
    lr: Positive = 3e-4
    """Peak learning rate."""
    weight_decay: NotNegative = 0.1
    """Decoupled weight decay, multiplied by the learning rate."""
    beta1: Beta = 0.9
    """Decay of the running mean of gradients."""
    beta2: Beta = 0.95
    """Decay of the running mean of squared gradients."""
    epsilon: Positive = 1e-8
    """Added to the root of the running mean of squares."""
    muon_momentum: Beta = 0.95
    """Momentum of the matrices under muon (Nesterov)."""
    clip_grad: NotNegative = 1.0
    """Global gradient norm above which gradients are scaled down; 0: off."""
    cpu_offload: bool = False
    """Keep optimizer state in host memory (megatron-core's hybrid device optimizer; GPU only)."""


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """Learning rate over iterations."""

    name: Literal["cosine", "wsd", "constant"] = "cosine"
    """Shape after warm-up: cosine to `min_lr`; warm-up, stable, decay; or constant."""
    warmup: Index = 0
    """Iterations of linear warm-up from 0."""
    min_lr: NotNegative = 0.0
    """Learning rate at the end."""
    decay: Index | None = None
    """Iterations of a decay (wsd only); null: a tenth of those up to its end, at least 2; 0: none."""
    decay_shape: Literal["linear", "cosine", "exponential", "minus_sqrt"] = "minus_sqrt"
    """Shape of a decay (wsd only)."""
    restarts: tuple[Count, ...] = ()
    """Iterations at which a decay ends, is evaluated and saved for good, and the rate goes back to its peak."""
    rewarm: Index = 0
    """Iterations of linear warm-up from `min_lr` after each restart; 0: at once."""

    def decay_in(self, iterations: int) -> int:
        """Iterations of the decay that ends there; it begins after the first of them, so that 1 would lower nothing."""
        return max(2, iterations // 10) if self.decay is None else self.decay

    def phases(self, iterations: int) -> list[tuple[int, int]]:
        """First and last + 1 iteration between restarts."""
        return list(zip((0, *self.restarts), (*self.restarts, iterations), strict=True))


Recompute = Literal["none", "swiglu", "mixer", "full"]
"""From the fastest, which keeps most, to the leanest."""


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """Layout. The data-parallel size is what remains of the world size."""

    tensor: Count = 1
    """Tensor-parallel size."""
    pipeline: Count = 1
    """Pipeline-parallel size."""
    virtual_pipeline: Count = 1
    """Model chunks per pipeline rank (interleaved schedule when above 1)."""
    context: Count = 1
    """Context-parallel size."""
    expert: Count = 1
    """Expert-parallel size: ranks that share out the experts of a layer; divides tensor × context × data."""
    sequence: bool = True
    """Sequence parallelism inside the tensor-parallel group (no effect when tensor is 1)."""
    first_stage_layers: Count | None = None
    """Layers on the first pipeline stage; null: even."""
    last_stage_layers: Count | None = None
    """Layers on the last pipeline stage; null: even."""
    distributed_optimizer: bool = True
    """Shard optimizer state over data-parallel ranks."""
    overlap: bool = False
    """Overlap gradient reduction and parameter gathering with computation (ZeRO's overlap_comm in DeepSpeed)."""
    recompute: Recompute = "none"
    """Activations recomputed in the backward pass: none; SwiGLU's output, where the mixer is fused and not in FP8; that
    and what is inside the mixer; or whole blocks (docs/parallelism.md)."""
    distributed_timeout: Positive = 600.0
    """Seconds after which a stuck collective ends the run."""


@dataclass(frozen=True, kw_only=True)
class DeepSpeedConfig:
    """What DeepSpeed shards and where it keeps it; only with `engine: deepspeed`."""

    zero_stage: Annotated[int, Range(ge=1, le=3)] = 1
    """Sharded over data-parallel ranks: 1: optimizer state, 2: gradients too, 3: parameters too."""
    offload: Literal["none", "optimizer", "parameters"] = "none"
    """Kept in host memory: nothing, optimizer state, or parameters as well (zero_stage 3 only)."""


@dataclass(frozen=True, kw_only=True)
class PrecisionConfig:
    """Number formats. States of the recurrence and the listed small parameters are always fp32 (but see DeepSpeed)."""

    dtype: Literal["bf16", "fp32"] = "bf16"
    """Format of weights and activations; bf16 keeps fp32 master weights in the optimizer."""
    fp8: Literal["none", "delayed", "tensorwise", "blockwise", "mxfp8"] = "none"
    """FP8 recipe of TransformerEngine for the linear layers."""
    fp4: Literal["none", "nvfp4"] = "none"
    """FP4 recipe of TransformerEngine for the linear layers instead, from Blackwell on, as mxfp8 of FP8."""
    fp8_params: bool = False
    """Keep the linear weights in FP8 between steps."""
    fp8_attention: bool = False
    """FP8 dot-product attention for whole-sequence attention plans; on Hopper with `fp8: delayed` alone."""
    bf16_first_layers: Index = 0
    """First layers kept out of FP8."""
    bf16_last_layers: Index = 0
    """Last layers kept out of FP8."""

    @property
    def of_decoding(self) -> PrecisionConfig:
        """Without FP8 and FP4, whose products take eight rows and more: a step of decoding has one."""
        return PrecisionConfig(dtype=self.dtype)


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Saving."""

    interval: Index = 1000
    """Iterations between checkpoints; 0: only at the end."""
    keep: Index = 2
    """Newest checkpoints kept; 0 keeps all."""
    keep_every: Index = 0
    """Also keep every checkpoint whose iteration is a multiple of this; 0: none."""
    steps: tuple[Index, ...] = ()
    """Also save after these iterations, 0 being before the first, and keep those checkpoints."""
    keep_best: str | None = None
    """Also keep the checkpoint with the lowest of this validation loss, `SET/PLAN` as `valid/recurrent`, or
    `ema/SET/PLAN` of the averaged weights (train.ema). Every checkpoint is then evaluated before it is saved, unless
    the run is told to stop. null: off."""
    asynchronous: bool = False
    """Write in the background while training continues."""
    timeout: Positive = 1800.0
    """Seconds a save may take before it counts as failed."""


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Evaluation during training."""

    interval: Index = 0
    """Iterations between evaluations; 0: only at the end."""
    steps: tuple[Index, ...] = ()
    """Also evaluate after these iterations, 0 being before the first."""
    batches: Count | None = 8
    """Global batches per validation set and plan; fewer where a set holds less: each sample is read once. null: the
    whole set, every dataset of it once whatever its weight."""
    plans: tuple[str, ...] = ("attention", "recurrent", "ratio:0.25")
    """Mode plans to evaluate under."""


@dataclass(frozen=True, kw_only=True)
class FaultsConfig:
    """What a run does when it is told to stop, when numbers go wrong, and when a rank hangs or lags."""

    time_limit: Positive | None = None
    """Seconds after which the run saves and stops, to be started again; ORYX_TIME_LIMIT_AT (unix time) works too."""
    time_margin: NotNegative = 300.0
    """Seconds before the time limit at which the run stops: at least what a step, an evaluation and a save take."""
    bad_steps: Index = 8
    """Bad steps in a row after which the run rolls back to the last good checkpoint, skipping their data; 0: never."""
    max_rollbacks: Index = 3
    """Rollbacks without one good step in between before the run gives up."""
    spike: Positive | None = None
    """Skip a step whose loss is this many scaled median absolute deviations above the running median; null: off."""
    spike_window: Annotated[int, Range(ge=8)] = 64
    """Good steps over which the running median goes; no spike is seen before half of them are done."""
    hang_timeout: Positive | None = None
    """Seconds without progress after which a rank writes down its stacks and ends, to be restarted; null: off."""
    slow_rank: NotNegative = 1.5
    """Name a rank that takes this many times its peers' time for its part of a step; 0: off."""


@dataclass(frozen=True, kw_only=True)
class LoggingConfig:
    """What a run reports."""

    interval: Count = 10
    """Iterations between lines on the terminal; metrics.jsonl has every iteration."""
    tensorboard: bool = True
    """Write TensorBoard events next to the metrics."""
    wandb_project: str | None = None
    """Weights & Biases project; null: off. Without a key or a network the run says so and continues without it."""
    profile: tuple[Count, Count] | None = None
    """First and last step, both included, that torch's profiler traces into RUN/profile; null: off."""
    profile_ranks: tuple[Index, ...] = (0,)
    """Ranks that do so."""


@dataclass(frozen=True, kw_only=True)
class KernelsConfig:
    """Backends of the mixer parts; `auto` takes the fastest that is present and right on this machine."""

    attention: Literal["auto", "reference", "sdpa", "flex", "te", "flash4"] = "auto"
    """Softmax attention of attention-mode queries."""
    recurrence: Literal["auto", "reference", "fla", "triton", "mamba_ssm"] = "auto"
    """Gated delta rule (reference, fla) or SSD (reference, triton, mamba_ssm)."""
    convolution: Literal["auto", "reference", "causal_conv1d"] = "auto"
    """Causal depthwise convolution of keys and values, where the mixer is not fused."""
    norm: Literal["auto", "reference", "fla"] = "auto"
    """Gated RMSNorm of the mixer's output, where the mixer is not fused."""
    mixer: Literal["auto", "reference", "fused"] = "auto"
    """Steps between the mixer's products, attention and recurrence: one by one, or fused over tokens sorted by mode."""
    graphs: Literal["auto", "off"] = "auto"
    """auto: capture forward and backward of a microbatch as CUDA graphs and replay them, where there is a GPU and the
    mixer is fused; start-up says what was chosen (docs/performance.md)."""
    cache_dir: LocalPath | None = None
    """Folder that keeps compiled kernels for all ranks and nodes (docs/install-gpu.md); null: each package's own."""


@dataclass(frozen=True, kw_only=True)
class StorageConfig:
    """Copies that each machine keeps of what lies on object storage (docs/storage.md)."""

    cache_dir: LocalPath | None = None
    """Folder of each machine for them; null: `$ORYX_CACHE`, else `~/.cache/oryx_megatron`."""
    cache_gb: Positive | None = None
    """Largest size of that folder in GB (10^9 bytes); null: `$ORYX_CACHE_GB`, else 100."""
    sync_interval: Positive = 60.0
    """Seconds between uploads of metrics and events to an output_dir on object storage."""


@dataclass(frozen=True, kw_only=True)
class RouterConfig:
    """How the router learns which tokens should attend (docs/router.md), once the run has ended."""

    texts: Count = 512
    """Training texts, each a sample of data.sequence_length."""
    held_out: Count = 64
    """Validation texts for thresholds and the table."""
    epochs: Count = 6
    """Times that every training text is used."""
    batch_size: Count = 4
    """Texts per update and rank."""
    lr: Positive = 6e-3
    """Peak learning rate of AdamW; it falls to zero along a cosine."""
    weight_decay: NotNegative = 1.0
    """Of AdamW, times the learning rate: gains are noisy, and a router would learn those of its texts by heart."""
    width: Size = 64
    """Numbers per token between its layers."""
    layers: Size = 2
    """Layers."""
    heads: Size = 2
    """Heads of a layer; they divide its width."""
    table: Annotated[int, Range(ge=0, le=1 << 32)] = 1 << 18
    """Entries for counts of runs of tokens in training text; 0: a router that counts nothing."""
    counted: Count = 4
    """Further training texts per text that are read for these counts alone."""
    seed: Index = 0
    """Seeds weights and order."""


WeightsKind = Literal["trained", "ema"]


@dataclass(frozen=True, kw_only=True)
class InitFromConfig:
    """What a run that has no checkpoint yet starts from (docs/operations.md); a path alone stands for `{path: …}`."""

    path: PathOrUrl
    """Run folder (its newest whole checkpoint), one checkpoint, or a Hugging Face folder: an export or a Llama."""
    weights: WeightsKind = "trained"
    """Which of the source's weights: those that it trained, or their average (train.ema)."""
    optimizer: bool = False
    """Load the optimizer state too; false: it starts from zero."""
    schedule: bool = False
    """Continue at the source's iteration: learning rate, mixing schedule, stages; false: at 0."""
    data: bool = False
    """Continue at the source's position in the same training data; false: from its beginning."""


Engine = Literal["megatron", "deepspeed"]
ENGINES = get_args(Engine)
"""Every one but megatron has a section of its name, and a module of train/."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One pretraining run."""

    model: ModelConfig
    """In YAML: the name of a file in configs/model, a path, the fields themselves, or `preset:` and changed fields."""
    data: DataConfig
    """What to train on."""
    train: TrainConfig
    """Length and batch of the run."""
    output_dir: PathOrUrl
    """Folder of this run: checkpoints/, metrics.jsonl, tensorboard/, config.yaml; also on object storage."""
    seed: Annotated[int, Range(ge=0, lt=2**32)] = 1234
    """Seeds initialisation, sample order and mode plans."""
    init_from: InitFromConfig | None = None
    """Checkpoint or model whose weights this run starts from; null: new weights."""
    modes: ModesConfig = ModesConfig()
    """How training mixes the two modes."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """Optimizer."""
    schedule: ScheduleConfig = ScheduleConfig()
    """Learning rate over iterations."""
    parallel: ParallelConfig = ParallelConfig()
    """Layout of the ranks."""
    precision: PrecisionConfig = PrecisionConfig()
    """Number formats."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """Saving."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """Evaluation during training."""
    router: RouterConfig | None = None
    """Trains the model's router when the run has ended, for `router:R` in evaluation.plans; null: it gets none."""
    faults: FaultsConfig = FaultsConfig()
    """Signals, time limits, bad numbers, hanging and slow ranks."""
    logging: LoggingConfig = LoggingConfig()
    """What the run reports."""
    kernels: KernelsConfig = KernelsConfig()
    """Backends of the mixer parts."""
    storage: StorageConfig = StorageConfig()
    """Copies of what lies on object storage."""
    engine: Engine = "megatron"
    """Training engine; deepspeed splits ranks into tensor and data parallelism only."""
    deepspeed: DeepSpeedConfig = DeepSpeedConfig()
    """DeepSpeed's share of the layout."""
    license: str | None = None
    """License of the weights for the model cards of exports, as the Hub writes it, e.g. apache-2.0; null: none."""

"""Parameters, FLOPs and decode memory of a model by arithmetic alone, and how much of it both modes share.

`oryx arch 1.4b-gdn` prints them. How shares count (docs/model.md, "What is shared"): per mode,
shared ÷ (used by that mode), without the embedding; the whole-model share and the shares with the embedding are
reported beside. Letters: d hidden size, f SwiGLU width, H query heads, G key/value heads, N key width, P value width,
w convolution taps, V vocabulary, E experts, s sequence.
"""

from __future__ import annotations

import json
import sys
import textwrap
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from oryx_megatron.cli import Parser, main_guard
from oryx_megatron.config import ModelConfig, is_run, load_model, load_run
from oryx_megatron.config.mixer_parts import conv_parts, decay_proj_parts, in_proj_parts
from oryx_megatron.display import shown_lines
from oryx_megatron.errors import ConfigError

User = Literal["embedding", "shared", "attention", "recurrent", "mtp"]

KV_BYTES = 2
"""Bytes of a cached key or value element and of a convolution window's (bf16)."""
STATE_BYTES = 4
"""Bytes of an element of the recurrent state (fp32)."""


@dataclass(frozen=True)
class ModelPart:
    """Parameters of one kind over all layers, and which mode uses them."""

    name: str
    count: int
    user: User
    note: str = ""
    idle: int = 0
    """Of them, those of experts that a token does not go to."""


@dataclass(frozen=True)
class ParameterCounts:
    """Parameters of a model by part. A single-mode baseline has all but its embedding under `shared`.

    Heads of multi-token prediction stand apart, under `mtp`: the model's own predictions do without them.
    """

    parts: tuple[ModelPart, ...]

    def of(self, *users: User) -> int:
        """Parameters used by these."""
        return sum(part.count for part in self.parts if part.user in users)

    @property
    def total(self) -> int:
        """All parameters."""
        return sum(part.count for part in self.parts)

    @property
    def active(self) -> int:
        """Parameters that one token uses, those of both modes and the embedding counted: all but its idle experts."""
        return self.total - sum(part.idle for part in self.parts)

    @property
    def embedding(self) -> int:
        """Embedding, and output layer when not tied."""
        return self.of("embedding")

    @property
    def non_embedding(self) -> int:
        return self.total - self.embedding

    @property
    def shared(self) -> int:
        """Non-embedding parameters that both modes use."""
        return self.of("shared")

    @property
    def attention_only(self) -> int:
        return self.of("attention")

    @property
    def recurrent_only(self) -> int:
        return self.of("recurrent")

    def share(self, mode: Literal["attention", "recurrent", "whole"], *, embedding: bool = False) -> float:
        """Shared ÷ used: by one mode, or by the whole model. `embedding` counts the embedding, as shared."""
        shared = self.shared + (self.embedding if embedding else 0)
        own = {"attention": self.attention_only, "recurrent": self.recurrent_only}
        return shared / (shared + (sum(own.values()) if mode == "whole" else own[mode]))


Share = float | Sequence[float]
"""Share of attention tokens that a mode plan gives: the same in all layers, or layer by layer (`Plan.layer_shares`)."""


@dataclass(frozen=True)
class Kind:
    """Layers of a model that have the same modes, and the same share of attention tokens."""

    model: ModelConfig
    """The architecture with these modes in every layer."""
    layers: int
    share: float
    """Of the tokens that attend in these layers."""


def layer_shares(model: ModelConfig, share: Share) -> list[float]:
    """Share of attention tokens in every layer when a plan gives `share`: 1 or 0 where a layer ignores plans.

    ValueError for a share outside 0 … 1, for one that a model of one mode cannot have, and where they are not as many
    as the layers.
    """
    given = [share] * model.num_layers if isinstance(share, (int, float)) else list(share)
    if len(given) != model.num_layers:
        raise ValueError(f"{len(given)} attention shares for the {model.num_layers} layers of {model.name}")
    for each in given:
        if not 0 <= each <= 1:
            raise ValueError(f"attention_share {each} is not within 0 … 1")
        if model.single_mode is not None and each != model.has_attention:
            raise ValueError(f"model {model.name} has only the mode {model.single_mode}, not a share of {each}")
    kinds = zip(model.layer_modes, model.reads_plans, given, strict=True)
    return [each if reads else float(modes == "attention") for modes, reads, each in kinds]


def kinds(model: ModelConfig, layers: Sequence[int] | None = None, share: Share | None = None) -> list[Kind]:
    """Kinds of layers of a model, or of those of its `layers` (numbers from 0), in the order of their first layer.

    `share` as of `layer_shares`; None where only their modes matter.
    """
    plain = float(model.has_attention)
    if not model.pattern and share is None:  # sizes are counted before anyone knows that so many layers fit
        return [Kind(model, model.num_layers if layers is None else len(layers), plain)]
    shares = [plain] * model.num_layers if share is None else layer_shares(model, share)
    modes = model.layer_modes
    counts = Counter((modes[i], shares[i]) for i in (range(model.num_layers) if layers is None else layers))
    own = {mode: model.with_modes(mode) if model.pattern else model for mode, _ in counts}
    return [Kind(own[mode], n, each) for (mode, each), n in counts.items()]


def _projections(model: ModelConfig) -> dict[str, tuple[int, User, str]]:
    """Output widths of the mixer's input projections, their users and formulas; of layers of one kind."""
    users: dict[str, User] = {}
    if model.modes == "both":
        users = {"query_attention": "attention", "query_recurrent": "recurrent"}
    formulas = {"key": "G N d", "value": "G P d", "output_gate": "H P d"}
    return {
        f"in_proj.{part}": (width, users.get(part, "shared"), formulas.get(part, "H N d"))
        for part, width in in_proj_parts(model).items()
    }


def _mixer_parts(model: ModelConfig, layers: int) -> list[ModelPart]:
    """Parameters of the mixers of `layers` layers of one kind."""
    d, heads, n, p = model.hidden_size, model.num_heads, model.qk_head_dim, model.v_head_dim
    both = model.modes == "both"
    attention: User = "attention" if both else "shared"
    recurrent: User = "recurrent" if both else "shared"
    widths = _projections(model)
    parts = [ModelPart(name, layers * width * d, user, note) for name, (width, user, note) in widths.items()]
    if model.conv_width:
        channels = sum(conv_parts(model).values())
        parts.append(ModelPart("conv", layers * channels * model.conv_width, "shared", "G (N + P) w"))
    if model.has_recurrence:
        mamba2, gates = model.mixer == "mamba2", sum(decay_proj_parts(model).values())
        parts.append(ModelPart("decay_proj", layers * gates * d, recurrent, "H d" if mamba2 else "2 H d"))
        scalars = ("a_log", "dt_bias", "d") if mamba2 else ("a_log", "dt_bias")
        count = layers * len(scalars) * heads
        parts.append(ModelPart(", ".join(scalars), count, recurrent, f"{len(scalars)} H"))
    if model.has_attention and model.qk_norm:
        parts.append(ModelPart("query_norm, key_norm", layers * 2 * n, attention, "2 N"))
    parts += [
        ModelPart("out_norm", layers * p, "shared", "P"),
        ModelPart("out_proj", layers * heads * p * d, "shared", "H P d"),
    ]
    return parts


def _layers(count: int) -> str:
    return "1 layer" if count == 1 else f"{count} layers"


def _merged(model: ModelConfig) -> list[ModelPart]:
    """Parameters of all mixers; parts of some layers say so."""
    found: dict[tuple[str, User], list[ModelPart]] = {}
    layers: Counter[tuple[str, User]] = Counter()
    for kind in kinds(model):
        for part in _mixer_parts(kind.model, kind.layers):
            found.setdefault((part.name, part.user), []).append(part)
            layers[part.name, part.user] += kind.layers
    users = Counter(name for name, _ in found)
    parts = []
    for (name, user), several in found.items():
        some = layers[name, user] < model.num_layers
        note = f"{several[0].note}, {_layers(layers[name, user])}" if some else several[0].note
        fixed = users[name] > 1 and user == "shared"
        parts.append(ModelPart(f"{name} (fixed)" if fixed else name, sum(part.count for part in several), user, note))
    return parts


def _mlp_parts(model: ModelConfig) -> list[ModelPart]:
    """Parameters behind the mixers: dense layers, and layers with experts."""
    d, moe, count = model.hidden_size, model.moe, model.expert_layers
    some = f", {_layers(model.num_layers - count)}" if count else ""
    parts = [ModelPart("mlp", (model.num_layers - count) * 3 * d * model.ffn_hidden_size, "shared", f"3 d f{some}")]
    if moe is not None:
        some = f", {_layers(count)}" if count < model.num_layers else ""
        one = count * 3 * d * moe.ffn_hidden_size
        note = f"E 3 d {moe.ffn_hidden_size}{some}"
        parts.append(ModelPart("experts", moe.experts * one, "shared", note, idle=(moe.experts - moe.top_k) * one))
        parts.append(ModelPart("router", count * moe.experts * d, "shared", f"E d{some}"))
        if moe.shared_ffn_hidden_size:
            width = moe.shared_ffn_hidden_size
            parts.append(ModelPart("shared experts", count * 3 * d * width, "shared", f"3 d {width}{some}"))
    return [part for part in parts if part.count]


def _mtp_parts(model: ModelConfig) -> list[ModelPart]:
    """Parameters of the heads of multi-token prediction, of which each has a projection and a dense layer."""
    d, heads = model.hidden_size, model.mtp_layers
    if not heads:
        return []
    mixer = sum(part.count for part in _mixer_parts(model.with_modes(model.mtp_modes), heads))
    return [
        ModelPart("mtp projections", heads * 2 * d * d, "mtp", "2 d²"),
        ModelPart("mtp mixers", mixer, "mtp", "as the last layer's"),
        ModelPart("mtp mlps", heads * 3 * d * model.ffn_hidden_size, "mtp", "3 d f"),
        ModelPart("mtp norms", heads * 5 * d, "mtp", "5 d"),
    ]


def parameter_counts(model: ModelConfig) -> ParameterCounts:
    """Parameters of `model` by part; equal to what the built model has."""
    d, layers = model.hidden_size, model.num_layers
    parts = [ModelPart("embedding", model.vocab_size * d, "embedding", "V d"), *_merged(model)]
    parts += [
        *_mlp_parts(model),
        ModelPart("layer norms", (2 * layers + 1) * d, "shared", "2 d, and d at the end"),
    ]
    if not model.tie_embeddings:
        parts.append(ModelPart("output_layer", model.vocab_size * d, "embedding", "V d"))
    parts += _mtp_parts(model)
    return ParameterCounts(tuple(parts))


def moment_bytes(model: ModelConfig, optimizer: str) -> int:
    """Bytes of the fp32 means of gradients that an optimizer (optimizer.name) keeps, over the whole model.

    AdamW has two; Muon one, of matrices, and leaves tables to AdamW. So it does the vectors of layers, which count as
    matrices here: they are below a hundredth of the model.
    """
    counts = parameter_counts(model)
    return 4 * (2 * counts.total - (counts.non_embedding if optimizer == "muon" else 0))


def muon_line(model: ModelConfig) -> str:
    """Muon's state beside AdamW's, over the whole model."""
    muon, adamw = moment_bytes(model, "muon"), moment_bytes(model, "adamw")
    masters = 4 * parameter_counts(model).total
    return (
        f"means {_bytes(muon)}, {muon / adamw:.0%} of AdamW's {_bytes(adamw)}; with fp32 masters "
        f"{_bytes(muon + masters)}, {(muon + masters) / (adamw + masters):.0%} of {_bytes(adamw + masters)}"
    )


def flops_per_token(model: ModelConfig, sequence: int, attention_share: Share) -> dict[str, float]:
    """Forward FLOPs per token by term, over all layers; a training step needs three times the sum.

    Counts what the plan needs, whatever kernels do: a multiply and an add are 2; a token's own query only; softmax
    attention over the (s + 1) / 2 tokens that a causal row sees on average, so attention tokens are taken as evenly
    spread; the recurrence in its step-by-step form, advanced at every token and read at recurrent tokens, and
    nothing of it in a layer where all tokens attend, as none reads the state. Norms, activations, rotary and softmax
    are left out. ValueError for shares that the model cannot have (`layer_shares`).
    """
    terms: dict[str, float] = {}
    for kind in kinds(model, share=attention_share):
        for name, flops in _mixer_flops(kind.model, sequence, kind.share).items():
            terms[name] = terms.get(name, 0.0) + kind.layers * flops
    # Experts: those that a token goes to, nothing dropped.
    terms |= {part.name: 2.0 * (part.count - part.idle) for part in _mlp_parts(model)}
    terms["output_layer"] = 2.0 * model.vocab_size * model.hidden_size
    return terms


def _mixer_flops(model: ModelConfig, sequence: int, attention_share: float) -> dict[str, float]:
    """`flops_per_token` of the mixer of one layer."""
    d, heads, n, p = model.hidden_size, model.num_heads, model.qk_head_dim, model.v_head_dim
    recurs = attention_share < 1
    terms: dict[str, float] = {}
    for name, (width, _, _) in _projections(model).items():
        used = {"in_proj.query_attention": attention_share, "in_proj.query_recurrent": 1 - attention_share}
        terms[name] = 2.0 * width * d * used.get(name, 1.0)
    if model.conv_width:
        terms["conv"] = 2.0 * sum(conv_parts(model).values()) * model.conv_width
    if model.has_attention:
        terms["attention"] = attention_share * heads * 2.0 * (n + p) * (sequence + 1) / 2
    if model.has_recurrence:
        terms["decay_proj"] = recurs * 2.0 * sum(decay_proj_parts(model).values()) * d
        # Decay S: N P. Add k vᵀ: 2 N P. Gated DeltaNet first reads Sᵀ k: 2 N P more.
        update = 3.0 if model.mixer == "mamba2" else 5.0
        terms["recurrence update"] = recurs * heads * update * n * p
        terms["recurrence read"] = (1 - attention_share) * heads * 2.0 * n * p
    terms["out_proj"] = 2.0 * heads * p * d
    return terms


def share_of_heads(model: ModelConfig, attention_share: Share) -> float:
    """Of the tokens that attend in the heads of multi-token prediction, which read the last layer's plan."""
    return layer_shares(model, attention_share)[-1]


def mtp_flops_per_token(model: ModelConfig, sequence: int, attention_share: Share) -> float:
    """Forward FLOPs per token of the heads of multi-token prediction, which run in training and in drafts alone."""
    if not model.mtp_layers:
        return 0.0
    d, own = model.hidden_size, model.with_modes(model.mtp_modes)
    mixer = sum(_mixer_flops(own, sequence, share_of_heads(model, attention_share)).values())
    return model.mtp_layers * (mixer + 2.0 * (2 * d * d + 3 * d * model.ffn_hidden_size + model.vocab_size * d))


def training_flops_per_token(model: ModelConfig, sequence: int, attention_share: Share) -> float:
    """FLOPs per token of forward and backward: three times the forward's, nothing recomputed; with all heads."""
    forward = sum(flops_per_token(model, sequence, attention_share).values())
    return 3 * (forward + mtp_flops_per_token(model, sequence, attention_share))


def mean_training_flops(model: ModelConfig, sequence: int, shares: Sequence[Share]) -> float:
    """`training_flops_per_token`, mean over microbatches whose plans give these shares.

    Not that of their mean share: a microbatch whose tokens all attend runs no recurrence.
    """
    return sum(training_flops_per_token(model, sequence, share) for share in shares) / len(shares)


def kv_bytes_per_token(model: ModelConfig) -> int:
    """Bytes that one token adds to a sequence's KV cache (bf16), whatever its mode, in the layers that attend."""
    layers = sum(kind.layers for kind in kinds(model) if kind.model.has_attention)
    return layers * model.kv_heads * (model.qk_head_dim + model.v_head_dim) * KV_BYTES


def state_bytes(model: ModelConfig) -> int:
    """Bytes of one sequence's recurrent states (fp32)."""
    layers = sum(kind.layers for kind in kinds(model) if kind.model.has_recurrence)
    return layers * model.num_heads * model.qk_head_dim * model.v_head_dim * STATE_BYTES


def window_bytes(model: ModelConfig) -> int:
    """Bytes of one sequence's convolution windows (bf16)."""
    taps = max(model.conv_width - 1, 0)
    return model.num_layers * model.kv_heads * (model.qk_head_dim + model.v_head_dim) * taps * KV_BYTES


def _shares(model: ModelConfig) -> tuple[float, ...]:
    """Attention shares to show: all, a quarter and none where the model has both modes."""
    return (1.0, 0.25, 0.0) if model.takes_plans else (float(model.has_attention),)


def report(model: ModelConfig, sequence: int) -> dict[str, object]:
    """All figures of `model` as plain data for JSON."""
    counts = parameter_counts(model)
    flops = {}
    for share in _shares(model):
        terms = flops_per_token(model, sequence, share)
        training = training_flops_per_token(model, sequence, share)
        flops[f"{share:g}"] = {"terms": terms, "forward": sum(terms.values()), "training": training}
        if model.mtp_layers:
            flops[f"{share:g}"]["mtp"] = mtp_flops_per_token(model, sequence, share)
    shares: dict[str, object] = {}
    if model.takes_plans:
        for name, embedding in (("non_embedding", False), ("with_embedding", True)):
            shares[name] = {
                mode: counts.share(mode, embedding=embedding) for mode in ("attention", "recurrent", "whole")
            }
    return {
        "name": model.name,
        "parameters": {
            "total": counts.total,
            "active": counts.active,
            "embedding": counts.embedding,
            "non_embedding": counts.non_embedding,
            "shared": counts.shared,
            "attention_only": counts.attention_only,
            "recurrent_only": counts.recurrent_only,
            "parts": {part.name: {"count": part.count, "user": part.user} for part in counts.parts},
        },
        "shares": shares,
        "sequence": sequence,
        "flops_per_token_by_attention_share": flops,
        "kv_bytes_per_token": kv_bytes_per_token(model),
        "state_bytes_per_sequence": state_bytes(model),
        "window_bytes_per_sequence": window_bytes(model),
        "decode_bytes_per_sequence": kv_bytes_per_token(model) * sequence + state_bytes(model) + window_bytes(model),
    }


def _bytes(count: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"


def table(model: ModelConfig, sequence: int) -> str:
    """All figures of `model` as text, at most 80 columns wide."""
    single = model.single_mode
    kind = f"{model.mixer} + attention"
    if single is not None:
        kind = "attention only" if single == "attention" else f"{model.mixer} only"
    heads = f"{model.num_heads}" + (f"/{model.kv_heads}" if model.kv_heads != model.num_heads else "")
    lines = [
        f"{model.name}: {kind}, {model.num_layers} layers × {model.hidden_size}, {heads} heads, SwiGLU "
        f"{model.ffn_hidden_size}",
        *([] if not model.pattern else textwrap.wrap(f"layers in turn: {', '.join(model.pattern)}", 78)),
        "",
        *_parameter_lines(model),
        "",
        *_flops_lines(model, sequence),
        "",
        *_memory_lines(model, sequence),
    ]
    return "\n".join(lines) + "\n"


def _parameter_lines(model: ModelConfig) -> list[str]:
    """Parameters by part, and how many of them each mode shares with the other."""
    counts = parameter_counts(model)
    both = model.takes_plans
    lines = [f"{'parameters':<26}{'count':>15}  {'used by':<11}per layer"]
    users = {"mtp": "mtp heads", "shared": "both modes" if both else model.single_mode or "all"}
    for part in counts.parts:
        lines.append(f"  {part.name:<24}{part.count:>15,}  {users.get(part.user, part.user):<11}{part.note}".rstrip())
    lines.append(f"  {'non-embedding':<24}{counts.non_embedding:>15,}")
    lines.append(f"  {'total':<24}{counts.total:>15,}")
    if model.moe is not None:
        lines.append(f"  {'active for a token':<24}{counts.active:>15,}")
    if not both:
        return lines
    lines += ["", f"{'shared by both modes':<26}{'parameters':>15}{'non-embedding':>17}{'with embedding':>17}"]
    rows: tuple[tuple[Literal["attention", "recurrent", "whole"], str, int], ...] = (
        ("attention", "of attention mode's", counts.shared + counts.attention_only),
        ("recurrent", "of recurrent mode's", counts.shared + counts.recurrent_only),
        ("whole", "of the whole model's", counts.of("shared", "attention", "recurrent")),
    )
    for mode, name, used in rows:
        plain, full = counts.share(mode), counts.share(mode, embedding=True)
        lines.append(f"  {name:<24}{used:>15,}{plain:>16.1%} {full:>16.1%}")
    lines.append(
        f"  shared {counts.shared:,}, attention {counts.attention_only:,}, recurrent {counts.recurrent_only:,} only"
    )
    return lines


def _flops_lines(model: ModelConfig, sequence: int) -> list[str]:
    """MFLOPs of a token by part, a column for each attention share."""
    shares = _shares(model)
    pure = model.takes_plans or model.single_mode
    head = {1.0: "all attention", 0.0: "all recurrent"} if pure else {1.0: "any plan"}
    lines = [
        f"{'MFLOPs per token, s=' + str(sequence):<26}"
        + "".join(f"{head.get(share, f'{share:.0%} attention'):>18}" for share in shares),
    ]
    columns = [flops_per_token(model, sequence, share) for share in shares]
    for name in columns[0]:
        lines.append(f"  {name:<24}" + "".join(f"{column[name] / 1e6:>18,.2f}" for column in columns))
    sums = [sum(column.values()) / 1e6 for column in columns]
    lines.append(f"  {'forward':<24}" + "".join(f"{value:>18,.2f}" for value in sums))
    name = "training (3×)"
    if model.mtp_layers:
        ahead = [mtp_flops_per_token(model, sequence, share) / 1e6 for share in shares]
        lines.append(f"  {'mtp heads, training':<24}" + "".join(f"{value:>18,.2f}" for value in ahead))
        sums, name = [a + b for a, b in zip(sums, ahead, strict=True)], "training (3× both)"
    lines.append(f"  {name:<24}" + "".join(f"{3 * value:>18,.2f}" for value in sums))
    return lines


def _memory_lines(model: ModelConfig, sequence: int) -> list[str]:
    """Bytes of decoding one sequence."""
    kv, state, windows = kv_bytes_per_token(model), state_bytes(model), window_bytes(model)
    memory = (
        ("KV cache per token", kv, "bf16"),
        (f"KV cache of {sequence} tokens", kv * sequence, "bf16"),
        ("recurrent states", state, "fp32, any length"),
        ("convolution windows", windows, "bf16, any length"),
        ("sum per sequence", kv * sequence + state + windows, ""),
    )
    return ["decode memory", *(f"  {name:<24}{_bytes(count):>15}  {note}".rstrip() for name, count, note in memory)]


EXAMPLES = """Parameters, FLOPs and decode memory of a model by arithmetic alone, and how much of it both modes share.

    oryx arch 1.4b-gdn --sequence 32768
    oryx arch configs/run/own-text.yaml --json
"""


@main_guard
def main(argv: list[str] | None = None) -> None:
    """Command line: print the table or JSON of one model."""
    parser = Parser("oryx_megatron.arch", description=EXAMPLES)
    parser.add_argument("model", help="name of a preset in configs/model, or a YAML file of a model or a run")
    parser.add_argument("--sequence", type=int, help="tokens of context (default: the run's, else 2048)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args(argv)
    if args.sequence is not None and args.sequence < 1:
        raise ConfigError(f"--sequence: {args.sequence} should be above 0")
    run = load_run(args.model) if is_run(args.model) else None
    model = load_model(args.model) if run is None else run.model
    sequence = args.sequence or (2048 if run is None else run.data.sequence_length)
    if args.json:
        sys.stdout.write(json.dumps(report(model, sequence), indent=2) + "\n")
    else:
        sys.stdout.write(shown_lines(table(model, sequence)))


if __name__ == "__main__":
    sys.exit(main())

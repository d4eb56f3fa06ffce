"""An Oryx model written out token by token in fp64: what the Hugging Face model is held against.

One row at a time, one token at a time, every sum written out; nothing of the model is used but its weights.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from oryx_megatron.hf.configuration_oryx import OryxConfig
from oryx_megatron.hf.modeling_oryx import OryxCache, OryxForCausalLM


def tiny_config(mixer: str, **changes) -> OryxConfig:
    fields = {
        "mixer": mixer,
        "vocab_size": 61,
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "value_head_dim": 6,
        "recurrence_chunk": 8,
        "mode_chunk": 4,
        "initializer_range": 0.3,
    }
    return OryxConfig(**(fields | changes))


def tiny_model(mixer: str, seed: int = 0, dtype: torch.dtype = torch.float64, **changes) -> OryxForCausalLM:
    torch.manual_seed(seed)
    model = OryxForCausalLM(tiny_config(mixer, **changes)).to(dtype).eval()
    with torch.no_grad():  # norms off their initial ones, so that a forgotten weight shows
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def random_ids(*shape: int, seed: int = 1) -> torch.Tensor:
    """Tokens of the vocabulary of `tiny_config`."""
    return torch.randint(0, 61, shape, generator=torch.Generator().manual_seed(seed))


def random_modes(*shape: int, seed: int = 2) -> torch.Tensor:
    """A plan as a mask: true for about half of the tokens."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.5


@torch.no_grad()
def in_pieces(
    model: OryxForCausalLM, ids: torch.Tensor, modes: torch.Tensor, sizes: list[int], room: int | None
) -> tuple[torch.Tensor, OryxCache]:
    """Logits [b, s, vocabulary] of a text read over a cache in pieces of these sizes, and the cache after it.

    `modes` [.., s] is the plan of the whole text; `room`: tokens of a static cache, None: it grows.
    """
    cache, parts, end = OryxCache(model.config, room), [], 0
    for size in sizes:
        piece = slice(end, end + size)
        parts.append(model(ids[:, piece], past_key_values=cache, mode_plan=modes[..., piece]).logits)
        end += size
        assert int(cache.get_seq_length()) == end
    return torch.cat(parts, 1), cache


def reference_logits(model: OryxForCausalLM, ids: torch.Tensor, attends: list[bool] | list[list[bool]]) -> torch.Tensor:
    """ids [s], attends [s] or [layers, s] → logits [s, vocabulary], fp64."""
    config = model.config
    w = {name: parameter.double() for name, parameter in model.state_dict().items()}
    heads, groups, n, p = (
        config.num_attention_heads,
        config.num_key_value_heads,
        config.head_dim,
        config.value_head_dim,
    )
    of = [head // (heads // groups) for head in range(heads)]  # the key/value head of each query head

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + config.rms_norm_eps).sqrt() * w[name]

    def rope(x: torch.Tensor, position: int) -> torch.Tensor:  # [h, n]
        y = x.clone()
        for i in range(n // 2):
            angle = torch.tensor(position / config.rope_parameters["rope_theta"] ** (2 * i / n), dtype=torch.float64)
            y[:, i] = x[:, i] * angle.cos() - x[:, i + n // 2] * angle.sin()
            y[:, i + n // 2] = x[:, i + n // 2] * angle.cos() + x[:, i] * angle.sin()
        return y

    def convolved(at: str, inputs: list[torch.Tensor]) -> torch.Tensor:
        """The last of the inputs [groups (n + p)] after the causal convolution."""
        if not config.conv_width:
            return inputs[-1]
        taps = w[at + "conv.weight"]
        backs = range(min(config.conv_width, len(inputs)))
        kv = sum(taps[:, config.conv_width - 1 - back] * inputs[-1 - back] for back in backs)
        return F.silu(kv) if config.mixer == "gdn" else kv

    def recurred(
        at: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, h: torch.Tensor, state: torch.Tensor
    ) -> torch.Tensor:
        """Outputs [heads, p] of a token read from the state [heads, n, p], which is advanced by it first."""
        raw = w[at + "decay_proj.weight"] @ h
        outs = []
        for head in range(heads):
            rate = w[at + "a_log"][head].exp()
            step = F.softplus(raw[head] + w[at + "dt_bias"][head])
            key, value = k[of[head]], v[of[head]]
            if config.mixer == "mamba2":
                state[head] = (-rate * step).exp() * state[head] + step * torch.outer(key, value)
                outs.append(state[head].T @ q[head] + w[at + "d_skip"][head] * value)
            else:
                beta = raw[heads + head].sigmoid()
                key = key / (key.pow(2).sum() + 1e-6).sqrt()
                query = q[head] / (q[head].pow(2).sum() + 1e-6).sqrt() / n**0.5
                kept = torch.eye(n, dtype=torch.float64) - beta * torch.outer(key, key)
                state[head] = (-rate * step).exp() * kept @ state[head] + beta * torch.outer(key, value)
                outs.append(state[head].T @ query)
        return torch.stack(outs)

    def attended(q: torch.Tensor, keys: list[torch.Tensor], values: list[torch.Tensor]) -> torch.Tensor:
        """Outputs [heads, p] of a token that attends to all keys [groups, n] and values [groups, p] so far."""
        return torch.stack(
            [
                torch.softmax(torch.stack([q[head] @ key[of[head]] for key in keys]) / n**0.5, 0)
                @ torch.stack([value[of[head]] for value in values])
                for head in range(heads)
            ]
        )

    xs = [w["model.embed_tokens.weight"][i] for i in ids.tolist()]
    plans = attends if isinstance(attends[0], list) else [attends] * config.num_hidden_layers
    for layer, whole in enumerate(plans):
        kind = config.modes_of(layer)
        if config.layer_modes is not None and kind != "both":  # it ignores the plan
            attends = [kind == "attention"] * len(whole)
        else:
            attends = whole
        shared = config.shared_query and kind == "both"
        at, at_mlp = f"model.layers.{layer}.mixer.", f"model.layers.{layer}.mlp."
        keys, values, inputs = [], [], []
        state = torch.zeros(heads, n, p, dtype=torch.float64)
        for t, x in enumerate(xs):
            h = norm(x, f"model.layers.{layer}.input_layernorm.weight")
            inputs.append(torch.cat([w[at + "k_proj.weight"] @ h, w[at + "v_proj.weight"] @ h]))
            kv = convolved(at, inputs)
            k, v = kv[: groups * n].view(groups, n), kv[groups * n :].view(groups, p)
            if kind != "attention":
                name = "q_proj" if shared else "q_recurrent_proj"
                q = (w[at + f"{name}.weight"] @ h).view(heads, n)
                turned = config.rotary == "both"
                o = recurred(at, rope(q, t) if turned else q, rope(k, t) if turned else k, v, h, state)
            if kind != "recurrent":
                k_a = norm(k, at + "key_norm.weight") if config.qk_norm else k
                keys.append(k_a if config.rotary == "none" else rope(k_a, t))
                values.append(v)
                if attends[t]:
                    name = "q_proj" if shared else "q_attention_proj"
                    q = (w[at + f"{name}.weight"] @ h).view(heads, n)
                    q = norm(q, at + "query_norm.weight") if config.qk_norm else q
                    o = attended(q if config.rotary == "none" else rope(q, t), keys, values)
            y = norm(o, at + "out_norm.weight")
            if config.output_gate:
                y = y * F.silu(w[at + "gate_proj.weight"] @ h).view(heads, p)
            x = x + w[at + "out_proj.weight"] @ y.flatten()
            h = norm(x, f"model.layers.{layer}.pre_mlp_layernorm.weight")
            h = F.silu(w[at_mlp + "gate_proj.weight"] @ h) * (w[at_mlp + "up_proj.weight"] @ h)
            xs[t] = x + w[at_mlp + "down_proj.weight"] @ h
    logits = torch.stack([w["lm_head.weight"] @ norm(x, "model.norm.weight") for x in xs])
    cap = config.final_logit_softcapping
    return logits if cap is None else cap * torch.tanh(logits / cap)

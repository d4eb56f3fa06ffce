"""Rotary position embedding (arXiv 2104.09864), and its frequencies scaled for texts longer than those of pretraining.

Torch only: training rotates by it, and every export ships it. Rotate-half convention: dimension i pairs with i + N/2.
Scaling as transformers names it: linear (arXiv 2306.15595), yarn (arXiv 2309.00071), llama3 (arXiv 2407.21783).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .recurrences_oryx import wide

TYPES = ("default", "linear", "yarn", "llama3")


@dataclass(frozen=True)
class Rope:
    """How positions become angles; the fields are transformers' `rope_parameters`. Hashable: tables are kept by it."""

    rope_theta: float = 10000.0
    """Base of the frequencies."""
    rope_type: str = "default"
    """One of `TYPES`."""
    factor: float = 1.0
    """How many times longer texts become."""
    original_max_position_embeddings: int | None = None
    """Tokens of a text in pretraining (yarn, llama3)."""
    beta_fast: float = 32.0
    """yarn: frequencies of more turns within the original length stay."""
    beta_slow: float = 1.0
    """yarn: frequencies of fewer turns are divided by `factor`; between the two they are blended."""
    attention_factor: float | None = None
    """yarn: factor of cosines and sines, a temperature of the softmax; None: 0.1 ln(factor) + 1."""
    mscale: float | None = None
    """yarn: with `mscale_all_dim`, attention_factor is the ratio of 0.1 m ln(factor) + 1 at the two."""
    mscale_all_dim: float | None = None
    """See `mscale`."""
    truncate: bool = True
    """yarn: the bounds of the blend are whole dimensions."""
    low_freq_factor: float | None = None
    """llama3: frequencies of fewer turns within the original length are divided by `factor`."""
    high_freq_factor: float | None = None
    """llama3: frequencies of more turns stay; between the two they are blended."""

    @classmethod
    def of(cls, parameters: Mapping[str, Any]) -> Rope:
        """From `rope_parameters` of a config; null is a default. Raises ValueError with the key at fault."""
        given = {key: value for key, value in parameters.items() if value is not None}
        kind = given.setdefault("rope_type", given.pop("type", "default"))
        if kind not in TYPES:
            raise ValueError(f"rope_type is {kind!r}, not one of {', '.join(TYPES)}")
        known = list(cls.__dataclass_fields__)
        for key, value in given.items():
            if key not in known:
                raise ValueError(f"`{key}` is not known; known: {', '.join(known)}")
            if key != "rope_type" and key != "truncate" and (isinstance(value, bool) or not _is_number(value)):
                raise ValueError(f"{key} is {value!r}, not a number above 0")
        needed = {"linear": ("factor",), "yarn": ("factor", "original_max_position_embeddings")}
        needed["llama3"] = (*needed["yarn"], "low_freq_factor", "high_freq_factor")
        for key in needed.get(kind, ()):
            if key not in given:
                raise ValueError(f"rope_type {kind} needs `{key}`")
        rope = cls(**given)
        if rope.factor < 1:
            raise ValueError(f"factor is {rope.factor}, less than 1")
        if kind == "llama3" and not rope.low_freq_factor < rope.high_freq_factor:  # type: ignore[operator]
            raise ValueError(f"low_freq_factor {rope.low_freq_factor} is not below high_freq_factor")
        if kind == "yarn" and rope.beta_fast < rope.beta_slow:
            raise ValueError(f"beta_fast {rope.beta_fast} is below beta_slow {rope.beta_slow}")
        return rope

    def frequencies(self, width: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Radians per token of each pair of dimensions, [width / 2]."""
        half = width // 2
        index = torch.arange(half, device=device, dtype=dtype)
        plain = self.rope_theta ** (index / -half)
        if self.rope_type == "linear":
            return plain / self.factor
        if self.rope_type == "yarn":
            first, last = self._blend(width)
            divided = ((index - first) / (last - first)).clamp(0, 1)
            return plain / self.factor * divided + plain * (1 - divided)
        if self.rope_type == "llama3":
            length, low, high = self.original_max_position_embeddings, self.low_freq_factor, self.high_freq_factor
            assert length is not None
            assert low is not None
            assert high is not None
            turns = plain * (length / (2 * math.pi))
            kept = ((turns - low) / (high - low)).clamp(0, 1)
            return plain / self.factor * (1 - kept) + plain * kept
        return plain

    def _blend(self, width: int) -> tuple[float, float]:
        """Pairs of dimensions between which yarn blends: beta_fast and beta_slow turns fit the original length."""
        length = self.original_max_position_embeddings
        assert length is not None

        def pair(turns: float) -> float:
            return width * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(self.rope_theta))

        low, high = pair(self.beta_fast), pair(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, width - 1)
        return low, high if low != high else high + 0.001  # as transformers has it

    @property
    def temperature(self) -> float:
        """Factor of the cosines and sines of attention's queries and keys: scores are multiplied by its square."""
        if self.rope_type != "yarn":
            return 1.0
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return self._mscale(self.mscale) / self._mscale(self.mscale_all_dim)
        return self._mscale(1.0)

    def _mscale(self, mscale: float) -> float:
        return 0.1 * mscale * math.log(self.factor) + 1.0 if self.factor > 1 else 1.0

    def tables(
        self, positions: Tensor, width: int, dtype: torch.dtype, *, attention: bool = True
    ) -> tuple[Tensor, Tensor]:
        """Integer positions [...] → cosines and sines [..., width / 2].

        `attention`: with the temperature of attention's softmax, which a recurrence lacks.
        """
        angles = positions.to(dtype).unsqueeze(-1) * self.frequencies(width, positions.device, dtype)
        cos, sin = angles.cos(), angles.sin()
        if attention and self.temperature != 1.0:
            cos, sin = cos * self.temperature, sin * self.temperature
        return cos, sin


def rotate(x: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate all N dimensions of x [(b,) s, heads, N] by tables [(b,) s, N / 2], in fp32 or fp64."""
    cos, sin = (table.to(device=x.device, dtype=wide(x.dtype)).unsqueeze(-2) for table in tables)
    first, second = x.to(cos.dtype).chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1).to(x.dtype)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and 0 < value < math.inf

"""Reading a run's metrics.jsonl: by the run itself when it resumes, the monitor and the plots. Needs no torch."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from oryx_megatron.display import shown
from oryx_megatron.train.records import (
    Check,
    is_amount,
    is_flag,
    is_losses,
    is_number,
    is_numbers,
    is_table,
    is_text,
    is_whole,
    parse_record,
    read_records,
)

log = logging.getLogger(__name__)

NAME = "metrics.jsonl"
_NEEDS: dict[str, Check] = {"kind": is_text, "iteration": is_whole}
_KINDS: dict[str, dict[str, Check]] = {
    "step": {"loss": is_number, "tokens": is_whole},
    "evaluation": {"dataset": is_text, "plan": is_text, "loss": is_number},
    "routing": {"expert_load": is_table},
}
"""What a line of a kind has in any case; lines of other kinds are left alone."""
_MAY: dict[str, Check] = {
    "grad_norm": is_number,
    "lr": is_amount,
    "attention_share": is_amount,
    "consumed_samples": is_whole,
    "seconds": is_amount,
    "data_seconds": is_amount,
    "forward_backward_seconds": is_amount,
    "optimizer_seconds": is_amount,
    "model_flops": is_amount,
    "skipped": is_flag,
    "logit_z_loss": is_number,
    "mtp_loss": is_number,
    "mtp_losses": is_numbers,
    "memory_bytes": is_whole,
    "loss_by_mode": is_losses,
    "bits_per_byte": is_number,
    "perplexity": is_number,
    "ema_loss": is_number,
    "load_balancing_loss": is_number,
    "router_z_loss": is_number,
    "router_entropy": is_number,
    "expert_load_max": is_number,
    "expert_load_min": is_number,
    "dropped_share": is_number,
}


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Lines of a metrics.jsonl; damaged ones are left out, which the log says once. No file gives no lines."""
    found = read_records(path, parse_line)
    if (damage := found.damage()) is not None:
        log.warning("%s: %s", shown(path), damage)
    return found.lines


def parse_line(text: bytes) -> dict[str, Any] | None:
    """One line of a metrics.jsonl; None when it is damaged."""
    line = parse_record(text, _NEEDS, _MAY)
    if line is None:
        return None
    needs = _KINDS.get(line["kind"], {})
    return line if all(name in line and check(line[name]) for name, check in needs.items()) else None

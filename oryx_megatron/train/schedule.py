"""Learning rate by iteration: megatron-core's schedule, begun again at every restart."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from oryx_megatron.config.schema import RunConfig


class Schedule(OptimizerParamScheduler):
    """Sets the learning rate in an optimizer's param_groups; a function of the iteration alone.

    Linear warm-up, then cosine, WSD or constant. At each of `schedule.restarts` a decay ends and the learning rate goes
    back to its peak, over `schedule.rewarm` iterations: warm restarts of a cosine (SGDR, arXiv 1608.03983), several
    decays of WSD (WSD-S, arXiv 2410.05192).
    """

    def __init__(self, run: RunConfig, optimizer: Any) -> None:
        schedule, iterations = run.schedule, run.train.iterations
        self._schedule, self._phases = schedule, schedule.phases(iterations)
        wsd = schedule.name == "wsd"
        super().__init__(
            optimizer,
            init_lr=0.0,
            max_lr=run.optimizer.lr,
            min_lr=schedule.min_lr,
            lr_warmup_steps=schedule.warmup,
            lr_decay_steps=iterations,
            lr_decay_style={"cosine": "cosine", "wsd": "WSD", "constant": "constant"}[schedule.name],
            start_wd=run.optimizer.weight_decay,
            end_wd=run.optimizer.weight_decay,
            wd_incr_steps=0,
            wd_incr_style="constant",
            use_checkpoint_opt_param_scheduler=False,
            override_opt_param_scheduler=True,
            wsd_decay_steps=schedule.decay_in(iterations) if wsd else None,
            lr_wsd_decay_style=schedule.decay_shape if wsd else None,
        )

    def get_lr(self, param_group: dict[str, Any]) -> float:
        """Learning rate of the step after `num_steps`, in this parameter group."""
        done, rewarm = self.num_steps, self._schedule.rewarm
        begin, end = next(((b, e) for b, e in self._phases if done < e), self._phases[-1])
        if begin:
            peak, low = (float(param_group.get(f"{name}_lr", getattr(self, f"{name}_lr"))) for name in ("max", "min"))
            if done < begin + rewarm:
                return low + (peak - low) * (done - begin) / rewarm
            if done == begin + rewarm:
                return peak
        self.lr_warmup_steps = begin + rewarm if begin else self._schedule.warmup
        self.lr_decay_steps = end
        self.wsd_decay_steps = self._schedule.decay_in(end)
        return float(super().get_lr(param_group))

    def rewind(self, iteration: int) -> None:
        """Set the learning rate to where `iteration` steps are done."""
        self.num_steps = 0
        self.step(increment=iteration)


def learning_rate(run: RunConfig, iteration: int) -> float:
    """Learning rate of the step after `iteration` steps."""
    group: dict[str, Any] = {}
    Schedule(run, SimpleNamespace(param_groups=[group])).step(increment=iteration)
    return float(group["lr"])

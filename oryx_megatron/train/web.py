"""The page of `oryx monitor --web`: curves of runs from their files, served to this machine's browser alone.

Standard library; the page loads nothing from elsewhere. Listens on 127.0.0.1 and answers no other name, so that no page
of another site can read it through the browser.
"""

from __future__ import annotations

import contextlib
import http.server
import importlib.resources
import itertools
import json
import math
import secrets
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from oryx_megatron.config.loading import config_text, from_dict
from oryx_megatron.config.plans import attention_share
from oryx_megatron.config.schema import ModelConfig
from oryx_megatron.config.yaml_text import parse_yaml
from oryx_megatron.display import shown
from oryx_megatron.errors import ConfigError, OryxError
from oryx_megatron.train.history import count_starts, short
from oryx_megatron.train.watching import Followed, fact_text, left_text

HOST = "127.0.0.1"
PORT = 8484
POINTS = 1000
"""Most points of a curve: of longer runs the means of stretches."""
LAST = 100
"""Steps whose mode mix is shown."""
GIB = 2**30
COLUMNS = ("iteration", "loss", "grad_norm", "lr", "speed", "memory", "attention_share")
"""Of the steps: one curve each."""


def _columns() -> dict[str, list[float]]:
    return {name: [] for name in COLUMNS}


@dataclass
class Recorded(Followed):
    """A run with all of its steps and evaluations, as curves need them."""

    columns: dict[str, list[float]] = field(default_factory=_columns)
    modes: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    curves: dict[tuple[str, str], list[tuple[float, float]]] = field(default_factory=dict)

    def _take(self, line: dict[str, Any] | None) -> None:
        """See Followed."""
        super()._take(line)
        if line is None:
            return
        if line["kind"] == "step" and self.steps and self.steps[-1] is line:
            seconds, memory = line["seconds"], line.get("memory_bytes")
            line = line | {
                "speed": line["tokens"] / seconds if seconds else math.nan,
                "memory": math.nan if memory is None else memory / GIB,
            }
            for name, column in self.columns.items():
                column.append(line.get(name, math.nan))
            for mode, loss in line.get("loss_by_mode", {}).items():
                self.modes.setdefault(mode, []).append((line["iteration"], loss))
        elif line["kind"] == "evaluation" and "dataset" in line:
            self.curves.setdefault((line["dataset"], line["plan"]), []).append((line["iteration"], line["loss"]))

    def _forget(self) -> None:
        """See Followed."""
        super()._forget()
        self.columns, self.modes, self.curves = _columns(), {}, {}

    def facts(self, now: float) -> dict[str, Any]:
        """What the page shows of the run; no NaN in it, which JSON has not."""
        last = self.steps[-1] if self.steps else None
        seconds = sum(step["seconds"] for step in self.steps)
        events = [self._event(event) for event in reversed(self.events)]
        steps = list(zip(self.columns["iteration"], self.columns["attention_share"], self.columns["loss"], strict=True))
        return _plain(
            {
                "name": shown(self.name),
                "state": self.state(now),
                "iteration": last["iteration"] if last else 0,
                "iterations": self.iterations,
                "loss": f"{self.loss(now):.4f}" if last else "",
                "tokens": short(self.tokens),
                "speed": short(sum(step["tokens"] for step in self.steps) / seconds) if seconds else "",
                "left": left_text(self, now),
                "starts": count_starts(self.events),
                "steps": {name: thinned(column) for name, column in self.columns.items()},
                "modes": {
                    mode: thinned_points(self.modes.get(mode, [])) for mode in ("attention", "recurrent", "mixed")
                },
                "evaluations": [
                    {"dataset": shown(dataset), "plan": shown(plan), "points": thinned_points(points)}
                    for (dataset, plan), points in self.curves.items()
                ],
                "shares": self._shares(),
                "drawn": [(share, loss) for _, share, loss in steps[-LAST:]],
                "mix": [(step, share) for step, share, _ in steps[-LAST:] if math.isfinite(share)],
                "events": [event for event in events if event["event"] != "checkpoint"],
                "checkpoints": [event for event in events if event["event"] == "checkpoint"],
            }
        )

    def _event(self, event: dict[str, Any]) -> dict[str, Any]:
        named = {name: event[name] for name in ("event", "time", "iteration")}
        return named | {"event": shown(event["event"]), "text": shown(fact_text(event))}

    def _shares(self) -> list[dict[str, Any]]:
        """Attention share and last loss of the plans whose share is known, by dataset."""
        found: dict[str, list[tuple[float, float]]] = {}
        shares = plan_shares(self.folder / "config.yaml", {plan for _, plan in self.curves})
        for (dataset, plan), points in self.curves.items():
            if plan in shares:
                found.setdefault(dataset, []).append((shares[plan], points[-1][1]))
        return [{"dataset": shown(name), "points": sorted(points)} for name, points in found.items()]


def plan_shares(config: Any, plans: set[str]) -> dict[str, float]:
    """Attention share of plans at a run's sequence length; without its config, of whole modes alone."""
    found = {"attention": 1.0, "recurrent": 0.0}
    data: Any = {}
    layers: tuple[bool, ...] = ()
    try:
        data = parse_yaml(config_text(config), str(config))
        length, chunk = int(data["data"]["sequence_length"]), int(data["modes"]["chunk"])
    except (OryxError, KeyError, TypeError, ValueError):
        length = chunk = 0
    with contextlib.suppress(OryxError, KeyError, TypeError):
        model = from_dict(ModelConfig, data["model"], source=str(config))
        layers = model.reads_plans if model.num_layers < 2**16 else ()
    for plan in plans if 0 < length < 2**27 and chunk > 0 else ():
        with contextlib.suppress(OryxError):
            found[plan] = attention_share(plan, length, chunk=chunk, layers=layers)
    return {plan: share for plan, share in found.items() if plan in plans}


def thinned(values: Sequence[float]) -> list[float]:
    """At most POINTS values: the mean of each stretch, of its finite values."""
    if len(values) <= POINTS:
        return list(values)
    edges = [i * len(values) // POINTS for i in range(POINTS + 1)]
    return [_mean(values[start:stop]) for start, stop in itertools.pairwise(edges)]


def thinned_points(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """`thinned` of both coordinates."""
    return list(zip(thinned([x for x, _ in points]), thinned([y for _, y in points]), strict=True))


def _mean(values: Sequence[float]) -> float:
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else math.nan


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Copy(Protocol):
    """Files of a run elsewhere, kept here."""

    def look(self) -> None:
        """Fetch what is new."""


class Server(http.server.ThreadingHTTPServer):
    """Serves the page and data.json; looks at the runs when it is asked for them."""

    daemon_threads = True

    def __init__(self, runs: Sequence[Recorded], port: int, interval: float, copies: Sequence[Copy] = ()) -> None:
        self.runs, self.copies, self.looking = runs, copies, threading.Lock()
        self.page = (
            importlib.resources.files("oryx_megatron.train").joinpath("monitor.html").read_text(encoding="utf-8")
        )
        self.page = self.page.replace("INTERVAL", str(round(1000 * interval)))
        super().__init__((HOST, port), _Handler)

    @property
    def url(self) -> str:
        """Where the page is."""
        return f"http://{HOST}:{self.server_address[1]}/"

    def data(self) -> bytes:
        """data.json of now."""
        with self.looking:
            for looked in (*self.copies, *self.runs):
                looked.look()
            return json.dumps({"runs": [run.facts(time.time()) for run in self.runs]}, allow_nan=False).encode()


class _Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        """The page, or the data; nothing else."""
        port = self.server.server_address[1]
        if self.headers.get("Host") not in (f"{HOST}:{port}", f"localhost:{port}"):
            self.send_error(403, "open the address that the monitor printed")
        elif self.path == "/":
            nonce = secrets.token_urlsafe(16)
            policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'nonce-{nonce}'; connect-src 'self'"
            self._send(self.server.page.replace("NONCE", nonce).encode(), "text/html; charset=utf-8", policy)
        elif self.path == "/data.json":
            self._send(self.server.data(), "application/json", "default-src 'none'")
        else:
            self.send_error(404)

    def _send(self, body: bytes, kind: str, policy: str) -> None:
        self.send_response(200)
        for name, value in (
            ("Content-Type", kind),
            ("Content-Length", str(len(body))),
            ("Content-Security-Policy", policy),
            ("X-Content-Type-Options", "nosniff"),
            ("Cache-Control", "no-store"),
        ):
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: Any) -> None:
        """Says nothing: the terminal is the user's."""


def serve(runs: Sequence[Recorded], port: int, interval: float, copies: Sequence[Copy] = ()) -> Server:
    """A server that listens; `serve_forever` answers. `copies`: of runs elsewhere, looked at first.

    Raises:
        ConfigError: the port is taken or not allowed.
    """
    try:
        return Server(runs, port, interval, copies)
    except (OSError, OverflowError) as error:
        why = getattr(error, "strerror", None) or str(error).rstrip(".")
        raise ConfigError(f"--port {port}: {why}; choose another, or 0 for any that is free") from None

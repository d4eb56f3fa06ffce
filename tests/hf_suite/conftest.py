"""Around transformers' tests: their marks, no skip without a known reason, and a line per mixer and mode plan."""

from __future__ import annotations

import re
import sys
from collections import defaultdict

import pytest

MARKS = (
    "accelerate_tests", "bitsandbytes", "flash_attn_3_test", "flash_attn_4_test", "flash_attn_all_test",
    "flash_attn_test", "generate", "is_training_test", "not_device_test", "torch_compile_test", "torch_export_test",
)  # fmt: skip


def pytest_configure(config: pytest.Config) -> None:
    for mark in MARKS:  # declared in a file that the distribution leaves out
        config.addinivalue_line("markers", f"{mark}: of transformers")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo):
    report = yield
    if report.skipped and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2].removeprefix("Skipped: ")
        if not any(re.search(known, reason) for known in sys.modules[item.module.__name__].SKIPS):
            report.outcome = "failed"
            report.longrepr = f"skipped, for a reason that is not in SKIPS: {reason}"
    return report


def pytest_terminal_summary(terminalreporter) -> None:
    """Tests per mixer and mode plan; one whose subtests fail has failed."""
    outcomes: dict[str, dict[str, str]] = defaultdict(dict)
    for word in ("passed", "skipped", "xfailed", "failed", "error"):  # the last one counts
        for report in terminalreporter.getreports(word) + (
            terminalreporter.getreports("subtests failed") if word == "failed" else []
        ):
            case = re.search(r"::Test_([^:]+)::", report.nodeid)
            if case:
                outcomes[case[1]][report.nodeid] = word
    for case, tests in sorted(outcomes.items()):
        counts = [f"{list(tests.values()).count(word)} {word}" for word in ("passed", "failed", "xfailed", "skipped")]
        terminalreporter.write_line(f"{case.replace('_', ', plan ')}: {', '.join(counts)}")

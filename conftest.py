"""What every test of the workspace shares: fixed seeds, two threads, and no silent skips in CI."""

from __future__ import annotations

import gc
import os
import random
import signal
from collections.abc import Generator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

# Triton reads this when it is imported, which any test module may do: so it is set first of all.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
# Before anything imports transformers: no test of the default run may reach for the network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# What a shell starts in the background ignores Ctrl-C, and so would all that the tests start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--fail-on-skip",
        action="store_true",
        default=os.environ.get("CI", "").lower() in ("1", "true"),
        help="count skipped tests as failed (the default where CI=true)",
    )


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Where tests run in several processes, those of a file run in one."""
    from support.together import Together

    return Together(config, log)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, Any, Any]:
    """What nobody ran is not green: with --fail-on-skip a skip fails, an expected failure does not."""
    report = yield
    if report.skipped and not hasattr(report, "wasxfail") and item.config.getoption("--fail-on-skip"):
        report.outcome = "failed"
        report.longrepr = f"skipped, which --fail-on-skip counts as failed: {_reason(report.longrepr)}"
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Generator[None, Any, Any]:
    """The same for a whole module that skips itself."""
    report = yield
    if report.outcome == "skipped" and collector.config.getoption("--fail-on-skip"):
        report.outcome = "failed"
        report.longrepr = f"skipped, which --fail-on-skip counts as failed: {_reason(report.longrepr)}"
    return report


def _reason(longrepr: Any) -> str:
    return str(longrepr[2]) if isinstance(longrepr, tuple) else str(longrepr)


@pytest.fixture(autouse=True, scope="session")
def _two_threads() -> None:
    """Small tensors are slower on many threads, and results should not depend on the machine. Where tests run in
    several processes, each has one thread: more would wait for each other."""
    torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)


@pytest.fixture(autouse=True, scope="session")
def _no_tidying() -> Generator[None]:
    """Every engine's start looks for garbage, in all that the tests have imported too, for half of the time it takes,
    and puts aside what is there; an engine's end takes back all that any put aside. In tests each module does it."""
    from mm_core.engine import frontend

    nothing = SimpleNamespace(collect=lambda: 0, freeze=lambda: None, unfreeze=lambda: None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(frontend, "gc", nothing)
        yield
    gc.unfreeze()


@pytest.fixture(autouse=True, scope="module")
def _imported() -> None:
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _seeds() -> None:
    import numpy as np

    random.seed(0)
    np.random.seed(0)
    # For devices that are not there, torch.manual_seed writes down who called it: that takes a millisecond.
    (torch.manual_seed if torch.cuda.is_available() else torch.default_generator.manual_seed)(0)

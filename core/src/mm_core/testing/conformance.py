"""The kit's two doors: a class for pytest, and a function for everybody else."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from mm_core.testing.case import Answer, Case
from mm_core.testing.rungs import RUNGS, Findings, Rung
from mm_core.testing.workbench import Settings, Workbench


class Conformance:
    """Subclass it in a test file, under a name that begins with `Test`; pytest runs every rung on every case.

    cases: what is asked; at least one, the first with media. plugins: modules or objects that are not
    installed; None takes what is. rungs: the names of those to run; all by default.
    max_tokens: of every answer. logits_tolerance: how far log-probabilities may be from the reference's.
    rows_tolerance: the same, relative and absolute, for encoder rows of items packed together.
    distinct_tokens: how many different tokens the reference's answer has at least.
    other_kwargs: `mm_processor_kwargs` that change the features of the first case's media.
    num_blocks: KV blocks of 16 tokens of each engine. device: as in `Engine`.
    """

    cases: ClassVar[Sequence[Case]] = ()
    plugins: ClassVar[Sequence[Any] | None] = None
    rungs: ClassVar[Sequence[str]] = tuple(RUNGS)
    max_tokens: ClassVar[int] = 12
    logits_tolerance: ClassVar[float] = 5e-4
    rows_tolerance: ClassVar[float] = 1e-4
    distinct_tokens: ClassVar[int] = 5
    other_kwargs: ClassVar[Mapping[str, Any] | None] = None
    num_blocks: ClassVar[int] = 256
    device: ClassVar[str] = "auto"
    seed: ClassVar[int] = 0

    _bench: ClassVar[Workbench | None] = None

    def checkpoint(self, directory: Path) -> Path:
        """Write a tiny checkpoint with random weights into an empty directory; gives its path."""
        raise NotImplementedError(f"{type(self).__name__} needs checkpoint(directory).")

    def reference(self, path: Path, case: Case) -> Answer:
        """What the reference answers, greedily, in float32, in at most `max_tokens` tokens."""
        raise NotImplementedError(f"{type(self).__name__} has no reference(path, case).")

    @classmethod
    def ladder(cls) -> list[tuple[Rung, Case]]:
        """Every rung with every case it applies to."""
        has_reference = cls.reference is not Conformance.reference
        pairs = []
        for name in cls.rungs:
            rung = RUNGS[name]
            cases = [case for case in cls.cases if rung.applies(case, has_reference=has_reference)]
            pairs += [(rung, case) for case in (cases[:1] if rung.once else cases)]
        return pairs

    def workbench(self, directory: Path) -> Workbench:
        """What the rungs run on."""
        has_reference = type(self).reference is not Conformance.reference
        settings = Settings(
            cases=self.cases,
            plugins=self.plugins,
            reference=self.reference if has_reference else None,
            max_tokens=self.max_tokens,
            logits_tolerance=self.logits_tolerance,
            rows_tolerance=self.rows_tolerance,
            distinct_tokens=self.distinct_tokens,
            num_blocks=self.num_blocks,
            device=self.device,
            other_kwargs=self.other_kwargs,
            seed=self.seed,
        )
        return Workbench(self.checkpoint(directory), settings)

    # -- what pytest calls; the names are its own

    def pytest_generate_tests(self, metafunc: Any) -> None:
        """One test a rung and case, e.g. `test_rung[chunked-two images]`."""
        if "rung" in metafunc.fixturenames:
            pairs = self.ladder()
            names = [rung.name if rung.once else f"{rung.name}-{case.name}" for rung, case in pairs]
            metafunc.parametrize(("rung", "case"), pairs, ids=names)

    def test_rung(self, rung: Rung, case: Case, tmp_path_factory: Any, record_property: Any) -> None:
        """The rung, on the case. What it found goes into the report's properties."""
        cls = type(self)
        if cls._bench is None:
            cls._bench = self.workbench(tmp_path_factory.mktemp(cls.__name__))
        found = rung.run(cls._bench, case)
        record_property("mm_core.testing", report(cls._bench, rung, case, found))

    @classmethod
    def teardown_class(cls) -> None:
        """End the engines."""
        bench, cls._bench = cls._bench, None
        if bench is not None:
            bench.close()


def report(bench: Workbench, rung: Rung, case: Case, found: Findings) -> dict[str, Any]:
    """What a rung that passed has shown, for a table of results."""
    model = bench.model
    return {
        "family": model.family,
        "architecture": model.checkpoint.architectures[0],
        "modalities": list(model.processor.modalities),
        "limits": dict(getattr(model.processor, "limits", {})),
        "device": model.device.type,
        "rung": rung.name,
        "kinds": list(case.kinds),
        "findings": dict(found),
    }


@dataclass(frozen=True)
class Result:
    """How a rung ended on a case. error: what it raised, or None. findings: see `rungs.Findings`."""

    rung: str
    case: str
    error: BaseException | None = None
    findings: Findings = field(default_factory=dict)


def check_plugin(kit: Conformance, directory: Path | None = None) -> list[Result]:
    """Climb the whole ladder; one result a rung and case, in order. directory: where the checkpoint is written."""
    results = []
    with tempfile.TemporaryDirectory() as temporary:
        bench = kit.workbench(Path(temporary) if directory is None else directory)
        try:
            for rung, case in kit.ladder():
                try:
                    results.append(Result(rung.name, case.name, None, rung.run(bench, case)))
                except Exception as error:
                    results.append(Result(rung.name, case.name, error))
        finally:
            bench.close()
    return results

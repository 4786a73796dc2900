"""What the self-check finds at every site, also where it fails: for those who write adapters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from flowtracer_plugin.attention.adapter import (
    AdapterMismatchError,
    AttentionSite,
    UnsupportedArchitectureError,
)
from flowtracer_plugin.reading.reader import AttentionReader
from flowtracer_plugin.reading.self_check import SiteReport, check_report, report_site, worst

OK = "ok"
SLIGHT = 0.1
"""Smaller differences come from a factor or a term, larger ones from tensors in the wrong place."""

ADVICE = {
    "not found": "`module`, `function`, `occurrence` and `visit` in `sites()`: the module's "
    "`forward` must make that call, on the branch that is taken",
    "read() fails": "the arguments in the line above: they are what the model calls the function "
    "with",
    "does not fit": "the order of the axes: `[batch, head, token, width]`, key heads not repeated",
    "misread": "the order of `query`, `key` and `value`, then `mask` (`True` where a query may "
    "look), `scaling`, `softcap`, `bias`, `sinks`",
    "slightly off": "`scaling`, `softcap`, `bias`, `sinks`",
    "padding": "`mask`: take it from the call, where padding is in it; without one, `causal`",
    "not causal": "the model's configuration, not the adapter: it reads this call rightly",
}
"""Where to look, by verdict. The guide for authors of adapters has the same table."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SiteFinding:
    """What became of one site.

    Attributes:
        site: Where.
        verdict: `"ok"`, or a key of `ADVICE`.
        report: The numbers, if the call could be read.
        problem: What is wrong, in a sentence.
        call: The arguments that the adapter was given, if anything is wrong with them.
    """

    site: AttentionSite
    verdict: str = OK
    report: SiteReport | None = None
    problem: str | None = None
    call: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Diagnosis:
    """What the self-check finds.

    Attributes:
        sites: One finding for each site of the adapter, in its order.
        problem: What is wrong with the run as a whole, in a sentence.
    """

    sites: tuple[SiteFinding, ...]
    problem: str | None

    @property
    def passed(self) -> bool:
        """Whether `wrap` would take the model."""
        return self.problem is None and all(found.verdict == OK for found in self.sites)


def diagnose(reader: AttentionReader) -> Diagnosis:
    """The self-check, carried on after what it finds: one mistake must not hide the others.

    Raises:
        ValueError: The model computes logits that are not finite.
    """
    examination = _Examination(reader)
    problem = examination.run(reader.sites)
    # A site that cannot be found ends the run, so those that it left out get one of their own.
    apart = [site for site in reader.sites if site not in examination.findings]
    for site in apart:
        alone = examination.run([site])
        if site in examination.findings:
            problem = alone or problem
        else:
            examination.findings[site] = [
                SiteFinding(site=site, verdict="not found", problem=alone or problem)
            ]
    findings = tuple(_settled(examination.findings[site], reader) for site in reader.sites)
    if any(found.problem == problem or found.verdict == "not found" for found in findings):
        problem = None  # it has its place
    return Diagnosis(sites=findings, problem=problem)


class _Examination:
    """What runs of the self-check's texts find, by site."""

    def __init__(self, reader: AttentionReader) -> None:
        self.reader = reader
        self.findings: dict[AttentionSite, list[SiteFinding]] = {}

    def run(self, sites: Sequence[AttentionSite]) -> str | None:
        """Look at some sites, on every text; returns what was wrong with a run as a whole."""
        problem = None
        for padding in self.reader.check_padding:
            visible = self.reader.check_text(padding)[1][0]

            def receive(
                site: AttentionSite, args: Any, kwargs: Any, output: Any, seen: Tensor = visible
            ) -> None:
                self.findings.setdefault(site, []).append(
                    self._finding(site, args, kwargs, output, seen)
                )

            try:
                self.reader.probe(sites, receive, padding=padding)
            except (AdapterMismatchError, UnsupportedArchitectureError) as error:
                problem = str(error)
        return problem

    def _finding(
        self, site: AttentionSite, args: Any, kwargs: Any, output: Any, visible: Tensor
    ) -> SiteFinding:
        module = self.reader.model.get_submodule(site.module)
        found = SiteFinding(site=site, call=described(site, args, kwargs))
        try:
            call = self.reader.adapter.read(module, args, kwargs)
        except Exception as error:  # noqa: BLE001 - of an adapter that is being written
            return replace(found, verdict="read() fails", problem=_in_words(error))
        try:
            return replace(found, report=report_site(site, call, output, visible))
        except AdapterMismatchError as error:
            return replace(found, verdict="does not fit", problem=str(error))
        except Exception as error:  # noqa: BLE001 - tensors of any shape stumble in any way
            return replace(found, verdict="does not fit", problem=_in_words(error))


def _settled(findings: Sequence[SiteFinding], reader: AttentionReader) -> SiteFinding:
    """One finding for the several texts: the worst."""
    failed = next((found for found in findings if found.report is None), None)
    if failed is not None:
        return failed
    reports = [found.report for found in findings if found.report is not None]
    report = worst(reports)
    chosen = next(found for found in findings if found.report is report)
    judged = _judged(chosen, report, reader.adapter.name)
    wrong = [not seen.difference <= seen.tolerance for seen in reports]
    return replace(judged, verdict="padding") if any(wrong) and not all(wrong) else judged


def _judged(found: SiteFinding, report: SiteReport, adapter: str) -> SiteFinding:
    try:
        check_report(report, adapter)
    except AdapterMismatchError as error:
        verdict = "slightly off" if report.difference < SLIGHT else "misread"
        return replace(found, verdict=verdict, problem=str(error))
    except UnsupportedArchitectureError as error:
        return replace(found, verdict="not causal", problem=str(error), call=None)
    return replace(found, call=None)


def described(site: AttentionSite, args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
    """A call as one line: the function, and of each argument what it is."""
    given = [*map(_brief, args), *(f"{name}={_brief(value)}" for name, value in kwargs.items())]
    return f"{site.function.rpartition('/')[2]}({', '.join(given)})"


def _brief(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    if isinstance(value, nn.Module) or not isinstance(value, bool | int | float | str | None):
        return type(value).__name__
    return repr(value)


def _in_words(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".partition("\n")[0]

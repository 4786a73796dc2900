"""What the self-check finds at every site, even where it fails: for authors of adapters."""

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
"""Smaller differences come from a wrong factor or term, larger ones from swapped tensors."""

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
    "not causal": "the model's configuration, not the adapter: it reads this call correctly",
}
"""Where to look, by verdict. The guide for authors of adapters has the same table."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SiteFinding:
    """What the self-check found at one site.

    Attributes:
        site: The site.
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
    """What the self-check found.

    Attributes:
        sites: One finding for each site, in the adapter's order.
        problem: What is wrong with the run as a whole, in a sentence.
    """

    sites: tuple[SiteFinding, ...]
    problem: str | None

    @property
    def passed(self) -> bool:
        """Whether `wrap` would take the model."""
        return self.problem is None and all(found.verdict == OK for found in self.sites)


def diagnose(reader: AttentionReader) -> Diagnosis:
    """The findings of the self-check at all sites: it goes on after a mistake, to find the others.

    Raises:
        ValueError: The model computes logits that are not finite.
    """
    examination = _Examination(reader)
    problem = examination.run(reader.sites)
    # A site that cannot be found ends the run, so each site after it gets a run of its own.
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
        problem = None  # a site already names it
    return Diagnosis(sites=findings, problem=problem)


class _Examination:
    """Runs the self-check's texts, and collects findings by site."""

    def __init__(self, reader: AttentionReader) -> None:
        self.reader = reader
        self.findings: dict[AttentionSite, list[SiteFinding]] = {}

    def run(self, sites: Sequence[AttentionSite]) -> str | None:
        """What was wrong with a run as a whole; the findings at `sites` are added, text by text."""
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
        except Exception as error:  # noqa: BLE001 - unfinished adapters raise anything
            return replace(found, verdict="read() fails", problem=_in_words(error))
        try:
            return replace(found, report=report_site(site, call, output, visible))
        except AdapterMismatchError as error:
            return replace(found, verdict="does not fit", problem=str(error))
        except Exception as error:  # noqa: BLE001 - tensors of wrong shapes raise anything
            return replace(found, verdict="does not fit", problem=_in_words(error))


def _settled(findings: Sequence[SiteFinding], reader: AttentionReader) -> SiteFinding:
    """The worst finding at one site, over all texts."""
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
    """A call in one line: the function, and the type and shape of each argument."""
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

"""The old import paths of modules: they still work, and warn with the new path."""

from __future__ import annotations

import warnings
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

PACKAGE = "flowtracer_plugin"

MOVED = {
    "answer_cut": ("text.result_cut",),
    "answers": ("text.answers",),
    "audit_summary": ("audit.summary",),
    "backbone": ("flow.backbone",),
    "contrast": ("comparison.permutation",),
    "contrast_texts": ("comparison.texts",),
    "credit_audit": ("audit.run",),
    "curves": ("evaluation.curves",),
    "cutting": ("model.cutting",),
    "document": ("result.document",),
    "evaluation_report": ("evaluation.outcomes",),
    "faithfulness": ("evaluation.ranked_tokens", "evaluation.scored_example"),
    "graph": ("flow.graph",),
    "interception": ("reading.interface_backend",),
    "knockout": ("evaluation.knockout",),
    "lines_and_edges": ("evaluation.lines_and_edges",),
    "memory": ("trace.memory",),
    "policy_gradient": ("audit.policy_gradient",),
    "protocol_summaries": ("evaluation.summary",),
    "protocols": ("evaluation.protocols",),
    "regeneration": ("evaluation.regeneration",),
    "reward": ("rewards.flow_reward",),
    "river": ("flow.river",),
    "rollouts": ("trace.rollouts",),
    "sampling": ("audit.sampling",),
    "scorers": ("credit.scorers",),
    "scores": ("credit.measures",),
    "spans": ("text.spans",),
    "storage": ("trace.flow_trace", "result.storage", "files"),
    "summaries": ("evaluation.summary",),
    "token_scores": ("credit.token_scores",),
    "tracer": ("trace.tracer",),
    "training": ("grpo.script",),
}
"""For each old module, the new modules that hold its names."""


class MovedModules(MetaPathFinder, Loader):
    """Imports an old path as a module with the names of the modules at the new paths."""

    def find_spec(
        self, fullname: str, path: Any, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The spec of an old path; None for any other path."""
        return ModuleSpec(fullname, self) if _old_path(fullname) in MOVED else None

    def exec_module(self, module: ModuleType) -> None:
        """Fill the module with the names of its new modules."""
        homes = [f"{PACKAGE}.{home}" for home in MOVED[_old_path(module.__name__)]]
        warn(module.__name__, homes[0], level=3)
        for home in reversed(homes):
            held = vars(import_module(home))
            # Not by __getattr__, since nnsight gives every object a method `save`.
            vars(module).update({n: thing for n, thing in held.items() if not n.startswith("__")})


def warn(old: str, new: str, level: int) -> None:
    """Warn that `old` has moved to `new`."""
    message = f"{old} has moved to {new}; the old path will not work in the next release"
    warnings.warn(message, DeprecationWarning, stacklevel=level)


def _old_path(name: str) -> str:
    return name.removeprefix(f"{PACKAGE}.")

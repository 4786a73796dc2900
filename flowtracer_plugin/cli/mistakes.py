"""Messages that tell users of an error in one sentence and say what to do."""

from __future__ import annotations

import re

from flowtracer_plugin.extras import install

MISTAKES = (ValueError, LookupError, TypeError, OSError, RuntimeError, ImportError, MemoryError)
"""Errors that a user can cause. Any other is a bug of this package, and shows its traceback."""

EXTRAS = {
    "gradio": "app",
    "trl": "trl",
    "peft": "trl",
    "datasets": "trl",
    "latex2sympy2_extended": "math",
    "matplotlib": "viz",
    "networkx": "viz",
    "pandas": "viz",
    "pyarrow": "viz",
    "ray": "ray",
}
"""Optional packages, each with the extra that installs it."""

_PYTHON = re.compile(
    r"(?:wrap\(\.\.\., )?\b(mode|layers|question|backend|batch_size|preset|target|rows|edges)="
    r"(['\"]?)([\w:]+)\2\)?"
)
"""How messages of the Python API name options that are also on the command line."""

_BARE = re.compile(r"\b(layers|heads|edges|rows|answer|question|block)=(?=[ ,;]|$)")


def sentence(error: BaseException) -> str:
    """The error's message on one line, in terms of the command line."""
    said = " ".join(str(error).split()) or type(error).__name__
    missing = (getattr(error, "name", None) or "").partition(".")[0]
    if isinstance(error, ModuleNotFoundError) and missing in EXTRAS and "pip install" not in said:
        return f"this needs {missing}; run: {install(EXTRAS[missing])}"
    if _is_out_of_memory(error):
        return (
            "the memory is used up; trace a shorter text or fewer layers (--layers middle:2), with "
            "--mode streamed, --dtype bfloat16 or on another --device; flowtracer estimate shows "
            "how much memory it takes"
        )
    if type(error).__name__ == "AnswerNotFoundError":
        found, _, _ = said.rpartition("; say how to find it")
        return (
            f"{found}; --answer says how to find it, such as last_word, text:ANSWER for the answer "
            "itself, or re:PATTERN; where the model breaks off, --max-new-tokens lets it say more"
        )
    if isinstance(error, KeyError):
        return f"there is no {said}"
    said = re.sub(r"^\[Errno \d+\] ", "", said)
    said = said.replace("wrap(..., verify=False)", "--no-verify")
    said = said.removesuffix(" or a boolean mask with a True").removesuffix(", or a mask")
    said = _BARE.sub(lambda found: f"--{found[1]}", said)
    return _PYTHON.sub(lambda found: f"--{found[1].replace('_', '-')} {found[3]}", said)


def _is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out; `TooLittleMemoryError` comes earlier, with its own advice."""
    said = str(error)
    return (
        type(error) is MemoryError
        or type(error).__name__ == "OutOfMemoryError"
        or (isinstance(error, RuntimeError) and "DefaultCPUAllocator: " in said)
        or (isinstance(error, RuntimeError) and "MPS backend out of memory" in said)
    )

"""The command `flowtracer` with all its subcommands."""

from __future__ import annotations

import re
import sys
from typing import Annotated, Any, Literal

import typer
from typer.core import TyperCommand

from flowtracer_plugin.cli.adapters import adapters_app
from flowtracer_plugin.cli.audit import audit
from flowtracer_plugin.cli.compare import compare
from flowtracer_plugin.cli.evaluate import evaluate
from flowtracer_plugin.cli.mistakes import MISTAKES, sentence
from flowtracer_plugin.cli.options import Traceback
from flowtracer_plugin.cli.outputs import print_table, show
from flowtracer_plugin.cli.parsing import wrong_usage
from flowtracer_plugin.cli.report import report
from flowtracer_plugin.cli.trace_data import trace_data
from flowtracer_plugin.cli.tracing import app as serve_app, demo, estimate, generate, trace

app = typer.Typer(
    help="Find out which tokens carried a language model's answer.\n\n"
    "'flowtracer docs' lists the pages of the documentation; 'flowtracer docs TOPIC' shows one.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def main() -> None:
    """Run the command line.

    A mistake ends with one sentence on stderr and exit code 1, wrong usage with exit code 2, and
    Ctrl-C with exit code 130.
    """
    # Show a question mark for characters that the terminal cannot show, as stderr does by default.
    reconfigure = getattr(sys.stdout, "reconfigure", None)
    if reconfigure:
        reconfigure(errors="replace")
    try:
        app(prog_name="flowtracer")  # the same name for python -m flowtracer_plugin
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except MISTAKES as error:
        if "--traceback" in sys.argv:
            raise
        _say(error)
        raise SystemExit(1) from None


def _say(error: Exception) -> None:
    from rich.console import Console

    console = Console(stderr=True, soft_wrap=True, highlight=False, markup=False)
    console.print(f"error: {sentence(error)}", style="red")
    console.print("(--traceback shows where it arose)")


class ModelFirst(TyperCommand):
    """A command that takes its model as the first argument, or as `--model` like earlier ones."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Move the value of `--model` to the front, and say where surplus texts belong."""
        ctx.allow_extra_args = True
        try:
            left: list[str] = super().parse_args(ctx, _model_first(args))
        except typer.BadParameter as error:
            error.message = error.message.removeprefix("Value error, ")  # typer's, from pydantic
            raise
        if left and not ctx.resilient_parsing:
            raise typer.BadParameter(
                f"found {left[0]!r:.80} where no further text is wanted; a text goes after its "
                "option, in quotes, such as --prompt 'How many?'"
            )
        return left


def _model_first(args: list[str]) -> list[str]:
    """The arguments with the value of `--model`, if there is one, in front."""
    for place, one in enumerate(args):
        name, equals, value = one.partition("=")
        if one == "--":
            break
        if name == "--model" and (equals or place + 1 < len(args)):
            rest = args[place + 1 :] if equals else args[place + 2 :]
            return [value if equals else args[place + 1], *args[:place], *rest]
    return args


def _log(level: str | None) -> str | None:
    """Write what the package does to standard error, from this level on."""
    if level is not None:
        import logging

        logging.basicConfig(format="%(asctime)s %(name)s: %(message)s")
        logging.getLogger("flowtracer_plugin").setLevel(level.upper())
    return level


def _version(wanted: bool) -> bool:
    if not wanted:
        return False
    from flowtracer_plugin import __version__

    typer.echo(f"flowtracer {__version__}")
    raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
    log: Annotated[
        Literal["info", "debug"] | None,
        typer.Option(callback=_log, help="Say on standard error what is done, with times."),
    ] = None,
) -> None:
    pass


# TRL's own parser reads the options; importing TRL only to list them here would take seconds.
def train(
    arguments: Annotated[list[str] | None, typer.Argument(metavar="--OPTION VALUE ...")] = None,
) -> None:
    """Train a model with GRPO and flow credit; its --help shows every option.

    For example:

    flowtracer train Qwen/Qwen3-0.6B --dataset_name data.jsonl --reward_funcs math_answer
    """
    from flowtracer_plugin.grpo.script import main as run

    run(_for_trl([one for one in arguments or () if one != "--traceback"]), prog="flowtracer train")


def _for_trl(arguments: list[str]) -> list[str]:
    """The arguments with TRL's name for the model, which other commands take first or as --model.

    Examples:
        >>> _for_trl(["folder", "--max_steps", "3"])
        ['--model_name_or_path', 'folder', '--max_steps', '3']
    """
    if arguments and not arguments[0].startswith("-"):
        return [_TRL_MODEL, *arguments]
    return [re.sub(r"^--model(?=$|=)", _TRL_MODEL, one) for one in arguments]


_TRL_MODEL = "--model_name_or_path"


def docs(
    topic: Annotated[
        str | None, typer.Argument(help="A page, such as quickstart; by default all are listed.")
    ] = None,
    traceback: Traceback = False,
) -> None:
    """Show a page of the documentation, or list the pages.

    For example:

    flowtracer docs quickstart
    """
    from flowtracer_plugin.report.documentation import page, topics

    if topic is None:
        print_table(("topic", "title"), topics().items())
        return
    with wrong_usage("TOPIC"):
        text = page(topic)
    from rich.markdown import Markdown

    show(Markdown(text, hyperlinks=False))


app.command(cls=ModelFirst)(trace)
app.command(cls=ModelFirst)(generate)
app.command(cls=ModelFirst)(trace_data)
app.command()(report)
app.command()(compare)
app.command(cls=ModelFirst)(evaluate)
app.command(cls=ModelFirst)(audit)
app.command(add_help_option=False, context_settings={"ignore_unknown_options": True})(train)
app.add_typer(adapters_app)
app.command(cls=ModelFirst)(estimate)
app.command(cls=ModelFirst)(serve_app)
app.command()(demo)
app.command()(docs)


if __name__ == "__main__":
    main()

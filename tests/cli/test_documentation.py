from flowtracer_plugin.report.documentation import topics
from tests.cli.command_line import assert_failed


def test_pages_are_listed_and_shown(flowtracer):
    listed = flowtracer("docs")
    assert listed.code == 0, listed.err
    assert [line.split()[0] for line in listed.out.splitlines()[1:] if line] == [*topics()]
    shown = flowtracer("docs", "own_scorers")
    assert shown.code == 0, shown.err
    assert "How to add a scorer" in shown.out
    assert '@needs("flow", "tokens")' in shown.out
    assert "```" not in shown.out


def test_an_unknown_page_is_wrong_usage(flowtracer):
    assert_failed(flowtracer("docs", "nothing"), 2, "Invalid value for TOPIC", "found 'nothing'")


def test_help_names_the_pages(flowtracer):
    assert "'flowtracer docs' lists the pages" in " ".join(flowtracer("--help").out.split())

"""The pages that `flowtracer docs` shows."""

import pytest

from flowtracer_plugin.report.documentation import UnknownTopicError, page, topics
from tests.documents.snippets import ROOT


def test_every_page_with_a_text_of_its_own_is_a_topic():
    written = {path.stem for path in (ROOT / "docs").glob("*.md")}
    assert {*topics(), "api", "command_line", "index"} == {*written, "adapters"}
    assert topics()["credit"] == "Credit for tokens"
    assert page("credit") == page("credit.md") == (ROOT / "docs/credit.md").read_text()
    assert page("adapters") == (ROOT / "adapters/README.md").read_text()


def test_an_unknown_topic_is_answered_with_the_topics():
    with pytest.raises(UnknownTopicError, match=r"wanted ablation, adapters, .*, found 'credits'"):
        page("credits")

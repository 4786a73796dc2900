import pytest

from flowtracer_plugin.report.pages import rollout_index
from flowtracer_plugin.report.pages.rollout_index import RolloutLine, write_rollout_index
from tests.pages import HOSTILE

SETTINGS = {"model": HOSTILE[0], "rows": 9}


def write(path, lines):
    return write_rollout_index(path, lines, title=HOSTILE[0], settings=SETTINGS).read_text("utf-8")


def test_texts_are_escaped(tmp_path):
    lines = [
        RolloutLine(row=row, id=text, prompt=text, answer=text, error=text)
        for row, text in enumerate(HOSTILE)
    ]
    page = write(tmp_path / "index.html", lines)
    # One script, that of the page.
    assert page.count("<script") == page.count("</script>") == 1
    for text in HOSTILE:
        if "<" in text:
            assert text not in page


def test_totals_count_all_and_pages_come_first(tmp_path, monkeypatch):
    monkeypatch.setattr(rollout_index, "LISTED", 3)
    lines = [
        RolloutLine(row=row, id=str(row), correct=[True, False, None][row % 3], error=None)
        for row in range(6)
    ]
    lines[5] = RolloutLine(row=5, id="5", error="no answer", page="pages/00000005.html")
    page = write(tmp_path / "index.html", iter(lines))
    assert "<b>6 of 9</b>" in page
    assert "1 with an error" in page
    assert "2 of 4 answers" in page
    assert "3 of 6 rollouts; the tables hold all" in page
    assert [f'data-value="{row}"' in page for row in range(6)] == [
        True,
        True,
        False,
        False,
        False,
        True,
    ]
    assert page.index('data-value="0"') < page.index('href="pages/00000005.html"')


def test_columns_without_values_are_left_out(tmp_path):
    page = write(tmp_path / "index.html", [RolloutLine(row=1, id="a")])
    assert 'scope="col" data-kind="verdict"' not in page
    assert 'scope="col" data-kind="error"' not in page
    known = [RolloutLine(row=1, id="a", correct=True), RolloutLine(row=2, id="b", error="long")]
    page = write(tmp_path / "index.html", known)
    rows = page[page.index("<thead>") :].split("</tr>")[:3]
    cells = [row.count("<th") + row.count("<td") for row in rows]
    assert cells == [9 + 1, 9, 9]  # with <thead> itself


def test_an_empty_list_is_a_page(tmp_path):
    assert "<b>0 of 9</b>" in write(tmp_path / "index.html", [])


@pytest.mark.browser
def test_the_list_shows_what_is_chosen(visits, tmp_path):
    lines = [
        RolloutLine(row=0, id="0", correct=True, page="pages/00000000.html"),
        RolloutLine(row=1, id="1", correct=False),
        RolloutLine(row=2, id="2", correct=False, page="pages/00000002.html"),
        RolloutLine(row=3, id="3", error="no answer"),
    ]
    page = visits.open(write(tmp_path / "index.html", lines))
    shown = page.locator("#rollouts tbody th:visible")
    for choice, rows in (
        *(("right", "0"), ("wrong", "12"), ("page", "02"), ("error", "3"), ("all", "0123")),
    ):
        page.locator("#shown").select_option(choice)
        assert shown.all_text_contents() == [*rows]

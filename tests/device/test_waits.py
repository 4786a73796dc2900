"""The host waits for the device as often as its budget says, however long the text is."""

import pytest
import torch

import flowtracer_plugin as ft
from benchmarks import tables
from flowtracer_plugin.flow.backbone import Outline
from flowtracer_plugin.flow.streamed import stream_flow
from flowtracer_plugin.flow.substitution import stored
from flowtracer_plugin.result.attention_map import AttentionMap, where_it_is
from tests.device import paths
from tests.device.simulated import placed, simulated
from tests.device.waits import WORK, count
from tests.tiny import PROMPT, RESPONSE

pytestmark = [
    pytest.mark.usefixtures("unchecked"),  # what is checked in all other tests takes long here
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning"),
]


@pytest.mark.parametrize("name", WORK)
def test_the_host_waits_no_more_than_its_budget(name):
    found = count(name)
    assert found.ours <= WORK[name][1], found.places


def test_the_table_of_the_benchmark_shows_these_budgets():
    rows = tables.read("host_waits")["rows"]
    table = {row["case"]["work"]: row["counts"]["most"] for row in rows}
    assert table == {name: most for name, (_, most) in WORK.items()}


@pytest.mark.parametrize("paths_kept", [3])
def test_a_longer_text_needs_no_more_waits(paths_kept):
    found = []
    for tokens in (40, 90):
        attention = torch.rand(tokens, tokens, generator=torch.Generator().manual_seed(0)).tril()
        place = torch.arange(tokens)
        given = [attention / tokens, place < 9, place == tokens - 1]
        with simulated() as waits:
            rows, question, target = (placed(one) for one in given)
            outline = Outline(prompt_length=9, bounds=((0, 9), (9, tokens)))
            # Blocks of 16 tokens: three of them, and six.
            stream_flow(stored(rows), question, target, outline, block=16, paths=paths_kept)
        found.append(len(waits))
    assert found[0] == found[1]


def test_the_map_of_a_trace_stays_on_the_device_until_somebody_reads_it():
    with simulated() as waits:
        tracer = paths.tracer(placed)
        tracer.trace(PROMPT, RESPONSE)  # also checks the model
        waits.clear()
        trace = tracer.trace(PROMPT, RESPONSE)
        kept = where_it_is(trace)
        assert isinstance(kept, torch.Tensor)
        sizes = len(waits)
        assert trace.hubs(3)
        assert trace.steps().steps
        assert where_it_is(trace) is kept  # the backbone was computed where the map is
        later = tracer.trace(PROMPT, RESPONSE)
        assert not isinstance(where_it_is(trace), torch.Tensor)  # made room for the next map
        assert isinstance(where_it_is(later), torch.Tensor)
        assert (later.attention == trace.attention).all()
        assert not isinstance(where_it_is(later), torch.Tensor)
    assert sizes <= 5
    assert isinstance(trace, ft.FlowTrace)


def test_a_pickled_map_is_an_array():
    import pickle

    with simulated():
        held = AttentionMap(placed(torch.eye(3)))
        assert pickle.loads(pickle.dumps(held)).tolist() == torch.eye(3).tolist()

"""The graph in which the row that chose a token leads into it."""

import doctest
import pickle
import re
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st

import flowtracer_plugin as ft
from flowtracer_plugin import UnsupportedArchitectureError, options
from flowtracer_plugin.credit.token_scores import score_text
from flowtracer_plugin.options import FlowOptions, flow_options, preset_of, preset_over
from flowtracer_plugin.reading.edges import deciding_blocks, deciding_rows
from tests.flow import reference
from tests.tiny import tiny_llama, tiny_tokenizer

PROMPT = [1, 7, 9, 4, 8]
SAID = [5, 11, 6, 3, 12, 10, 14, 9, 5, 4]


def shifted_by_hand(attention, visible, response):
    """Row t of a response token is the row of the last visible token before it."""
    found = np.zeros_like(attention)
    for text, token in np.argwhere(response):
        before = [t for t in range(token) if visible[text, t]]
        found[text, token] = attention[text, before[-1]]
    return found


@st.composite
def rollouts(draw):
    batch, tokens = draw(st.integers(1, 3)), draw(st.integers(2, 9))
    rng = np.random.default_rng(draw(st.integers(0, 999)))
    visible = rng.random((batch, tokens)) < 0.8
    attention = np.tril(rng.random((batch, tokens, tokens))) * visible[:, None] * visible[..., None]
    start = draw(st.integers(1, tokens))
    response = visible & (np.arange(tokens) >= start)
    response &= np.cumsum(visible, -1) > 1  # something precedes each
    return attention, visible, response


@given(rollouts())
def test_rows_are_those_of_the_token_before(drawn):
    parts = [torch.from_numpy(part) for part in drawn]
    np.testing.assert_array_equal(deciding_rows(*parts).numpy(), shifted_by_hand(*drawn))


@given(rollouts(), st.integers(1, 4))
def test_blocks_of_rows_are_parts_of_the_whole(drawn, size):
    attention, visible, response = (torch.from_numpy(part) for part in drawn)
    attention, tokens, asked = attention.float(), attention.shape[1], []
    visible[:] = True
    whole = deciding_rows(attention, visible, response)
    prompt = int(torch.cat([response.any(0), torch.ones(1).bool()]).int().argmax())

    def plain(start, stop):
        asked.append(stop)
        return attention[:, start:stop, :stop]

    rows = deciding_blocks(plain, response, prompt)
    for start in range(0, tokens, size):
        stop = min(start + size, tokens)
        assert torch.equal(rows(start, stop), whole[:, start:stop, :stop])
    blocks = [min(start + size, tokens) for start in range(0, tokens, size)]
    assert asked == [stop - 1 for stop in blocks if stop > max(prompt, 1)]  # none of the prompt


@pytest.fixture(scope="module")
def model():
    tokenizer = tiny_tokenizer()
    return tiny_llama(vocab_size=len(tokenizer)), tokenizer


def tracer(model, **options):
    return ft.wrap(*model, answer="last_word", **{"preset": "paper", **options})


def test_the_flow_is_that_of_the_slow_definition(model):
    own = tracer(model, layers="all", edges="value").trace_tokens(PROMPT, SAID)
    trace = tracer(model, preset="decided").trace_tokens(PROMPT, SAID)
    start = len(PROMPT)
    edges = np.zeros_like(own.attention)
    edges[start:] = own.attention[start - 1 : -1] * 0.5
    np.testing.assert_allclose(trace.attention, edges, atol=1e-7)
    wanted = reference.flow(edges, trace.spans.question, trace.spans.target, "origins")
    np.testing.assert_allclose(trace.throughput, wanted["throughput"], atol=1e-6)
    np.testing.assert_allclose(trace.reach, wanted["reach"], atol=1e-6)


@pytest.mark.parametrize("first_token", ["keep", "drop"])
@pytest.mark.parametrize("edges", ["attention", "value"])
def test_streamed_traces_are_equal_to_dense_ones(model, edges, first_token):
    options = {"rows": "decision", "layers": "all", "edges": edges, "first_token": first_token}
    options["damping"] = 0.3 if first_token == "keep" else 1.0
    dense, streamed = (
        tracer(model, mode=mode, block=3, **options).trace_tokens(PROMPT, SAID)
        for mode in ("dense", "streamed")
    )
    np.testing.assert_allclose(streamed.throughput, dense.throughput, atol=1e-5)
    np.testing.assert_allclose(streamed.reach, dense.reach, atol=1e-5)


@pytest.mark.parametrize("mode", ["dense", "streamed"])
def test_tokens_after_the_answer_change_nothing(model, mode):
    """The answer does not depend on them, and influence on them does not count."""
    made = ft.wrap(*model, preset="derivation", mode=mode, answer=re.compile("%(!)"))
    alone = made.trace_tokens(PROMPT, SAID)
    seen = len(PROMPT) + len(SAID)
    for tail in ([6], [8, 12, 7, 11, 13]):
        longer = made.trace_tokens(PROMPT, SAID + tail)
        assert longer.spans.answer.nonzero()[0].tolist() == [seen - 2]
        np.testing.assert_allclose(longer.throughput[:seen], alone.throughput, atol=1e-5)
        np.testing.assert_allclose(longer.reach[:seen], alone.reach, atol=1e-5)
        assert not longer.throughput[seen:].any()


@pytest.mark.parametrize("mode", ["dense", "streamed"])
@pytest.mark.parametrize("preset", ["decided", "derivation"])
def test_padding_and_batching_change_nothing(model, preset, mode):
    traced = tracer(model, preset=preset, mode=mode)
    texts = [(PROMPT, SAID), (PROMPT[:3], SAID[2:]), (PROMPT, [*SAID[:4], 9])]
    width = len(SAID)
    prompts, said = torch.zeros(3, 5, dtype=torch.long), torch.zeros(3, width, dtype=torch.long)
    asked, spoken = torch.zeros_like(prompts), torch.zeros_like(said)
    for row, (prompt, response) in enumerate(texts):
        prompts[row, 5 - len(prompt) :] = torch.tensor(prompt)
        asked[row, 5 - len(prompt) :] = 1
        said[row, : len(response)] = torch.tensor(response)
        spoken[row, : len(response)] = 1
    batch = traced.trace_ids(prompts, said, asked, spoken)
    for row, (prompt, response) in enumerate(texts):
        alone = traced.trace_tokens(prompt, response)
        seen = torch.cat([asked[row], spoken[row]]).bool()
        np.testing.assert_allclose(batch.throughput[row][seen], alone.throughput, atol=1e-5)
        np.testing.assert_allclose(batch.reach[row][seen], alone.reach, atol=1e-5)


def test_one_unit_arrives_and_inflow_equals_outflow(model):
    trace = tracer(model, preset="decided", boundary="absorbing").trace_tokens(PROMPT, SAID)
    target, flow = trace.spans.target, trace.flow
    assert trace.throughput[target].sum() == pytest.approx(1, abs=1e-5)
    inflow = flow.inflow(np.ones_like(target)) + flow.source
    inside = ~target & trace.spans.response
    np.testing.assert_allclose(inflow[inside], trace.throughput[inside], atol=1e-6)


def test_scores_of_the_preset_read_its_layers(model):
    middle = tracer(model, mode="dense")
    text = middle.trace_tokens(PROMPT, SAID)
    own = tracer(model, preset="decided", mode="dense")
    alone = own.trace_tokens(PROMPT, SAID)
    scores = score_text(middle, text, ["flow:decided", "reach:decided"])
    start = len(PROMPT)
    np.testing.assert_allclose(scores["flow:decided"][start:], alone.throughput[start:], atol=1e-6)
    np.testing.assert_allclose(scores["reach:decided"][start:], alone.reach[start:], atol=1e-6)


def test_layers_are_the_presets_where_nobody_chose(model):
    assert tracer(model).layers != tracer(model, preset="decided").layers
    assert tracer(model, preset="decided").options.layers == "all"
    assert tracer(model, preset="decided", layers="late").options.layers == "late"
    assert flow_options("decided").target == "answer"


def test_options_that_contradict_the_default_say_which_preset_allows_them(model):
    with pytest.raises(ValueError, match=r"itself; use target='answer', or preset='decision'"):
        ft.wrap(*model, target="decision")
    with pytest.raises(ValueError, match=r"would move them; use preset='causal'"):
        ft.wrap(*model, edges="causal")
    incapable = without_backward("inference"), tiny_tokenizer()
    asked = ft.wrap(*incapable, edges="influence", answer="last_word")
    with pytest.raises(UnsupportedArchitectureError, match="edges='influence' needs the gradient"):
        asked.trace_tokens(PROMPT, SAID)


@pytest.mark.parametrize(
    ("given", "by_default", "layers"),
    [
        ({}, True, "middle"),
        ({"layers": "all"}, True, "all"),
        ({"first_token": "drop"}, False, "middle"),
        ({"preset": "derivation"}, False, "middle"),
    ],
)
def test_a_tracer_knows_what_was_chosen(model, given, by_default, layers):
    made = pickle.loads(pickle.dumps(ft.wrap(*model, **given)))
    assert made.options.layers == "all"
    assert made.by_default == by_default
    assert preset_over("sharp", made.chosen).layers == layers
    assert preset_over("decided", made.chosen).layers == "all"


def test_rows_and_target_must_not_both_decide():
    with pytest.raises(ValueError, match=r"lead into the answer itself; use target='answer'"):
        FlowOptions(rows="decision", target="decision")
    with pytest.raises(ValueError, match=r"rows must be one of \('own', 'decision'\)"):
        FlowOptions(rows="before")


def test_examples_of_presets():
    result = doctest.testmod(options)
    assert (result.attempted, result.failed) == (4, 0)


def test_flow_passes_tokens_before_the_answer_by_their_reach(model):
    for preset in ("decided", "derivation"):
        trace = tracer(model, preset=preset).trace_tokens(PROMPT, SAID)
        before = np.arange(len(trace.tokens)) < trace.spans.answer.argmax()
        shares = trace.throughput[before] / trace.reach[before]
        np.testing.assert_allclose(shares, shares.mean(), rtol=1e-4)
        jumped = trace.flow.inflow(~trace.spans.response)[trace.spans.target].sum()
        assert trace.reasoning_share == pytest.approx(1 - jumped, abs=1e-5)


def test_inference_mode_changes_nothing(model):
    made = ft.wrap(*model, answer="last_word")
    wanted = made.trace_tokens(PROMPT, SAID)
    with torch.inference_mode():
        np.testing.assert_array_equal(made.trace_tokens(PROMPT, SAID).throughput, wanted.throughput)
        assert ft.wrap(*model, answer="last_word").options == made.options


@pytest.mark.parametrize("backend", ["nnsight", "interface"])
def test_threads_trace_the_same_as_one_thread(model, backend):
    made = ft.wrap(*model, answer="last_word", backend=backend)
    wanted = made.trace_tokens(PROMPT, SAID)
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda _: made.trace_tokens(PROMPT, SAID), range(9)))
    for trace in found:
        np.testing.assert_allclose(trace.throughput, wanted.throughput, atol=1e-6)


@pytest.mark.parametrize("score", ["grad_x_input", "counterfactual", "oar"])
def test_scores_with_passes_of_their_own_wait_for_a_reading(model, score):
    made = ft.wrap(*model, answer="last_word")
    trace = made.trace_tokens(PROMPT, SAID)
    wanted = score_text(made, trace, [score])[score]
    with ThreadPoolExecutor(1) as pool:
        with made.reader.exclusive():
            found = pool.submit(score_text, made, trace, [score])
            with pytest.raises(TimeoutError):
                found.result(timeout=0.3)
        np.testing.assert_array_equal(found.result()[score], wanted)


def test_derivation_is_the_default_where_a_backward_pass_is_possible(model):
    made = ft.wrap(*model, answer="last_word")
    assert made.options == flow_options("derivation", answer="last_word")
    chosen = ft.wrap(*model, answer="last_word", layers="late", damping=0.25)
    assert (chosen.options.layers, chosen.options.damping) == ("late", 0.25)
    assert preset_of(chosen.options) is None


class NoBackward(torch.autograd.Function):
    """The identity, without a gradient, as kernels for inference are."""

    @staticmethod
    def forward(_, value):
        return value.clone()

    @staticmethod
    def backward(*_):
        raise RuntimeError("no kernel for this pass\nfrom deep inside")


def without_backward(why):
    with torch.inference_mode(why == "inference"):
        model = tiny_llama(vocab_size=len(tiny_tokenizer()))
    if why == "backward":
        mlp = model.model.layers[-1].mlp
        mlp.register_forward_hook(lambda _module, _args, output: NoBackward.apply(output))
    if why == "inputs":

        def refuse(*_):
            if torch.is_grad_enabled():
                raise KeyError("pixels")

        model.model.layers[0].register_forward_pre_hook(refuse)
    return model


@pytest.mark.parametrize("why", ["inference", "backward", "inputs"])
def test_a_model_without_a_backward_pass_is_traced_by_the_papers_graph_with_a_warning(why):
    tokenizer, model = tiny_tokenizer(), without_backward(why)
    said = "there is none"
    if why == "backward":
        said = r"pass fails \(RuntimeError: no kernel for this pass\)"
    if why == "inputs":
        said = r"pass fails \(KeyError: 'pixels'\)"
    with pytest.warns(UserWarning, match=f"traced by preset='paper', since .*{said}"):
        made = ft.wrap(model, tokenizer, answer="last_word")
    assert made.options == flow_options("paper", answer="last_word")
    assert made.trace_tokens(PROMPT, SAID).throughput.any()
    with pytest.raises((UnsupportedArchitectureError, RuntimeError, KeyError)):
        tracer((model, tokenizer), preset="derivation").trace_tokens(PROMPT, SAID)


@pytest.mark.parametrize("mode", ["dense", "streamed"])
def test_damping_multiplies_every_edge_and_reach_falls_with_each_hop(model, mode):
    whole, half = (
        tracer(model, mode=mode, damping=damping, block=3).trace_tokens(PROMPT, SAID)
        for damping in (1.0, 0.5)
    )
    edges = tracer(model, mode="dense").trace_tokens(PROMPT, SAID).attention * 0.5
    wanted = reference.flow(edges, half.spans.question, half.spans.target)
    np.testing.assert_allclose(half.reach, wanted["reach"], atol=1e-5)
    np.testing.assert_allclose(half.throughput, wanted["throughput"], atol=1e-5)
    before = ~half.spans.target
    assert (half.reach[before] <= whole.reach[before] / 2 + 1e-6).all()

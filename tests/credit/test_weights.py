"""Credit: the fast weights against a slow definition, on numpy and torch, and their laws."""

import doctest
import math
from fractions import Fraction

import jaxtyping
import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from hypothesis.extra import numpy as hnp

import flowtracer_plugin.credit.weights as credit_module
from flowtracer_plugin.credit.weights import credit_weights, token_credit, top_tokens
from tests.device.gpu import GPU, on_gpu

FRACTIONS = st.sampled_from([0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0])
GAMMAS = st.sampled_from([0.0, 0.5, 1.0, 1.5, 3.0])
NORMALIZATIONS = st.sampled_from(["none", "mean_one"])


@st.composite
def rollouts(draw):
    """Throughput with many ties and zeros, and which tokens count."""
    shape = draw(st.sampled_from([(0,), (1,), (7,), (2, 5), (3, 12), (2, 2, 6)]))
    values = st.sampled_from([0.0, 0.125, 0.25, 0.5]) | st.floats(0, 1, width=32)
    throughput = draw(hnp.arrays(np.float64, shape, elements=values))
    return throughput, draw(hnp.arrays(np.bool_, shape))


def slow_credit(throughput, mask, top_fraction, gamma, normalize):
    """One row: sort the counted tokens, take the first ones, weigh them."""
    counted = [i for i, counts in enumerate(mask) if counts]
    ranked = sorted(counted, key=lambda i: (-throughput[i], i))
    limit = math.ceil(Fraction(str(top_fraction)) * len(counted))
    chosen = [i for i in ranked[:limit] if throughput[i] > 0]
    weights = [0.0] * len(mask)
    for i in counted:
        weights[i] = gamma if i in chosen else 1.0
    mean = sum(weights) / max(len(counted), 1)
    if normalize == "mean_one":
        weights = [w / mean if mean else float(i in counted) for i, w in enumerate(weights)]
    return weights


def rows(*arrays):
    """The rows of several arrays of one shape, side by side."""
    places = np.ndindex(arrays[0].shape[:-1])
    return [tuple(array[place] for array in arrays) for place in places]


def slow(throughput, mask, *options):
    found = [slow_credit(*row, *options) for row in rows(throughput, mask)]
    return np.array(found).reshape(throughput.shape)


@given(rollouts(), FRACTIONS, GAMMAS, NORMALIZATIONS)
def test_numpy_and_torch_agree_with_the_slow_definition(rollout, top_fraction, gamma, normalize):
    throughput, mask = rollout
    options = {"top_fraction": top_fraction, "gamma": gamma, "normalize": normalize}
    wanted = slow(throughput, mask, top_fraction, gamma, normalize)
    np.testing.assert_allclose(token_credit(throughput, mask, **options), wanted, rtol=1e-12)
    found = token_credit(torch.tensor(throughput), torch.tensor(mask), **options)
    np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-12)


@given(rollouts(), FRACTIONS, GAMMAS, NORMALIZATIONS)
def test_float32_chooses_the_same_tokens(rollout, top_fraction, gamma, normalize):
    throughput, mask = rollout
    options = {"top_fraction": top_fraction, "gamma": gamma, "normalize": normalize}
    single = throughput.astype(np.float32)
    wanted = slow(single, mask, top_fraction, gamma, normalize)
    for found in (
        token_credit(single, mask, **options),
        token_credit(torch.tensor(single), torch.tensor(mask), **options).numpy(),
    ):
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, wanted, rtol=1e-6)


@pytest.mark.parametrize("top_fraction", [0.05, 0.1, 0.2, 0.3, 0.4, 0.7])
@pytest.mark.parametrize("make", [np.ones, torch.ones], ids=["numpy", "torch"])
def test_the_limit_is_exact_at_every_length(make, top_fraction):
    """In float32, 0.4 * 55 is more than 22, and its ceiling 23."""
    lengths = range(1, 601)
    mask = np.tri(600, dtype=bool)
    mask = mask if make is np.ones else torch.tensor(mask)
    chosen = top_tokens(make((600, 600)), mask, top_fraction=top_fraction).sum(-1)
    wanted = [math.ceil(Fraction(str(top_fraction)) * n) for n in lengths]
    assert chosen.tolist() == wanted


@given(rollouts(), FRACTIONS)
def test_integer_masks_mean_the_same(rollout, top_fraction):
    throughput, mask = rollout
    wanted = token_credit(throughput, mask, top_fraction=top_fraction)
    assert (token_credit(throughput, mask.astype(int), top_fraction=top_fraction) == wanted).all()
    found = token_credit(
        torch.tensor(throughput), torch.tensor(mask.astype(int)), top_fraction=top_fraction
    )
    assert found.tolist() == wanted.tolist()


@given(st.permutations(range(8)), FRACTIONS, GAMMAS, NORMALIZATIONS)
def test_order_does_not_matter_without_ties(order, top_fraction, gamma, normalize):
    throughput, mask = np.arange(8.0), np.arange(8) != 5
    options = {"top_fraction": top_fraction, "gamma": gamma, "normalize": normalize}
    weights = token_credit(throughput, mask, **options)
    moved = token_credit(throughput[list(order)], mask[list(order)], **options)
    assert moved.tolist() == weights[list(order)].tolist()


@given(rollouts(), FRACTIONS, NORMALIZATIONS)
def test_more_flow_is_never_less_credit(rollout, top_fraction, normalize):
    throughput, mask = rollout
    weights = token_credit(throughput, mask, top_fraction=top_fraction, normalize=normalize)
    for flow, weight, counted in rows(throughput, weights, mask):
        by_flow = weight[counted][np.argsort(flow[counted], kind="stable")]
        strictly = np.diff(np.sort(flow[counted])) > 0
        assert (np.diff(by_flow)[strictly] >= 0).all()


@given(rollouts(), FRACTIONS, GAMMAS)
def test_mean_one_keeps_the_mean_credit_of_every_row(rollout, top_fraction, gamma):
    throughput, mask = rollout
    weights = token_credit(
        throughput, mask, top_fraction=top_fraction, gamma=gamma, normalize="mean_one"
    )
    np.testing.assert_allclose(weights.sum(-1), mask.sum(-1), rtol=1e-12)


@given(rollouts(), FRACTIONS, NORMALIZATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_gamma_one_is_exactly_uniform(dtype, rollout, top_fraction, normalize):
    throughput, mask = (torch.tensor(part) for part in rollout)
    weights = token_credit(
        throughput.to(dtype), mask, top_fraction=top_fraction, gamma=1.0, normalize=normalize
    )
    assert weights.dtype == dtype
    assert torch.equal(weights, mask.to(dtype))


@given(rollouts())
def test_throughput_outside_the_mask_changes_nothing(rollout):
    throughput, mask = rollout
    other = np.where(mask, throughput, 0.9)
    assert (token_credit(throughput, mask) == token_credit(other, mask)).all()


def slow_weights(boost, competing, gamma, normalize):
    """One row: 1 + (gamma - 1) times the boost where a token competes, 1 elsewhere."""
    weights = [
        1 + (gamma - 1) * more if counts else 1.0
        for more, counts in zip(boost, competing, strict=True)
    ]
    counted = [weight for weight, counts in zip(weights, competing, strict=True) if counts]
    if normalize == "none" or not counted:
        return weights
    mean = sum(counted) / len(counted)
    scaled = [weight / mean if mean else 1.0 for weight in weights]
    return [w if counts else 1.0 for w, counts in zip(scaled, competing, strict=True)]


@given(rollouts(), GAMMAS, NORMALIZATIONS)
def test_boosts_become_weights_as_defined(rollout, gamma, normalize):
    boost, competing = rollout
    options = {"gamma": gamma, "normalize": normalize}
    wanted = [slow_weights(*row, gamma, normalize) for row in rows(boost, competing)]
    wanted = np.array(wanted).reshape(boost.shape)
    for kind in (np.float64, np.float32):
        found = credit_weights(boost.astype(kind), competing, **options)
        assert found.dtype == kind
        np.testing.assert_allclose(found, wanted, rtol=1e-5)
        held = torch.tensor(boost.astype(kind)), torch.tensor(competing)
        np.testing.assert_allclose(credit_weights(*held, **options), wanted, rtol=1e-5)


@given(rollouts(), FRACTIONS, st.floats(0, 10), NORMALIZATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_token_credit_is_the_weight_of_the_top_tokens(dtype, rollout, share, gamma, normalize):
    throughput, mask = torch.tensor(rollout[0]).to(dtype), torch.tensor(rollout[1])
    options = {"gamma": gamma, "normalize": normalize}
    chosen = top_tokens(throughput, mask, top_fraction=share)
    weights = credit_weights(chosen.to(dtype), mask, **options)
    found = token_credit(throughput, mask, top_fraction=share, **options)
    assert torch.equal(found, weights.where(mask, 0.0))
    if normalize == "none":
        assert (weights[chosen] == torch.tensor(gamma, dtype=dtype)).all()
        assert (weights[~chosen] == 1).all()


@given(rollouts(), GAMMAS, NORMALIZATIONS)
def test_weights_are_exactly_one_without_a_boost(rollout, gamma, normalize):
    boost, competing = rollout
    for weights in (
        credit_weights(boost, competing, gamma=1.0, normalize=normalize),
        credit_weights(boost * 0, competing, gamma=gamma, normalize=normalize),
        credit_weights(boost, competing, gamma=gamma, normalize=normalize)[~competing],
    ):
        assert (weights == 1).all()


def test_ties_go_to_the_earlier_token():
    for flow in (np.full(5, 0.25), torch.full((5,), 0.25)):
        assert top_tokens(flow, flow == 0.25).tolist() == [True, True, False, False, False]


def test_a_row_without_flow_is_not_reweighted():
    assert token_credit(np.zeros((1, 4)), np.ones((1, 4), bool)).tolist() == [[1.0] * 4]


@pytest.mark.gpu
def test_cuda_agrees_and_stays_on_the_device():
    throughput = torch.rand(4, 300)
    mask = torch.rand(4, 300) > 0.2
    wanted = token_credit(throughput, mask, normalize="mean_one")
    with on_gpu() as place:
        found = token_credit(*place([throughput, mask]), normalize="mean_one")
        assert found.device == GPU
        torch.testing.assert_close(found.cpu(), wanted)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_fraction": 1.1}, "top_fraction must be between 0 and 1, got 1.1"),
        ({"top_fraction": math.nan}, "top_fraction must be between 0 and 1, got nan"),
        ({"gamma": -0.5}, "gamma must be a number of at least 0, got -0.5"),
        ({"gamma": math.inf}, "gamma must be a number of at least 0, got inf"),
        ({"normalize": "mean"}, "normalize must be 'none' or 'mean_one', got 'mean'"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        token_credit(np.ones(3), np.ones(3, bool), **options)
    if "top_fraction" not in options:
        with pytest.raises(ValueError, match=message):
            credit_weights(np.ones(3), np.ones(3, bool), **options)


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -0.1])
@pytest.mark.parametrize("make", [np.array, torch.tensor], ids=["numpy", "torch"])
def test_throughput_that_is_no_flow_is_an_error(make, wrong):
    with pytest.raises(ValueError, match="throughput must be finite and not negative"):
        token_credit(make([0.5, wrong]), make([True, False]))


def test_a_mask_of_another_shape_is_an_error(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # it refuses this first
    with pytest.raises(ValueError, match=r"shape of throughput, \(2, 3\), got \(2, 2\)"):
        top_tokens(np.ones((2, 3)), np.ones((2, 2), bool))


def test_docstring_examples():
    assert doctest.testmod(credit_module).failed == 0


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (np.ma.ones(3, bool), r"mask must not be a masked array; pass mask\.filled\(0\)"),
        ([1, None, 0], "mask must be a numpy array or a torch tensor, got list"),
        (None, "mask must be a numpy array or a torch tensor, got NoneType"),
        (np.array([1, None, 0]), "mask must hold booleans, or 0 and 1, got dtype object"),
        (np.ones(3), "mask must hold booleans, or 0 and 1, got dtype float64"),
        (torch.ones(3, dtype=torch.bool), "of one library, got ndarray and Tensor; convert"),
        (torch.ones(3, dtype=torch.bool, device="meta"), "on the meta device"),
        (torch.ones(3, dtype=torch.bool).to_sparse(), "must not be a sparse tensor"),
    ],
)
def test_a_mask_that_cannot_be_read_is_refused(mask, message):
    throughput = np.array([0.1, 0.6, 0.3])
    for function in (token_credit, top_tokens):
        with pytest.raises(TypeError, match=message):
            function(throughput, mask)
    with pytest.raises(TypeError, match=message.replace("mask ", "competing ").split(";")[0]):
        credit_weights(throughput, mask)


@pytest.mark.usefixtures("unchecked")
def test_throughput_that_cannot_be_read_is_refused():
    for throughput, found in (
        ([0.5, 0.5], "throughput must be a numpy array or a torch tensor, got list"),
        (np.ma.ones(2), "throughput must not be a masked array"),
        (np.array([None, 1.0]), "throughput must hold real numbers, got dtype object"),
    ):
        with pytest.raises(TypeError, match=found):
            token_credit(throughput, np.ones(2, bool))

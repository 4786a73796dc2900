"""Attention matrices, masks and padded batches, and the kinds of array that can hold them."""

import warnings
from dataclasses import dataclass

import numpy as np
import scipy.sparse
import torch
from hypothesis import strategies as st

KINDS = ("numpy", "torch", "scipy", "torch_csr")
DENSE = ("numpy", "torch")
TOLERANCE = {"float64": {"rtol": 1e-9, "atol": 1e-15}, "float32": {"rtol": 1e-5, "atol": 1e-12}}


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """One graph, in float64 and numpy."""

    attention: np.ndarray
    question: np.ndarray
    answer: np.ndarray

    @property
    def parts(self):
        return self.attention, self.question, self.answer


@st.composite
def problems(draw, max_tokens=10):
    """Causal attention of many kinds, whose first token, a question, reaches the answer.

    Rows are flat or peaked softmax rows, edges are missing at random, and rows may be zero or sum
    to less, and rarely to more, than one.
    """
    tokens = draw(st.integers(2, max_tokens))
    sharpness = draw(st.sampled_from([0.3, 3.0, 12.0]))
    missing = draw(st.sampled_from([0.0, 0.5, 0.9]))
    rows = draw(st.sampled_from([(1.0, 1.0), (0.1, 1.0), (0.0, 3.0)]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    attention = np.tril(np.exp(sharpness * rng.normal(size=(tokens, tokens))))
    attention /= attention.sum(1, keepdims=True)
    attention *= rng.uniform(*rows, size=(tokens, 1)) * (rng.random((tokens, 1)) > missing / 4)
    attention *= rng.random((tokens, tokens)) >= missing
    border = draw(st.integers(1, tokens - 1))
    question = (rng.random(tokens) < 0.6) & (np.arange(tokens) < border)
    answer = (rng.random(tokens) < 0.4) & (np.arange(tokens) >= border)
    question[0] = answer[-1] = True
    attention[-1] *= 0.9
    attention[-1, 0] += 0.1
    # rounded, so that float64 and the slow definition use the same numbers as float32
    attention = attention.astype(np.float32).astype(np.float64)
    return Problem(attention=attention, question=question, answer=answer)


def substochastic(problem):
    """The same graph with rows that sum to at most one, as attention does."""
    sums = np.maximum(problem.attention.sum(1, keepdims=True), 1.0)
    return Problem(
        attention=problem.attention / sums, question=problem.question, answer=problem.answer
    )


def padded(problem, left, right):
    """The same graph between padding tokens, which have no attention in either direction."""
    return Problem(
        attention=np.pad(problem.attention, (left, right)),
        question=np.pad(problem.question, (left, right)),
        answer=np.pad(problem.answer, (left, right)),
    )


@st.composite
def batches(draw):
    """Graphs of several lengths, and the same graphs padded on both sides to one length."""
    alone = draw(st.lists(problems(), min_size=1, max_size=4))
    length = max(len(one.question) for one in alone) + draw(st.integers(0, 2))
    spare = [length - len(one.question) for one in alone]
    left = [draw(st.integers(0, most)) for most in spare]
    return (
        alone,
        left,
        [
            padded(one, start, most - start)
            for one, start, most in zip(alone, left, spare, strict=True)
        ],
    )


def held_as(kind, array, dtype="float64"):
    """A numpy array as an array of this kind; masks and batches stay dense."""
    array = np.asarray(array)
    if array.dtype != bool:
        array = array.astype(dtype)
    if kind.startswith("torch"):
        array = torch.from_numpy(array.copy())
    if array.dtype in (bool, torch.bool) or kind in DENSE:
        return array
    if kind == "scipy":
        return scipy.sparse.csr_array(array)
    with warnings.catch_warnings():  # torch calls the layout beta, once per process
        warnings.simplefilter("ignore")
        return array.to_sparse_csr()


def given_as(kind, problem, dtype="float64"):
    """Attention and masks as arrays of this kind."""
    return tuple(held_as(kind, part, dtype) for part in problem.parts)


def stack_as(kind, matrices, dtype="float64"):
    """The attention of a batch: dense kinds are stacked, sparse ones listed."""
    if kind in DENSE:
        return held_as(kind, np.stack(matrices), dtype)
    return [held_as(kind, matrix, dtype) for matrix in matrices]


def batch_as(kind, rows, dtype="float64"):
    """Attention and masks of a batch."""
    masks = zip(*(row.parts[1:] for row in rows), strict=True)
    attention = stack_as(kind, [row.attention for row in rows], dtype)
    return attention, *(held_as(kind, np.stack(part)) for part in masks)


def dense(array):
    """Any kind of array as a numpy array; a tuple is stacked."""
    if isinstance(array, tuple):
        return np.stack([dense(one) for one in array])
    if isinstance(array, torch.Tensor):
        return array.to_dense().cpu().numpy()
    return array.toarray() if scipy.sparse.issparse(array) else np.asarray(array)

"""Random controls for scorers; their draws depend on nothing but the rollout's own tokens."""

from __future__ import annotations

from hashlib import blake2b

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

POSITION_BINS = 10


def row_draws(
    ids: Int[Tensor, "batch token"],
    visible: Bool[Tensor, "batch token"],
    prompt_length: int,
    seed: int,
) -> Float[Tensor, "batch completion"]:
    """Uniform random numbers in (0, 1] for the visible completion tokens, 1 elsewhere.

    The numbers of a row depend on `seed` and its visible ids alone, not on padding, other rows, the
    device or a global random state, which stays as it is. Ids and masks are copied to the host,
    where a generator draws for one row at a time.
    """
    tokens, seen = ids.to("cpu", torch.int64), visible.cpu()
    draws = torch.ones(ids.shape[0], ids.shape[1] - prompt_length, device="cpu")
    for row, shown in enumerate(seen):
        generator = row_generator(tokens[row, shown], seed)
        said = shown[prompt_length:]
        drawn = torch.rand(int(said.sum()), generator=generator, device="cpu")
        draws[row, said] = 1 - drawn
    return draws.to(ids.device)


def row_generator(tokens: Int[Tensor, " token"], seed: int) -> torch.Generator:
    """A generator whose draws depend on the seed and on the tokens of a row alone."""
    return torch.Generator("cpu").manual_seed(_row_seed(tokens, seed))


def _row_seed(tokens: Int[Tensor, " token"], seed: int) -> int:
    """A number of 63 bits; `hash` would give another number in every process."""
    digest = blake2b(f"{seed}:".encode() + tokens.numpy().astype("<i8").tobytes(), digest_size=8)
    return int.from_bytes(digest.digest(), "little") >> 1


def role_and_position(
    competing: Bool[Tensor, "batch completion"], answer: Bool[Tensor, "batch completion"]
) -> Int[Tensor, "batch completion"]:
    """The bin number of each token: whether it is in the answer, times its tenth of the row.

    Among `n` competing tokens, the token with `r` before it is in tenth `⌊10 r / n⌋`. Tokens that
    do not compete share another bin.

    Examples:
        >>> competing = torch.tensor([[True, True, False, True, True]])
        >>> role_and_position(competing, torch.tensor([[False] * 4 + [True]])).tolist()
        [[0, 2, 20, 5, 17]]
    """
    before = competing.cumsum(-1) - competing.long()
    tenth = POSITION_BINS * before // competing.sum(-1, keepdim=True).clamp_min(1)
    return torch.where(competing, tenth + POSITION_BINS * answer.long(), 2 * POSITION_BINS)


def permute_within(
    bins: Int[Tensor, "batch completion"],
    values: Shaped[Tensor, "batch completion"],
    draws: Float[Tensor, "batch completion"],
) -> Shaped[Tensor, "batch completion"]:
    """The values, for example a mask, permuted inside every bin in the order of the draws.

    With independent uniform draws every permutation of a bin is equally likely.
    """
    in_order = bins.argsort(dim=-1, stable=True)
    by_draw = draws.argsort(dim=-1, stable=True)
    shuffled = by_draw.gather(-1, bins.gather(-1, by_draw).argsort(dim=-1, stable=True))
    return torch.zeros_like(values).scatter(-1, shuffled, values.gather(-1, in_order))

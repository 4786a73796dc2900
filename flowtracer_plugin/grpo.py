"""TRL: GRPO that gives the tokens which carried the answer more of the credit, and a flow reward.

`GRPOTrainer` gives every token of a completion the same advantage. Here an extra forward pass,
which ends after the traced layers, measures what flowed through each token, and the advantages
become one number per token: paper section 4. Uniform credit trains bit-identically to plain GRPO.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from flowtracer_plugin._trl_version import check_trl

check_trl()

# ruff: noqa: E402 (TRL may be imported only now)
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.grpo_trainer import GRPOTrainer
from trl.trainer.utils import get_config_model_id

from flowtracer_plugin._grpo_checks import UnsupportedTrainerError, check_host, check_level
from flowtracer_plugin._grpo_credit import CreditOptions, FlowCredit
from flowtracer_plugin.answers import AnswerFinder
from flowtracer_plugin.reward import FlowReward

__all__ = [
    "CreditOptions",
    "FlowCreditMixin",
    "FlowGRPOConfig",
    "FlowGRPOTrainer",
    "FlowReward",
    "UnsupportedTrainerError",
    "attach_flow_credit",
]


@dataclass
class FlowGRPOConfig(GRPOConfig):
    """Configuration class for the [`FlowGRPOTrainer`].

    It inherits every parameter from [`~trl.GRPOConfig`] and adds those of the flow credit. The
    defaults are the paper's.

    Parameters:
        flow_top_fraction (`float`, *optional*, defaults to `0.4`):
            Share of the tokens of each completion that get more credit: those that carry the most
            flow.
        flow_gamma (`float`, *optional*, defaults to `1.5`):
            Factor on the advantage of these tokens. With `1.0` the training is that of plain GRPO.
        flow_layers (`str`, *optional*, defaults to `"middle"`):
            Attention layers that are averaged: `"middle"`, `"early"`, `"late"`, `"all"`, or such a
            name with a number, as in `"middle:5"` for five evenly spaced ones.
        flow_answer (`str`, *optional*, defaults to `"auto"`):
            Name of the answer finder, a key of `flowtracer_plugin.answers.FINDERS`, or `"auto"`. A
            pattern or a function of your own goes to [`attach_flow_credit`].
        flow_target (`str`, *optional*, defaults to `"answer"`):
            Where flow ends: at the rows of the `"answer"` tokens, or at those of the `"decision"`,
            the tokens before them, whose logits choose them.
        flow_sign (`str`, *optional*, defaults to `"both"`):
            Which advantages are reweighted: `"both"`, `"positive"` or `"negative"`.
        flow_normalize (`str`, *optional*, defaults to `"none"`):
            `"mean_one"` divides the weights of a completion by their mean, so that the learning
            rate keeps its meaning. The paper does not (`"none"`): its weights have a mean of 1.2.
        flow_no_answer (`str`, *optional*, defaults to `"uniform"`):
            What happens to completions without an answer: weight 1 (`"uniform"`), an error
            (`"raise"`), or the last token that is not special counts as the answer (`"last"`).
    """

    flow_top_fraction: float = field(
        default=0.4,
        metadata={"help": "Share of the tokens of each completion that get more credit."},
    )
    flow_gamma: float = field(
        default=1.5,
        metadata={"help": "Factor on the advantage of the tokens that carry the most flow."},
    )
    flow_layers: str = field(
        default="middle",
        metadata={
            "help": "Attention layers that are averaged: middle, early, late, all, middle:5."
        },
    )
    flow_answer: str = field(
        default="auto", metadata={"help": "Name of the answer finder, such as auto or boxed."}
    )
    flow_target: str = field(
        default="answer", metadata={"help": "Where flow ends: answer or decision."}
    )
    flow_sign: str = field(
        default="both",
        metadata={"help": "Which advantages are reweighted: both, positive or negative."},
    )
    flow_normalize: str = field(
        default="none",
        metadata={"help": "mean_one keeps the mean weight of each completion at 1, none does not."},
    )
    flow_no_answer: str = field(
        default="uniform",
        metadata={"help": "Completions without an answer: uniform, raise or last."},
    )

    def __post_init__(self) -> None:
        """Refuse what would not train, before a model is loaded.

        Raises:
            ValueError: An option is out of range, or importance sampling is not per token.
        """
        super().__post_init__()  # type: ignore[no-untyped-call]
        self.credit_options()
        check_level(self.importance_sampling_level)

    def credit_options(self) -> CreditOptions:
        """The `flow_` parameters."""
        names = [option.name for option in fields(CreditOptions)]
        return CreditOptions(**{name: getattr(self, f"flow_{name}") for name in names})


class FlowCreditMixin:
    """Flow credit for a subclass of `GRPOTrainer`: `class Mine(FlowCreditMixin, MyTrainer)`.

    Its `args` must be a `FlowGRPOConfig`. Raises as `FlowCredit` does.
    """

    args: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        check_host(type(self))
        super().__init__(*args, **kwargs)
        if not isinstance(self.args, FlowGRPOConfig):
            found = type(self.args).__name__
            raise TypeError(f"{type(self).__name__} needs args=FlowGRPOConfig(...), got {found}")
        self._flow_credit = FlowCredit(self, self.args.credit_options())

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        rollouts = super()._generate_and_score_completions(inputs)  # type: ignore[misc]
        return self._flow_credit.spread(rollouts)


class FlowGRPOTrainer(FlowCreditMixin, GRPOTrainer):
    """GRPO in which the tokens that carried the answer get more of the credit.

    It takes what [`~trl.GRPOTrainer`] takes, with a [`FlowGRPOConfig`] as `args`. It logs
    `flow/answer_found` (share of completions with an answer), `flow/weight_mean`, `flow/top_share`
    (share of a completion's flow that its top tokens carry), `flow/reasoning_share` (share of the
    flow that enters the completion at a token other than the answer) and `flow/seconds`.
    """

    _tag_names = ["trl", "grpo", "flowtracer"]  # noqa: RUF012 - TRL's own form
    _name = "FlowTracer GRPO"
    _paper = {  # noqa: RUF012
        "title": "How Does Reasoning Flow? Tracing Attention-Induced Information Flow for Targeted "
        "RL in LLMs",
        "id": "2606.10646",
    }

    def __init__(
        self, model: Any, reward_funcs: Any, args: FlowGRPOConfig | None = None, **kwargs: Any
    ) -> None:
        if args is None:
            name = model if isinstance(model, str) else get_config_model_id(model.config)
            args = FlowGRPOConfig(f"{name.split('/')[-1]}-FlowGRPO")
        super().__init__(model, reward_funcs, args=args, **kwargs)


def attach_flow_credit(
    trainer: Any,
    *,
    top_fraction: float = 0.4,
    gamma: float = 1.5,
    layers: str | Sequence[int] = "middle",
    answer: AnswerFinder = "auto",
    target: str = "answer",
    sign: str = "both",
    normalize: str = "none",
    no_answer: str = "uniform",
) -> Any:
    """Give a `GRPOTrainer` that somebody else built flow credit, and return it.

    Options are those of `FlowGRPOConfig`; `layers` may be numbers, and `answer` a pattern or a
    function. Call it on every process, before training.

    Raises:
        ValueError: As `FlowCredit`; and if the trainer has flow credit already.
        UnsupportedTrainerError, ImportError, NoAttentionError: As `FlowCredit`.
    """
    check_host(type(trainer))
    if "_flow_credit" in vars(trainer):
        raise ValueError("this trainer has flow credit already; attach it once, to a plain trainer")
    options = CreditOptions(
        top_fraction=top_fraction,
        gamma=gamma,
        layers=layers,
        answer=answer,
        target=target,
        sign=sign,
        normalize=normalize,
        no_answer=no_answer,
    )
    credit, generate = FlowCredit(trainer, options), trainer._generate_and_score_completions
    trainer._generate_and_score_completions = lambda inputs: credit.spread(generate(inputs))
    trainer._flow_credit = credit
    return trainer

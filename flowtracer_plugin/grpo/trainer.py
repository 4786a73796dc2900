"""TRL: GRPO that gives the tokens which carried the answer more of the credit, and a flow reward.

`GRPOTrainer` gives every token of a completion the same advantage. Here attention is read in the
forward pass that trains, or in one that TRL makes before, and the advantages become one number per
token: paper section 4. Uniform credit trains bit-identically to plain GRPO.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any

from flowtracer_plugin.grpo.trl_version import check_trl

check_trl()

# ruff: noqa: E402 (TRL may be imported only now)
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.grpo_trainer import GRPOTrainer
from trl.trainer.utils import get_config_model_id

from flowtracer_plugin.credit.scorers import SCORERS
from flowtracer_plugin.grpo.checks import UnsupportedTrainerError, check_host, check_level
from flowtracer_plugin.grpo.hooks import FlowCredit
from flowtracer_plugin.grpo.options import CreditOptions
from flowtracer_plugin.rewards.flow_reward import FlowReward

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
        flow_layers (`str`, *optional*, defaults to `"auto"`):
            Attention layers that are averaged: `"middle"`, `"early"`, `"late"`, `"all"`, or such a
            name with a number, as in `"middle:5"` for five evenly spaced ones. `"auto"` is what the
            scorer was published with: `"middle"`, and `"middle:5"` for the predecessor's.
        flow_answer (`str`, *optional*, defaults to `"auto"`):
            Name of the answer finder, a key of `flowtracer_plugin.text.FINDERS`, or `"auto"`. A
            pattern or a function of your own goes to [`attach_flow_credit`].
        flow_target (`str`, *optional*):
            Where flow ends: at the rows of the `"answer"` tokens, or at those of the `"decision"`,
            the tokens before them, whose logits choose them. By default as the scorer's preset
            says, and without one at the answer.
        flow_sign (`str`, *optional*, defaults to `"both"`):
            Which advantages are reweighted: `"both"`, `"positive"` or `"negative"`.
        flow_normalize (`str`, *optional*, defaults to `"none"`):
            `"mean_one"` divides the weights of a completion by their mean, so that the learning
            rate keeps its meaning. The paper does not (`"none"`): its weights have a mean of 1.2.
        flow_no_answer (`str`, *optional*, defaults to `"uniform"`):
            What happens to completions without an answer: weight 1 (`"uniform"`), an error
            (`"raise"`), or the last token that is not special counts as the answer (`"last"`).
        flow_scorer (`str`, *optional*, defaults to `"flow"`):
            What the tokens are chosen by. `"flow"` is FlowTracer. `"waad"`, `"fai"` and `"coupled"`
            are its predecessor's (arXiv 2510.13554); `"attention"` is what the answer pays to them
            directly; `"entropy"` is the policy's; `"random"` is chance. `"shuffled"` is the flow's
            choice, permuted among tokens of like role and position: if it trains as well as
            `"flow"`, flow itself is not what helps. `"uniform"` is plain GRPO. `"flow:sharp"` and
            `"flow:decision"` read the graph by another preset, and `"flow*entropy"` multiplies two
            scores; `docs/credit.md` lists all of them.
        flow_side (`str`, *optional*, defaults to `"top"`):
            `"bottom"` chooses as many tokens, of those with the lowest scores: a control.
        flow_oracle (`str`, *optional*):
            For `flow_scorer="oracle"`: a pattern that matches, in a completion, what matters there;
            its groups if it has any. A function of your own goes to [`attach_flow_credit`].
        flow_pass (`str`, *optional*, defaults to `"auto"`):
            Which forward pass is read. `"training"` is the one that trains; `"scoring"` is TRL's
            own over the rollouts, which it makes for `num_iterations > 1`, misaligned accumulation
            and vLLM's correction; `"auto"` is the scoring pass where there is one, else the
            training pass. `"extra"` is a pass of its own without dropout, up to the last layer that
            counts: the paper's way, which costs time.
        flow_start_step (`int`, *optional*, defaults to `0`):
            Optimizer step before which credit is plain, and nothing is read.
        flow_warmup_steps (`int`, *optional*, defaults to `0`):
            Optimizer steps over which the factor rises from 1 to `flow_gamma`.
        flow_on_error (`str`, *optional*, defaults to `"raise"`):
            What happens if flow cannot be read or solved for some rollouts: an error (`"raise"`),
            or plain credit for them (`"uniform"`), counted in the metric `flow/errors`.
        flow_page_steps (`int`, *optional*, defaults to `100`):
            With the first generation after so many optimizer steps, a page of one prompt's
            completions is written to the folder `flow` below `output_dir`; never with `0`.
        flow_page_limit_mb (`float`, *optional*, defaults to `50.0`):
            What these pages may take together; the oldest go first.
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
        default="auto",
        metadata={
            "help": "Attention layers that are averaged: auto, middle, early, late, all, middle:5."
        },
    )
    flow_answer: str = field(
        default="auto", metadata={"help": "Name of the answer finder, such as auto or boxed."}
    )
    flow_target: str | None = field(
        default=None, metadata={"help": "Where flow ends: answer or decision."}
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
    flow_scorer: str = field(
        default="flow",
        metadata={
            "help": f"What the tokens are chosen by: {', '.join(SCORERS)}; of those that read the "
            "graph also with a preset, as flow:sharp; and products, as flow*entropy."
        },
    )
    flow_side: str = field(
        default="top", metadata={"help": "Choose the top of the scores, or the bottom."}
    )
    flow_oracle: str | None = field(
        default=None, metadata={"help": "Pattern of what matters, for the scorer oracle."}
    )
    flow_pass: str = field(
        default="auto",
        metadata={"help": "Which forward pass is read: auto, training, scoring or extra."},
    )
    flow_start_step: int = field(
        default=0, metadata={"help": "Optimizer step before which credit is plain."}
    )
    flow_warmup_steps: int = field(
        default=0, metadata={"help": "Optimizer steps over which the factor rises to flow_gamma."}
    )
    flow_on_error: str = field(
        default="raise",
        metadata={"help": "If flow cannot be read or solved: raise, or uniform for plain credit."},
    )
    flow_page_steps: int = field(
        default=100,
        metadata={"help": "Every so many steps, a page of one prompt's completions; 0 for none."},
    )
    flow_page_limit_mb: float = field(
        default=50.0, metadata={"help": "What these pages may take together; the oldest go first."}
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
        # A field cannot be called `pass`.
        return CreditOptions(**{name: getattr(self, f"flow_{name.rstrip('_')}") for name in names})


class FlowCreditMixin:
    """Flow credit for a subclass of `GRPOTrainer`: `class Mine(FlowCreditMixin, MyTrainer)`.

    Its `args` must be a `FlowGRPOConfig`. Raises as `FlowCredit` does.
    """

    args: Any
    _flow_credit: FlowCredit

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        check_host(type(self))
        super().__init__(*args, **kwargs)
        if not isinstance(self.args, FlowGRPOConfig):
            found = type(self.args).__name__
            raise TypeError(f"{type(self).__name__} needs args=FlowGRPOConfig(...), got {found}")
        self._flow_credit = FlowCredit(self, self.args.credit_options())

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        generate = super()._generate_and_score_completions  # type: ignore[misc]
        return self._flow_credit.generation(generate, inputs)

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
        forward = super()._get_per_token_logps_and_entropies  # type: ignore[misc]
        return self._flow_credit.forward(forward, *args, **kwargs)

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Any:
        compute = super()._compute_loss  # type: ignore[misc]
        if "_flow_credit" not in vars(self):  # the check of the trainer asks for a loss before
            return compute(model, inputs)
        return self._flow_credit.loss(compute, model, inputs)


class FlowGRPOTrainer(FlowCreditMixin, GRPOTrainer):
    """GRPO in which the tokens that carried the answer get more of the credit.

    It takes what [`~trl.GRPOTrainer`] takes, with a [`FlowGRPOConfig`] as `args`. It logs

    * `flow/answer_found`: share of the completions with an answer;
    * `flow/weight_mean`: of the tokens that the model chose;
    * `flow/top_share`: share of a completion's flow that the chosen tokens hold;
    * `flow/entropy`: how evenly it is spread over the tokens, from 0 to 1;
    * `flow/prompt_jump`: share of it that goes from the prompt straight to the answer;
    * `flow/seconds`: that credit took for a batch, beside the forward pass it was read in;
    * `flow/errors`: how many batches have failed so far, with `flow_on_error="uniform"`.

    With `log_completions`, TRL's table has the columns `flow_answer`, `flow_weight` and
    `flow_prompt_jump`.
    """

    _tag_names = ["trl", "grpo", "flowtracer"]  # noqa: RUF012 - TRL's own form
    _name = "FlowTracer GRPO"
    _paper = {  # noqa: RUF012
        "title": "How Does Reasoning Flow? Tracing Attention-Induced Information Flow for Targeted "
        "RL in LLMs",
        "id": "2606.10646",
    }

    def __init__(
        self,
        model: Any,
        reward_funcs: Any = None,
        args: FlowGRPOConfig | None = None,
        *others: Any,
        **kwargs: Any,
    ) -> None:
        if args is None:
            name = model if isinstance(model, str) else get_config_model_id(model.config)
            args = FlowGRPOConfig(f"{name.split('/')[-1]}-FlowGRPO")
        super().__init__(model, reward_funcs, args, *others, **kwargs)


def attach_flow_credit(trainer: Any, options: CreditOptions | None = None) -> Any:
    """Give a `GRPOTrainer` that somebody else built flow credit, and return it.

    `CreditOptions` are those of `FlowGRPOConfig`, without `flow_`; here `layers` may be numbers,
    and `answer` a pattern or a function. Call it on every process, before training.

    Raises:
        ValueError: As `FlowCredit`; and if the trainer has flow credit already.
        UnsupportedTrainerError, ImportError, NoAttentionError: As `FlowCredit`.
    """
    check_host(type(trainer))
    if "_flow_credit" in vars(trainer):
        raise ValueError("this trainer has flow credit already; attach it once, to a plain trainer")
    credit = FlowCredit(trainer, CreditOptions() if options is None else options)
    around: dict[str, Callable[..., Any]] = {
        "_generate_and_score_completions": credit.generation,
        "_get_per_token_logps_and_entropies": credit.forward,
        "_compute_loss": credit.loss,
    }
    for name, method in around.items():
        setattr(trainer, name, partial(method, getattr(trainer, name)))
    trainer._flow_credit = credit
    return trainer

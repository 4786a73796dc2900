"""GRPO in TRL with more credit for the tokens that carried the answer (paper, section 4).

`GRPOTrainer` gives every token of a completion the same advantage. `FlowGRPOTrainer` reads the
attention in the forward pass that trains, or in TRL's own scoring pass, and multiplies the
advantage of each token by its weight. Uniform credit trains bit-identically to plain GRPO.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

from flowtracer_plugin.grpo.trl_version import check_trl

check_trl()

# ruff: noqa: E402 (TRL may be imported only now)
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.grpo_trainer import GRPOTrainer
from trl.trainer.utils import get_config_model_id

from flowtracer_plugin.credit.own_scorers import function_scorer
from flowtracer_plugin.grpo.checks import UnsupportedTrainerError, check_host, check_level
from flowtracer_plugin.grpo.hooks import FlowCredit
from flowtracer_plugin.grpo.options import CreditOptions, documented
from flowtracer_plugin.grpo.settings import settings_line
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


_DEFAULTS = {option.name: option.default for option in fields(CreditOptions)}


@dataclass
class FlowGRPOConfig(GRPOConfig):
    """Configuration class for the [`FlowGRPOTrainer`].

    It has every parameter of [`~trl.GRPOConfig`] and those of flow credit, whose defaults are the
    paper's.

    Parameters:
        flow_top_fraction (`float`, *optional*, defaults to `0.4`):
            Share of the tokens of each completion that get more credit: those with the highest
            scores.
        flow_gamma (`float`, *optional*, defaults to `1.5`):
            Factor on the advantage of these tokens. `1.0` is plain GRPO.
        flow_layers (`str`, *optional*, defaults to `"auto"`):
            Attention layers that are averaged: `"middle"`, `"early"`, `"late"`, `"all"`, or one of
            these names with a number: `"middle:5"` takes five evenly spaced layers. `"auto"` takes
            the layers that the scorer was published with: `"middle"`, or `"middle:5"` for the
            scorers of the predecessor paper.
        flow_answer (`str`, *optional*, defaults to `"auto"`):
            Name of the answer finder: `"auto"` or a key of `flowtracer_plugin.text.FINDERS`. Pass a
            pattern or a function to [`attach_flow_credit`] instead.
        flow_target (`str`, *optional*):
            Where flow ends: `"answer"` for the rows of the answer tokens, `"decision"` for the rows
            before them, whose logits choose the answer. By default, the scorer's preset decides;
            without a preset it is `"answer"`.
        flow_sign (`str`, *optional*, defaults to `"both"`):
            Which advantages are reweighted: `"both"`, `"positive"` or `"negative"`.
        flow_normalize (`str`, *optional*, defaults to `"none"`):
            `"mean_one"` divides the weights of a completion by their mean, so that the learning
            rate keeps its meaning. `"none"` does not, as in the paper, where the mean is 1.2.
        flow_no_answer (`str`, *optional*, defaults to `"uniform"`):
            What to do with a completion without an answer: give its tokens weight 1 (`"uniform"`),
            raise an error (`"raise"`), or take its last token as the answer (`"last"`).
        flow_scorer (`str`, *optional*, defaults to `"flow"`):
            Score by which tokens are chosen: `"flow"` is FlowTracer; `"reach"` is the influence on
            the answer; `"waad"`, `"fai"` and `"coupled"` are those of its predecessor (arXiv
            2510.13554); `"attention"`, `"attention_power"` and `"rollout"` are the answer's
            attention in one hop, in two hops and through all layers; `"grad_x_input"` is a
            gradient, `"oar"` that of arXiv 2601.07408, and `"counterfactual"` the exact effect of
            swapping a token; `"causal"` and `"flow:causal"` hide what they choose, step by step;
            `"entropy"` and `"surprisal"` are those of the policy; `"oracle"` is a pattern;
            `"random"` is chance.
            `"shuffled"` permutes flow's choice among tokens of the same role and position: if it
            trains as well as `"flow"`, flow is not what helps; `"shuffled_reach"` does so with the
            choice of `"reach"`. `"uniform"` is plain GRPO.
            `"flow:decided"` and `"flow:sharp"` make the graph by another preset, and
            `"flow*entropy"` multiplies two scores. `"package.module:function"` is your own, and so
            is the name of one that a package has installed. `docs/credit.md` describes all scores.
        flow_side (`str`, *optional*, defaults to `"top"`):
            `"top"` chooses the tokens with the highest scores; `"bottom"`, a control, as many with
            the lowest scores.
        flow_oracle (`str`, *optional*):
            For `flow_scorer="oracle"`: a pattern whose matches in a completion, or whose groups if
            it has any, are the tokens that matter. Pass a function to [`attach_flow_credit`]
            instead.
        flow_pass (`str`, *optional*, defaults to `"auto"`):
            Forward pass in which the attention is read. `"training"` is the pass that trains.
            `"scoring"` is the pass that TRL makes over the rollouts for `num_iterations > 1`,
            misaligned accumulation or vLLM's correction. `"auto"` is the scoring pass if TRL makes
            one, otherwise the training pass. `"extra"` is an additional pass without dropout, up
            to the last layer that is read, as in the paper; it costs time.
        flow_start_step (`int`, *optional*, defaults to `0`):
            Optimizer step at which flow credit starts. Before it, training is plain GRPO.
        flow_warmup_steps (`int`, *optional*, defaults to `0`):
            Number of optimizer steps over which the factor rises from 1 to `flow_gamma`.
        flow_on_error (`str`, *optional*, defaults to `"raise"`):
            What to do if flow cannot be read or solved for some rollouts: raise the error
            (`"raise"`), or give them plain credit (`"uniform"`) and count them in the metric
            `flow/errors`. What fails for one completion, such as an answer finder, costs no other.
        flow_page_steps (`int`, *optional*, defaults to `100`):
            Number of optimizer steps between two pages in the folder `flow` of `output_dir`. A page
            shows the completions of one prompt with their credit. `0` writes no pages.
        flow_page_limit_mb (`float`, *optional*, defaults to `50.0`):
            Megabytes that these pages may take together; the oldest pages are deleted first.
    """

    flow_top_fraction: float = documented(__doc__, "flow_top_fraction", _DEFAULTS["top_fraction"])
    flow_gamma: float = documented(__doc__, "flow_gamma", _DEFAULTS["gamma"])
    flow_layers: str = documented(__doc__, "flow_layers", _DEFAULTS["layers"])
    flow_answer: str = documented(__doc__, "flow_answer", _DEFAULTS["answer"])
    flow_target: str | None = documented(__doc__, "flow_target", _DEFAULTS["target"])
    flow_sign: str = documented(__doc__, "flow_sign", _DEFAULTS["sign"])
    flow_normalize: str = documented(__doc__, "flow_normalize", _DEFAULTS["normalize"])
    flow_no_answer: str = documented(__doc__, "flow_no_answer", _DEFAULTS["no_answer"])
    flow_scorer: str = documented(__doc__, "flow_scorer", _DEFAULTS["scorer"])
    flow_side: str = documented(__doc__, "flow_side", _DEFAULTS["side"])
    flow_oracle: str | None = documented(__doc__, "flow_oracle", _DEFAULTS["oracle"])
    flow_pass: str = documented(__doc__, "flow_pass", _DEFAULTS["pass_"])
    flow_start_step: int = documented(__doc__, "flow_start_step", _DEFAULTS["start_step"])
    flow_warmup_steps: int = documented(__doc__, "flow_warmup_steps", _DEFAULTS["warmup_steps"])
    flow_on_error: str = documented(__doc__, "flow_on_error", _DEFAULTS["on_error"])
    flow_page_steps: int = documented(__doc__, "flow_page_steps", _DEFAULTS["page_steps"])
    flow_page_limit_mb: float = documented(
        __doc__, "flow_page_limit_mb", _DEFAULTS["page_limit_mb"]
    )

    def __post_init__(self) -> None:
        """Refuse options that cannot train, before a model is loaded.

        Raises:
            ValueError: An option is out of range, or importance sampling is not per token.
        """
        super().__post_init__()  # type: ignore[no-untyped-call]
        self.credit_options()
        check_level(self.importance_sampling_level)

    def credit_options(self) -> CreditOptions:
        """The `flow_` parameters as `CreditOptions`.

        Raises:
            TypeError: `flow_scorer` is no name.
        """
        if not isinstance(self.flow_scorer, str):
            raise TypeError(
                "the arguments of a training run are saved, so flow_scorer must be a name, such as "
                f"{function_scorer(self.flow_scorer).name!r}; or pass the function itself, as "
                "attach_flow_credit(trainer, CreditOptions(scorer=function))"
            )
        names = [option.name for option in fields(CreditOptions)]
        # A field cannot be called `pass`.
        return CreditOptions(**{name: getattr(self, f"flow_{name.rstrip('_')}") for name in names})


class FlowCreditMixin:
    """Flow credit for a subclass of `GRPOTrainer`: `class Mine(FlowCreditMixin, MyTrainer)`.

    Its `args` must be a `FlowGRPOConfig`. It raises the same errors as `FlowCredit`.
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
        if "_flow_credit" not in vars(self):  # FlowCredit tests the loss in __init__
            return compute(model, inputs)
        return self._flow_credit.loss(compute, model, inputs)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write TRL's model card, with the options of the credit."""
        create = super().create_model_card  # type: ignore[misc]
        self._flow_credit.model_card(create, *args, **kwargs)


class FlowGRPOTrainer(FlowCreditMixin, GRPOTrainer):
    """Trainer for GRPO in which the tokens that carried the answer get more of the credit.

    It takes the arguments of [`~trl.GRPOTrainer`], with a [`FlowGRPOConfig`] as `args`. It logs

    * `flow/answer_found`: share of the completions with an answer;
    * `flow/weight_mean`: mean weight of the tokens that the model chose;
    * `flow/top_share`: share of a completion's flow that the chosen tokens hold;
    * `flow/entropy`: how evenly the flow is spread over the tokens, from 0 to 1;
    * `flow/prompt_jump`: share of the flow that goes from the prompt straight to the answer;
    * `flow/seconds`: seconds for the credit of a batch, without the forward pass it is read in;
    * `flow/errors`: number of batches so far in which all or some completions have failed, with
      `flow_on_error="uniform"`.

    With `log_completions`, TRL's table of completions has the columns `flow_answer`, `flow_weight`
    and `flow_prompt_jump`. Metrics, columns or pages that fail are logged once, and the training
    goes on.
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
    """The given `GRPOTrainer`, with flow credit added to it, which one printed line describes.

    The options are those of `FlowGRPOConfig` without `flow_`; `layers` may also be numbers, and
    `scorer`, `answer` and `oracle` functions. Call it in every process, before training.

    Raises:
        ValueError: The trainer has flow credit already, or as `FlowCredit`.
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
        "create_model_card": credit.model_card,
    }
    for name, method in around.items():
        setattr(trainer, name, partial(method, getattr(trainer, name)))
    trainer._flow_credit = credit
    trainer._tag_names = [*trainer._tag_names, "flowtracer"]  # of the model card
    trainer.accelerator.print(f"flow credit attached: {settings_line(trainer.args.flow_credit)}")
    return trainer

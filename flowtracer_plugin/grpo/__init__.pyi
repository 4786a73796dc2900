from .options import CreditOptions as CreditOptions
from .other_trainers import rollout_credit as rollout_credit
from .trainer import (
    FlowCreditMixin as FlowCreditMixin,
    FlowGRPOConfig as FlowGRPOConfig,
    FlowGRPOTrainer as FlowGRPOTrainer,
    FlowReward as FlowReward,
    UnsupportedTrainerError as UnsupportedTrainerError,
    attach_flow_credit as attach_flow_credit,
)

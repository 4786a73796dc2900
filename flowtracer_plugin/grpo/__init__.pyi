from .options import CreditOptions as CreditOptions
from .trainer import (
    FlowCreditMixin as FlowCreditMixin,
    FlowGRPOConfig as FlowGRPOConfig,
    FlowGRPOTrainer as FlowGRPOTrainer,
    FlowReward as FlowReward,
    UnsupportedTrainerError as UnsupportedTrainerError,
    attach_flow_credit as attach_flow_credit,
)

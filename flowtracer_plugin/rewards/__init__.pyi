from .flow_reward import FlowReward as FlowReward, completion_text as completion_text
from .judge import equal_answers as equal_answers
from .named import (
    concentration as concentration,
    imported_reward as imported_reward,
    math_flow as math_flow,
    named_reward as named_reward,
    reasoning_share as reasoning_share,
)
from .right_answers import math_answer as math_answer

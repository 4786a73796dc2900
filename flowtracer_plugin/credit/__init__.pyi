from .choosing import Scorer as Scorer
from .measures import Rollouts as Rollouts
from .own_scorers import ScorerError as ScorerError, needs as needs
from .scorers import SCORERS as SCORERS, find_scorer as find_scorer
from .token_scores import (
    TOKEN_SCORES as TOKEN_SCORES,
    ScoredText as ScoredText,
    read_text as read_text,
    score_text as score_text,
    token_score as token_score,
)
from .weights import (
    credit_weights as credit_weights,
    token_credit as token_credit,
    top_tokens as top_tokens,
)

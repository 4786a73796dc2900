from .answers import FINDERS as FINDERS, FoundAnswer as FoundAnswer, find_answer as find_answer
from .result_cut import NotComputedError as NotComputedError, cut_at_result as cut_at_result
from .spans import (
    AnswerNotFoundError as AnswerNotFoundError,
    Spans as Spans,
    find_spans as find_spans,
)

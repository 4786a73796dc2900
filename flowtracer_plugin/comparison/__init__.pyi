from .different import Different as Different
from .groups import GroupComparison as GroupComparison, ShownRollout as ShownRollout
from .permutation import Contrast as Contrast, Sides as Sides
from .texts import Beginning as Beginning, Continuation as Continuation, Word as Word
from .traces import (
    ComparedTrace as ComparedTrace,
    Comparison as Comparison,
    Origins as Origins,
    compare as compare,
)

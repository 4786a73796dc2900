"""Rows of several lengths, whose traces take milliseconds with the tiny model."""

from tests.tiny import PROMPT, RESPONSE


def stories(count):
    """Rows with a right answer in every other one, and other columns."""
    return [
        {
            "prompt": PROMPT + " Tom" * (row % 5),
            "response": RESPONSE.replace("3.", "3." + " one" * (row % 3)),
            "answer": "2" if row % 2 else "#### 7",
            "id": f"story-{row}",
            "level": row % 4,
        }
        for row in range(count)
    ]

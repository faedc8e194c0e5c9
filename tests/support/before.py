"""What the version before the package had rooms wrote (`tests/golden/before/write.py`)."""

import json
from pathlib import Path
from typing import Any

BEFORE = Path(__file__).parents[1] / "golden" / "before"


def difference(answers: list[dict[str, Any]]) -> float:
    """Largest difference of a probability between these answers and the stored ones, label by label."""
    stored = [json.loads(line) for line in (BEFORE / "answers.jsonl").read_text().splitlines()]
    assert [answer["image"] for answer in answers] == [answer["image"] for answer in stored]
    scores = [[{label["label"]: label["score"] for label in answer["labels"]} for answer in each]
              for each in (answers, stored)]  # fmt: skip
    assert [one.keys() for one in scores[0]] == [other.keys() for other in scores[1]]
    return max(abs(one[name] - other[name]) for one, other in zip(*scores, strict=True) for name in one)

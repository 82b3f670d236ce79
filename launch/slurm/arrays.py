"""Job array expressions: the values of `--array`, and the index lists in batch files and records.

`folds` stands for all folds. Index lists have the notation of sbatch: `0-4`, `0-4:2` (every second
index), `1,3`, and `%N` at the end for at most N tasks at the same time. The meaning of an index
depends on the command: a fold for train and chain, a share of the scans for convert.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from liverseg_dist.errors import UserError

FOLDS = "folds"
ARRAY_FORMS = "folds, 0-4, 0-4:2, 1,3 or 3; add %N for at most N tasks at the same time"
TASK_COUNT_FORMS = "8, 8%4 or 0-7"
MAX_TASKS = 100_000
"""No cluster allows larger arrays (MaxArraySize is 1001 by default); the limit keeps a typing error
from filling the memory."""
# [0-9] and not \d, which also matches the digits of other scripts.
_EXPRESSION = re.compile(r"(?P<indices>folds|[0-9][0-9,:-]*)(%(?P<throttle>[0-9]+))?")
_RANGE = re.compile(r"(?P<first>[0-9]+)(-(?P<last>[0-9]+)(:(?P<step>[0-9]+))?)?")


@dataclass(frozen=True)
class ArrayExpression:
    """A parsed `--array`."""

    text: str
    indices: tuple[int, ...] = ()
    """Sorted, without duplicates. Empty: all folds."""
    throttle: int = 0
    """At most so many tasks at the same time; 0: no limit."""
    number: int | None = None
    """The value of an expression that is one number; convert reads it as the number of tasks."""

    def format_indices(self, indices: Sequence[int]) -> str:
        """These indices with the throttle of this expression, in sbatch's notation."""
        return format_indices(indices) + (f"%{self.throttle}" if self.throttle else "")


def parse_array(text: str, option: str = "--array") -> ArrayExpression:
    """Parse the value of `--array` or `--convert-tasks`.

    Raises:
        UserError: The text is not an array expression; the message lists the accepted forms.
    """
    match = _EXPRESSION.fullmatch(text)
    if match is None:
        forms = ARRAY_FORMS if option == "--array" else TASK_COUNT_FORMS
        raise UserError(f"{option} {text}: not an array; accepted: {forms}")
    throttle = int(match["throttle"] or 0)
    if match["throttle"] is not None and throttle < 1:
        raise UserError(f"{option} {text}: %N must allow at least one task")
    if match["indices"] == FOLDS:
        return ArrayExpression(text, throttle=throttle)
    indices = tuple(parse_indices(match["indices"], option))
    number = int(match["indices"]) if match["indices"].isdigit() else None
    return ArrayExpression(text, indices, throttle, number)


def parse_indices(text: str, option: str = "--array") -> list[int]:
    """Expand an index list: `0-4:2,7%3` -> [0, 2, 4, 7]. Raises `UserError`."""
    found: set[int] = set()
    # Records have the throttle behind the indices.
    for part in text.partition("%")[0].split(","):
        match = _RANGE.fullmatch(part)
        if match is None:
            raise UserError(
                f"{option} {text}: '{part}' is not an index or range; accepted: {ARRAY_FORMS}"
            )
        first, last = int(match["first"]), int(match["last"] or match["first"])
        step = int(match["step"] or 1)
        if last < first:
            raise UserError(f"{option} {text}: {part} counts down; write {last}-{first}")
        if step < 1:
            raise UserError(f"{option} {text}: the step after ':' must be at least 1")
        # Checked before the range is expanded.
        if last >= MAX_TASKS:
            raise UserError(f"{option} {text}: index {last} is above {MAX_TASKS - 1}")
        found.update(range(first, last + 1, step))
    return sorted(found)


def format_indices(indices: Sequence[int]) -> str:
    """[0, 1, 2, 5] -> `0-2,5`."""
    parts: list[str] = []
    start = 0
    for end in range(1, len(indices) + 1):
        if end < len(indices) and indices[end] == indices[end - 1] + 1:
            continue
        first, last = indices[start], indices[end - 1]
        parts.append(str(first) if first == last else f"{first}-{last}")
        start = end
    return ",".join(parts)


def expand_tasks(job_id: str, array: str) -> list[str]:
    """Ids of the tasks of an array, or the id of the job.

    A damaged index list (from a record) counts as one job.
    """
    if not array:
        return [job_id]
    try:
        return [f"{job_id}_{index}" for index in parse_indices(array)]
    except UserError:
        return [job_id]

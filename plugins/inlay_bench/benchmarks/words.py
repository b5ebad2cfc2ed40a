"""What a caption says that another does not: the subject of an insertion, where none is named."""

from __future__ import annotations

import re
from difflib import SequenceMatcher

# Words at the ends of a phrase that name nothing.
WORDS = """
a an the some another one two three and or with of in on at by to from near next beside behind under
over above below into onto there is are was has have that which who it its his her their this these
those while as for up down out off inside outside against along around
"""
IDLE = frozenset(WORDS.split())


def new_phrase(before: str, after: str) -> str:
    """The longest run of words of `after` that `before` lacks, without idle words at its ends: "a
    dog on a road" to "a dog with a red hat on a road" gives "red hat". "" when nothing is new.

    The phrase stands in `after` word for word.
    """
    words = list(re.finditer(r"[\w'-]+", after))
    old = [w.lower() for w in re.findall(r"[\w'-]+", before)]
    new = [m[0].lower() for m in words]
    found: list[tuple[int, int]] = []
    for kind, _, _, start, end in SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
        if kind in ("insert", "replace"):
            while start < end and new[start] in IDLE:
                start += 1
            while end > start and new[end - 1] in IDLE:
                end -= 1
            found.append((start, end))
    start, end = max(found, key=lambda run: run[1] - run[0], default=(0, 0))
    return after[words[start].start() : words[end - 1].end()] if end > start else ""

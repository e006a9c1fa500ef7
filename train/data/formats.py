"""A ready transform that varies how a request is laid out, so that a model learns content and not layout."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cpmbee.errors import DataError
from cpmbee.train.data.records import Record
from cpmbee.train.data.transform import ANSWER, Apply

# Names that mean the same; a field is renamed within its line.
SYNONYMS = (
    ("input", "document", "text", "content", "passage", "文章", "文本", "内容", "输入"),
    ("prompt", "hint", "instruction", "提示", "任务", "要求"),
    ("question", "query", "问题", "提问"),
    ("options", "choices", "candidates", "选项", "候选"),
    ("title", "headline", "标题", "题目"),
)
SEPARATORS = ("\n", "：", " ", "。")
_GROUP = {name: group for group in SYNONYMS for name in group}
_MAX_FIELDS = 64  # whose order is drawn


@dataclass(frozen=True)
class PerturbFormat:
    """Renames fields of the root among synonyms, reorders them, joins two of them; the answer stays as it is.

    A request and its in-context examples are treated alike.

    Attributes:
        rename: how often names change.
        reorder: how often the order of the fields is drawn anew.
        join: how often two fields of text become one.
    """

    rename: float = 0.5
    reorder: float = 0.5
    join: float = 0.1

    def __post_init__(self) -> None:
        for name in ("rename", "reorder", "join"):
            if not 0 <= getattr(self, name) <= 1:
                raise DataError(f"{name}: must lie between 0 and 1, not {getattr(self, name)}")

    def plan(self, rng: np.random.Generator) -> Apply:
        """As `cpmbee.train.data.transform.Transform.plan`."""
        rename, reorder, join = rng.random(3) < (self.rename, self.reorder, self.join)
        names = [group[int(rng.integers(len(group)))] for group in SYNONYMS]
        renamed = dict(zip(map(id, SYNONYMS), names, strict=True)) if rename else {}
        order = rng.random(_MAX_FIELDS).tolist()
        separator = SEPARATORS[int(rng.integers(len(SEPARATORS)))]

        def apply(record: Record, num_samples: int, rng: np.random.Generator) -> Record:
            fields = {name: value for name, value in record.items() if name != ANSWER}
            if join:
                fields = _joined(fields, order, separator)
            if renamed:
                fields = _renamed(fields, renamed)
            if reorder:
                ranks = dict(zip(fields, order, strict=False))
                fields = {name: fields[name] for name in sorted(fields, key=lambda name: ranks.get(name, 1.0))}
            return {**fields, ANSWER: record[ANSWER]} if ANSWER in record else fields

        return apply


def _joined(fields: Record, order: list[float], separator: str) -> Record:
    """Two fields of text as one, under the name of the first that keeps its place."""
    texts = [name for name, value in fields.items() if isinstance(value, str)]
    if len(texts) < 2:
        return fields
    ranked = sorted(range(len(texts[:_MAX_FIELDS])), key=lambda i: order[i])
    first, second = texts[ranked[0]], texts[ranked[1]]
    kept = min(first, second, key=lambda name: _GROUP.get(name) is not SYNONYMS[0])  # a text rather than its prompt
    gone = second if kept == first else first
    both = f"{fields[first]}{separator}{fields[second]}"
    return {name: both if name == kept else value for name, value in fields.items() if name != gone}


def _renamed(fields: Record, names: dict[int, str]) -> Record:
    """Fields under other names; one whose new name is taken keeps its own."""
    renamed: Record = {}
    for name, value in fields.items():
        group = _GROUP.get(name)
        new = names[id(group)] if group is not None else name
        if new in renamed or (new != name and new in fields):
            new = name
        renamed[new] = value
    return renamed

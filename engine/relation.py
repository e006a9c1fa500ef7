"""The relation matrix between queries and keys: compiled where a compiler was, else in plain NumPy."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cpmbee.plain.relation import RelationBuilder, TokenLayout
else:
    try:
        from cpmbee._relation import RelationBuilder, TokenLayout
    except ImportError:
        from cpmbee.plain import warn_not_built
        from cpmbee.plain.relation import RelationBuilder, TokenLayout

        warn_not_built()

__all__ = ["RelationBuilder", "TokenLayout"]

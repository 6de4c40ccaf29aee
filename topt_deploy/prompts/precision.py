"""Precisions whose prompts can replace each other."""


def comparable(trained: str | None, served: str | None) -> bool:
    """True if a model that was trained with prompts of one precision may be served prompts of another.

    int4 moves all regions' vectors alike by several times what they differ by: a model trained with others reads noise
    (docs/background/encoder-figures.md). Where a table does not name the precision, nothing can be said.
    """
    return None in (trained, served) or (trained == "int4") == (served == "int4")

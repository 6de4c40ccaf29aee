"""Which precisions give prompts that can stand in for each other's."""


def comparable(trained: str | None, served: str | None) -> bool:
    """Whether a model trained with prompts of one precision may be served those of another.

    int4 moves all regions' vectors alike by several times what they differ by: a model trained with others reads noise
    (docs/background/encoder-figures.md). Where a table does not name the precision, nothing can be said.
    """
    return None in (trained, served) or (trained == "int4") == (served == "int4")

"""Rounding to 8 bits, restated one row at a time."""

import numpy as np


def in_8_bits(rows):
    """Each row to whole steps of its largest magnitude over 127."""
    out = np.zeros_like(rows)
    for i, row in enumerate(rows):
        if row.any():
            step = np.abs(row).max() / 127
            out[i] = np.round(row / step) * step
    return out


def weight_in_8_bits(weight):
    """The same for weights, in steps so large that no two neighbours of one sign add up to more than 128 of them."""
    out = np.zeros_like(weight)
    for i, row in enumerate(weight):
        pairs = [(row[j], row[j + 1] if j + 1 < len(row) else 0) for j in range(0, len(row), 2)]
        together = max(abs(a + b) if a * b > 0 else max(abs(a), abs(b)) for a, b in pairs)
        if row.any():
            step = max(np.abs(row).max() / 127, together / 128)
            out[i] = np.round(row / step) * step
    return out

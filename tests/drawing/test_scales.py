"""Classes, ticks and numbers."""

import numpy as np
import pytest

from topt_deploy.drawing.scales import BLUES, TEAL_TO_BROWN, diverging, number, root_ticks, sequential


@pytest.mark.parametrize("high", [0.4, 7.0, 1900.0, 3.2e6])
def test_sequential_classes_cover_the_values_in_order(high: float) -> None:
    values = np.linspace(0, high, 400)
    scale = sequential(values, BLUES)
    assert scale.edges == tuple(sorted(set(scale.edges)))
    assert (scale.edges[0], scale.edges[-1]) == (0, high)
    assert len(scale.colours) == len(scale.edges) - 1 == len(BLUES)
    for edge, colour in zip(scale.edges, scale.colours, strict=False):
        assert scale.colour(edge) == colour
    assert scale.colour(high) == BLUES[-1]
    roots = np.sqrt(scale.edges)
    np.testing.assert_allclose(np.diff(roots), np.sqrt(high) / len(BLUES), rtol=0.1)


def test_values_that_do_not_vary_are_one_class() -> None:
    scale = sequential(np.full(3, 12.0), BLUES)
    assert len(scale.colours) == 1
    assert scale.colour(12.0) in BLUES
    assert scale.labels() == ["12"]


def test_values_too_close_for_rounded_edges_have_fewer_classes() -> None:
    scale = sequential(np.array([1000.0, 1004.0]), BLUES)
    assert len(scale.edges) - 1 == len(scale.colours) < len(BLUES)
    assert scale.colour(1000.0) in scale.colours
    assert scale.colour(1004.0) in scale.colours


@pytest.mark.parametrize("high", [0.03, 55.0, 12000.0])
def test_diverging_classes_are_the_same_to_both_sides(high: float) -> None:
    scale = diverging(np.array([high, -high / 3, 0.0]))
    assert scale.edges == tuple(-edge for edge in reversed(scale.edges))
    assert [scale.colour(v) for v in (-high, 0.0, high)] == [TEAL_TO_BROWN[i] for i in (0, 3, 6)]


def test_residuals_that_are_all_zero_are_neutral() -> None:
    scale = diverging(np.zeros(4))
    assert scale.colour(0.0) == TEAL_TO_BROWN[3]
    assert scale.labels() == ["0"]


@pytest.mark.parametrize(
    ("high", "ticks"), [(1560, [0, 100, 500, 1000]), (500, [0, 20, 100, 200, 500]), (1, [0, 0.05, 0.2, 0.5, 1])]
)
def test_ticks_are_round_and_end_within_the_axis(high: float, ticks: list[float]) -> None:
    assert root_ticks(high) == pytest.approx(ticks)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (-0.0, "0"),
        (3, "3"),
        (3.456, "3.5"),
        (0.0123, "0.012"),
        (9.97, "10"),
        (1234.5, "1,234"),
        (-4.4, "−4.4"),
    ],
)
def test_numbers_as_text(value: float, text: str) -> None:
    assert number(value) == text


def test_signed_numbers_show_their_sign() -> None:
    assert [number(v, signed=True) for v in (12.0, 0.0, -12.0)] == ["+12", "0", "−12"]

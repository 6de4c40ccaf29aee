"""Profiles: read, refused with the dimension's name, and laid out as shapes."""

import pytest

from topt_deploy.errors import UsageError
from topt_deploy.tensorrt.profile import ProfileRange, as_record, parse_profile, read_profile, read_range, shapes

REGIONS = {"regions": ProfileRange(min=1, opt=256, max=4096)}
DECODER = {
    "batch": ProfileRange(min=1, opt=1, max=8),
    "tokens": ProfileRange(min=1, opt=256, max=1024),
    "past": ProfileRange(min=0, opt=512, max=8192),
}


def test_a_range_is_three_numbers_in_order():
    assert read_range("regions", [1, 77, 4096]) == ProfileRange(min=1, opt=77, max=4096)
    assert read_range("past", [0, 1, 1]) == ProfileRange(min=0, opt=1, max=1)


@pytest.mark.parametrize(
    "sizes",
    [(), (1, 2), (1, 2, 3, 4), (2, 1, 3), (1, 3, 2), (0, 1, 2), (-1, 1, 2), (1, 2, 2**31), (1, 2.0, 3), (True, 2, 3)],
)
def test_what_is_no_range_is_refused_by_the_dimensions_name(sizes):
    with pytest.raises(UsageError, match="no profile of tokens") as refused:
        read_range("tokens", sizes)
    assert refused.value.found == (",".join(map(str, sizes)) or "nothing")


def test_only_the_past_may_be_nothing_and_even_that_not_as_a_rule():
    with pytest.raises(UsageError, match="no profile of past"):
        read_range("past", [0, 0, 4])


def test_the_command_line_names_dimensions_or_means_the_usual_one():
    assert parse_profile([], REGIONS, unnamed="regions") == REGIONS
    asked = parse_profile(["2,9, 50"], REGIONS, unnamed="regions")
    assert asked == {"regions": ProfileRange(min=2, opt=9, max=50)}
    asked = parse_profile(["past=0,4,64", "3,4,5"], DECODER, unnamed="tokens")
    assert asked == {
        "batch": DECODER["batch"],
        "tokens": ProfileRange(min=3, opt=4, max=5), "past": ProfileRange(min=0, opt=4, max=64),
    }  # fmt: skip
    assert list(asked) == list(DECODER)


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["rows=1,2,3"], "names 'rows' and there is no such dimension"),
        (["tokens=1,2,3", "1,2,3"], "names 'tokens' twice"),
        (["tokens=3,2,1"], "no profile of tokens"),
        (["1,2,many"], "no profile of tokens"),
        (["1,2,²"], "no profile of tokens"),
        ([""], "no profile of tokens"),
    ],
)
def test_a_wrong_one_on_the_command_line_is_named(texts, message):
    with pytest.raises(UsageError, match=message):
        parse_profile(texts, DECODER, unnamed="tokens")


def test_a_manifest_has_it_as_lists():
    assert as_record(DECODER) == {"batch": [1, 1, 8], "tokens": [1, 256, 1024], "past": [0, 512, 8192]}
    assert read_profile(as_record(DECODER)) == DECODER
    for wrong in ([1, 2], [1, 2, "3"], [3, 2, 1], ["1", "2", "3"]):
        with pytest.raises(TypeError, match="no profile of batch"):
            read_profile({"batch": wrong})


def test_every_input_gets_its_shapes():
    inputs = {"hidden": ("batch", "tokens", 32), "past_key": ("batch", 2, "past", 16), "scale": (3,)}
    found = shapes(inputs, DECODER)
    assert set(found) == {"hidden", "past_key"}
    hidden, past = found["hidden"], found["past_key"]
    assert (hidden.min, hidden.opt, hidden.max) == ((1, 1, 32), (1, 256, 32), (8, 1024, 32))
    assert (past.min, past.opt, past.max) == ((1, 2, 0, 16), (1, 2, 512, 16), (8, 2, 8192, 16))


@pytest.mark.parametrize(
    ("dims", "message"),
    [
        (("regions", "width"), "no sizes for dimension 'width' of input 'x'"),
        (("regions", None), "no sizes for dimension 'without a name' of input 'x'"),
        ((4, 4), "has sizes for 'regions', and no input has such a dimension"),
    ],
)
def test_a_profile_and_a_graph_that_do_not_go_together(dims, message):
    with pytest.raises(UsageError, match=message):
        shapes({"x": dims}, REGIONS)

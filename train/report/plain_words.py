"""Names of columns, views and scales in plain words."""

from topt_deploy.config.settings import TargetConfig
from topt_deploy.data.features import DESTINATIONS, LOG_CONTEXT, MOBILITY, POSITION, TRIPS, TWO_HOPS
from topt_deploy.model.gaussian_process import LOCAL, PROMPT

VIEWS = {
    "poi": "points of interest",
    MOBILITY: "flow context",
    LOG_CONTEXT: "far context (log)",
    TWO_HOPS: "two-hop context",
    TRIPS: "trips",
    DESTINATIONS: "destinations",
    POSITION: "position",
    LOCAL: "what regions next to each other have in common",
    PROMPT: "prompts",
}
"""Views whose names are not words."""
SCALES = {"none": "count", "sqrt": "√count", "cbrt": "∛count", "log1p": "log(1 + count)"}
"""The scale of a prediction before it is transformed back."""


def in_words(name: str) -> str:
    """A column's name as words: ``check_in`` is "check in"."""
    return name.replace("_", " ").strip()


def title_of(name: str) -> str:
    """A column's name as a heading: ``check_in`` is "Check in"."""
    return sentence_case(in_words(name))


def view_name(view: str) -> str:
    """A view in plain words; those that a user has added keep their own name."""
    return VIEWS.get(view, in_words(view))


def scale_name(target: TargetConfig, transform: str) -> str:
    """The scale that a head predicts on, with the transform that it came to have."""
    return SCALES[transform] if target.likelihood == "gaussian" else "log count"


def sentence_case(text: str) -> str:
    """With a capital first letter, and the rest as it is."""
    return text[:1].upper() + text[1:]


def percent(share: float) -> str:
    """A share in [0, 1] as whole percents."""
    return f"{100 * share:.0f}\N{NO-BREAK SPACE}%"

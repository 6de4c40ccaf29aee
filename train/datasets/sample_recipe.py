"""The recipe of the made-up city: its categories, its words, and how labels come about."""

from dataclasses import dataclass

# How each category answers to density, trade, industry and night life (columns), and its log count at zero.
POI = {
    "food": (0.7, 0.5, -0.1, 0.6, 3.0),
    "retail": (0.5, 0.9, 0.0, 0.1, 2.8),
    "office": (0.4, 0.8, 0.2, 0.0, 2.2),
    "school": (0.5, -0.1, -0.2, -0.1, 1.6),
    "health": (0.4, 0.3, -0.1, 0.0, 1.5),
    "nightlife": (0.4, 0.2, 0.0, 1.0, 1.6),
    "park": (-0.2, -0.1, -0.4, 0.1, 1.5),
    "transit": (0.7, 0.3, 0.1, 0.1, 1.9),
    "worship": (0.3, -0.2, 0.0, -0.2, 1.3),
    "hotel": (0.3, 0.6, -0.2, 0.5, 0.8),
    "warehouse": (-0.3, 0.1, 1.0, -0.2, 1.4),
    "parking": (0.1, 0.5, 0.3, 0.1, 2.4),
}
LAND_USE = {
    "residential": (0.6, -0.3, -0.5, 0.1, 1.6),
    "commercial": (0.3, 0.9, -0.1, 0.4, 0.3),
    "industrial": (-0.3, 0.1, 1.2, -0.2, 0.0),
    "green": (-0.6, -0.3, -0.3, 0.0, 0.8),
    "institutional": (0.2, 0.1, -0.1, -0.1, 0.0),
    "transport": (0.1, 0.2, 0.5, 0.0, 0.2),
}
LAND_USE_SPREAD = 12.0  # Dirichlet concentration: larger means closer to the expected shares
# What only the text tells: five words per attribute, from low to high, in sentences that vary.
ATTRIBUTES = {
    "street_life": ("deserted", "sleepy", "ordinary", "lively", "bustling"),
    "upkeep": ("derelict", "shabby", "passable", "tidy", "immaculate"),
    "festivals": ("never", "rarely", "sometimes", "often", "constantly"),
}
SENTENCES = {
    "street_life": (
        "After dark the streets are {}.",
        "At night its pavements look {}.",
        "Evenings here are {}.",
    ),
    "upkeep": ("Buildings and kerbs are {}.", "Upkeep of the blocks is {}.", "The facades look {}."),
    "festivals": ("Squares {} host festivals.", "Street fairs {} take place.", "Parades {} pass through."),
}
STREETS = (
    "Linden",
    "Harbour",
    "Mill",
    "Station",
    "Orchard",
    "Chapel",
    "Quarry",
    "Meadow",
    "Foundry",
    "Lantern",
)


@dataclass(frozen=True, kw_only=True)
class Task:
    """The recipe of a label.

    Attributes:
        level: Count of a typical region.
        spread: Standard deviation s of log μ.
        size: Of the negative binomial; larger means less noise.
        poi: Weights of the standardised log counts that make up the views' part.
        visitors: Weights of the same, averaged over where visitors come from.
        attributes: Weights of the attributes that only the text tells.
        shares: Weights w of views, visitors, neighbours and text; their squares are shares of the variance
            as far as the parts are independent.
    """

    level: float
    spread: float
    size: float
    poi: dict[str, float]
    visitors: dict[str, float]
    attributes: dict[str, float]
    shares: tuple[float, float, float, float]


TASKS = {
    "crime": Task(
        level=150, spread=0.65, size=60,
        poi={"nightlife": 0.6, "transit": 0.5, "warehouse": 0.3},
        visitors={"nightlife": 1.0},
        attributes={"upkeep": -0.8, "street_life": 0.4},
        shares=(0.6, 0.5, 0.3, 0.5),
    ),
    "check_in": Task(
        level=900, spread=0.8, size=50,
        poi={"food": 0.6, "hotel": 0.4, "nightlife": 0.3},
        visitors={"office": 1.0},
        attributes={"festivals": 0.7, "street_life": 0.6},
        shares=(0.6, 0.55, 0.2, 0.5),
    ),
    "service_call": Task(
        level=220, spread=0.55, size=60,
        poi={"school": 0.4, "parking": 0.5, "worship": 0.3},
        visitors={"warehouse": 1.0},
        attributes={"upkeep": -0.9, "festivals": 0.3},
        shares=(0.6, 0.4, 0.4, 0.5),
    ),
}  # fmt: skip

"""The intended use of predictions: one text for the model card and the report."""

INTENDED_USE = (
    "Estimates of reported counts for whole regions of a city, to plan services and to fill gaps where counts are"
    " missing. Predictions are of reported events, not of all that happen: they carry every bias of who reports what,"
    " and where.",
    "Not for decisions about individuals, and not for allocating patrols: a model of reported crime sends more"
    " patrols to where more was reported, which reports more.",
)
"""Paragraphs of plain text."""

"""The geo-text of a region that brings none: coordinates, address, and what was counted there, in FlexiReg's form."""

from collections.abc import Mapping

from .templates import Wording


def geo_text(
    wording: Wording, *, lon: float, lat: float, address: str | None = None, pois: Mapping[str, float] | None = None
) -> str:
    """One region's geo-text.

    Args:
        wording: The lines.
        lon, lat: Degrees.
        address: Left out where None.
        pois: Counts by category, written from most to least and without those that are 0; left out where None.
    """
    lines = [wording.heading.format(), wording.coordinates.format(lat=f"{lat:.6f}", lon=f"{lon:.6f}")]
    if address is not None:
        lines.append(wording.address.format(address=_plain(address)))
    if pois is not None:
        lines.append(_pois(wording, pois))
    return "\n".join(lines)


def _pois(wording: Wording, pois: Mapping[str, float]) -> str:
    total = sum(pois.values())
    if not total:
        return wording.no_pois.format()
    most = sorted(pois.items(), key=lambda item: (-item[1], item[0]))
    listed = ", ".join(
        wording.poi.format(count=_number(count), category=_plain(name.replace("_", " ")), share=f"{count / total:.2%}")
        for name, count in most
        if count
    )
    return wording.pois.format(pois=listed, total=_number(total))


def _number(count: float) -> str:
    """Whole numbers without a point; others to six decimals."""
    return str(int(count)) if count == int(count) else f"{count:.6f}".rstrip("0")


def _plain(text: str) -> str:
    """On one line."""
    return " ".join(text.split())

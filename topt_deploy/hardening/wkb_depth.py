"""How deep geometries are nested, read off their bytes before GEOS decodes them."""

import struct

NESTING_LIMIT = 16
"""Of collections in a geometry."""
_POINT, _LINE, _POLYGON, _COLLECTION = 1, 2, 3, 7  # WKB's codes; what is above is a curve, or none
_SIMPLE = {struct.pack(f"{order}BI", order == "<", kind) for order in "<>" for kind in (1, 2, 3)}
"""The first bytes of geometries that cannot contain others."""


def is_shallow(wkb: bytes) -> bool:
    """True if there is no curve and no collection is nested deeper than the limit. Reading stops where the bytes end or
    are invalid."""
    if wkb[:5] in _SIMPLE:
        return True
    position, left = 0, [1]  # geometries still to come, per level
    try:
        while left:
            if not left[-1]:
                left.pop()
                continue
            left[-1] -= 1
            if wkb[position] > 1:
                return False
            order = "<" if wkb[position] else ">"
            (code,) = struct.unpack_from(f"{order}I", wkb, position + 1)
            kind, iso = (code & 0xFFFF) % 1000, (code & 0xFFFF) // 1000
            if kind > _COLLECTION:
                return False
            solid, measured = code >> 31 or iso in (1, 3), code >> 30 & 1 or iso in (2, 3)
            width = 8 * (2 + bool(solid) + bool(measured))
            position += 9 if code >> 29 & 1 else 5
            if kind == _POINT:
                position += width
                continue
            (count,) = struct.unpack_from(f"{order}I", wkb, position)
            position += 4
            if kind == _LINE:
                position += count * width
            elif kind == _POLYGON:
                for _ in range(count):
                    position += 4 + width * struct.unpack_from(f"{order}I", wkb, position)[0]
            else:
                left.append(count)
                if len(left) > NESTING_LIMIT:
                    return False
    except (IndexError, struct.error):  # cut off: GEOS will say so, and not go deeper before
        pass
    return True

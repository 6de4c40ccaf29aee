#!/bin/sh
# remove-unused.sh: takes out of the environment what packages bring and prediction never opens.
set -eu
python3 - <<'PYTHON'
import shutil
from importlib.util import find_spec
from pathlib import Path

# pyarrow: headers for those who compile against it, its tests, and Flight, a protocol between databases that no other of
# its libraries needs. numpy: tests and headers.
UNUSED = {
    "pyarrow": ["include", "src", "tests", "libarrow_flight.*", "libarrow_python_flight.*", "_flight.*"],
    "numpy": ["**/tests", "_core/include"],
}
for package, patterns in UNUSED.items():
    folder = Path(find_spec(package).origin).parent
    for place in [place for pattern in patterns for place in folder.glob(pattern)]:
        shutil.rmtree(place) if place.is_dir() else place.unlink()
PYTHON

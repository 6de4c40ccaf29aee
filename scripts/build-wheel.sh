#!/bin/sh
# build-wheel.sh DIR: writes the wheel of this tree, and no other, to DIR.
set -eu
# setuptools copies into build/lib and never deletes there: a module removed since would still be shipped.
rm -rf build/lib "$1"
python3 -m pip wheel --quiet --no-deps --wheel-dir "$1" .

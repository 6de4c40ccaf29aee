#!/usr/bin/env bash
# check-install.sh DIR [runtime|train]...: installs from the wheel into plain virtual environments below DIR,
# with the very lines the Dockerfile runs, and checks what came out.
set -euo pipefail
cd "$(dirname "$0")/.."
dir=$1
shift
[ $# -gt 0 ] || set -- runtime train

# -I: without it the current folder is on the path, and with it this repository's train/ and export/.
absent() {
    python3 -I - "$@" <<'PYTHON'
import sys
from importlib.util import find_spec

found = [name for name in sys.argv[1:] if find_spec(name)]
sys.exit(f"importable, and should not be: {', '.join(found)}" if found else 0)
PYTHON
}

runtime() {
    absent torch transformers onnx sklearn scipy pandas geopandas
    topt-run --help
    topt-deploy --help
}

train() {
    python3 -I -c "import torch, onnxscript, sklearn"
    topt-deploy train --help
    topt-deploy export --help
}

sh scripts/build-wheel.sh "$dir/dist"
for target; do
    "${PYTHON:-python3}" -m venv --clear "$dir/$target"
    (
        PATH=$(cd "$dir/$target/bin" && pwd):$PATH
        sh "scripts/install-$target.sh" "$dir/dist"
        absent train export runtime
        "$target" >/dev/null
        echo "$target installs from the wheel: $(topt-run --version)"
    )
done

#!/usr/bin/env bash
# check-install.sh DIR [runtime-cpu|runtime-gpu|train]...: installs from the wheel into plain virtual environments below
# DIR, with the very lines the Dockerfile runs, checks what came out, and says how large it is.
# runtime-gpu downloads 2 GB and is there for those who name it.
set -euo pipefail
cd "$(dirname "$0")/.."
dir=$1
shift
[ $# -gt 0 ] || set -- runtime-cpu train

# -I: without it the current folder is on the path, and with it this repository's train/ and export/.
absent() {
    python3 -I - "$@" <<'PYTHON'
import sys
from importlib.util import find_spec

found = [name for name in sys.argv[1:] if find_spec(name)]
sys.exit(f"importable, and should not be: {', '.join(found)}" if found else 0)
PYTHON
}

runtime-cpu() {
    absent torch transformers onnx sklearn scipy pandas geopandas
    topt-run --help
    topt-deploy --help
}

runtime-gpu() {
    runtime-cpu
    # The provider is there, and the libraries that it loads on a machine with a driver.
    python3 -I - <<'PYTHON'
import sys
from pathlib import Path

import onnxruntime

assert "CUDAExecutionProvider" in onnxruntime.get_available_providers()
libraries = Path(onnxruntime.__file__).parents[1] / "nvidia"
missing = [name for name in ("cudart", "cublas", "cublasLt", "cufft", "curand", "nvrtc", "cudnn")
           if not list(libraries.rglob(f"lib{name}.so.*"))]
sys.exit(f"absent: {', '.join(missing)}" if missing else 0)
PYTHON
}

train() {
    python3 -I -c "import torch, onnxscript, sklearn, accelerate"
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
        size=$(du -sm "$dir/$target/lib" | cut -f1)
        echo "$target installs from the wheel: $(topt-run --version), $size MB of packages"
    )
done

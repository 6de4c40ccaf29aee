"""numpy without what its import spends a quarter of its time on: that is there all the same once it is asked for."""

import subprocess
import sys

import pytest
from commands import environment

LEAN = """
import sys
from topt_deploy.lean_numpy import DEFERRED, lean_numpy
lean_numpy()
import numpy as np
assert all(type(sys.modules[name]).__name__ == "_Deferred" for name in DEFERRED), "read all the same"
assert np.linalg.eigh(np.eye(2)).eigenvalues.tolist() == [1, 1]
"""
ASKED = {
    "types": "import numpy.typing as npt; assert npt.NDArray is not list; assert npt.ArrayLike is not list",
    "one type": "from numpy._typing import NDArray; assert NDArray is not list",
    "a module within": "import numpy._typing._array_like as found; assert found.ArrayLike",
    "documentation": "import numpy._core._add_newdocs as docs; assert docs.add_newdoc; assert np.ndarray.sum.__doc__",
    "another part of numpy": "import numpy.ma, numpy.random, numpy.polynomial; assert numpy.ma.array([1]).sum() == 1",
}


@pytest.mark.parametrize("what", ASKED)
def test_what_is_left_out_is_there_once_it_is_asked_for(what):
    done = subprocess.run([sys.executable, "-c", LEAN + ASKED[what]], env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

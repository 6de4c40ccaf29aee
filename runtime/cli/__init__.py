"""``topt-run``: predict, inspect and test bundles on a machine without PyTorch. One command a file."""

import gc
import os


def main() -> None:
    """Entry point."""
    # By itself Python looks for garbage ninety times in all that is being imported, where there is none.
    gc.set_threshold(100_000)
    # Arrow's own allocator keeps what it has freed; at this size the system's costs nothing and halves the memory.
    os.environ.setdefault("ARROW_DEFAULT_MEMORY_POOL", "system")
    from topt_deploy.console import run
    from topt_deploy.lean_numpy import lean_numpy
    from topt_deploy.pandas_blocker import without_pandas

    from .group import cli

    lean_numpy()
    without_pandas()
    run(cli, teardown=False)

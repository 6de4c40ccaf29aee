"""From Python: open a bundle once and predict city after city.

    python predict.py BUNDLE OUT CITY...

Each CITY is a folder with regions.parquet and mobility.parquet. Exit codes are topt-run's: 0 done, 3 if some cities
failed, and if all did, the last one's (an error carries its own).
"""

import sys
from pathlib import Path

import pyarrow.parquet as pq

import topt_deploy as topt
from topt_deploy.errors import Exit


def main(bundle: str, out: str, *cities: str) -> int:
    """Predict every city into OUT/NAME.parquet, one row per region."""
    model = topt.load(bundle)
    code = done = 0
    for city in map(Path, cities):
        try:
            table = model.predict(city, wide=True)
        except topt.ToptError as error:
            print(f"{city}: {error}", file=sys.stderr)
            code = int(error.exit_code)
            continue
        pq.write_table(table, Path(out) / f"{city.name}.parquet")
        done += 1
    return int(Exit.PARTIAL) if code and done else code


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))

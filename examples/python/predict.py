"""From Python: open a bundle once and predict city after city, Arrow tables in and out.

    python predict.py BUNDLE OUT CITY...

Each CITY is a folder with regions.parquet and mobility.parquet. Exit codes are topt-run's: 0 done, 3 if some cities
failed, and if all did, the last one's (an error carries its own).
"""

import sys
from pathlib import Path

import pyarrow.parquet as pq

from topt_deploy.errors import Exit, ToptError
from topt_deploy.runtime import load


def main(bundle: str, out: str, *cities: str) -> int:
    """Predict every city into OUT/NAME.parquet, one row per region."""
    predictor = load(bundle)
    code = done = 0
    for city in map(Path, cities):
        try:
            regions, mobility = (pq.ParquetFile(city / f"{name}.parquet").read() for name in ("regions", "mobility"))
            table = predictor.predict(regions, mobility, wide=True)
        except ToptError as error:
            print(f"{city}: {error}", file=sys.stderr)
            code = int(error.exit_code)
            continue
        pq.write_table(table, Path(out) / f"{city.name}.parquet")
        done += 1
    return int(Exit.PARTIAL) if code and done else code


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))

"""Draw docs/images/report.png: the top of a report on Chicago, with the shapes of its community areas.

    python dev/report_picture.py --hafusion HAFusion --prompt4re Prompt4RE
    python dev/report_picture.py --hafusion HAFusion --prompt4re Prompt4RE --city chicago/   # keep its files

Imports the published data with libpysal's Chicago77.shp, trains the default preset, makes the report and photographs
it in Chromium without a window. A city that is there already is neither imported nor trained again.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from chicago_areas import chicago_areas
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "docs" / "images" / "report.png"
COMMAND = Path(sys.executable).parent / "topt-deploy"
WIDTH, HEIGHT, COLOURS = 1200, 1165, 128


def run(*command: str | Path) -> None:
    """Run a command, and end where it fails."""
    subprocess.run([str(part) for part in command], check=True)


def report_on_chicago(city: Path, hafusion: Path, prompt4re: Path) -> Path:
    """The page of a run of the default preset."""
    if not (city / "regions.parquet").exists():
        source = ("--city", "Chi", "--prompt4re", prompt4re, "--encoder", "llama", "--out", city)
        run(COMMAND, "import", "hafusion", hafusion, *source, *chicago_areas())
    if not (city / "runs" / "picture").exists():
        run(COMMAND, "train", city, "--out", city / "runs" / "picture")
    run(COMMAND, "report", city / "runs" / "picture", "--out", city / "report.html")
    return city / "report.html"


def photograph(page: Path, out: Path) -> None:
    """The top of a page as a PNG of few colours."""
    chromium = next((found for name in ("chromium", "google-chrome") if (found := shutil.which(name))), None)
    if chromium is None:
        raise SystemExit("Chromium is absent")
    with tempfile.TemporaryDirectory() as folder:
        shot = Path(folder) / "shot.png"
        run(
            chromium, "--headless", "--no-sandbox", "--hide-scrollbars", f"--user-data-dir={folder}/profile",
            f"--window-size={WIDTH},{HEIGHT}", f"--screenshot={shot}", page.resolve().as_uri(),
        )  # fmt: skip
        with Image.open(shot) as image:
            image.convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE).save(out, optimize=True)


def main() -> None:
    """Draw it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hafusion", required=True, type=Path)
    parser.add_argument("--prompt4re", required=True, type=Path)
    parser.add_argument("--city", type=Path, help="the city's folder, which stays")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        city = options.city or Path(folder) / "chicago"
        photograph(report_on_chicago(city, options.hafusion, options.prompt4re), OUT)


if __name__ == "__main__":
    main()

"""One bit flipped, anywhere in a bundle: refused. The figures are in docs/background/reliability.md."""

import random
import shutil

import pytest

from topt_deploy.bundle.manifest import SCHEMA_VERSION
from topt_deploy.bundle.sealed import MANIFEST, open_sealed
from topt_deploy.errors import BadBundle

pytestmark = pytest.mark.slow

SAMPLED = 1000


def flips(path, places, bits):
    """Flip a bit at each place in turn, and flip it back."""
    with path.open("r+b", buffering=0) as file:
        for place in places:
            file.seek(place)
            byte = file.read(1)[0]
            file.seek(place)
            file.write(bytes([byte ^ 1 << bits.randrange(8)]))
            yield f"{path.name}, byte {place}"
            file.seek(place)
            file.write(bytes([byte]))


@pytest.fixture(params=["a city's bundle", "an encoder's bundle"])
def bundle(request, demo_bundle, prompted, tmp_path):
    source = demo_bundle if "city" in request.param else prompted / "encoder.topt"
    return shutil.copytree(source, tmp_path / "m.topt")


def sound(path):
    open_sealed(path, SCHEMA_VERSION).verify()


def refused(path):
    try:
        sound(path)
    except BadBundle:
        return True
    return False


def test_every_byte_of_the_manifest(bundle):
    sound(bundle)
    manifest = bundle / MANIFEST
    count = 0
    for what in flips(manifest, range(manifest.stat().st_size), random.Random(0)):
        assert refused(bundle), what
        count += 1
    assert count == manifest.stat().st_size > 4000
    sound(bundle)


def test_sampled_bytes_of_the_other_files(bundle):
    """As likely in each byte of each file; the seal is one of them."""
    draw = random.Random(1)
    files = sorted(f for f in bundle.rglob("*") if f.is_file() and f.name != MANIFEST)
    chosen = draw.choices(files, weights=[f.stat().st_size for f in files], k=SAMPLED)
    for file in files:
        places = [draw.randrange(file.stat().st_size) for _ in range(chosen.count(file))]
        for what in flips(file, places, draw):
            assert refused(bundle), what
    sound(bundle)

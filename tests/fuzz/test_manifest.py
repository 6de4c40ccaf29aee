"""Manifests that whoever sealed them has changed: a bundle opens, or is refused."""

import hashlib
import json

from fuzzing import contained, contained_records, guided, held_in_memory, mutations, scratch, sealed_manifest
from hypothesis import given
from hypothesis import strategies as st

from topt_deploy.bundle.manifest import open_bundle
from topt_deploy.runtime.predictor import Predictor

FILES = {"onnx/fp32.onnx": b"graph", "onnx/topt.weights": bytes(64), "golden/a.regions.parquet": b"table"}
RECORD = {
    "schema_version": 1, "version": "0.1.0", "opset": 20, "mobility": True, "golden": ["a"], "encoder": None,
    "source": {"city_id": "a", "regions": 3, "synthetic": True, "protocol": "none"},
    "tasks": {"crime": {"prompt": "prompt_crime", "report": {}, "scores": [0.1, 0.5, 1.0], "scale": "cbrt"}},
    "views": {"poi": ["bar", "shop"]}, "prompts": {"prompt_crime": {"width": 8, "encoder": "e", "template": "t"}},
    "ranges": {"poi_bar": [0, 3], "poi_shop": [0, 9], "outflow": [0.0, 1.5], "inflow": [0.0, 1.5]},
    "inputs": ["poi", "mobility", "position", "prompt_crime"],
    "variants": {
        "fp32": {
            "graph": "onnx/fp32.onnx", "weights": "onnx/topt.weights", "initializers": {"w": [0, [4, 4]]},
            "tolerance": 1e-4, "providers": ["CPUExecutionProvider"],
        }
    },
    "files": {name: {"size": len(d), "sha256": hashlib.sha256(d).hexdigest()} for name, d in FILES.items()},
}  # fmt: skip


def seeds() -> list[bytes]:
    return [json.dumps(RECORD).encode(), b"{}", b'{"schema_version": 1e999}']


def target(data: bytes) -> None:
    """Seal the bytes as a manifest, and open the bundle."""
    with held_in_memory(FILES | sealed_manifest(data)):
        opened = open_bundle(scratch())
        Predictor(opened, device="cpu", threads=1)
        _ = opened.manifest.schema
        for name in opened.record["files"]:
            if not name.endswith(".onnx"):
                opened.read(name)


def test_the_seed_is_sound():
    target(seeds()[0])


@given(mutations(seeds()))
def test_bytes(data):
    contained(target, data)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(sorted(FILES)),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@given(st.lists(st.tuples(st.lists(st.integers(0, 20), min_size=1, max_size=5), VALUES), min_size=1, max_size=3))
def test_values(changes):
    """Any value of the record replaced by any other."""
    record = json.loads(json.dumps(RECORD))
    for path, value in changes:
        place, key = {"": record}, ""
        for step in path:
            inner = place[key]
            if not isinstance(inner, (dict, list)) or not inner:
                break
            place, key = inner, (list(inner) if isinstance(inner, dict) else range(len(inner)))[step % len(inner)]
        if place is not None and key != "":
            place[key] = value
    contained(target, json.dumps(record).encode())


def test_altered_records():
    contained_records(RECORD, target)


def test_guided():
    guided(__file__)

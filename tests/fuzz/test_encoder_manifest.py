"""Encoders' manifests that whoever sealed them has changed: a bundle opens, or is refused as a bundle."""

import copy
import functools
import hashlib
import json
from pathlib import Path

import pytest
from fuzzing import contained, contained_records, guided, held_in_memory, mutations, scratch, sealed_manifest
from hypothesis import given, settings
from hypothesis import strategies as st

from topt_deploy.bundle.encoder_manifest import open_encoder_bundle
from topt_deploy.errors import BadBundle, NoDevice, UsageError
from topt_deploy.prompts.golden_regions import read_golden
from topt_deploy.prompts.templates import load_templates
from topt_deploy.runtime.prompt_encoder import load_encoder

pytest.importorskip("tokenizers", reason="tokenizers is not installed (extra encoder)")
from tokenizer import tiny_tokenizer

FILES = {
    "decoder.onnxruntime.onnx": b"graph", "decoder.standard.onnx": b"graph", "decoder.weights": bytes(64),
    "vision.onnxruntime.onnx": b"graph", "vision.weights": bytes(8), "embedding.weights": bytes(4 * 8 * 4),
    "tokenizer.json": tiny_tokenizer(), "golden/regions.parquet": b"table",
}  # fmt: skip
CHAT = {"before": "a", "image": "b", "after": "c"}
RECORD = {
    "schema_version": 1, "version": "0.1.0", "source": {"reference": "PyTorch"}, "precision": "fp32", "kept": {},
    "spec": {
        "family": "qwen2_5_vl", "name": "tiny", "weights_sha256": "0" * 64, "width": 8, "context": 2048,
        "settings": {
            "image_token": 3, "patch": 14, "frames": 2, "merge": 2, "window": 112, "min_pixels": 3136,
            "max_pixels": 50176, "resample": 3, "scale": 0.1, "mean": [0.1, 0.2, 0.3], "std": [0.1, 0.2, 0.3],
        },
        "chat": CHAT, "imageless": None,
    },
    "templates": load_templates().as_dict(), "embedding": {"dtype": "float32", "shape": [4, 8]},
    "past": {"past_key_0": [2, 4]}, "tolerance": {"cosine": 0.999999, "difference": 1e-4},
    "networks": {
        name: {
            "graphs": {"onnxruntime": f"{name}.onnxruntime.onnx", "standard": "decoder.standard.onnx"},
            "weights": f"{name}.weights",
        }
        for name in ("decoder", "vision")
    },
    "parity": [{"cosine": 1.0}], "golden": ["a"], "exact_without_vnni": True,
    "files": {name: {"size": len(d), "sha256": hashlib.sha256(d).hexdigest()} for name, d in FILES.items()},
}  # fmt: skip


def seeds() -> list[bytes]:
    return [json.dumps(RECORD).encode(), b"{}"]


@functools.cache
def folder() -> Path:
    """An encoder's bundle but for its manifest: ONNX Runtime opens files itself."""
    place = scratch() / "encoder.topt"
    for name, data in FILES.items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_bytes(data)
    return place


def target(data: bytes) -> None:
    """Seal the bytes as a manifest, open the bundle, and take it into use as far as a graph that is none lets it."""
    with held_in_memory(FILES | sealed_manifest(data)):
        opened = open_encoder_bundle(folder())
        assert opened.spec.identity
        opened.spec.host(FILES["tokenizer.json"])
        for use in (lambda: read_golden(opened), lambda: load_encoder(opened, engine="onnxruntime", threads=1)):
            with pytest.raises((BadBundle, NoDevice, UsageError)):
                use()


def test_the_seed_is_sound():
    target(seeds()[0])


@settings(deadline=None)
@given(mutations(seeds()))
def test_bytes(data):
    contained(target, data)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(sorted(FILES)),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
PATHS = st.lists(st.integers(0, 20), min_size=1, max_size=5)


@settings(deadline=None)
@given(st.lists(st.tuples(PATHS, VALUES, st.booleans()), min_size=1, max_size=3))
def test_values(changes):
    """Any value of the record replaced by any other, or taken out."""
    record = copy.deepcopy(RECORD)
    for path, value, out in changes:
        place, key = {"": record}, ""
        for step in path:
            inner = place[key]
            if not isinstance(inner, (dict, list)) or not inner:
                break
            place, key = inner, (list(inner) if isinstance(inner, dict) else range(len(inner)))[step % len(inner)]
        if key == "":
            continue
        if out:
            del place[key]
        else:
            place[key] = value
    contained(target, json.dumps(record).encode())


def test_altered_records():
    contained_records(RECORD, target)


def test_guided():
    guided(__file__)

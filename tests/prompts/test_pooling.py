"""Shared beginnings, ragged batches and packed ends against naive passes of a tiny Llama."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from encoders_text import tiny_text
from naive import naive
from transformers import LlamaModel

from topt_deploy.prompts.pooling import allowed, pooled
from topt_deploy.prompts.prompt import Prompt, TokenSequence
from topt_deploy.prompts.pytorch.causal_backend import TorchBackend

IMAGE = 7
TOKENS = 300


class Counted(TorchBackend):
    """A Llama that counts the tokens it reads, and sees each image as the embeddings that it is given as."""

    def __init__(self, model: LlamaModel) -> None:
        super().__init__(model.get_input_embeddings(), model)
        self.calls: list[tuple[int, int]] = []
        self.images = 0

    def vision(self, image):
        self.images += 1
        return torch.tensor(image["features"])

    def decode(self, state, embeds, positions, visible, begins=None):
        self.calls.append(embeds.shape[:2])
        return super().decode(state, embeds, positions, visible, begins)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_text(tmp_path_factory.mktemp("text") / "model").model


@pytest.fixture
def backend(model):
    torch.set_num_threads(1)
    return Counted(model)


def tokens(*lengths, seed=0):
    """Rows of token ids, none an image's."""
    rng = np.random.default_rng(seed)
    return [rng.integers(IMAGE + 1, TOKENS, length) for length in lengths]


def prompt(*rows, images=()):
    sequences = tuple(TokenSequence(ids=row.astype(np.int64), positions=np.arange(len(row))[None]) for row in rows)
    features = tuple({"features": image} for image in images)
    return Prompt(sequences=sequences, images=features, image_token=IMAGE if images else None)


def tasks(beginning, *ends):
    return prompt(*(np.concatenate([beginning, end]) for end in ends))


BEGINNING, A, B, C = tokens(40, 9, 3, 14)
CASES = {
    "three tasks": tasks(BEGINNING, A, B, C),
    "one task": tasks(BEGINNING, A),
    "the same task twice": tasks(BEGINNING, A, A),
    "one task is another's beginning": tasks(BEGINNING, A[:4], A),
    "no task at all": tasks(BEGINNING, A[:0], A[:0]),
    "nothing in common": prompt(A, B + 1, C + 2),
    "ends alike but for one token": tasks(BEGINNING, A, np.append(A[:-1], A[-1] + 1)),
}


@pytest.mark.parametrize("chunk", [1, 7, 40, 1000])
@pytest.mark.parametrize("case", CASES)
def test_sharing_equals_a_pass_for_each_task(backend, case, chunk):
    found = pooled(backend, [CASES[case]], chunk=chunk)
    assert found.dtype == np.float32
    assert np.abs(found[0] - naive(backend, CASES[case])).max() < 1e-5


def test_the_naive_pass_is_transformers_own(backend, model):
    ids = CASES["three tasks"].sequences[0].ids
    with torch.inference_mode():
        expected = model(input_ids=torch.tensor(ids)[None]).last_hidden_state[0].mean(dim=0).numpy()
    assert np.abs(naive(backend, CASES["three tasks"])[0] - expected).max() < 1e-6


def test_the_common_beginning_is_read_once_and_the_ends_in_one_row(backend):
    pooled(backend, [CASES["three tasks"]], chunk=16)
    assert backend.calls == [(1, 14), (1, 13), (1, 13), (1, 9 + 3 + 14)]


@pytest.mark.parametrize("seed", range(4))
def test_regions_of_any_length_in_one_batch(backend, seed):
    rng = np.random.default_rng(seed)
    prompts = []
    for number in range(4):
        beginning, *ends = tokens(*rng.integers(5, 60, 1), *rng.integers(0, 12, 3), seed=[seed, number])
        prompts.append(tasks(beginning, *ends))
    found = pooled(backend, prompts, chunk=13)
    expected = np.stack([naive(backend, one) for one in prompts])
    assert np.abs(found - expected).max() < 1e-5
    assert np.array_equal(found, pooled(backend, prompts, chunk=13))


def test_a_batch_of_unlike_regions_shares_what_the_shortest_does(backend):
    prompts = [tasks(BEGINNING, A, B), tasks(BEGINNING[:10], C, B)]
    pooled(backend, prompts)
    # 30 more tokens of the longer beginning stand before each of its tasks' ends.
    assert backend.calls == [(2, 10), (2, 30 + len(A) + 30 + len(B))]


def test_images_stand_in_their_places_and_are_seen_once(backend):
    rng = np.random.default_rng(1)
    images = [rng.normal(size=(size, 32)).astype(np.float32) for size in (5, 2)]
    beginning = np.concatenate([BEGINNING[:3], [IMAGE] * 5, BEGINNING[3:9], [IMAGE] * 2, BEGINNING[9:]])
    rows = [np.concatenate([beginning, end]) for end in (A, B)]
    found = pooled(backend, [prompt(*rows, images=images)], chunk=6)[0]
    assert backend.images == 2
    assert np.abs(found - naive(backend, prompt(*rows, images=images))).max() < 1e-5
    assert np.abs(found - pooled(backend, [prompt(*rows, images=[images[0], -images[1]])])[0]).max() > 1e-3


def test_positions_are_the_sequences_own(backend):
    shifted = CASES["three tasks"]
    gaps = [np.where(np.arange(len(s.ids)) < 20, s.positions, s.positions + 50) for s in shifted.sequences]
    shifted = replace(
        shifted, sequences=tuple(replace(s, positions=p) for s, p in zip(shifted.sequences, gaps, strict=True))
    )
    found = pooled(backend, [shifted], chunk=11)[0]
    assert np.abs(found - naive(backend, shifted)).max() < 1e-5
    assert np.abs(found - pooled(backend, [CASES["three tasks"]])[0]).max() > 1e-3


def test_a_token_sees_what_was_before_and_its_own_end():
    begins = np.array([[0, 0, 2, 2, 4], [0, 1, 1, 1, 1]])
    for past in (0, 3):
        found = allowed(begins, past)
        assert found.shape == (2, 1, 5, past + 5)
        for b, s, seen in np.ndindex(2, 5, past + 5):
            new = seen - past
            assert found[b, 0, s, seen] == (new < 0 or begins[b, s] <= new <= s)

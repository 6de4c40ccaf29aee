"""Regions unlike each other that encoders are asked about. Imports no torch."""

import numpy as np

from topt_deploy.prompts.templates import load_templates

QUESTIONS = [load_templates().question("crime"), "", "How many check-ins?", "How many check-ins are there?"]
REGIONS = {
    "one image, few words": ("Where?", [(57, 200)]),
    "no image": ("At 52.5, 13.4 there are 1250 cafés, 3 museums and no shop.", []),
    "images of every shape": ("Address: Karl-Marx-Allee 1.", [(300, 31), (80, 80), (47, 121), (200, 240), (63, 62)]),
    "a long text": ("Included POIs: " + ", ".join(f"{i} kinds of place {i % 7}" for i in range(60)), [(90, 100)]),
}


def pictures(sizes):
    rng = np.random.default_rng(len(sizes))
    return [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes]


def asked(encoder, region, family):
    text, sizes = REGIONS[region]
    return encoder.prompt(text, pictures(sizes) if family != "text" else [], QUESTIONS)

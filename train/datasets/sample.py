"""A made-up city to try everything on: known truth, known noise, and "synthetic" written all over it.

Hidden fields over the city (density, trade, industry, night life) shape points of interest and land use.
Flows follow a gravity law in which every region attracts a mix of visitors of its own, which nothing but the
flows shows. Three attributes stand in the texts and nowhere else. Each label is a negative binomial count
around a mean that depends on all of these:

    log μ = a + s · Σ_k w_k z_k,    z = views, visitors' origin, neighbours, text (each standardised)
    y ~ NB(μ, size): variance μ + μ²/size

so the best R² that any model can reach is known: the one of μ itself.

Prompts are a real language model's where they are shipped, which is for the default size and seed; elsewhere they are
hashed words, and say so.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from topt_deploy.data.geometry import geo_library, geo_metadata, geometry_types
from topt_deploy.errors import UsageError
from topt_deploy.prompts.geotext import geo_text
from topt_deploy.prompts.templates import Templates, Wording, load_templates

from .city_files import fixed_lists, flow_table, table, write_city
from .sample_prompts import Prompts, shipped_prompts
from .sample_recipe import ATTRIBUTES, LAND_USE, LAND_USE_SPREAD, POI, SENTENCES, STREETS, TASKS

Array = np.ndarray[Any, Any]
CITY = "synthetic-demo"
CENTRE = (-30.0, 40.0)
"""Longitude and latitude in the middle of the Atlantic, so that nobody takes the city for a real one."""
KM_PER_DEGREE = 111.32
REGION_KM2 = 1.2
FLOWS_PER_REGION = 30
HIDDEN_SHARE = 0.1
HASHING_WIDTH = 256
HASHING = f"hashing-{HASHING_WIDTH} (stand-in, no language model)"


@dataclass(frozen=True, kw_only=True)
class SampleReport:
    """A summary of the city. ``best_r2`` is the R² of the true means, by task, over the regions with labels;
    ``encoder`` is the encoder of the prompts."""

    out: Path
    seed: int
    regions: int
    hidden: int
    flow_pairs: int
    best_r2: dict[str, float]
    encoder: str

    def __str__(self) -> str:
        best = ", ".join(f"{task} {value:.3f}" for task, value in self.best_r2.items())
        lines = [
            f"{CITY}: a synthetic city of {self.regions} regions (seed {self.seed}); nothing in it is real",
            f"  labels    {self.regions - self.hidden} regions; {self.hidden} without, to predict",
            f"  flows     {self.flow_pairs:,} pairs",
            f"  prompts   by {self.encoder}",
            f"  best R²   {best} (of the true means: no model can expect more)",
            f"next: cd {self.out} && topt-deploy train",
        ]
        return "\n".join(lines)


@dataclass(frozen=True, kw_only=True)
class _Land:
    """The shapes and places of the regions.

    Attributes:
        cells: Their shapes (N,), in degrees.
        lonlat: float64 (N, 2), centroids in degrees.
        km: float64 (N, 2), from the city's centre.
        hectares: float64 (N,).
    """

    cells: Array
    lonlat: Array
    km: Array
    hectares: Array


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """A city as it was drawn. N regions.

    Attributes:
        ids: str (N,).
        land: Where they are.
        poi: int64 (N, C), by the categories of :data:`POI`.
        land_use: float64 (N, C), hectares by the classes of :data:`LAND_USE`.
        flows: Origins, destinations (E,) and trips.
        text: Geo-texts.
        prompts: Prompt vectors.
        labels: int64 (N,) by task.
        best: R² of the true means by task, over the regions with labels.
        hidden: bool (N,): the regions without labels.
    """

    ids: Array
    land: "_Land"
    poi: Array
    land_use: Array
    flows: tuple[Array, Array, Array]
    text: list[str]
    prompts: Prompts
    labels: dict[str, Array]
    best: dict[str, float]
    hidden: Array


def draw_city(regions: int, seed: int) -> Drawn:
    """Draw a city; the same number and seed give the same.

    Raises:
        UsageError: If there are too few regions to be a city.
    """
    if regions < 20:
        raise UsageError("too few regions for a city", expected="--regions of at least 20", found=regions)
    rng = np.random.default_rng(seed)
    ids = np.array([f"D{number:0{max(3, len(str(regions)))}d}" for number in range(1, regions + 1)])
    land = _land(regions, rng)
    fields = _fields(land.km, rng)
    poi = rng.poisson(np.exp(_respond(fields, POI)))
    parts = rng.gamma(LAND_USE_SPREAD * _softmax(_respond(fields, LAND_USE)))
    land_use = np.round(land.hectares[:, None] * parts / parts.sum(axis=1, keepdims=True), 2)
    log_poi = dict(zip(POI, _standard(np.log1p(poi)).T, strict=True))
    flows = _flows(land.km, fields, log_poi, rng)
    levels = {name: rng.integers(len(words), size=regions) for name, words in ATTRIBUTES.items()}
    templates = load_templates()
    text = _texts(templates.wording, land.lonlat, poi, levels, rng)
    prompts = shipped_prompts(text, {task: templates.sha256(task) for task in TASKS}) or _hashed(text, templates)
    means = _means(land.km, log_poi, flows, levels)
    hidden = rng.permutation(regions) < round(HIDDEN_SHARE * regions)
    labels, best = {}, {}
    for task, mean in means.items():
        size = TASKS[task].size
        labels[task] = rng.negative_binomial(size, size / (size + mean))
        best[task] = _r2(labels[task][~hidden], mean[~hidden])
    return Drawn(
        ids=ids,
        land=land,
        poi=poi,
        land_use=land_use,
        flows=flows,
        text=text,
        prompts=prompts,
        labels=labels,
        best=best,
        hidden=hidden,
    )


def make_sample(out: Path, *, regions: int = 120, seed: int = 0) -> SampleReport:
    """Write the synthetic city to ``out``; the same number and seed give the same bytes.

    Args:
        out: Folder for regions.parquet and mobility.parquet.
        regions: N, at least 20.
        seed: Of all that is random.

    Raises:
        UsageError: If there are too few regions to be a city, or tables that are no older sample.
    """
    drawn = draw_city(regions, seed)
    ids, land, text, prompts = drawn.ids, drawn.land, drawn.text, drawn.prompts
    origin, dest, flow = drawn.flows
    columns: dict[str, Any] = {"region_id": ids, "city_id": [CITY] * regions}
    columns |= {
        "lon": land.lonlat[:, 0],
        "lat": land.lonlat[:, 1],
        "geometry": _wkb(land.cells),
        "text": text,
    }
    columns |= {f"poi_{name}": drawn.poi[:, k] for k, name in enumerate(POI)}
    columns |= {f"land_use_{name}": drawn.land_use[:, k] for k, name in enumerate(LAND_USE)}
    columns |= {task: pa.array(label, mask=drawn.hidden) for task, label in drawn.labels.items()}
    columns |= {f"prompt_{task}": fixed_lists(vectors) for task, vectors in prompts.vectors.items()}
    metadata: dict[str, str | bytes] = {
        "synthetic": "true",
        "source": f"topt-deploy sample --regions {regions} --seed {seed}",
        "encoder": prompts.encoder,
        "best_r2": json.dumps({task: round(value, 4) for task, value in drawn.best.items()}),
        "geo": geo_metadata(geometry_types(columns["geometry"])),
    }
    described = {f"prompt_{task}": fields for task, fields in prompts.fields.items()}
    mobility = flow_table(CITY, ids, origin, dest, {"flow": flow})
    write_city(
        Path(out),
        table(columns, metadata, described),
        mobility.replace_schema_metadata({"synthetic": "true", "source": metadata["source"]}),
    )
    return SampleReport(
        out=Path(out),
        seed=seed,
        regions=regions,
        hidden=int(drawn.hidden.sum()),
        flow_pairs=len(flow),
        best_r2=drawn.best,
        encoder=prompts.encoder,
    )


def _land(n: int, rng: np.random.Generator) -> _Land:
    """Voronoi cells of evenly spread random points, clipped to an uneven coast."""
    shapely = geo_library("shapely")
    turn = np.linspace(0, 2 * np.pi, 181)[:-1]
    radius = 1 + sum(rng.uniform(-0.12, 0.12) * np.cos(k * turn + rng.uniform(0, 2 * np.pi)) for k in (2, 3, 5))
    radius *= np.sqrt(n * REGION_KM2 / np.pi)
    coast = shapely.polygons(np.stack([radius * np.cos(turn), radius * np.sin(turn)], axis=1))
    shapely.prepare(coast)
    candidates = rng.uniform(-radius.max(), radius.max(), size=(8 * n, 2))
    points = candidates[shapely.contains_xy(coast, candidates)][:n]
    for _ in range(3):  # Lloyd's relaxation: each point to its cell's centroid
        cells = shapely.get_parts(shapely.voronoi_polygons(shapely.multipoints(points), extend_to=coast, ordered=True))
        cells = shapely.intersection(cells, coast)
        points = shapely.get_coordinates(shapely.centroid(cells))
    cells = shapely.transform(shapely.set_precision(cells, 1e-3), _degrees)
    return _Land(
        cells=cells,
        lonlat=shapely.get_coordinates(shapely.centroid(cells)),
        km=points,
        hectares=100 * shapely.area(shapely.transform(cells, lambda xy: xy * _km_per_degree())),
    )


def _km_per_degree() -> Array:
    return KM_PER_DEGREE * np.array([np.cos(np.radians(CENTRE[1])), 1.0])


def _degrees(km: Array) -> Array:
    return np.round(np.array(CENTRE) + km / _km_per_degree(), 6)


def _fields(km: Array, rng: np.random.Generator) -> Array:
    """Density, trade, industry and night life, standardised (N, 4): smooth bumps, and some roughness."""
    extent = np.abs(km).max()
    centres = rng.uniform(-0.8, 0.8, size=(4, 6, 2)) * extent
    weights = rng.uniform(0.4, 1.2, size=(4, 6))
    squared = ((km[:, None, None, :] - centres) ** 2).sum(axis=-1)
    smooth = (weights * np.exp(-squared / (2 * (0.25 * extent) ** 2))).sum(axis=-1)
    smooth[:, 0] += np.exp(-np.hypot(*km.T) / (0.5 * extent))  # a centre
    return _standard(_standard(smooth) + 0.6 * rng.normal(size=smooth.shape))


def _respond(fields: Array, categories: Mapping[str, tuple[float, ...]]) -> Array:
    answers = np.array(list(categories.values()))
    return fields @ answers[:, :4].T * 0.8 + answers[:, 4]


def _softmax(scores: Array) -> Array:
    powers = np.exp(scores - scores.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


def _flows(km: Array, fields: Array, log_poi: dict[str, Array], rng: np.random.Generator) -> tuple[Array, Array, Array]:
    """Trips as (E,) origins, destinations and counts, sorted; the strongest origins of each destination.

    Gravity, where each destination has a taste for origins with much night life, offices or warehouses:
    T_ij ~ Poisson(c · P_i · A_j · exp(−d_ij / d_0 + taste_j · f_i)).
    """
    n = len(km)
    sources = np.stack([log_poi[name] for name in ("nightlife", "office", "warehouse")], axis=1)
    taste = rng.normal(scale=1.0, size=sources.shape)
    people, pull = 0.5 * fields[:, 0], 0.4 * fields[:, 0] + 0.4 * fields[:, 1] + 0.3 * fields[:, 3]
    reach = 0.4 * np.abs(km).max() * min(1.0, np.sqrt(300 / n))
    origins, dests, rates = [], [], []
    kept = min(FLOWS_PER_REGION, n - 1)
    for start in range(0, n, 512):  # blocks of destinations, so that no N × N array is held
        j = np.arange(start, min(start + 512, n))
        distance = np.hypot(*(km[j, None] - km).transpose(2, 0, 1))
        weight = people - distance / reach + taste[j] @ sources.T
        i = np.argpartition(-weight, kept, axis=1)[:, :kept]
        share = _softmax(np.take_along_axis(weight, i, axis=1))
        origins.append(i.ravel())
        dests.append(np.repeat(j, kept))
        rates.append((3000 * np.exp(pull[j])[:, None] * share).ravel())
    origin, dest = np.concatenate(origins), np.concatenate(dests)
    flow = rng.poisson(np.concatenate(rates))
    order = np.lexsort((dest, origin))
    order = order[flow[order] > 0]
    return origin[order], dest[order], flow[order]


def _means(
    km: Array, log_poi: dict[str, Array], flows: tuple[Array, Array, Array], levels: dict[str, Array]
) -> dict[str, Array]:
    """The true mean of each label, (N,) by task."""
    from scipy.spatial import cKDTree

    n = len(km)
    near = cKDTree(km).query(km, k=7)[1][:, 1:]
    origin, dest, flow = flows
    inflow = np.bincount(dest, flow, n)

    def visitors(values: Array) -> Array:
        return np.bincount(dest, flow * values[origin], n) / np.maximum(inflow, 1)

    centred = {name: _standard(level.astype(float)) for name, level in levels.items()}
    means = {}
    for name, task in TASKS.items():
        views = sum(weight * log_poi[k] for k, weight in task.poi.items())
        parts = (
            views,
            sum(weight * visitors(log_poi[k]) for k, weight in task.visitors.items()),
            np.asarray(views)[near].mean(axis=1),
            sum(weight * centred[k] for k, weight in task.attributes.items()),
        )
        score = sum(w * _standard(np.asarray(part)) for w, part in zip(task.shares, parts, strict=True))
        means[name] = task.level * np.exp(task.spread * _standard(np.asarray(score)))
    return means


def _texts(
    wording: Wording, lonlat: Array, poi: Array, levels: dict[str, Array], rng: np.random.Generator
) -> list[str]:
    """Geo-texts as the encoder builds them, with what only a text can tell at the end."""
    n = len(lonlat)
    streets, numbers = rng.integers(len(STREETS), size=n), rng.integers(1, 200, size=n)
    forms = {name: rng.integers(len(SENTENCES[name]), size=n) for name in ATTRIBUTES}
    texts = []
    for i, (lon, lat) in enumerate(lonlat):
        address = f"{numbers[i]}, {STREETS[streets[i]]} Street, Demo City (synthetic)"
        counts = dict(zip(POI, poi[i].tolist(), strict=True))
        told = " ".join(
            SENTENCES[name][forms[name][i]].format(ATTRIBUTES[name][levels[name][i]]) for name in ATTRIBUTES
        )
        texts.append(geo_text(wording, lon=lon, lat=lat, address=address, pois=counts) + f"\nImpressions: {told}")
    return texts


def _hashed(texts: list[str], templates: Templates) -> Prompts:
    """Stand-in for a language model's prompt vectors: hashed counts of words, digits left out."""
    from sklearn.feature_extraction.text import HashingVectorizer

    words = HashingVectorizer(n_features=HASHING_WIDTH, token_pattern=r"[a-z]{3,}", norm="l2")
    asked = {task: [f"{text} {templates.question(task)}" for text in texts] for task in TASKS}
    vectors = {task: words.transform(prompts).toarray() for task, prompts in asked.items()}
    return Prompts(encoder=HASHING, vectors=vectors, fields={task: {"encoder": HASHING} for task in TASKS})


def _wkb(cells: Array) -> pa.Array:
    return pa.array(geo_library("shapely").to_wkb(cells), pa.binary())


def _standard(values: Array) -> Array:
    """Mean 0 and standard deviation 1 per column."""
    return (values - values.mean(axis=0)) / values.std(axis=0)


def _r2(y: Array, prediction: Array) -> float:
    return float(1 - ((y - prediction) ** 2).sum() / ((y - y.mean()) ** 2).sum())

"""`topt-run predict` of regions without prompts: made by the encoder that the bundle goes with, and by no other."""

import json
import shutil
import zipfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from commands import Desk
from PIL import Image

from topt_deploy.bundle.encoder_manifest import open_encoder_bundle
from topt_deploy.errors import BadData
from topt_deploy.runtime import load

PLACES = {"model.topt": "model.topt/encoder", "beside.topt": "encoder.topt"}
NO_INPUT, BAD_DATA, BAD_BUNDLE = 66, 65, 76


@pytest.fixture
def desk(prompted, tmp_path):
    folder = shutil.copytree(prompted, tmp_path / "desk", ignore=shutil.ignore_patterns("runs"))
    (folder / "bare.parquet").rename(folder / "regions.parquet")
    return Desk(folder)


@pytest.fixture
def predicted(topt_run, desk):
    """Predict with this bundle and these options; the output's bytes and the receipt."""

    def call(bundle, *arguments):
        said = topt_run("predict", desk.regions, "--bundle", desk.folder / bundle, *arguments)
        assert said.code == 0, said.err
        return desk.out.read_bytes(), json.loads(desk.receipt.read_text())

    return call


@pytest.mark.parametrize("bundle", PLACES)
def test_as_if_the_prompts_had_been_encoded_before(topt_run, desk, predicted, bundle):
    found, receipt = predicted(bundle)
    assert receipt["encoder"]["encoded"] == 20
    assert receipt["encoder"]["engine"] == "onnxruntime"
    assert "prompt_crime" not in pq.read_schema(desk.regions).names, "the input stays as it is"
    tasks = ("--task", "crime", "--task", "check_in")
    said = topt_run("encode", desk.regions, "--bundle", desk.folder / bundle, *tasks, "--no-cache", "--update-regions")
    assert said.code == 0, said.err
    again, receipt = predicted(bundle)
    assert receipt["encoder"] is None
    assert found == again


def test_both_places_say_the_same_and_what_pytorch_encoded_nearly_so(desk, predicted, prompted, topt_run):
    bare = {bundle: predicted(bundle)[0] for bundle in PLACES}
    assert bare["model.topt"] == bare["beside.topt"]
    ours = pq.read_table(desk.out).column("prediction").to_numpy()
    shutil.copy(prompted / "regions.parquet", desk.regions)
    predicted("model.topt")
    assert pq.read_table(desk.out).column("prediction").to_numpy() == pytest.approx(ours, rel=1e-4)


def test_prompts_are_kept_for_the_next_time(desk, predicted):
    first, receipt = predicted("model.topt")
    assert (receipt["encoder"]["encoded"], receipt["encoder"]["cached"]) == (20, 0)
    again, receipt = predicted("model.topt")
    assert (receipt["encoder"]["encoded"], receipt["encoder"]["cached"]) == (0, 20)
    assert first == again
    shutil.rmtree(desk.folder / ".topt")
    third, _ = predicted("model.topt", "--no-cache")
    assert third == first
    assert not (desk.folder / ".topt").exists()


def test_only_what_is_missing_is_encoded(desk, predicted, prompted):
    whole = pq.read_table(prompted / "regions.parquet")
    pq.write_table(whole.drop_columns("prompt_crime"), desk.regions)
    _, receipt = predicted("beside.topt")
    assert receipt["encoder"]["encoded"] == 20
    pq.write_table(whole, desk.regions)
    _, receipt = predicted("beside.topt")
    assert receipt["encoder"] is None


def test_on_openvino(desk, predicted):
    pytest.importorskip("openvino", reason="OpenVINO is not installed (extra openvino)")
    predicted("model.topt")
    ours = pq.read_table(desk.out).column("prediction").to_numpy()
    _, receipt = predicted("model.topt", "--encoder-engine", "openvino")
    assert receipt["encoder"]["engine"] == "openvino"
    assert receipt["encoder"]["encoded"] == 20, "vectors of one engine are not taken for another's"
    assert pq.read_table(desk.out).column("prediction").to_numpy() == pytest.approx(ours, rel=1e-4)


@pytest.mark.parametrize("bundle", PLACES)
def test_tables_of_a_program(desk, bundle):
    predictor = load(desk.folder / bundle)
    regions, mobility = pq.read_table(desk.regions), pq.read_table(desk.mobility)
    predictions = predictor.predictions(regions, mobility)
    assert predictions.encoded["encoded"] == 20
    table = predictions.long()
    assert table.equals(predictor.predict(desk.regions, desk.mobility))
    renamed = regions.rename_columns(["id" if name == "region_id" else name for name in regions.column_names])
    assert table.equals(predictor.predict(renamed, mobility, id_col="id"))


def test_an_encoder_in_another_place(topt_run, desk, predicted, tmp_path):
    (desk.folder / "encoder.topt").rename(tmp_path / "other.topt")
    said = topt_run("predict", desk.regions, "--bundle", desk.folder / "beside.topt")
    assert said.code == NO_INPUT
    for part in ("prompt encoder was not found", str(desk.folder / "encoder.topt"), "--encoder-bundle", "text sha256:"):
        assert part in said.err
    assert not desk.out.exists()
    predicted("beside.topt", "--encoder-bundle", tmp_path / "other.topt")


@pytest.mark.parametrize(("family", "precision"), [("text", "int8"), ("qwen2_5_vl", "fp32")])
def test_another_encoder(topt_run, desk, encoders, family, precision):
    arguments = ("predict", desk.regions, "--bundle", desk.folder / "beside.topt")
    said = topt_run(*arguments, "--encoder-bundle", encoders(family, precision))
    assert said.code == BAD_BUNDLE
    assert "not the prompt encoder that the bundle was exported with" in said.err
    assert not desk.out.exists()


def test_an_encoder_with_other_templates(topt_run, desk, reseal):
    encoder = desk.folder / "encoder.topt"

    def ask_otherwise(record):
        record["templates"]["tasks"]["crime"]["question"] = "How safe is it?"

    reseal(encoder, ask_otherwise)
    said = topt_run("predict", desk.regions, "--bundle", desk.folder / "beside.topt")
    assert said.code == BAD_BUNDLE
    assert "not the prompt encoder that the bundle was exported with" in said.err
    # Encoded with it on purpose, its vectors are refused by the hash of their template.
    tasks = ("--task", "crime", "--task", "check_in", "--update-regions")
    assert topt_run("encode", desk.regions, "--bundle", encoder, *tasks).code == 0
    said = topt_run("predict", desk.regions, "--bundle", desk.folder / "beside.topt")
    assert said.code == BAD_DATA
    assert "another template than the model's" in said.err


@pytest.mark.parametrize("bundle", PLACES)
@pytest.mark.parametrize(
    "name",
    [
        "manifest.json", "manifest.json.sha256", "tokenizer.json", "embedding.weights", "decoder.weights",
        "decoder.onnxruntime.onnx",
    ],
)  # fmt: skip
def test_a_changed_byte_of_the_encoder(topt_run, desk, bundle, name):
    file = desk.folder / PLACES[bundle] / name
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    said = topt_run("predict", desk.regions, "--bundle", desk.folder / bundle)
    assert said.code == BAD_BUNDLE, said
    assert "Traceback" not in said.err
    assert not desk.out.exists()


def test_an_encoder_that_was_exchanged_as_a_whole(topt_run, desk, encoders):
    shutil.rmtree(desk.folder / "encoder.topt")
    shutil.copytree(encoders("text", "fp16"), desk.folder / "encoder.topt")
    said = topt_run("predict", desk.regions, "--bundle", desk.folder / "beside.topt")
    assert said.code == BAD_BUNDLE
    assert "manifest" in said.err


def test_a_zipped_city_finds_its_encoder_beside_it(topt_run, desk, predicted):
    for name in PLACES:
        with zipfile.ZipFile(desk.folder / f"zipped-{name}", "w") as archive:
            for file in (f for f in (desk.folder / name).rglob("*") if f.is_file()):
                archive.write(file, file.relative_to(desk.folder / name))
    found, _ = predicted("zipped-beside.topt")
    assert found == predicted("beside.topt")[0]
    # One that holds it cannot be mapped, and says so; with prompts it serves.
    said = topt_run("predict", desk.regions, "--bundle", desk.folder / "zipped-model.topt")
    assert said.code == 2
    assert "unzip the bundle" in said.err


def test_a_zipped_city_with_its_encoder_predicts_where_prompts_are_there(desk, predicted, prompted):
    with zipfile.ZipFile(desk.folder / "zipped.topt", "w") as archive:
        for file in (f for f in (desk.folder / "model.topt").rglob("*") if f.is_file()):
            archive.write(file, file.relative_to(desk.folder / "model.topt"))
    shutil.copy(prompted / "regions.parquet", desk.regions)
    assert predicted("zipped.topt")[0] == predicted("model.topt")[0]


def test_regions_of_which_nothing_is_known(topt_run, desk):
    table = pq.read_table(desk.regions)
    kept = [name for name in table.column_names if not name.startswith("poi_")]
    pq.write_table(table.select(kept), desk.regions)
    said = topt_run("predict", desk.regions, "--bundle", desk.folder / "beside.topt")
    assert said.code == BAD_DATA
    assert "some regions have nothing" in said.err


def test_a_bundle_without_an_encoder_says_what_is_missing(demo_bundle):
    regions, mobility = (pq.read_table(demo_bundle.with_name(f"{name}.parquet")) for name in ("regions", "mobility"))
    prompts = [name for name in regions.column_names if name.startswith("prompt_")]
    with pytest.raises(BadData) as refused:
        load(demo_bundle).predict(regions.drop_columns(prompts), mobility)
    assert refused.value.column == prompts[0] or "prompt" in str(refused.value)


@pytest.mark.parametrize(
    ("policy", "code", "statuses"), [("fail", BAD_DATA, None), ("quarantine", 3, [19, 0]), ("mask", 3, [20, 1])]
)
def test_an_unreadable_image(topt_run, desk, reseal, encoders, policy, code, statuses):
    encoder = open_encoder_bundle(encoders("qwen2_5_vl"))
    shutil.copytree(encoder.path, desk.folder / "seeing.topt")

    def see(record):  # a tiny model that sees has vectors of the same width
        record["encoder"] = {"identity": encoder.spec.identity, "sha256": encoder.sha256, "bundle": "seeing.topt"}
        for facts in record["prompts"].values():
            facts["encoder"], facts["precision"] = encoder.spec.identity, "fp32"

    reseal(desk.folder / "beside.topt", see)
    Image.new("RGB", (40, 30), "red").save(desk.folder / "sound.png")
    (desk.folder / "broken.png").write_bytes((desk.folder / "sound.png").read_bytes()[:60])
    table = pq.read_table(desk.regions)
    images = [["sound.png"], ["sound.png", "broken.png"]] + [[]] * 18
    pq.write_table(table.append_column("images", pa.array(images, pa.list_(pa.string()))), desk.regions)
    said = topt_run("predict", desk.regions, "--bundle", desk.folder / "beside.topt", "--on-bad-row", policy)
    assert said.code == code, said.err
    region = table.column("region_id")[1].as_py()
    if statuses is None:
        assert "broken.png" in said.err
        assert region in said.err
        assert not desk.out.exists()
        return
    rows = pq.read_table(desk.out).to_pylist()
    mine = [row for row in rows if row["task"] == "crime"]
    assert [len(mine), sum(row["status"] == "masked" for row in mine)] == statuses
    assert [row["prediction"] for row in mine if row["region_id"] == region] == [None] * statuses[1]
    (aside,) = pq.read_table(desk.folder / "predictions.quarantine.parquet").to_pylist()
    assert (aside["region_id"], aside["row"], aside["reason_code"]) == (region, 1, "bad_image")

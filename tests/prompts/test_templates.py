import json
from importlib import resources

import pytest

from topt_deploy.errors import BadConfig, NoInput, UsageError
from topt_deploy.prompts.templates import Templates, load_templates

SHIPPED = load_templates()


@pytest.fixture
def own(tmp_path):
    def load(text):
        (tmp_path / "own.toml").write_text(text, encoding="utf-8")
        return load_templates(tmp_path / "own.toml")

    return load


class TestShipped:
    def test_tasks(self):
        assert list(SHIPPED.questions) == ["crime", "check_in", "service_call", "none"]
        assert SHIPPED.questions["none"] == ""
        assert SHIPPED.version

    @pytest.mark.parametrize("task", ["crime", "check_in", "service_call"])
    def test_questions_are_a_few_plain_sentences(self, task):
        question = SHIPPED.question(task)
        assert 2 <= question.count(". ") + 1 <= 4
        assert question.endswith(".")
        assert "\n" not in question
        assert "images" in question
        assert "description" in question

    def test_lies_in_the_package(self):
        assert (resources.files("topt_deploy.prompts") / "templates.toml").is_file()

    def test_an_unknown_task(self):
        with pytest.raises(UsageError, match="no template for task 'noise'") as refused:
            SHIPPED.question("noise")
        assert refused.value.expected == "one of crime, check_in, service_call, none"
        with pytest.raises(UsageError):
            SHIPPED.sha256("noise")


class TestOwn:
    def test_a_new_task_beside_the_shipped(self, own):
        templates = own('[tasks.noise]\nquestion = """\nHow loud is it — really?\n"""')
        assert templates.questions == {**SHIPPED.questions, "noise": "How loud is it — really?"}
        assert templates.version == SHIPPED.version
        assert templates.wording == SHIPPED.wording

    def test_overriding(self, own):
        templates = own('version = "mine"\n[geo_text]\nheading = "A {{place}}."\n[tasks.crime]\nquestion = "Safe?"')
        assert templates.version == "mine"
        assert templates.question("crime") == "Safe?"
        assert templates.question("check_in") == SHIPPED.question("check_in")
        assert templates.wording.heading == "A {{place}}."
        assert templates.wording.pois == SHIPPED.wording.pois

    def test_an_empty_file_changes_nothing(self, own):
        assert own("") == SHIPPED

    @pytest.mark.parametrize(
        ("text", "parts"),
        [
            ("tasks = 3", ["column 'tasks': not a table", "[tasks]", "3"]),
            ("geo_text = []", ["column 'geo_text': not a table"]),
            ("Version = 1", ["unknown key 'Version'", "one of version, geo_text, tasks"]),
            ("version = 2", ["column 'version': not a text", "2"]),
            ("[geo_text]\nlines = ''", ["unknown key 'geo_text.lines'", "heading"]),
            ("[geo_text]\npoi = 3", ["column 'geo_text.poi': not a text"]),
            ("[geo_text]\npoi = '{count} {name}'", ["geo_text.poi", "{category}, {count}, {share}", "{name}"]),
            ("[geo_text]\npoi = '{count:d}'", ["geo_text.poi", "nothing to fill in", "{count:d}"]),
            ("[geo_text]\npoi = '{count!r}'", ["geo_text.poi", "nothing to fill in"]),
            ("[geo_text]\npoi = '{count.real}'", ["geo_text.poi", "nothing to fill in"]),
            ("[geo_text]\npoi = '{}'", ["geo_text.poi", "nothing to fill in"]),
            ("[geo_text]\nheading = 'a } b'", ["geo_text.heading", "plain text", "doubled"]),
            ("[tasks.noise]\nquestions = ''", ["unknown key 'tasks.noise.questions'", "one of question"]),
            ("[tasks.noise]", ["column 'tasks.noise.question': not a text"]),
            ("[tasks]\nnoise = 'How loud?'", ["column 'tasks.noise': not a table"]),
            ("[tasks.'no ise']\nquestion = ''", ["tasks.no ise", "no name for a task"]),
            ("[tasks.geometry]\nquestion = ''", ["tasks.geometry", "no name for a task"]),
            ("[tasks", ["not valid TOML"]),
        ],
    )
    def test_mistakes(self, own, text, parts):
        with pytest.raises(BadConfig) as refused:
            own(text)
        for part in ["own.toml", *parts]:
            assert part in str(refused.value)

    def test_no_file(self, tmp_path):
        with pytest.raises(NoInput):
            load_templates(tmp_path / "none.toml")


class TestHashes:
    def test_what_they_are_of(self, own):
        other_question = own('[tasks.crime]\nquestion = "Safe?"')
        other_wording = own('[geo_text]\nheading = "A place."')
        other_version = own('version = "2"')
        for changed in (other_question, other_wording, other_version):
            assert changed.whole_sha256 != SHIPPED.whole_sha256
            assert changed.sha256("crime") != SHIPPED.sha256("crime")
        assert other_question.sha256("check_in") == SHIPPED.sha256("check_in")
        assert other_wording.sha256("check_in") != SHIPPED.sha256("check_in")
        assert len({SHIPPED.sha256(task) for task in SHIPPED.questions}) == 4

    def test_a_new_task_leaves_the_others(self, own):
        with_noise = own('[tasks.noise]\nquestion = "How loud?"')
        assert {t: with_noise.sha256(t) for t in SHIPPED.questions} == {t: SHIPPED.sha256(t) for t in SHIPPED.questions}
        assert with_noise.whole_sha256 != SHIPPED.whole_sha256


def test_plain_values_and_back(own):
    templates = own('[tasks.noise]\nquestion = "How loud — really?"')
    assert Templates.from_dict(json.loads(json.dumps(templates.as_dict()))) == templates
    with pytest.raises(BadConfig, match="column 'tasks': not a table"):
        Templates.from_dict({"version": "1", "geo_text": templates.as_dict()["geo_text"]})

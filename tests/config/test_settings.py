import json
from dataclasses import asdict

import pytest

from topt_deploy.config.load import config_from_dict, load_config, presets
from topt_deploy.errors import BadConfig, Exit, NoInput


def load(tmp_path, text, **more):
    file = tmp_path / "topt.toml"
    file.write_text(text)
    return load_config(file=file, **{"preset": "paper", **more})


def refuse(tmp_path, text="", **more):
    with pytest.raises(BadConfig) as caught:
        load(tmp_path, text, **more)
    assert caught.value.exit_code == Exit.BAD_CONFIG
    return str(caught.value).replace(str(tmp_path), "")  # which has the test's own name in it


class TestPresets:
    @pytest.mark.parametrize("name", presets())
    def test_loads(self, name):
        config = load_config(preset=name)
        assert config.preset == name
        assert set(config.tasks) == {"crime", "check_in", "service_call"}

    def test_the_default_one_is_there_and_taken(self):
        assert load_config() == load_config(preset="default")

    def test_paper_has_the_papers_settings(self):
        tasks = load_config(preset="paper").tasks
        found = {
            name: (t.srel.lr, t.srel.layers, t.srel.bias, t.prompt4re.lr, t.target.drop_zeros)
            for name, t in tasks.items()
        }
        assert found == {
            "crime": (7e-4, 2, 0.1, 1e-4, False),
            "check_in": (2e-4, 5, 0.4, 5e-4, True),
            "service_call": (7e-4, 2, 0.1, 1e-2, False),
        }
        for task in tasks.values():
            assert (task.srel.width, task.srel.intra_blocks, task.srel.inter_blocks) == (144, 1, 2)
            assert task.srel.deep_fc
            assert (task.srel.channels, task.srel.memory, task.srel.view_width) == (32, 36, 32)
            assert (task.srel.epochs, task.srel.weight_decay, task.srel.dropout) == (4000, 5e-4, 0.1)
            assert (task.prompt4re.epochs, task.prompt4re.ridge_alpha) == (3000, 1.0)
            assert (task.target.transform, task.target.likelihood) == ("none", "gaussian")

    def test_the_ensemble_is_what_is_deployed_and_the_paper_has_none(self):
        found = {
            name: {(task.ensemble.enabled, task.target.transform) for task in load_config(preset=name).tasks.values()}
            for name in presets()
        }
        assert found == {
            "default": {(True, "auto")},
            "kernels": {(True, "auto")},
            "quick": {(True, "auto")},
            "paper": {(False, "none")},
            "srel": {(False, "sqrt")},
        }

    def test_an_unknown_one_names_those_there_are(self, tmp_path):
        message = refuse(tmp_path, preset="papier")
        assert "no such preset" in message
        assert "'papier'" in message
        assert "'paper'" in message

    def test_a_file_names_its_own_and_the_command_line_wins(self, tmp_path):
        file = tmp_path / "topt.toml"
        file.write_text('preset = "paper"\nseed = 3\n')
        assert load_config(file=file).preset == "paper"
        assert load_config(file=file).seed == 3
        other = next(name for name in presets() if name != "paper")
        assert load_config(file=file, preset=other).preset == other


class TestPrecedence:
    def test_file_over_preset(self, tmp_path):
        config = load(tmp_path, "[tasks.crime.srel]\nlr = 0.5\n[tasks.check_in]\n")
        assert config.tasks["crime"].srel.lr == 0.5
        assert config.tasks["crime"].srel.layers == 2
        assert config.tasks["check_in"].srel.lr == 2e-4

    def test_a_later_common_value_overrides_the_presets_task_value(self, tmp_path):
        config = load(tmp_path, "[srel]\nlr = 0.5\n")
        assert {task.srel.lr for task in config.tasks.values()} == {0.5}
        assert config.tasks["check_in"].srel.layers == 5

    @pytest.mark.parametrize("order", [0, 1])
    def test_in_one_file_a_tasks_value_wins_over_the_common_one(self, tmp_path, order):
        parts = ["[srel]\nlr = 0.5\n", "[tasks.crime.srel]\nlr = 0.25\n[tasks.check_in]\n"]
        config = load(tmp_path, "".join(parts[::-1] if order else parts))
        assert config.tasks["crime"].srel.lr == 0.25
        assert config.tasks["check_in"].srel.lr == 0.5

    def test_overrides_come_last_and_in_order(self, tmp_path):
        text = "[tasks.crime.srel]\nlr = 0.25\n[tasks.check_in]\n"
        assert load(tmp_path, text, overrides=["srel.lr=0.125"]).tasks["crime"].srel.lr == 0.125
        both = load(tmp_path, text, overrides=["srel.lr=0.125", "tasks.crime.srel.lr=1"])
        assert (both.tasks["crime"].srel.lr, both.tasks["check_in"].srel.lr) == (1, 0.125)
        other_way = load(tmp_path, text, overrides=["tasks.crime.srel.lr=1", "srel.lr=0.125"])
        assert other_way.tasks["crime"].srel.lr == 0.125

    def test_override_values(self):
        config = load_config(
            preset="paper",
            overrides=[
                "seed=7",
                "mobility=false",
                'views=["poi"]',
                "target.transform=sqrt",
                'prompt4re.prompt="none"',
                "srel.lr=1e-3",
                "srel.dropout=0",
                "ensemble.lengths=[2, 0.5]",
                'ensemble.not_linear=["poi"]',
            ],
        )
        crime = config.tasks["crime"]
        assert (config.seed, config.mobility, config.views) == (7, False, ("poi",))
        assert (crime.target.transform, crime.prompt4re.prompt) == ("sqrt", "none")
        assert (crime.srel.lr, crime.srel.dropout) == (1e-3, 0.0)
        assert isinstance(crime.srel.dropout, float)
        assert (crime.ensemble.lengths, crime.ensemble.not_linear) == ((2, 0.5), ("poi",))

    @pytest.mark.parametrize("override", ["prompt4re.epochs", "=3", ""])
    def test_an_override_without_value(self, override, tmp_path):
        assert "not KEY=VALUE" in refuse(tmp_path, overrides=[override])

    def test_loading_twice_gives_the_same(self):
        first = load_config(preset="paper", overrides=["srel.lr=1"])
        assert load_config(preset="paper") != first
        assert load_config(preset="paper", overrides=["srel.lr=1"]) == first


class TestTasks:
    def test_choosing_some(self):
        config = load_config(preset="paper", tasks=["check_in"])
        assert list(config.tasks) == ["check_in"]
        assert config.tasks["check_in"].srel.layers == 5

    def test_a_task_of_ones_own_gets_the_common_settings(self):
        config = load_config(preset="paper", tasks=["noise", "crime"], overrides=["tasks.noise.srel.layers=4"])
        assert list(config.tasks) == ["noise", "crime"]
        assert config.tasks["noise"].srel.layers == 4
        assert config.tasks["noise"].srel.epochs == 4000

    def test_those_that_a_file_lists(self, tmp_path):
        config = load(tmp_path, '[tasks.noise.target]\ntransform = "log1p"\n[tasks.crime]\n')
        assert list(config.tasks) == ["noise", "crime"]
        assert config.tasks["noise"].target.transform == "log1p"
        assert config.tasks["crime"].srel.lr == 7e-4

    def test_the_presets_where_a_file_lists_none(self, tmp_path):
        assert list(load(tmp_path, "seed = 1").tasks) == ["crime", "check_in", "service_call"]

    def test_embeddings_are_shared_where_settings_are_equal(self):
        config = load_config(preset="paper", tasks=["crime", "noise", "dogs", "check_in"])
        assert list(config.embeddings()) == ["crime", "check_in"]  # the paper's crime has the common settings
        assert [config.embedding_of(task) for task in config.tasks] == ["crime", "crime", "crime", "check_in"]
        assert config.embeddings()["crime"] == config.tasks["dogs"].srel
        assert len(load_config(preset="paper").embeddings()) == 2  # service calls share crime's
        same = load_config(preset="paper", overrides=["srel.lr=1e-3", "srel.layers=2", "srel.bias=0.1"])
        assert list(same.embeddings()) == ["crime"]

    def test_tasks_whose_ensembles_have_no_topt_build_on_no_embedding(self):
        off = ["tasks.check_in.ensemble.enabled=false", "tasks.service_call.ensemble.enabled=false"]
        config = load_config(preset="kernels", overrides=off)
        assert list(config.embeddings()) == ["check_in"]
        assert config.embedding_of("service_call") == "check_in"
        assert load_config(preset="kernels").embeddings() == {}
        assert list(load_config(preset="default").embeddings()) == ["crime"]
        assert load_config(preset="default", overrides=["ensemble.embedding=false"]).embeddings() == {}

    def test_prompt_columns(self):
        assert load_config(preset="paper").prompt_columns() == (
            "prompt_crime",
            "prompt_check_in",
            "prompt_service_call",
        )
        assert load_config(preset="paper", overrides=["prompt4re.enabled=false"]).prompt_columns() == ()
        assert load_config(preset="paper", overrides=["prompt4re.prompt=none"]).prompt_columns() == ("prompt_none",)
        mixed = load_config(preset="paper", overrides=["tasks.crime.prompt4re.prompt=none"])
        assert mixed.prompt_columns() == ("prompt_none", "prompt_check_in", "prompt_service_call")


class TestRefusals:
    @pytest.mark.parametrize(
        ("text", "key", "hint"),
        [
            ("sed = 1", "'sed'", "seed"),
            ("[sreel]\nlr = 1", "'sreel'", "srel"),
            ("[srel]\nlearning_rate = 1", "'learning_rate'", "lr"),
            ("[tasks.crime.prompt4re]\nepoch = 1", "'epoch'", "epochs"),
            ("[tasks.crime.model]\nlr = 1", "tasks.crime", "prompt4re"),
        ],
    )
    def test_an_unknown_key_is_named_with_what_is_known(self, tmp_path, text, key, hint):
        message = refuse(tmp_path, text)
        assert key in message
        assert hint in message
        assert "topt.toml" in message

    @pytest.mark.parametrize(
        ("override", "expected"),
        [
            ("seed=1.5", "int"),
            ("seed=true", "int"),
            ('srel.lr="fast"', "float"),
            ("srel.epochs=2.0", "int"),
            ("mobility=1", "bool"),
            ('views="poi"', "a list of names"),
            ("views=[1, 2]", "a list of names"),
            ("srel.decay=linear", "'exponential', 'gaussian', 'inverse'"),
            ("target.likelihood=normal", "'gaussian', 'poisson', 'negative_binomial'"),
            ("prompt4re.prompt=crime", "'task', 'none'"),
            ("prompt4re.enabled=no", "bool"),
            ("ensemble.lengths=0.7", "a list of numbers above 0"),
            ("ensemble.lengths=[0.7, 0]", "a list of numbers above 0"),
            ("ensemble.position_lengths=[-1.0]", "a list of numbers above 0"),
            ("ensemble.lengths=[inf]", "a list of numbers above 0"),
            ("ensemble.lengths=[true]", "a list of numbers above 0"),
            ('ensemble.lengths=["short"]', "a list of numbers above 0"),
            ("ensemble.not_linear=[1.0]", "a list of names"),
            ("ensemble.schedule=linear", "'constant', 'cosine'"),
            ("target.transform=square", "'none', 'sqrt', 'cbrt', 'log1p'"),
        ],
    )
    def test_a_value_of_the_wrong_kind(self, tmp_path, override, expected):
        message = refuse(tmp_path, overrides=[override])
        assert "wrong value" in message
        assert expected in message.partition("expected: ")[2]
        assert f"column {override.partition('=')[0].split('.')[-1]!r}" in message

    @pytest.mark.parametrize("value", ["-1", "-0.5", "nan", "inf"])
    def test_a_number_out_of_range(self, tmp_path, value):
        message = refuse(tmp_path, overrides=[f"srel.lr={value}"])
        assert "out of range" in message
        assert f"found:    {float(value):g}" in message

    @pytest.mark.parametrize(
        "override",
        [
            "srel.width=0",
            "srel.ffn_width=0",
            "srel.memory=0",
            "srel.channels=0",
            "srel.view_width=0",
            "srel.dropout=1",
            "srel.dropout=1.5",
            "prompt4re.dropout=2",
            "prompt4re.members=0",
            "ensemble.features=0",
            "ensemble.lengths=[]",
            "ensemble.position_lengths=[]",
            "ensemble.members=0",
            "ensemble.width=0",
            "ensemble.input_dropout=1",
            "checkpoint_every=0",
            "views=[]",
        ],
    )
    def test_a_value_that_no_model_can_have(self, tmp_path, override):
        assert override.partition("=")[0].split(".")[-1] in refuse(tmp_path, overrides=[override])

    @pytest.mark.parametrize(
        "text",
        [
            "srel = 3",
            "tasks = 3",
            'tasks = "crime"',
            "[tasks.crime]\nsrel = 3",
            "[seed]\na = 1",
            "[mobility]\na = 1",
            "[srel.lr]\nx = 1",
        ],
    )
    def test_a_table_where_a_value_belongs_and_the_other_way_round(self, tmp_path, text):
        assert "topt.toml" in refuse(tmp_path, text)

    @pytest.mark.parametrize("likelihood", ["poisson", "negative_binomial"])
    @pytest.mark.parametrize("transform", ["sqrt", "cbrt", "log1p"])
    def test_a_count_likelihood_takes_no_transform(self, tmp_path, likelihood, transform):
        message = refuse(tmp_path, f'[target]\nlikelihood = "{likelihood}"\ntransform = "{transform}"\n')
        assert likelihood in message
        assert f"found:    '{transform}'" in message
        assert "target.transform = 'none'" in message

    @pytest.mark.parametrize(
        ("overrides", "found"),
        [
            (["srel.heads=5"], "5 heads, width 144"),
            (["srel.heads=0"], "0 heads"),
            (["prompt4re.heads=7"], "7 heads, width 144"),
            (["prompt4re.width=10", "prompt4re.heads=4"], "4 heads, width 10"),
            (["srel.width=30", "prompt4re.heads=4"], "4 heads, width 30"),
        ],
    )
    def test_heads_divide_the_width(self, tmp_path, overrides, found):
        message = refuse(tmp_path, overrides=overrides)
        assert "heads do not divide the width" in message
        assert found in message

    @pytest.mark.parametrize("likelihood", ["poisson", "negative_binomial"])
    def test_an_ensemble_knows_squared_error_only(self, tmp_path, likelihood):
        chosen = ["ensemble.enabled=true", f"target.likelihood={likelihood}"]
        message = refuse(tmp_path, overrides=chosen)
        assert "target.likelihood = 'gaussian'" in message

    def test_an_ensemble_of_nothing(self, tmp_path):
        nothing = ["ensemble.kernel=false", "ensemble.network=false"]
        assert "nothing takes part" in refuse(tmp_path, overrides=["ensemble.enabled=true", *nothing])
        load(tmp_path, "", overrides=nothing)

    def test_a_view_that_there_is_not_cannot_be_without_a_linear_kernel(self, tmp_path):
        message = refuse(tmp_path, overrides=['views=["poi", "roads"]', 'ensemble.not_linear=["poi", "rods"]'])
        assert "ensemble.not_linear: no such view" in message
        assert "tasks.crime" in message
        assert "found:    rods" in message
        for known in ("poi", "roads", "land_use", "mobility_log", "position", "prompt"):
            assert known in message.partition("expected: ")[2]

    def test_a_view_that_a_city_lacks_may_be_named_all_the_same(self, tmp_path):
        load(tmp_path, "", overrides=['views=["poi"]', "mobility=false"])
        load(
            tmp_path, "", overrides=['views=["roads"]', 'ensemble.not_linear=["land_use", "roads", "trips", "prompt"]']
        )

    @pytest.mark.parametrize("folds", [0, 1])
    def test_fewer_than_two_folds(self, tmp_path, folds):
        assert "at least 2 folds" in refuse(tmp_path, overrides=[f"prompt4re.folds={folds}"])

    def test_not_toml(self, tmp_path):
        message = refuse(tmp_path, "seed = = 3")
        assert "not valid TOML" in message
        assert "line 1" in message

    def test_not_text(self, tmp_path):
        (tmp_path / "x.toml").write_bytes(b"\xff\xfe\x00")
        with pytest.raises(BadConfig, match="not valid TOML"):
            load_config(file=tmp_path / "x.toml")

    def test_a_missing_file(self, tmp_path):
        with pytest.raises(NoInput, match="no such file") as caught:
            load_config(file=tmp_path / "none.toml")
        assert str(tmp_path / "none.toml") in str(caught.value)

    def test_an_error_says_which_layer_it_is_in(self, tmp_path):
        assert "--set" in refuse(tmp_path, "seed = 1", overrides=["srel.foo=1"])

    def test_the_preset_is_no_override(self, tmp_path):
        assert "--preset" in refuse(tmp_path, overrides=["preset=quick"])

    @pytest.mark.parametrize("name", ["a/b", "../x", "a.b", "", " "])
    def test_a_task_that_can_be_no_file_and_no_tensor(self, name):
        with pytest.raises(BadConfig):
            load_config(preset="paper", tasks=[name])

    @pytest.mark.parametrize(
        "views", [["mobility"], ["trips"], ["destinations"], ["position"], ["poi", "poi"], ["a.b"], [""]]
    )
    def test_views_that_cannot_be_told_apart(self, views):
        with pytest.raises(BadConfig):
            load_config(preset="paper", overrides=[f"views={views}"])

    def test_an_override_for_a_task_that_is_not_trained(self, tmp_path):
        assert "crme" in refuse(tmp_path, tasks=["crime"], overrides=["tasks.crme.srel.lr=1"])


class TestRecord:
    @pytest.mark.parametrize("name", presets())
    def test_comes_back_from_json(self, name):
        config = load_config(preset=name, overrides=["seed=5", 'views=["poi"]'])
        again = config_from_dict(json.loads(config.as_json()))
        assert again == config
        assert again.views == ("poi",)
        assert config.as_dict() == asdict(config)

    def test_a_damaged_one_is_refused(self):
        record = load_config(preset="paper").as_dict()
        record["tasks"]["crime"]["srel"]["lr"] = "fast"
        with pytest.raises(BadConfig, match="wrong value") as caught:
            config_from_dict(record, "run.json")
        assert "run.json: tasks.crime.srel" in str(caught.value)

    def test_is_frozen(self):
        config = load_config(preset="paper")
        with pytest.raises(AttributeError):
            config.seed = 1
        assert isinstance(hash(config.tasks["crime"]), int)

"""The Python face does what the verbs do, in the same words."""

import pytest
from toy import write_rows

import sftjax
from sftjax.evaluate.contenders import Options
from sftjax.hf.save import save
from sftjax.models.heads import scored


def test_every_name_is_there():
    assert all(getattr(sftjax, name) is not None for name in sftjax.__all__)
    with pytest.raises(AttributeError, match="no attribute 'evaluat'"):
        sftjax.evaluat  # noqa: B018


def test_a_model_is_evaluated_and_compared_and_a_run_planned(toy, tmp_path):
    asked = {"data": str(toy.data), "rows": 3}
    found = sftjax.evaluate(model=toy.base, **asked, metrics="exact_match,token_f1", max_new_tokens=2)
    assert found["answered"] == 3 and found["figures"][0]["figures"]["loss"]["rows"] == len(toy.rows)
    compared = sftjax.compare(
        toy.base, **asked, metrics="exact_match", out=str(tmp_path / "out"), options=Options(max_new_tokens=2)
    )
    assert compared["rows"] == 3 and (tmp_path / "out" / "compare.html").is_file()
    said = []
    assert "chips" in sftjax.plan(toy.config(), say=said.append) and said


REFUSED = [
    ({}, "needs the directory of a run, or model= and data="),
    ({"workdir": "w", "model": "m"}, "needs the directory of a run, or model= and data="),
    ({"model": "m"}, "--model needs --data=FILE"),
    ({"model": 3, "data": "d"}, "needs a directory or a hub id, not a int"),
    ({"model": "m", "data": [{"text": "a"}]}, "rows in memory"),
    ({"workdir": "w", "split": "tst"}, "--split=tst: needs test or eval"),
]


@pytest.mark.parametrize("given, sentence", REFUSED)
def test_what_cannot_be_evaluated_is_refused(given, sentence):
    with pytest.raises(sftjax.UserError, match=sentence):
        sftjax.evaluate(**given)


@pytest.mark.parametrize(
    "options, sentence",
    [
        ({"foo": 1}, "foo: no such option; there are metrics"),
        ({"temprature": 1}, "did you mean temperature?"),
        ({"temperature": -1}, "needs 0 .greedy. or more"),
        ({"metrics": "exact_mach"}, "--metrics=exact_mach: no such metric"),
        ({"base": "", "rows": -1}, "--rows=-1: needs at least 0"),
    ],
)
def test_an_option_is_refused_before_the_model_is_read(options, sentence, toy):
    with pytest.raises(sftjax.UserError, match=sentence):
        sftjax.evaluate(model="nowhere", data=toy.data, **options)


@pytest.mark.parametrize(
    "given, sentence",
    [
        ({"prompts": {"a": "b"}}, "prompts: needs a path, not a dict"),
        ({"models": [object()]}, "models: needs a path, not a object"),
        ({"metrics": "exact_mach"}, "--metrics=exact_mach: no such metric"),
    ],
)
def test_what_cannot_be_compared_is_refused(given, sentence, tmp_path):
    with pytest.raises(sftjax.UserError, match=sentence):
        sftjax.compare(**{"models": "nowhere", "data": "d", "out": str(tmp_path), **given})


def test_a_model_with_a_score_head_is_measured_by_it(toy, tmp_path):
    model = sftjax.load(toy.base)
    params, config = scored(model.params, model.config, ("reward",))
    save(params, config, source=toy.base, out=tmp_path / "reward")
    rows = [{"prompt": "2 + 2?", "chosen": f"{i}", "rejected": "?"} for i in range(4)]
    data = write_rows(tmp_path / "pairs.jsonl", rows)
    found = sftjax.evaluate(model=tmp_path / "reward", data=data, out=tmp_path / "out")
    assert found["pairs"] == 4 and (tmp_path / "out" / "scores.jsonl").is_file()
    with pytest.raises(sftjax.UserError, match="--rows: "):
        sftjax.evaluate(model=tmp_path / "reward", data=data, rows=3)


def test_a_config_may_be_the_path_of_one(toy, tmp_path):
    assert "chips" in sftjax.plan(toy.config_file, say=lambda _: None)
    for config in (tmp_path / "none.py", str(tmp_path / "none.py")):
        with pytest.raises(sftjax.UserError, match="no such file"):
            sftjax.train(config, tmp_path / "run")
    wrong = toy.config(task="SFT")
    with pytest.raises(sftjax.UserError, match=r"--config.task=SFT: needs one of .* did you mean sft\?"):
        sftjax.train(wrong, tmp_path / "run")


def test_a_preview_needs_no_console(toy, capsys):
    sftjax.preview(toy.config(), rows=1)
    assert f"{toy.data}:1" in capsys.readouterr().out.replace("\n", "")

"""The Python face does what the verbs do, in the same words."""

import pytest

import sftjax
from sftjax.evaluate.contenders import Options


def test_every_name_is_there():
    assert all(getattr(sftjax, name) is not None for name in sftjax.__all__)
    with pytest.raises(AttributeError, match="no attribute 'evaluat'"):
        sftjax.evaluat  # noqa: B018


def test_a_model_is_evaluated_and_compared_and_a_run_planned(toy, tmp_path):
    asked = {"data": str(toy.data), "rows": 3}
    found = sftjax.evaluate(model=str(toy.base), **asked, max_new_tokens=2)
    assert found["answered"] == 3 and found["figures"][0]["figures"]["loss"]["rows"] == len(toy.rows)
    compared = sftjax.compare([str(toy.base)], **asked, out=str(tmp_path / "out"), options=Options(max_new_tokens=2))
    assert compared["rows"] == 3 and (tmp_path / "out" / "compare.html").is_file()
    said = []
    assert "chips" in sftjax.plan(toy.config(), say=said.append) and said
    for given in ({}, {"workdir": tmp_path, "model": "m"}):
        with pytest.raises(sftjax.UserError, match="needs the directory of a run, or model= and data="):
            sftjax.evaluate(**given)

"""SftjaxLM beside the harness' own `hf` model in torch: the same tokens are scored, the same text comes, the same figures."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

pytest.importorskip("lm_eval")
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from toy import make_base

from sftjax.config import UserError
from sftjax.evaluate.harness import SftjaxLM, run

TASKS = Path(__file__).parent / "harness_tasks"
LENGTH = 96  # less than many of the texts below
PAIRS = [
    ("Once upon a time", " there was"),
    ("", "Lily had a cat"),
    ("", "<s>Hi"),  # starts with the prefix token itself
    ("The dog  ", "ran"),  # spaces go over to the continuation
    ("Answer:", " x"),
    ("Answer:", " y"),
    ("long text " * 90, " end"),
    ("héllo wörld", " ünï"),
    ("<s> Once", " upon"),  # brings its BOS
    ("q", "z" * 80),
]
TEXTS = ["Once upon a time there was a little girl. " * 20, "Hi", "<s>One day, a dog", ""]
ASKED = [
    ("Once upon a time", {"until": ["."], "max_gen_toks": 20}),
    ("Lily", {"until": ["\n\n", "mom"], "max_new_tokens": 24, "do_sample": False}),
    ("<s>One day", {"until": "the", "max_gen_toks": 30, "temperature": 0.0}),
    ("The cat " * 80, {"until": ["x"], "max_gen_toks": 16}),
    ("Tom and", {"until": ["<|im_end|>", "e"], "max_gen_toks": 40}),
    ("He said:", {"max_gen_toks": 40}),
]


def requests(kind, arguments):
    return [Instance(request_type=kind, doc={}, arguments=a, idx=i) for i, a in enumerate(arguments)]


@pytest.fixture(scope="module", params=["random", "stories260K"])
def checkpoint(request, tmp_path_factory):
    """A byte-level tokenizer without a BOS, whose prefix is the EOS; and a real small model with a BOS."""
    if request.param == "random":
        return make_base(tmp_path_factory.mktemp("harness") / "base")
    return request.getfixturevalue("shared") / "data/hf_models" / request.param


@pytest.fixture(scope="module")
def both(checkpoint):
    """The same checkpoint in the harness' torch model and in ours."""
    theirs = HFLM(str(checkpoint), device="cpu", dtype="float32", max_length=LENGTH, batch_size=1)
    return theirs, SftjaxLM(checkpoint, max_length=LENGTH, batch_size=8)


def test_log_likelihoods_equal_hf(both):
    theirs, ours = (lm.loglikelihood(requests("loglikelihood", PAIRS), disable_tqdm=True) for lm in both)
    np.testing.assert_allclose([logp for logp, _ in ours], [logp for logp, _ in theirs], rtol=1e-6, atol=1e-4)
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs]


def test_a_continuation_that_greedy_decoding_says_is_called_greedy(both):
    _, ours = both
    said = ours.generate_until(requests("generate_until", [("Once upon a time", {"max_gen_toks": 4})]), disable_tqdm=True)[0]
    pairs = [("Once upon a time", said), ("Once upon a time", said + "zq")]
    tokens = [ours._encode_pair(*pair)[1] for pair in pairs]
    if tokens[1][: len(tokens[0])] == tokens[0] and "\ufffd" not in said:  # not where it is cut within a character
        greedy = [g for _, g in ours.loglikelihood(requests("loglikelihood", pairs), disable_tqdm=True)]
        assert greedy == [True, False]


def test_rolling_windows_equal_hf(both):
    texts = [(text,) for text in TEXTS]
    theirs, ours = (lm.loglikelihood_rolling(requests("loglikelihood_rolling", texts), disable_tqdm=True) for lm in both)
    np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-4)


def test_answers_equal_hf(both):
    theirs, ours = (lm.generate_until(requests("generate_until", ASKED), disable_tqdm=True) for lm in both)
    assert ours == theirs


@pytest.mark.parametrize("add_bos_token", [True, False])
def test_the_bos_is_added_as_hf_does_it(checkpoint, add_bos_token):
    theirs = HFLM(str(checkpoint), device="cpu", dtype="float32", add_bos_token=add_bos_token)
    ours = SftjaxLM(checkpoint, add_bos_token=add_bos_token)
    for text in ("Once", "<s> Once", " a\n"):
        assert ours.tok_encode(text) == theirs.tok_encode(text)
        assert ours._prompt(text, 8) == theirs.tok_batch_encode([text], left_truncate_len=8)[0][0].tolist()
    pairs = [pair for pair in PAIRS[:2] if pair[0] or add_bos_token]
    assert [ours._encode_pair(*p) for p in pairs if p[0]] == [theirs._encode_pair(*p) for p in pairs if p[0]]


def test_chat_templates_equal_hf(toy):
    theirs, ours = HFLM(str(toy.base), device="cpu", dtype="float32"), SftjaxLM(toy.base)
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "why?"}]
    assert ours.apply_chat_template(turns) == theirs.apply_chat_template(turns)
    begun = [*turns, {"role": "assistant", "content": "because"}]
    assert ours.apply_chat_template(begun, False) == theirs.apply_chat_template(begun, False)
    assert (ours.tokenizer_name, ours.chat_template(True)) == (theirs.tokenizer_name, theirs.chat_template(True))


@pytest.mark.parametrize("checkpoint", ["random"], indirect=True)
def test_sampling_follows_the_seed_and_differs_from_row_to_row(both):
    _, ours = both
    how = {"until": [], "max_gen_toks": 12, "do_sample": True, "temperature": 1.0}

    def drawn(seed):
        np.random.seed(seed)  # as the harness' --seed does
        return ours.generate_until(requests("generate_until", [("Once", how)] * 4), disable_tqdm=True)

    first = drawn(1)
    assert drawn(1) == first != drawn(2)
    assert len(set(first)) > 1


@pytest.mark.parametrize("checkpoint", ["random"], indirect=True)
def test_what_comes_before_the_end_of_thinking_is_left_out(both):
    _, ours = both
    asked = requests("generate_until", [("Once upon a time", {"max_gen_toks": 30})])
    whole = ours.generate_until(asked, disable_tqdm=True)[0]
    ours.think_end = whole[10:12]
    try:
        assert ours.generate_until(asked, disable_tqdm=True)[0] == whole.split(whole[10:12])[-1].lstrip()
    finally:
        ours.think_end = None


# whole tasks


@pytest.fixture(scope="module")
def tasks(shared, tmp_path_factory):
    """The folder of the task files, beside rows of data/gsm8k, data/text_classification and data/pretrain_text."""
    data, folder = shared / "data", tmp_path_factory.mktemp("tasks")
    reviews = [line.rsplit("\t", 1) for line in (data / "text_classification/SST2_dev.tsv").read_text().splitlines()[:10]]
    stories = json.loads((data / "pretrain_text/tinystories_1000.json").read_text())[:2]
    rows = {
        "gsm8k": [json.loads(line) for line in (data / "gsm8k/test.jsonl").read_text().splitlines()[:4]],
        "sst2": [{"text": text, "label": int(label)} for text, label in reviews],
        "stories": [{"text": text} for text in stories],
    }
    for name, these in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in these))
        (folder / f"{name}.yaml").write_text((TASKS / f"{name}.yaml").read_text())
    return folder


@pytest.mark.parametrize("checkpoint", ["stories260K"], indirect=True)
def test_tasks_are_scored_as_by_hf(both, tasks, monkeypatch):
    monkeypatch.chdir(tasks)
    configs = [yaml.safe_load(file.read_text()) for file in sorted(tasks.glob("*.yaml"))]
    options = {"tasks": configs, "task_manager": TaskManager(include_defaults=False), "bootstrap_iters": 0, "log_samples": True}
    theirs, ours = (simple_evaluate(model=lm, verbosity="ERROR", **options) for lm in both)
    figures = 0
    for task, expected in theirs["results"].items():
        for name, value in expected.items():
            if isinstance(value, float) and "stderr" not in name:
                assert ours["results"][task][name] == pytest.approx(value, rel=1e-3, abs=1e-3), (task, name)
                figures += 1
    assert figures == 5
    for task, rows in theirs["samples"].items():
        for row, mine in zip(rows, ours["samples"][task]):
            assert mine["prompt_hash"] == row["prompt_hash"]
            if task == "local_gsm8k":
                assert mine["resps"] == row["resps"]
            else:
                got, want = ([float(x) for x in np.ravel(sample["resps"]).astype(float)] for sample in (mine, row))
                np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-4)


def test_the_command_line_prints_the_table(tasks):
    base = make_base(tasks / "base")
    command = [sys.executable, "-m", "sftjax.cli", "lm-eval", f"--model_args=path={base},max_length=64"]
    command += ["--tasks", "sst2.yaml", "--limit", "2", "--batch_size", "4"]
    done = subprocess.run(command, cwd=tasks, env=os.environ | {"HF_DATASETS_OFFLINE": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "sftjax (" in done.stdout and "|local_sst2|" in done.stdout and "acc_norm" in done.stdout


def test_an_unknown_task_is_one_sentence(monkeypatch):
    monkeypatch.setattr(sys, "argv", [])
    monkeypatch.setattr("multiprocessing.set_start_method", lambda *_, **__: None)
    with pytest.raises(UserError, match=r"^Tasks not found: nonsense$"):
        run(["--model_args", "path=x", "--tasks", "nonsense"])


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        ("pretrained=x", "no such argument; did you mean path?"),
        ("path=x,quantise=nf4", "did you mean quantize?"),
        ("batch_size=4", "needs path=DIR"),
        ("path=x,quantize=int4", "needs one of nf4, int8"),
        ("path=x,dtype=half", "needs one of float32"),
        ("path=x,batch_size=0", "needs a number from 1, or auto"),
        ("path=x,max_batch_size=4", "goes with batch_size=auto"),
        ("path=x,enable_thinking=True", "needs think_end_token"),
        ("path=BASE,max_length=1000", "from 2 to 128"),
    ],
)
def test_a_mistake_in_the_model_args_is_one_sentence(toy, arguments, sentence):
    with pytest.raises(UserError, match=sentence):
        SftjaxLM.create_from_arg_string(arguments.replace("BASE", str(toy.base)))


def test_model_args_go_before_the_command_lines_own(toy):
    config = {"batch_size": 1, "max_batch_size": None, "device": "cuda:0"}  # what the harness says where nothing was asked
    assert SftjaxLM.create_from_arg_string(f"path={toy.base},batch_size=8", config).batch_size == 8
    with pytest.raises(UserError, match="--device cuda: JAX runs on cpu"):
        SftjaxLM.create_from_arg_string(f"path={toy.base}", config | {"device": "cuda"})


@pytest.mark.parametrize("checkpoint", ["random"], indirect=True)
@pytest.mark.parametrize(
    "how, sentence",
    [
        ({"do_sample": True, "max_gen_toks": 9}, "needs temperature above 0"),
        ({"num_beams": 4, "max_gen_toks": 9}, "no beam search"),
        ({"max_gen_toks": 96}, "from 1 to 95"),
        ({"length_penalty": 2.0, "max_gen_toks": 9}, "length_penalty is nothing"),
    ],
)
def test_a_manner_that_cannot_be_is_refused(both, how, sentence):
    with pytest.raises(UserError, match=sentence):
        both[1].manner(how)

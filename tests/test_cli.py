"""The command line as a user meets it: help that ends with an example, and every mistake one plain sentence."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from sftjax import cli

VERBS = list(cli.VERBS)


@pytest.fixture
def sftjax(capfd):
    """`sftjax("train", "--config=x") -> (exit code, what it printed, what it complained)`."""

    def run(*argv):
        capfd.readouterr()
        with pytest.raises(SystemExit) as end:
            cli.main([str(a) for a in argv])
        out, err = capfd.readouterr()
        return end.value.code, out, err

    return run


@pytest.fixture
def mistake(sftjax):
    """`mistake(*argv)`: the one sentence. It is all that is said of it."""

    def told(*argv):
        code, _, err = sftjax(*argv)
        assert code == 1
        assert "Traceback" not in err
        assert err.startswith(f"sftjax {argv[0]}: ")
        return err.removeprefix(f"sftjax {argv[0]}: ").rstrip("\n")

    return told


def test_the_whole_road(toy, sftjax, tmp_path):
    run, out = tmp_path / "run", tmp_path / "out"
    short = ["--config.train.steps=3", "--config.train.eval_every=0"]
    code, said, err = sftjax("train", f"--config={toy.config_file}", f"--workdir={run}", *short)
    assert (code, err) == (0, "")
    assert "training 22,272 of 62,096 parameters" in said
    assert said.splitlines()[-1] == f"next: sftjax export --workdir={run} --to=hf --out=DIR"
    code, said, err = sftjax("export", f"--workdir={run}", f"--out={out}", "--dtype", "bfloat16")
    assert (code, err) == (0, "")
    assert said.splitlines()[-1] == f"next: sftjax chat --model={out}"
    answers = tmp_path / "answers.jsonl"
    code, said, err = sftjax("generate", f"--model={out}", f"--data={toy.data}", f"--out={answers}", "--max-new-tokens=4")
    assert code == 0, err
    assert len(answers.read_text().splitlines()) == len(toy.rows)


def test_preview(toy, sftjax):
    code, said, err = sftjax("preview", f"--config={toy.config_file}", "--rows=1")
    assert code == 0, err
    assert "[[g|r|e|e|n|<|im_end|>]]" in said
    assert said.splitlines()[-1] == f"next: sftjax train --config={toy.config_file} --workdir=runs/mine"


@pytest.mark.parametrize("verb", cli.EXAMPLES)
def test_help_says_what_is_needed_and_ends_with_an_example(sftjax, verb):
    code, said, _ = sftjax(*verb.split(), "--help")
    assert code == 0
    assert re.match(rf"usage: sftjax {verb}( \w+)? --", said)
    assert said.rstrip().splitlines()[-1].strip() == cli.EXAMPLES[verb]


@pytest.mark.parametrize("verb", cli.EXAMPLES)
def test_the_examples_are_understood(verb):
    _, *argv = cli.EXAMPLES[verb].split()
    args, rest = cli.build_parser().parse_known_args(argv)
    args.overrides = cli.overrides(args, rest)
    cli.check_needs(args)
    assert cli.full_name(args).startswith(verb)


def test_pairs_are_written_from_rankings(sftjax, mistake, tmp_path):
    rankings, out = tmp_path / "rankings.jsonl", tmp_path / "pairs.jsonl"
    rows = [{"q": "?", "answers": ["a", "b", "c"], "scores": scores} for scores in ([3, 2, 1], [1, 1, 0], [0, 0, 0])]
    rankings.write_text("".join(json.dumps(row) + "\n" for row in rows))
    argv = ["data", "pairs", f"--data={rankings}", f"--out={out}", "--config.data.columns.prompt=q"]
    code, said, err = sftjax(*argv)
    assert (code, err) == (0, "")
    assert f"3 rows, 1 make no pair, all their answers being equally good or the same\n5 pairs in {out}, 4 ties" in said
    assert [json.loads(line)["rejected"] for line in out.read_text().splitlines()] == ["b", "c", "c", "c", "c"]
    assert "exists already; give --force" in mistake(*argv)
    assert "has no effect on sftjax data pairs" in mistake(*argv, "--force", "--config.train.steps=3")
    assert "invalid choice: 'pears' (choose from " in mistake("data", "pears", *argv[2:])
    assert mistake("data", "pairs").startswith("needs --data=FILE and --out=FILE; for example\n  sftjax data pairs")
    assert mistake("data").startswith("needs a word after it, one of check, clean, split, select, convert, pairs; for example")


def test_rows_are_checked_cleaned_split_selected_and_converted(sftjax, mistake, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [{"frage": f"q{i}", "antwort": "a"} for i in (1, 2, 3, 4, 2)]
    rows[2:2], rows[4:4] = [{"frage": "q1", "antwort": "other"}], [{"frage": "q"}]
    Path("mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("held.csv").write_text("frage,antwort\nq4,a\n")
    names = ["--config.data.columns.instruction=frage", "--config.data.columns.output=antwort"]
    read = ["--data=mine.jsonl", "--held-out=held.csv", *names]
    as_read = "read as alpaca (frage as instruction, antwort as output)"
    code, said, err = sftjax("data", "check", *read)
    assert (code, said.splitlines()) == (
        1,
        [
            f"mine.jsonl: {as_read}",
            f"held.csv: {as_read}",
            "7 rows = 4 good + 1 that cannot be used + 1 that stand in held.csv too + 1 that say what an earlier one says",
            "formats: alpaca 6",
            "turns: user 6, assistant 6",
            "rows that stand in the held-out file too, 1: mine.jsonl:6",
            "rows that say what an earlier one says, 1: mine.jsonl:7 (as mine.jsonl:2)",
            "questions with several answers, 1: mine.jsonl:1 and mine.jsonl:3",
            "",
        ],
    )
    assert err == (
        "sftjax data: 1 row cannot be used:\n  mine.jsonl:5: antwort: is missing or null\nmend them, or leave them out: "
        f"sftjax data clean {' '.join(read)} --out=clean.jsonl\n"
    )
    code, said, err = sftjax("data", "clean", *read, "--out=clean.jsonl")
    assert (code, err) == (0, "")
    _, _, total, bad, then = said.splitlines()
    assert total.startswith("7 rows = 4 in clean.jsonl + 1 that") and bad == "  mine.jsonl:5: antwort: is missing or null"
    assert then == f"next: sftjax preview --config=configs/sft_lora.py --config.data.train=clean.jsonl {' '.join(names)}"
    assert Path("clean.jsonl").read_text().splitlines() == [json.dumps(rows[i]) for i in (0, 1, 2, 3)]
    read[0] = "--data=clean.jsonl"
    code, said, err = sftjax("data", "check", *read)
    assert (code, err) == (0, "") and "4 rows = 4 good\n" in said and said.splitlines()[-1] == then
    code, said, err = sftjax("data", "split", read[0], *names, "--out=parts", "--config.data.split=2,2")
    assert (code, err) == (0, "") and "4 rows = 2 train + 2 eval + 0 test\n" in said
    assert " --config.data.train=parts/train.jsonl " in said and said.endswith(" --config.data.eval=parts/eval.jsonl\n")
    code, said, err = sftjax("data", "select", read[0], *names, "--out=some.jsonl", "--rows=3")
    assert (code, err) == (0, "") and "4 rows = 3 in some.jsonl + 1 not taken\n" in said
    code, said, err = sftjax("data", "convert", read[0], *names, "--out=all.jsonl")
    assert (code, err) == (0, "") and "4 rows = 4 as messages in all.jsonl\n" in said
    assert said.splitlines()[-1] == "next: sftjax preview --config=configs/sft_lora.py --config.data.train=all.jsonl"
    assert mistake("data", "check", "--data=held.csv", "--held-out=held.csv", *names).startswith(
        "1 row is in held.csv too; leave"
    )
    assert mistake("data", "check", "--data=all.jsonl", "--config.task=spp").startswith("--config.task=spp: needs one of sft")
    assert "no format with pairs" in mistake("data", "check", "--data=all.jsonl", "--config.task=dpo")
    assert mistake("data", "select", "--data=all.jsonl", "--out=few.jsonl", "--rows=0").startswith("--rows=0: needs a number")
    code, _, err = sftjax("data", "select", "--data=x", "--rows=y")
    assert (code, err) == (1, "sftjax data select: argument --rows: invalid int value: 'y'; see sftjax data select --help\n")
    assert mistake("data", "check", "--data=x", "--held=y").endswith("did you mean --held-out?; see sftjax data check --help")


def test_no_verb_shows_them_all(sftjax):
    code, said, _ = sftjax()
    assert code == 0
    assert all(verb in said for verb in VERBS)


@pytest.mark.parametrize(
    "argv, sentence",
    [
        (["trian", "--config=x"], "sftjax: trian: no such verb; did you mean train?; see sftjax --help"),
        (["deploy"], f"sftjax: deploy: no such verb; there are {', '.join(VERBS)}; see sftjax --help"),
        (["--config=x"], f"sftjax: --config=x: needs a verb before it, one of {', '.join(VERBS)}; see sftjax --help"),
        (["preview", "--rows=all"], "sftjax preview: argument --rows: invalid int value: 'all'; see sftjax preview --help"),
    ],
)
def test_a_command_that_cannot_be_read_is_one_sentence(sftjax, argv, sentence):
    assert sftjax(*argv) == (1, "", sentence + "\n")


def test_help_starts_no_jax():
    program = "import sys; from sftjax import cli; cli.build_parser().format_help(); print('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout == "False\n"


@pytest.mark.parametrize(
    "argv, sentence",
    [
        (["train", "--confg=x"], "--confg=x: no such option; did you mean --config?; see sftjax train --help"),
        (["train", "--config=x", "--workdri=y"], "--workdri=y: no such option; did you mean --workdir?; see sftjax train --help"),
        (["train", "--config=x", "--wrkdir", "y"], "--wrkdir: no such option; did you mean --workdir?; see sftjax train --help"),
        (["train", "more", "--config=x"], "more: no such option; see sftjax train --help"),
        (["export", "--config.seed=3"], "--config.seed=3: no such option; see sftjax export --help"),
        (["train", "--config=x"], "needs --workdir=DIR; for example\n  " + cli.EXAMPLES["train"]),
        (["export"], "needs --workdir=DIR or --model=DIR and --out=DIR; for example\n  " + cli.EXAMPLES["export"]),
        (["export", "--workdir=w"], "needs --out=DIR; for example\n  " + cli.EXAMPLES["export"]),
        (["export", "--model=m", "--out=o"], "--model needs --adapter=DIR, what is to be merged into it"),
        (["preview", "--config=/nope.py"], "--config=/nope.py: no such file; try --config=configs/sft_lora.py"),
    ],
)
def test_a_wrong_option_is_named_with_the_nearest(mistake, argv, sentence):
    assert mistake(*argv) == sentence


@pytest.mark.parametrize(
    "argv, sentence",
    [
        (["--workdir=w", "--model=m"], "--workdir is for a run and --model for adapters without one; give only one of them"),
        (["--workdir=w", "--weights=1"], "--workdir is for a run and --weights for adapters without one; give only one of them"),
        (["--model=m", "--base=original"], "--base is for a run and --model for adapters without one; give only one of them"),
        (["--model=m", "--adapter=a", "--weights=1,x"], "--weights=1,x: needs numbers with commas between them, e.g. 0.7,0.3"),
        (["--model=m", "--adapter=a", "--weights=nan"], "--weights=nan: needs numbers with commas between them, e.g. 0.7,0.3"),
    ],
)
def test_a_run_and_adapters_without_one_are_not_mixed(mistake, tmp_path, argv, sentence):
    assert mistake("export", f"--out={tmp_path / 'out'}", *argv) == sentence


@pytest.mark.parametrize(
    "argv, sentence",
    [
        (["--workdir=w", "--data=d"], "--workdir is for a run and --data for a model without one; give only one of them"),
        (
            ["--model=m", "--data=d", "--split=test"],
            "--split is for a run and --model for a model without one; give only one of them",
        ),
        (["--model=m"], "--model needs --data=FILE, the rows that it is measured on"),
        (["--workdir=w", "--rows=-1"], "--rows=-1: needs at least 0"),
        (["--workdir=w", "--max-new-tokens=0"], "--max-new-tokens=0: needs at least 1"),
        (["--workdir=w", "--batch-size=0"], "--batch-size=0: needs at least 1"),
        (
            ["--model=m", "--data=d", "--config.model.quantize=nf4"],
            "--config.model.quantize=nf4: has no effect with --model; use --quantize",
        ),
        (
            ["--model=m", "--data=d", "--config.data.train=x"],
            "--config.data.train=x: has no effect with --model; use --data=FILE",
        ),
        (
            ["--model=m", "--data=d", "--config.mesh.fsdp=2"],
            "--config.mesh.fsdp=2: has no effect with --model, whose rows come from --data; leave it out. What has: "
            "data.*, eval.*, seed, task, model.dtype, model.trust_remote_code",
        ),
        (["--workdir=w"], "--workdir=w: no config.json there, so it is no run's directory"),
    ],
)
def test_what_cannot_be_evaluated_is_told(mistake, argv, sentence):
    assert mistake("eval", *argv) == sentence


def test_a_run_and_its_data_are_evaluated(toy, sftjax, mistake, tmp_path):
    run = tmp_path / "run"
    keys = ["--config.train.steps=2", "--config.train.eval_every=0", "--config.eval.max_new_tokens=4"]
    assert sftjax("train", f"--config={toy.config_file}", f"--workdir={run}", *keys)[0] == 0
    code, said, err = sftjax("eval", f"--workdir={run}", "--rows=3", "--metrics=exact_match,chrf")
    assert (code, err) == (0, "")
    assert "base: answering 3 of 7 rows" in said and "chrF: sacrebleu's of the corpus, chrF2" in said
    assert said.splitlines()[-2:] == [
        f"report: {run}/report.html",
        f"next: sftjax export --workdir={run} --checkpoint=2 --to=hf --out=DIR",
    ]
    told = mistake("eval", f"--workdir={run}", "--config.seed=1")
    assert told.splitlines()[1:] == [
        "  config.seed: 0 -> 1",
        "leave --config out, the run keeps its own; --config.eval.KEY=VALUE changes how it is evaluated",
    ]
    keys = [f"--data={toy.data}", "--rows=2", "--max-new-tokens=3", "--config.data.max_length=64"]
    code, said, err = sftjax("eval", f"--model={toy.base}", *keys)
    assert (code, err) == (0, "") and "72 rows read, 72 kept" in said
    assert said.splitlines()[-2:] == [
        "nothing was written; --out=DIR keeps every answer",
        f"next: sftjax chat --model={toy.base}",
    ]


@pytest.mark.parametrize(
    "to, quantize, adapter, command",
    [
        ("hf", "nf4", None, "sftjax chat --model=OUT"),
        ("vllm", None, None, "vllm serve OUT"),  # merged, since vLLM would not serve the adapter
        (
            "ollama",
            None,
            None,
            "python llama.cpp/convert_hf_to_gguf.py OUT --outfile OUT/model.gguf && ollama create NAME -f OUT/Modelfile",
        ),
        ("vllm", None, 16, "vllm serve base --enable-lora --lora-modules mine=OUT"),
        ("vllm", "nf4", 33, "vllm serve base --enable-lora --max-lora-rank=64 --lora-modules mine=OUT"),
        ("peft", None, 8, "sftjax chat --model=base --adapter=OUT"),
        ("peft", "nf4", 8, "sftjax chat --model=base --adapter=OUT --quantize=nf4"),
    ],
)
def test_what_was_written_says_what_to_run_next(tmp_path, to, quantize, adapter, command):
    if adapter:
        own = {"base_model_name_or_path": "base", "r": adapter, "task_type": "CAUSAL_LM"}
        (tmp_path / "adapter_config.json").write_text(json.dumps(own))
    else:
        (tmp_path / "config.json").write_text("{}")
    assert cli.what_next(to, str(tmp_path), quantize) == command.replace("OUT", str(tmp_path))


@pytest.mark.parametrize("labels, verb", [(["reward"], "rewards(model, conversations)"), ("ab", "classify(model, texts)")])
def test_an_adapter_with_a_head_says_what_its_head_is_for(tmp_path, labels, verb):
    own = {"base_model_name_or_path": "base", "r": 8, "task_type": "SEQ_CLS"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(own))
    (tmp_path / "labels.json").write_text(json.dumps(dict(enumerate(labels))))
    said = cli.what_next("peft", str(tmp_path), None)
    assert said == f"python: model = sftjax.load('base', adapter={str(tmp_path)!r}); sftjax.{verb}"


@pytest.mark.parametrize("method, form", [("lora", "hf"), ("full", "hf"), ("adapter", "sftjax")])
def test_training_names_a_form_that_its_method_has(toy, sftjax, monkeypatch, method, form):
    monkeypatch.setattr("sftjax.tasks.train", lambda *_, **__: {})
    code, said, err = sftjax("train", f"--config={toy.config_file}", "--workdir=w", f"--config.method={method}")
    assert (code, said.splitlines()[-1]) == (0, f"next: sftjax export --workdir=w --to={form} --out=DIR"), err


def test_adapters_are_combined_and_asked_over_a_quantised_model(toy, sftjax, tmp_path):
    run, out, data = tmp_path / "run", tmp_path / "one", tmp_path / "questions.jsonl"
    data.write_text("".join(toy.data.read_text().splitlines(keepends=True)[:3]))
    keys = ["--config.train.steps=2", "--config.train.eval_every=0", "--config.model.quantize=nf4"]
    assert sftjax("train", f"--config={toy.config_file}", f"--workdir={run}", *keys)[0] == 0
    code, said, err = sftjax("export", f"--workdir={run}", "--to=peft", f"--out={out}")
    assert (code, err) == (0, "")
    assert said.splitlines()[-1] == f"next: sftjax chat --model={toy.base} --adapter={out} --quantize=nf4"
    both = [f"--model={toy.base}", f"--adapter={out}", f"--adapter={out}", "--weights=0.25,0.75"]
    code, said, err = sftjax("export", *both, "--to=peft", f"--out={tmp_path / 'sum'}")
    assert (code, err) == (0, "")
    answers = []
    for adapter in (out, tmp_path / "sum"):
        argv = [f"--model={toy.base}", f"--adapter={adapter}", "--quantize=nf4", f"--data={data}", f"--out={adapter}.jsonl"]
        code, _, err = sftjax("generate", *argv, "--max-new-tokens=4")
        assert code == 0, err
        answers.append((tmp_path / f"{adapter.name}.jsonl").read_text())
    assert answers[0] == answers[1] and len(answers[0].splitlines()) == 3


KEYS = [
    ("optim.lrr=1", "--config.optim.lrr: no such key; did you mean --config.optim.lr?"),
    ("optim.lr=fast", "--config.optim.lr=fast: needs a number"),
    ("train.batch_size=2.5", "--config.train.batch_size=2.5: needs a whole number"),
    ("train.batch_size=0", "--config.train.batch_size=0: needs at least 1"),
    ("data.packing=maybe", "--config.data.packing=maybe: needs true or false"),
    ("data.split=8:1:1", "--config.data.split=8:1:1: needs numbers, e.g. 8,1,1"),
    ("method=loar", "--config.method=loar: needs one of lora, full, freeze, adapter, tokens; did you mean lora?"),
    ("lora.targets=q_proj,v_prj", "lora.targets: nothing is named 'v_prj'; did you mean v_proj?"),
    ("model.path=/nope", "/nope: no such directory"),
    ("data.train=/nope.jsonl", "/nope.jsonl: no such file"),
]


@pytest.mark.parametrize("override, sentence", KEYS)
def test_a_wrong_key_or_value_is_one_sentence(toy, mistake, tmp_path, override, sentence):
    told = mistake("train", f"--config={toy.config_file}", f"--workdir={tmp_path / 'run'}", f"--config.{override}")
    assert told.startswith(sentence)
    assert len(told.splitlines()) == 1


def test_an_override_may_stand_apart_from_its_value(toy, mistake, tmp_path):
    argv = ["train", f"--config={toy.config_file}", f"--workdir={tmp_path / 'run'}"]
    assert mistake(*argv, "--config.method", "loar").startswith("--config.method=loar: needs one of")
    assert mistake(*argv, "--config.method") == "--config.method: needs a value, --config.method=VALUE"


DEFAULT = "from sftjax.config import default\n\n\ndef get_config():\n    c = default()\n"
FILES = {
    "no get_config": ("x = 1\n", ": needs a function get_config() that returns sftjax.config.default(), changed"),
    "returns no config": ("def get_config():\n    return 3\n", ": needs a function get_config()"),
    "does not parse": ("def get_config(:\n", ":1: invalid syntax"),
    "imports what is not there": ("\nimport nothing_there\n", ":2: No module named 'nothing_there'"),
    "unknown key": (DEFAULT + "    c.optim.lrr = 3\n    return c\n", ":6: no such key: lrr; did you mean optim.lr?"),
    "wrong type": (DEFAULT + "    c.optim.lr = 'fast'\n    return c\n", ":6: --config.optim.lr=fast: needs a number"),
    "fails": (DEFAULT + "    return 1 / 0\n", ":6: division by zero"),
}


@pytest.mark.parametrize("text, sentence", FILES.values(), ids=FILES.keys())
def test_a_config_file_with_a_mistake_is_told_with_its_line(mistake, tmp_path, text, sentence):
    file = tmp_path / "mine.py"
    file.write_text(text)
    told = mistake("train", f"--config={file}", f"--workdir={tmp_path / 'run'}")
    assert told.startswith(f"{file}{sentence}")
    assert len(told.splitlines()) == 1


def test_columns_are_named_freely(sftjax, tmp_path, toy):
    """data.columns and data.roles take keys that the schema cannot know."""
    (tmp_path / "rows.csv").write_text("review,stars\n" + "".join(f"it was {i},{i % 2}\n" for i in range(20)))
    argv = [f"--config.data.train={tmp_path / 'rows.csv'}", "--config.data.format=label"]
    argv += ["--config.data.columns.text=review", "--config.data.columns.label=stars", "--config.data.roles.narrator=user"]
    code, said, err = sftjax("preview", f"--config={toy.config_file}", *argv)
    assert code == 0, err
    assert "20 rows read, 20 kept" in said


def test_a_bad_row_is_told_with_file_line_field_and_reason(toy, mistake, tmp_path):
    rows = [
        json.dumps(toy.rows[0]),
        '{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": 3}]}',
        "{",
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows) + "\n")
    argv = [f"--config={toy.config_file}", f"--workdir={tmp_path / 'run'}", f"--config.data.train={tmp_path / 'rows.jsonl'}"]
    told = mistake("train", *argv).splitlines()
    assert told[0] == "2 rows cannot be used:"
    assert told[1].startswith(f"  {tmp_path / 'rows.jsonl'}:2: messages[1].content: is the number 3")
    assert told[2].startswith(f"  {tmp_path / 'rows.jsonl'}:3: ")
    assert told[3] == "mend them, or leave them out with --config.data.on_bad_row=skip"
    assert len(told) == 4


def test_a_model_without_config_is_told(toy, mistake, tmp_path):
    argv = ["train", f"--config={toy.config_file}", f"--workdir={tmp_path / 'run'}"]
    assert mistake(*argv, f"--config.model.path={tmp_path}") == f"{tmp_path}: the directory has no config.json"


def test_another_run_is_refused_until_forced(toy, sftjax, mistake, tmp_path):
    argv = ["train", f"--config={toy.config_file}", f"--workdir={tmp_path / 'run'}", "--config.train.eval_every=0"]
    assert sftjax(*argv, "--config.train.steps=2")[0] == 0
    told = mistake(*argv, "--config.train.steps=3").splitlines()
    assert told[1:] == [
        "  config.train.steps: 2 -> 3",
        "use another --workdir, or --force to go on with its checkpoint",
    ]
    code, said, _ = sftjax(*argv, "--config.train.steps=3", "--force")
    assert code == 0
    assert "resuming after step 2 of 3" in said

"""Models x prompts over one file: what is asked, kept, counted, shown; and that nothing is paid for twice."""

import gc
import json
import shutil
import time

import jax
import pytest
from fake_server import failing, said, serving
from safetensors.numpy import load_file, save_file

from sftjax.cli import main
from sftjax.config import UserError
from sftjax.data.example import Message
from sftjax.evaluate import contenders, endpoint
from sftjax.evaluate.compare import run_compare
from sftjax.evaluate.contenders import Contender, Local, Options, Remote, hash_folder, parse
from sftjax.evaluate.prompts import Ask
from sftjax.generate.engine import Engine, Generated
from sftjax.generate.open import open_engine

KEY = "sk-secret-of-mine"
PROMPTS = """
plain: {}
hinted: {system: The sky is blue., input: "What colour is {thing}?"}
"""
ROWS = [("grass", "green"), ("snow", "white"), ("<script>alert(1)</script>", "none"), ("the sky", "blue")]


@pytest.fixture
def world(tmp_path, monkeypatch):
    """Rows with a field of their own, two prompts; the key is in the environment."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setattr(endpoint, "FIRST_WAIT", 0.0)
    rows = [{"thing": x, "instruction": f"{x}?", "output": y} for x, y in ROWS]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "prompts.yaml").write_text(PROMPTS)
    return tmp_path


def oracle(body, headers):
    """Knows it when it is hinted; else only of grass, and is cut off."""
    question = body["messages"][-1]["content"]
    answer = next(y for x, y in ROWS if x in question)
    return said(answer, 20, 1) if len(body["messages"]) > 1 else said("green", 10, 3, "length")


def compare(world, *models, **changes):
    given = {"data": str(world / "rows.jsonl"), "out": str(world / "out"), "prompts": str(world / "prompts.yaml")}
    return run_compare(models, **(given | {"options": Options(max_new_tokens=4)} | changes))


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_server_through_two_prompts(world, capsys):
    with serving(oracle) as server:
        got = compare(world, f"oracle={server.url}#m", prices=["oracle=1000,5000"])
    plain, hinted = got["cells"]
    assert got["rows"] == 4 and got["metrics"] == ["exact_match", "token_f1"]
    assert (plain["metrics"]["exact_match"]["value"], hinted["metrics"]["exact_match"]["value"]) == (0.25, 1.0)
    assert (plain["stop_rate"], hinted["stop_rate"]) == (0.0, 1.0)
    assert plain["prompt_tokens"] == {"mean": 10, "total": 40} and plain["answer_tokens"] == {"mean": 3, "total": 12}
    assert hinted["dollars"] == pytest.approx((80 * 1000 + 4 * 5000) / 1e6)
    (edge,) = got["differences"]
    assert (edge["better"], edge["than"], edge["value"]) == (["oracle", "hinted"], ["oracle", "plain"], 0.75)
    assert got["disagreements"]["rows"] == [1, 2, 3]
    assert got["verdict"][0].startswith("With oracle, the best prompt is hinted, 100.0 [")
    written = lines(world / "out" / "predictions.jsonl")
    assert len(written) == 8 and written[0]["messages"] == [{"role": "user", "content": "grass?"}]
    assert written[1]["messages"][0] == {"role": "system", "content": "The sky is blue."}
    assert [line["exact_match"] for line in written] == [1, 1, 0, 1, 0, 1, 0, 1]
    assert json.loads((world / "out" / "compare.json").read_text()) == json.loads(json.dumps(got))
    shown = capsys.readouterr().out
    assert "oracle   hinted" in shown and got["verdict"][0] in shown


def test_a_thought_is_no_part_of_an_answer(world, toy, monkeypatch):
    rows = [{"instruction": f"{i}?", "output": output} for i, output in enumerate(("ham", "<think>\nhm\n</think>\n\nham"))]
    (world / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    thought = "<think>\n\n</think>\n\nham"

    def thinks(self, prompts, *, tokenizer, **_):
        return ((i, Generated(tokenizer(thought)["input_ids"], True, thought)) for i in range(len(prompts)))

    monkeypatch.setattr(Engine, "each", thinks)
    with serving(lambda *_: said(thought, 1, 1)) as server:
        got = compare(world, f"there={server.url}#m", f"here={toy.base}", prompts=None)
    assert [cell["metrics"]["exact_match"]["value"] for cell in got["cells"]] == [1.0, 1.0]


def test_the_page_escapes_and_the_key_is_nowhere(world, capsys):
    with serving(oracle) as server:
        compare(world, f"oracle={server.url}#m", key_envs=["OPENAI_API_KEY"])
    page = (world / "out" / "compare.html").read_text()
    assert "&lt;script&gt;alert(1)" in page and "<script" not in page and "default-src 'none'" in page
    assert all(headers["Authorization"] == f"Bearer {KEY}" for headers in server.headers)
    assert not [file for file in (world / "out").iterdir() if KEY in file.read_text()]
    assert KEY not in "".join(capsys.readouterr())


def test_openais_key_goes_to_openai_alone(world):
    with serving(oracle) as server:
        compare(world, f"oracle={server.url}#m", rows=1)
    assert server.headers and not any("Authorization" in headers for headers in server.headers)
    sent = {
        "https://api.openai.com/v1": KEY,
        "https://API.openai.com:443/v1": KEY,
        "http://api.openai.com/v1": None,
        "https://api.openai.com.example.org/v1": None,
        "https://openai.example.org/v1": None,
        "http://localhost:8000/v1": None,
    }
    assert {url: Remote(Contender("m", url=url, model="m"), None, 1.0, 1).key for url in sent} == sent


def test_a_key_is_sent_in_the_clear_to_this_machine_alone(world):
    def key(url):
        return Remote(Contender("m", url=url, model="m"), "OPENAI_API_KEY", 1.0, 1).key

    for url in ("https://example.org/v1", "http://localhost:1/v1", "http://127.0.0.2/v1", "http://[::1]:8000/v1"):
        assert key(url) == KEY
    for url in (
        "http://example.org/v1",
        "http://10.0.0.1/v1",
        "http://localhost.example.org/v1",
        "http://127.0.0.1.example.org/v1",
    ):
        with pytest.raises(UserError, match="would be sent the key unencrypted; give an https address") as told:
            key(url)
        assert KEY not in str(told.value)


def test_run_again_nothing_is_asked(world):
    with serving(oracle) as server:
        first = compare(world, f"a={server.url}#m")
        assert len(server.bodies) == 8
        assert compare(world, f"a={server.url}#m") == first
        compare(world, f"a={server.url}#m", options=Options(max_new_tokens=4, seed=1))  # greedy answers have none
        assert len(server.bodies) == 8
        compare(world, f"a={server.url}#m", options=Options(max_new_tokens=5))  # other answers
        assert len(server.bodies) == 16
        compare(world, f"a={server.url}#m", f"b={server.url}#n")
        assert len(server.bodies) == 24


def test_interrupted_it_goes_on(world):
    def broken(body, headers):
        return oracle(body, headers) if len(server.bodies) <= 3 else failing(401, "expired")

    with serving(broken) as server:
        with pytest.raises(UserError, match="401"):
            compare(world, f"a={server.url}#m", parallel=1)
        kept = world / "out" / "answers.jsonl"
        assert len(lines(kept)) == 3 and not (world / "out" / "compare.json").exists()
        kept.write_bytes(kept.read_bytes()[:-20])  # killed in the middle of a line
        server.reply, before = oracle, len(server.bodies)
        got = compare(world, f"a={server.url}#m", parallel=1)
        assert len(server.bodies) - before == 6
    assert got["cells"][1]["metrics"]["exact_match"]["value"] == 1.0


@pytest.mark.parametrize("refusal", [failing(400, "a filter"), (200, {}, {"choices": []})])
def test_with_a_refused_row_it_runs_again(world, refusal):
    def picky(body, headers):
        return refusal if "the sky" in body["messages"][-1]["content"] else oracle(body, headers)

    with serving(picky) as server:
        first = compare(world, f"a={server.url}#m")
        assert len(server.bodies) == 8 and [cell["unanswered"] for cell in first["cells"]] == [1, 1]
        again = compare(world, f"a={server.url}#m")
        assert len(server.bodies) == 10 and again == first  # the refused ones are asked again
        server.reply = oracle
        assert [cell["unanswered"] for cell in compare(world, f"a={server.url}#m")["cells"]] == [0, 0]


def test_a_comparison_where_every_row_is_refused(world, capsys):
    with serving(lambda body, headers: failing(400, "no such role")) as server:
        got = compare(world, f"a={server.url}#m")
    assert [cell["unanswered"] for cell in got["cells"]] == [4, 4]
    assert "4 rows without an answer, which counts as a wrong one; the first: 400: it refuses the request (no such role)" in (
        capsys.readouterr().out
    )


def test_the_same_question_is_asked_once(world):
    (world / "rows.jsonl").write_text((world / "rows.jsonl").read_text() * 2)
    with serving(oracle) as server:
        got = compare(world, f"a={server.url}#m")
    assert len(server.bodies) == 8 and got["rows"] == 8 and got["cells"][0]["prompt_tokens"]["total"] == 80


def test_a_local_model_answers_as_the_engine_does(toy, world):
    with serving(oracle) as server:
        got = compare(world, f"mine={toy.base}", f"oracle={server.url}#m", options=Options(max_new_tokens=6))
    engine, chat = open_engine(str(toy.base))
    mine = [line for line in lines(world / "out" / "predictions.jsonl") if line["model"] == "mine"]
    prompts = [chat.prompt(line["messages"]) for line in mine]
    halves = [engine.generate(prompts[half::2], max_new_tokens=6, tokenizer=chat.tokenizer) for half in (0, 1)]
    alone = [a for pair in zip(*halves) for a in pair]
    assert [(line["answer"], line["stopped"]) for line in mine] == [(a.text, a.stopped) for a in alone]
    assert [line["prompt_tokens"] for line in mine] == [len(p) for p in prompts]
    assert [line["answer_tokens"] for line in mine] == [len(a.ids) for a in alone]
    assert got["verdict"][-2].startswith("So no prompt tried here makes mine as good as oracle")


def test_one_model_is_in_memory_at_a_time(toy, world, monkeypatch):
    other = world / "other"
    shutil.copytree(toy.base, other)
    (other / "chat_template.jinja").write_text((other / "chat_template.jinja").read_text() + " ")
    held = []

    def weighed(*args):
        gc.collect()
        held.append(sum(x.nbytes for x in jax.live_arrays()))
        return open_engine(*args)

    monkeypatch.setattr(contenders, "open_engine", weighed)
    compare(world, str(toy.base), str(other), f"again={toy.base}", prompts=None, rows=1)
    assert len(held) == 2 and held[1] <= held[0]  # the third is the first, whose answers are there


def test_a_prompt_too_long_for_a_model_is_no_answer(toy, world, monkeypatch):
    (world / "rows.jsonl").write_text(json.dumps({"prompt": "x" * 300, "completion": "y"}) + "\n")
    got = compare(world, f"mine={toy.base}", prompts=None)
    (cell,) = got["cells"]
    assert (cell["prompt"], cell["unanswered"], cell["empty"]) == ("as given", 1, 1.0)
    assert "300 tokens; the model takes 1 to 127" in cell["why"]


def test_a_model_without_a_template_gets_text(toy, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(toy.base, base)
    (base / "chat_template.jinja").unlink()
    model = Local(Contender("base", path=str(base)), None, 8)
    put = Ask((Message("system", "S"), Message("user", "q:")), None, "a")
    assert model.chat.tokenizer.decode(model.ids(put)) == "S\n\nq:"
    assert model.notes == ["has no chat template: prompts are plain text"]


def test_a_template_that_refuses_a_prompt_is_told_before_anyone_is_asked(toy, world):
    base = world / "base"
    shutil.copytree(toy.base, base)
    template = base / "chat_template.jinja"
    template.write_text(
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + template.read_text()
    )
    with (
        serving(oracle) as server,
        pytest.raises(UserError, match=r"rows\.jsonl:1: base cannot be asked this .* hinted: .*no system"),
    ):
        compare(world, f"oracle={server.url}#m", str(base))
    assert not server.bodies


def test_a_model_is_known_by_what_it_is(toy, tmp_path):
    one, other, changed = (tmp_path / name for name in ("one", "other", "changed"))
    for copy in (one, other, changed):
        shutil.copytree(toy.base, copy)
    template = changed / "chat_template.jinja"
    template.write_text(template.read_text() + " ")
    a, b, c = (Local(Contender("m", path=str(path)), None, 8).identity for path in (one, other, changed))
    assert a == b != c
    assert Local(Contender("m", path=str(one)), "int8", 8).identity != a


@pytest.mark.parametrize(
    "name", ["config.json", "generation_config.json", "tokenizer_config.json", "additional_chat_templates/tool_use.jinja"]
)
def test_every_file_that_answers_depend_on_makes_another_model(toy, tmp_path, name):
    shutil.copytree(toy.base, base := tmp_path / "base")
    (base / name).parent.mkdir(exist_ok=True)
    before = hash_folder(base)
    (base / name).write_text(((base / name).read_text() if (base / name).exists() else "{}") + "\n")
    assert hash_folder(base) != before


def test_every_tensor_makes_another_model(toy, tmp_path):
    shutil.copytree(toy.base, base := tmp_path / "base")
    seen, file = {hash_folder(base)}, base / "model.safetensors"
    held = load_file(file)
    for name, tensor in held.items():
        save_file(held | {name: tensor + 1}, file)
        seen.add(hash_folder(base))
    assert len(seen) == len(held) + 1


def test_of_weights_only_samples_are_read(tmp_path):
    """Else each comparison of models of 70 B would begin with reading 140 GB, here of a hole."""
    size = 2**34
    header = json.dumps({"model.layers.0.mlp.up_proj.weight": {"dtype": "BF16", "shape": [size // 2], "data_offsets": [0, size]}})
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header.encode())
        file.truncate(file.tell() + size)
    began = time.perf_counter()
    hash_folder(tmp_path)
    assert time.perf_counter() - began < 5


def test_an_answer_is_shown_without_what_a_terminal_obeys(world, capsys):
    (world / "prompts.yaml").write_text('"a\\eb": "{thing}"\n')
    with serving(lambda body, headers: said("\x1b[2J\x1b]0;mine\x07green")) as server:
        compare(world, f"m={server.url}#m")
    shown = capsys.readouterr().out
    assert "\ufffd[2J\ufffd]0;mine\ufffdgreen" in shown and "a\ufffdb" in shown
    assert not [c for c in shown if not c.isprintable() and c != "\n"]


def test_labels_that_a_prompt_calls_otherwise(world, capsys):
    (world / "rows.csv").write_text("label,review\n" + "1,good\n0,bad\n" * 5)
    (world / "prompts.yaml").write_text('a: {input: "{review}", labels: {1: yes, 0: no}}\nb: "{review}"\n')
    with serving(lambda body, headers: said("yes")) as server:
        got = compare(world, f"m={server.url}#m", data=str(world / "rows.csv"), expected="label")
    assert got["metrics"] == ["accuracy", "macro_f1"]
    assert [cell["metrics"]["accuracy"]["value"] for cell in got["cells"]] == [0.5, 0.0]
    assert got["cells"][0]["metrics"]["macro_f1"]["value"] == pytest.approx(1 / 3)
    shown = capsys.readouterr().out  # each is held against what it should have said
    first = shown[shown.index("rows.csv:2") :].splitlines()[:4]
    assert [" ".join(told.split()) for told in first[1:]] == ["expected 1", "m, a yes (expected: yes)", "m, b yes"]
    page = (world / "out" / "compare.html").read_text()
    assert page.count('<h3>expected</h3><pre dir="auto">yes</pre>') == 5
    assert page.count('<h3>expected</h3><pre dir="auto">1</pre>') == 5


def test_rows_are_chosen_by_the_seed(world):
    def asked(seed, out):
        with serving(oracle) as server:
            compare(world, f"m={server.url}#m", rows=2, out=str(world / out), options=Options(4, seed=seed))
        return [line["row"] for line in lines(world / out / "predictions.jsonl")]

    assert asked(0, "a") == asked(0, "b") and len(set(asked(0, "c"))) == 2
    assert len({tuple(asked(seed, f"s{seed}")) for seed in range(6)}) > 1


def test_how_models_are_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a@b").mkdir()
    specs = ["Qwen/Qwen3-0.6B", "runs/base@runs/lora/", "mine=x@y", "a@b", "http://h:1/v1#org/m", "gpt=https://h/v1#m"]
    got = parse(specs)
    assert [c.name for c in got] == ["Qwen3-0.6B", "base+lora", "mine", "a@b", "m", "gpt"]
    assert [(c.path, c.adapter) for c in got[:4]] == [
        ("Qwen/Qwen3-0.6B", None),
        ("runs/base", "runs/lora/"),
        ("x", "y"),
        ("a@b", None),
    ]
    assert [(c.url, c.model) for c in got[4:]] == [("http://h:1/v1", "org/m"), ("https://h/v1", "m")]


def test_an_adapter_goes_over_its_base(toy, world, monkeypatch):
    opened = []
    adapter = world / "lora"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")

    class Silent:
        limit = 128

        def fits(self, ids):
            return False

        def each(self, prompts, **_):
            return iter(())

    def record(*args):
        opened.append(args)
        return Silent(), None

    monkeypatch.setattr(contenders, "open_engine", record)
    compare(world, str(toy.base), f"tuned={toy.base}@{adapter}", quantize="int8", rows=1)
    assert opened == [(str(toy.base), None, "int8"), (str(toy.base), str(adapter), "int8")]


MISTAKES = [
    (["--model=/nope"], "/nope: no such directory"),
    (["--model=http://h/v1"], "--model=http://h/v1: needs the model's name after a #, e.g. http://h/v1#NAME"),
    (["--model=@lora"], "--model=@lora: an adapter goes after its base, as --model=DIR@ADAPTER"),
    (["--model=http://h/v1#m", "--model=http://i/v1#m"], "two models are called m; give --model=http://i/v1#m another name"),
    (["--model=http://h/v1#m", "--metrics=acuracy"], "--metrics=acuracy: no such metric"),
    (["--model=http://h/v1#m", "--expected=thnig"], "rows.jsonl: no row has a field thnig"),
    (["--model=http://h/v1#m", "--price=n=1,2"], "--price=n=1,2: no model is called n; known are m"),
    (["--model=http://h/v1#m", "--price=m=1"], "--price=m=1: needs dollars a million tokens of prompts and of answers"),
    (["--model=http://h/v1#m", "--key-env=n=KEY"], "--key-env=n=KEY: no endpoint is called n; known are m"),
    (["--model=http://h/v1#m", "--quantize=nf4"], "--quantize=nf4: is for local models, of which there are none"),
    (["--model=http://h/v1#m", "--key-env=NOT_SET"], "--key-env=NOT_SET: there is no such variable in the environment"),
    (["--model=http://h/v1#m", "--batch-size=2"], "--batch-size=2: is for local models, of which there are none"),
    (["--model=some/model", "--parallel=2"], "--parallel=2: is for endpoints, of which there are none"),
    (["--model=http://h/v1#m", "--rows=0"], "--rows=0: needs at least 1"),
    (["--model=http://h/v1#m", "--temperature=-1"], "temperature=-1.0: "),
    (["--model=http://h/v1#m", "--timeout=0"], "--timeout=0: needs seconds, more than 0"),
    ([], "needs --model=MODEL; for example"),
    (["--model=http://h/v1#m", "--prompts=nope.yaml"], "--prompts=nope.yaml: No such file or directory"),
]


@pytest.mark.parametrize("argv, sentence", MISTAKES)
def test_a_mistake_is_one_sentence_and_makes_nothing(world, monkeypatch, capsys, argv, sentence):
    monkeypatch.chdir(world)
    with pytest.raises(SystemExit) as end:
        main(["compare", "--data=rows.jsonl", "--out=out", *argv])
    told = capsys.readouterr().err
    assert end.value.code == 1 and told.startswith(f"sftjax compare: {sentence}") and told.count("\n") == (1 if argv else 2)
    assert not (world / "out").exists()


def test_a_directory_with_other_files_is_left_alone(world):
    (world / "out").mkdir()
    (world / "out" / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match="has other files in it"):
        compare(world, "http://127.0.0.1:9/v1#m")


def test_columns_of_no_known_format_need_to_be_named(world):
    (world / "rows.csv").write_text("label,review\n1,good\n")
    with pytest.raises(UserError, match=r"columns \(label, review\) are of no format .* --expected=FIELD"):
        compare(world, "http://127.0.0.1:9/v1#m", data=str(world / "rows.csv"), prompts=None)


def test_rows_without_an_answer_are_named(world):
    (world / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "why?"}\n')
    with pytest.raises(UserError, match=r"rows\.jsonl:2: has no answer to compare with; .* --expected=FIELD"):
        compare(world, "http://127.0.0.1:9/v1#m", prompts=None)

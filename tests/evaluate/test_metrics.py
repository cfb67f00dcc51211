"""Every metric equals the formula it is named for, or the library that others compare with."""

import math
import random
import string
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest

from sftjax.check import METRICS as NAMES
from sftjax.config import UserError
from sftjax.evaluate import metrics, rouge_bleu
from sftjax.evaluate.metrics import CORPUS_SUMS, METRICS, exact_match, fitting, number, row_scores, total
from sftjax.evaluate.script import chinese

VOCAB = ["the", "a", "cat", "sat", "on", "mat,", "and", "then", "it", "ran", "home.", "isn't", "well-known", "42"]
ZH = "北京是中国的首都，也是一座有三千年历史的城市。"


def texts(n, words=VOCAB, join=" ", seed=0):
    rng = random.Random(seed)
    return [join.join(rng.choices(words, k=rng.randint(0, 9))) for _ in range(n)]


def pairs(n=40, **kind):
    """Random answers, a third of them equal to what is expected."""
    expected, answers = texts(n, seed=1, **kind), texts(n, seed=2, **kind)
    return [e if i % 3 == 0 else a for i, (a, e) in enumerate(zip(answers, expected))], expected


def of_all(names, answers, expected):
    """{name: the figure of all rows}"""
    return {name: total(of) for name, of in metrics.all_sums(names, answers, expected).items()}


CHINESE = {"words": ZH, "join": ""}


def test_every_name_of_the_config_is_a_metric():
    assert {*METRICS, *CORPUS_SUMS} == {*NAMES}


@pytest.mark.parametrize(
    "text, value",
    [
        ("She sold 48/2 = <<48/2=24>>24 clips.\n#### 72", 72),
        ("#### 1,234.50 dollars, of 3 people", 1234.5),  # the first after the mark
        ("#### 5 ... #### 7 then 8", 7),
        ("#### none, 12", 12),
        ("#### of no number, after 3", 3),
        ("3 #### nothing", 3),
        ("it is $-5", -5),
        ("it is -$5.00", -5),
        ("10-5", 5),
        ("x = −7.", -7),
        ("1,2345", 2345),
        ("答案是１２个", 12),
        ("0.50", 0.5),
        ("about .5", 0.5),
        ("-$.75", -0.75),
        ("see section.2", 2),
        ("so it is...42", 42),
        ("nothing", None),
        ("", None),
    ],
)
def test_the_number_of_an_answer(text, value):
    assert number(text) == value


def test_numbers_are_equal_by_value():
    score = METRICS["numeric"]
    assert score("so $1,000.0", "#### 1000") and not score("1001", "#### 1000")
    assert not score("none", "none")


def squad(answer, expected):
    """SQuAD's own normalisation and F1."""

    def normal(text):
        text = "".join(c for c in text.lower() if c not in set(string.punctuation))
        return [w for w in text.split() if w not in ("a", "an", "the")]

    a, e = normal(answer), normal(expected)
    common = sum((Counter(a) & Counter(e)).values())
    if not a or not e:
        return float(a == e)
    if not common:
        return 0.0
    p, r = common / len(a), common / len(e)
    return 2 * p * r / (p + r)


def test_token_f1_is_squads():
    for answer, expected in zip(*pairs()):
        assert METRICS["token_f1"](answer, expected) == pytest.approx(squad(answer, expected))


def test_token_f1_counts_chinese_characters():
    assert METRICS["token_f1"]("北京市。", "北京") == pytest.approx(2 * 2 / (3 + 2))
    assert METRICS["token_f1"]("用GPU 训练", "GPU训练") == pytest.approx(2 * 3 / (4 + 3))


@pytest.mark.parametrize("kind", ["rouge1", "rouge2", "rougeL"])
def test_rouge_is_rouge_scores_and_of_characters_in_chinese(kind):
    from rouge_score.rouge_scorer import RougeScorer

    own = RougeScorer([kind])
    for answer, expected in zip(*pairs()):
        assert METRICS[kind](answer, expected) == own.score(expected, answer)[kind].fmeasure
    answers, expected = pairs(**CHINESE)
    spelled = {c: f"w{i}" for i, c in enumerate(ZH) if c not in "，。"}  # each character a word

    def words(text):
        return " ".join(spelled.get(c, "") for c in text)

    for a, e in zip(answers, expected):
        assert METRICS[kind](a, e) == own.score(words(e), words(a))[kind].fmeasure


@pytest.mark.parametrize("kind, tokenize", [({}, "13a"), (CHINESE, "zh")])
def test_bleu_and_chrf_are_sacrebleus(kind, tokenize):
    from sacrebleu.metrics import BLEU, CHRF

    for n in (1, 2, 40):
        answers, expected = pairs(n + 1, **kind)
        answers, expected = answers[1:], expected[1:]
        got = of_all(["bleu", "chrf"], answers, expected)
        assert 100 * got["bleu"] == pytest.approx(BLEU(tokenize=tokenize).corpus_score(answers, [expected]).score)
        assert 100 * got["chrf"] == pytest.approx(CHRF().corpus_score(answers, [expected]).score)
    rows = row_scores(["bleu", "chrf"], answers, expected)
    a, e = next((a, e) for a, e in zip(answers, expected) if chinese([e]) == (tokenize == "zh") and a)
    i = answers.index(a)
    sentence = BLEU(tokenize=tokenize, effective_order=True).sentence_score(a, [e]).score
    assert e == expected[i] and 100 * rows["bleu"][i] == pytest.approx(sentence)
    assert 100 * rows["chrf"][i] == pytest.approx(CHRF().sentence_score(a, [e]).score)
    assert f"tokenizer {tokenize}" in rouge_bleu.how(["bleu", "numeric"], expected)["bleu"]


def test_bleu_of_few_matches_is_smoothed_as_sacrebleu_does():
    from sacrebleu.metrics import BLEU

    for a, e in (("the cat sat down here", "the dog sat up there"), ("x", "y"), ("", "a b c d e"), ("a b", "a b")):
        assert 100 * of_all(["bleu"], [a], [e])["bleu"] == pytest.approx(BLEU().corpus_score([a], [[e]]).score)


def test_macro_f1_is_the_mean_of_the_labels():
    rng = random.Random(0)
    answers, expected = ([rng.choice(labels) for _ in range(60)] for labels in (["a", "b", "c", "?"], ["a", "b", "c"]))
    f1 = []
    for label in "abc":
        tp = sum(a == e == label for a, e in zip(answers, expected))
        fp = sum(a == label != e for a, e in zip(answers, expected))
        fn = sum(e == label != a for a, e in zip(answers, expected))
        f1.append(2 * tp / (2 * tp + fp + fn))
    (got,) = of_all(["macro_f1"], answers, expected).values()
    assert got == pytest.approx(sum(f1) / 3)
    for said, f1_of in ((["x", "y"], 1), (["y", "x"], 0)):
        assert of_all(["macro_f1"], said, ["x", "y"]) == {"macro_f1": f1_of}
    accuracy = sum(a == e for a, e in zip(answers, expected)) / 60
    assert of_all(["accuracy"], answers, expected) == {"accuracy": pytest.approx(accuracy)}


def test_exact_match_and_contains():
    assert exact_match(" 4\n", "4") and not exact_match("4.", "4")
    contains = METRICS["contains"]
    assert contains("It is PARIS.", " Paris") and not contains("Rome", "Paris")
    assert not contains("anything", " ") and contains("", "")


def test_json_is_an_object_or_a_list():
    valid = METRICS["json_valid"]
    assert valid(' {"a": [1, null]}\n', "") and valid("[]", "")
    for text in ('{"a": NaN}', "{'a': 1}", "```json\n{}\n```", "3", "true", "", "[" * 100_000):
        assert not valid(text, "")


@pytest.mark.parametrize("kind", [{}, CHINESE])
def test_a_figure_is_a_function_of_sums_over_rows(kind):
    """All rows, and any rows taken any number of times: as scoring just those."""
    answers, expected = pairs(**kind)
    taken = np.random.default_rng(0).integers(0, len(answers), 25)
    of_them = of_all(NAMES, [answers[i] for i in taken], [expected[i] for i in taken])
    for name, sums in metrics.all_sums(NAMES, answers, expected).items():
        assert sums.figure(sums.rows[taken].sum(0)) == pytest.approx(of_them[name], nan_ok=True), name
        assert 0 <= of_them[name] <= 1


def test_rows_have_every_score_but_the_corpus_own():
    answers, expected = pairs()
    rows = row_scores(NAMES, answers, expected)
    assert {*rows} == {*NAMES} - {"macro_f1"} and all(len(scores) == 40 for scores in rows.values())
    for name, value in of_all(NAMES, answers, expected).items():
        if name not in CORPUS_SUMS:
            assert value == pytest.approx(sum(rows[name]) / 40)
    assert math.isnan(of_all(["exact_match"], [], [])["exact_match"])


def test_what_suits_the_data_is_chosen():
    assert fitting(["a", "b"], labels=True) == ("accuracy", "macro_f1")
    assert fitting(["x\n#### 3", "-1,000.5"]) == ("numeric", "exact_match")
    assert fitting(["3", "three"]) == ("exact_match", "token_f1") == fitting([])
    assert fitting(['{"a": 1}']) == ("exact_match", "json_valid", "token_f1")


def test_a_wrong_name_and_a_missing_library_are_sentences(monkeypatch):
    with pytest.raises(UserError, match=r"metrics=rouge: no such metric.*did you mean rouge"):
        of_all(["rouge"], ["a"], ["a"])
    monkeypatch.setitem(sys.modules, "sacrebleu.metrics", None)
    rouge_bleu.chrf_of.cache_clear()
    with pytest.raises(
        UserError, match=r"the metric chrf needs sacrebleu, which is not installed; run pip install 'sftjax\[eval\]'"
    ):
        of_all(["chrf"], ["a"], ["a"])


def test_rouge_is_there_where_torch_is_hidden():
    """As on the command line, in a process that has imported nothing yet."""
    program = (
        "import sys; sys.modules['torch'] = None; from sftjax.evaluate.metrics import METRICS;"
        "print(METRICS['rouge1']('a', 'a'), sys.modules['torch'])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "1.0 None\n"

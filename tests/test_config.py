"""The schema's laws: every key survives its own text, has a type and a range, and none is accepted and ignored."""

import itertools
import re
from pathlib import Path

import numpy as np
import pytest
from ml_collections import ConfigDict

from sftjax import config as config_module
from sftjax.check import CHOICES, USELESS, check
from sftjax.config import UserError, default, flatten, load, opened, override, shown
from sftjax.data import layouts

DEFAULTS = dict(flatten(default()))


def told(*changes):
    """What `check` says of command-line `key=value`s."""
    c = default()
    with pytest.raises(UserError) as refused:
        for change in changes:
            key, _, text = change.partition("=")
            override(c, key, text)
        check(c)
    return str(refused.value)


@pytest.mark.parametrize("key", DEFAULTS)
def test_every_key_round_trips_from_its_text(key):
    for text in (shown(DEFAULTS[key]), str(DEFAULTS[key])):
        c = default()
        override(c, key, text)
        got, was = (dict(v) if isinstance(v, ConfigDict) else v for v in (dict(flatten(c))[key], DEFAULTS[key]))
        assert got == was
        check(c)


@pytest.mark.parametrize("key", [key for key, value in DEFAULTS.items() if value is None])
def test_a_key_that_may_be_none_can_be_set_and_unset(key):
    set_to = {
        "model.dtype": "float32",
        "dpo.beta": "3.0",
        "dpo.label_smoothing": "0.3",
        "dpo.nll_by": "sum",
        "ppo.kl_target": "3.0",
        "ppo.score_clip": "3.0",
        "grpo.epsilon_high": "3.0",
    }.get(key, "3")
    c = default()
    override(c, key, set_to)
    assert str(dict(flatten(c))[key]) == set_to
    override(c, key, "none")
    assert dict(flatten(c))[key] is None


REFUSED = [
    ("train.steps=abc", "needs a number"),
    ("train.steps=1.5", "needs a whole number"),
    ("train.micro_batch=2.5", "needs a whole number"),
    ("eval.batch_size=x", "needs a number"),
    ("eval.batch_size=0", "needs at least 1"),
    ("data.workers=two", "needs a number"),
    ("optim.lr_width=abc", "needs a number"),
    ("optim.lr_width=0", "needs at least 1"),
    ("optim.lr=-1", "needs at least 0"),
    ("optim.lr=1e999", "needs a finite number"),
    ("optim.lr=nan", "needs a number"),
    ("optim.warmup=-5", "needs at least 0"),
    ("optim.clip=-1", "needs at least 0"),
    ("optim.final_lr=-1", "needs at least 0"),
    ("optim.b1=1", "needs a share"),
    ("loss.neftune_alpha=-5", "needs at least 0"),
    ("loss.label_smoothing=1", "needs a share"),
    ("lora.dropout=-0.1", "needs a share"),
    ("lora.alpha=0", "needs more than 0"),
    ("train.epochs=-1", "needs more than 0"),
    ("seed=-1", "needs at least 0"),
    ("seed=4294967296", "needs at most 4294967295"),
    ("optim.decay=2", "needs at most 1"),
    ("mesh.data=0", "needs at least 1, or -1"),
    ("mesh.fsdp=-2", "needs at least 1, or -1"),
    ("data.split=a,b", "needs numbers"),
    ("data.split=8,1,1,1", "needs numbers"),
    ("data.split=1e999,1", "needs numbers"),
    ("data.columns=text", "--config.data.columns.NAME=text"),
    ("lora.rank=none", "needs a number"),
    ("lora.lr_ratio=0", "needs more than 0"),
    ("lora.init=pisa", "did you mean pissa?"),
    ("optim.name=AdamW", "did you mean adamw?"),
    ("lora.targets=", "needs a name at least, e.g. all-linear"),
    ("adapter.targets=", "needs a name at least, e.g. o_proj,down_proj"),
    ("model.quantize=nf5", "did you mean nf4?"),
    ("adapter.width=0", "needs at least 1"),
    ("lora.rank_pattern.q_proj=4.5", "needs a whole number"),
    ("lora.rank_pattern.q_proj=0", "needs a whole number, at least 1"),
    ("lora.alpha_pattern.q_proj=-1", "needs a finite number, more than 0"),
    ("dpo.beta=0", "needs more than 0"),
    ("dpo.ld_alpha=1.5", "needs at most 1"),
    ("dpo.label_smoothing=1", "needs a share"),
    ("dpo.loss=sigmoid,sft", "needs a name, or several with a number above 0 each"),
    ("dpo.loss={}", "needs a name, or several with a number above 0 each"),
    ("dpo.loss={'sigmoid': 0}", "needs a name, or several with a number above 0 each"),
    ("dpo.tau=0", "needs more than 0"),
    ("dpo.nll_by=word", "needs one of None, pair, token, sum"),
    ("kto.loss=apo_zero", "did you mean apo_zero_unpaired?"),
    ("kto.beta=0", "needs more than 0"),
    ("grpo.num_generations=1", "needs at least 2"),
    ("grpo.temperature=0", "needs more than 0"),
    ("grpo.top_p=2", "needs at most 1"),
    ("grpo.advantage=gae", "needs one of grpo, rloo"),
    ("kto.undesirable_weight=-1", "needs at least 0"),
    ("data.format=pairs", "did you mean pair?"),
    ("lora.rank_pattern=4", "--config.lora.rank_pattern.NAME=4"),
]


@pytest.mark.parametrize("change, sentence", REFUSED)
def test_a_value_of_another_type_or_range_is_refused(change, sentence):
    said = told(change)
    key, _, text = change.partition("=")
    assert re.match(rf"--config\.{key}=({re.escape(text)}|[\w.-]+): ", said)
    assert sentence in said


@pytest.mark.parametrize("text", ["{[1]: 2}", "{{}}", "(" * 10_000, "-" * 10_000 + "1", "1 +", "{1: 2}[1]", "a,b"])
def test_what_is_no_value_of_python_is_the_text_itself(text):
    assert config_module.read(text) == text


def test_every_format_may_be_named():
    assert {*CHOICES["data.format"]} == {"auto", *layouts.NEEDS}


def test_names_of_ones_own_may_be_regexes_and_have_no_dots(tmp_path):
    c = default()
    override(c, "lora.rank_pattern.(q|k)_proj", "4")
    override(c, "lora.alpha_pattern.down_proj", "4")
    assert (c.lora.rank_pattern.to_dict(), c.lora.alpha_pattern.to_dict()) == ({"(q|k)_proj": 4}, {"down_proj": 4.0})
    check(c)
    assert "q_proj in place of self_attn.q_proj" in told("lora.rank_pattern.self_attn.q_proj=4")
    assert "cannot contain a dot" in told("lora.rank_pattern={'.*_proj': 4}")
    assert "no such key" in told("lora.rank_pattern.=4")
    (tmp_path / "c.py").write_text(FILE.format("c.lora.rank_pattern = {'self_attn.q_proj': 4}"))
    with pytest.raises(UserError, match=r"c.py:4: self_attn.q_proj: .*cannot contain a dot"):
        load(tmp_path / "c.py")


def test_text_stays_text():
    c = default()
    override(c, "model.revision", "123")
    override(c, "data.system", "42")
    assert (c.model.revision, c.data.system) == ("123", "42")


FILE = "from sftjax.config import default\ndef get_config():\n    c = default()\n    {}\n    return c\n"


@pytest.mark.parametrize(
    "line",
    [
        'c.lora.targets = ("q_proj", "v_proj")',
        'c.lora.targets = "q_proj"',
        'c.data.train = "x.jsonl"',
        'c.data.train = ("x.jsonl", {"path": "y.jsonl", "weight": 2})',
        'c.data.train = {"path": "y.jsonl", "weight": 2}',
        'c.data.eval = ["x.jsonl"]',
        'c.method, c.freeze.train = "freeze", "bias"',
        'c.method, c.freeze.train = "freeze", ("bias", "norm")',
        'c.method, c.adapter.targets = "adapter", ("o_proj",)',
        'c.tokens.train = "<tool>"',
        'c.task, c.dpo.loss = "dpo", {"sigmoid": 1.0, "sft": 0.2}',
        'c.lora.rank_pattern = {"q_proj": 4}',
        'c.lora.alpha_pattern = {"q_proj": 4}',
        "c.train.steps = 7",
        "c.optim.lr = 1",
    ],
)
def test_a_config_file_may_say_what_the_schema_says(line, tmp_path):
    (tmp_path / "c.py").write_text(FILE.format(line))
    load(tmp_path / "c.py")


@pytest.mark.parametrize(
    "line, sentence",
    [
        ("c.train.steps = 'abc'", ":4: --config.train.steps=abc: needs a number"),
        ("c.eval.batch_size = 1.5", ":4: --config.eval.batch_size=1.5: needs a whole number"),
        ("c.model.path = 3", ":4: --config.model.path=3: needs text"),
        ("c.data.packing = 1", ":4: --config.data.packing=1: needs true or false"),
        ("c.lora = {'rnak': 4}", ":4: no such key: rnak; did you mean lora.rank?"),
        ("c.train.stepz = 3", ":4: no such key: stepz; did you mean train.steps?"),
        ("c.data.train = [{'instruction': 'a', 'output': 'b'}]", "--config.data.train: rows in memory (dict) are not read"),
        ("c.optim.lr = -1.0", "--config.optim.lr=-1.0: needs at least 0"),
        ("from ml_collections import ConfigDict; c = ConfigDict({'seed': 1})", "needs a function get_config()"),
        ("c.lora.rank = None", "--config.lora.rank=None: needs a value"),
        ("c.lora.targets = 3", "--config.lora.targets=3: needs a name or names"),
        ("c.data.split = ('a',)", "--config.data.split=a: needs numbers"),
        ("c.tokens.train = 3", "--config.tokens.train=3: needs a name or names"),
        ("c.adapter.targets = None", "--config.adapter.targets=None: needs a value"),
        ("c.lora.rank_pattern = {'q_proj': 'x'}", "--config.lora.rank_pattern.q_proj=x: needs a whole number"),
        ("c.lora.rank_pattern.q_proj = True", "--config.lora.rank_pattern.q_proj=True: needs a whole number"),
        ("c.lora.rank_pattern = {3: 4}", "--config.lora.rank_pattern: 3 is no name"),
        ("c.lora.alpha_pattern.q_proj = float('nan')", "--config.lora.alpha_pattern.q_proj=nan: needs a finite number"),
        ("c.data.columns.text = 4", "--config.data.columns.text=4: needs text"),
    ],
)
def test_a_config_file_is_held_to_the_same(line, sentence, tmp_path):
    (tmp_path / "c.py").write_text(FILE.format(line))
    with pytest.raises(UserError) as refused:
        load(tmp_path / "c.py")
    assert sentence in str(refused.value)


def test_a_value_goes_in_as_what_it_says():
    c = default()
    c.optim.lr, c.lora.rank, c.model.path, c.optim.eps = "1e-4", 8.0, Path("base"), np.float64(1e-6)
    c.train.steps, c.data.packing, c.data.train = np.int64(4), np.bool_(False), [Path("a.jsonl"), {"path": Path("b.jsonl")}]
    c.mesh = {"data": 1, "fsdp": np.int32(2)}
    assert (c.optim.lr, c.lora.rank, c.model.path, c.optim.eps) == (1e-4, 8, "base", 1e-6)
    assert (c.train.steps, c.data.packing, c.data.train) == (4, False, ["a.jsonl", {"path": "b.jsonl"}])
    assert (c.mesh.data, c.mesh.fsdp, c.mesh.tensor) == (1, 2, 1)
    assert all(type(value) in (int, float, str, bool) for value in (c.train.steps, c.optim.eps, c.model.path, c.data.packing))
    check(c)
    again = c.copy_and_resolve_references()
    again.optim.lr, again.lora.targets = "2e-4", "q_proj"
    assert (again.optim.lr, c.optim.lr) == (2e-4, 1e-4)


@pytest.mark.parametrize(
    "overrides",
    [
        {"optim.lr": 1e-3, "data.train": "a.jsonl", "lora.targets": ["q_proj"], "model.revision": None},
        {"optim": {"lr": 1e-3}, "data": {"train": "a.jsonl"}, "lora.targets": ("q_proj",)},
        ("optim.lr=1e-3", "--config.data.train=a.jsonl", "lora.targets=q_proj,"),
        (item for item in ["optim.lr=1e-3", "data.train=a.jsonl", "lora.targets=q_proj,"]),
    ],
)
def test_overrides_are_a_mapping_or_texts(overrides, tmp_path):
    (tmp_path / "c.py").write_text(FILE.format("pass"))
    c = load(tmp_path / "c.py", overrides)
    assert (c.optim.lr, c.data.train, tuple(c.lora.targets)) == (1e-3, "a.jsonl", ("q_proj",))


@pytest.mark.parametrize(
    "overrides, sentence",
    [
        (["model.path"], "model.path: needs a key and a value"),
        ("model.path", "model.path: needs a key and a value"),
        ("lora=3", "is a group of keys; name one of them, e.g. --config.lora.alpha=VALUE"),
        ({"optim.lr": []}, "--config.optim.lr=: needs a number"),
        ({"optim": {"rl": 1}}, "no such key: rl"),
    ],
)
def test_an_override_that_says_nothing_is_refused(overrides, sentence, tmp_path):
    (tmp_path / "c.py").write_text(FILE.format("pass"))
    with pytest.raises(UserError) as refused:
        load(tmp_path / "c.py", overrides)
    assert sentence in str(refused.value)


def test_a_file_that_is_no_config_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="needs a Python file with get_config"):
        load(tmp_path / "config.json")
    with pytest.raises(UserError, match="load_config or"):
        opened({"task": "sft"})
    with pytest.raises(UserError, match="has other keys than"):
        check(ConfigDict({"task": "sft"}))


def test_one_key_leaves_the_users_own_names_open():
    c = default()
    override(c, "data.max_length", "64")
    override(c, "seed", "1")
    c.data.columns.text = "review"
    check(c)


def test_every_key_has_a_comment():
    lines = Path(config_module.__file__).read_text().splitlines()
    keys = [(i, line) for i, line in enumerate(lines) if re.match(r"    c\.[\w.]+ = ", line) and "Config()" not in line]
    assert len(keys) > 120
    assert not [line for i, line in keys if "#" not in line and "#" not in lines[i - 1][:5]]


def test_commas_part_names_but_not_what_is_in_brackets():
    c = default()
    override(c, "data.train", "a.jsonl, b.jsonl")
    override(c, "data.eval", "c.jsonl,d.jsonl")
    override(c, "freeze.train", "bias")
    override(c, "lora.targets", "(q|k){1,2}_proj,v_proj")
    assert (c.data.train, c.data.eval) == (("a.jsonl", "b.jsonl"), ("c.jsonl", "d.jsonl"))
    assert c.freeze.train == "bias"
    assert c.lora.targets == ("(q|k){1,2}_proj", "v_proj")


# Combinations: for each key of the table a value that is not its default

OTHER = {
    "model.adapter": "adapter",
    "model.quantize": "nf4",
    "lora.rank": "8",
    "lora.alpha": "8",
    "lora.dropout": "0.1",
    "lora.targets": "q_proj",
    "lora.rslora": "true",
    "lora.dora": "true",
    "lora.init": "pissa",
    "lora.lr_ratio": "16",
    "lora.rank_pattern": "{'q_proj': 4}",
    "lora.alpha_pattern": "{'q_proj': 4}",
    "lora.modules_to_save": "lm_head",
    "freeze.last_n_layers": "1",
    "freeze.train": "bias",
    "adapter.width": "8",
    "adapter.targets": "o_proj",
    "loss.neftune_alpha": "5",
    "loss.label_smoothing": "0.1",
    "loss.z_loss": "1e-4",
    "loss.router_balance": "1e-3",
    "dpo.loss": "ipo",
    "dpo.beta": "0.2",
    "dpo.sft_weight": "0.2",
    "dpo.label_smoothing": "0.1",
    "dpo.divergence": "js",
    "dpo.ld_alpha": "0.5",
    "dpo.alpha": "0.3",
    "dpo.per_token": "false",
    "dpo.tau": "0.1",
    "dpo.shift": "true",
    "dpo.gamma": "1.0",
    "dpo.nll": "0.5",
    "dpo.nll_by": "token",
    "dpo.prompt_nll": "true",
    "dpo.precompute_ref_log_probs": "true",
    "kto.loss": "apo_zero_unpaired",
    "kto.precompute_ref_log_probs": "true",
    "kto.beta": "0.2",
    "kto.desirable_weight": "1.3",
    "kto.undesirable_weight": "1.3",
    "grpo.rewards": "exact_match",
    "grpo.reward_weights": "2",
    "grpo.num_generations": "4",
    "grpo.max_completion_length": "64",
    "grpo.temperature": "0.9",
    "grpo.top_p": "0.9",
    "grpo.advantage": "rloo",
    "grpo.scale_rewards": "none",
    "grpo.loss_type": "dapo",
    "grpo.beta": "0.1",
    "grpo.epsilon": "0.1",
    "grpo.epsilon_high": "0.28",
    "grpo.num_iterations": "2",
    "grpo.num_mini_batches": "2",
    "grpo.missing_eos_penalty": "1",
    "grpo.mask_truncated_completions": "true",
    "data.packing": "false",
    "eval.max_new_tokens": "64",
    "classify.by": "head",
    "classify.class_weights": "balanced",
    "ppo.rewards": "exact_match",
    "ppo.reward_weights": "2",
    "ppo.score_clip": "5",
    "ppo.missing_eos_penalty": "1",
    "ppo.value": "base",
    "ppo.max_completion_length": "16",
    "ppo.temperature": "0.7",
    "ppo.top_p": "0.9",
    "ppo.num_ppo_epochs": "2",
    "ppo.num_mini_batches": "2",
    "ppo.kl_coef": "0.2",
    "ppo.kl_estimator": "k3",
    "ppo.kl_target": "6",
    "ppo.kl_horizon": "100",
    "ppo.cliprange": "0.1",
    "ppo.cliprange_value": "0.1",
    "ppo.vf_coef": "0.5",
    "ppo.gamma": "0.9",
    "ppo.lam": "1.0",
    "ppo.whiten_rewards": "true",
    "ppo.whiten_advantages": "false",
    "reward.loss": "plackett_luce",
    "reward.margin": "0.5",
    "reward.centring": "0.01",
    "eval.generate": "8",
    "eval.metrics": "chrf",
    "train.generate_every": "8",
    "data.loss_on": "all",
    "data.template": "chatml",
    "data.on_overlong": "error",
    "data.label_prompt": "which? {text}",
    "data.split": "9,1,0",
    "data.eval": "held.jsonl",
    "optim.decay": "0.2",
    "optim.final_lr": "0.1",
    "optim.b1": "0.8",
    "optim.b2": "0.95",
    "optim.eps": "1e-6",
    "train.patience": "3",
}
PAIRS = [
    (key, dict(zip(others, map(str, values))))
    for keys, others in USELESS
    for key in keys
    for values in itertools.product(*([OTHER[option]] if which == "given" else which for option, which in others.items()))
]
OTHERS = {key: [others for k, others in PAIRS if k == key] for key, _ in PAIRS}
# without which a key would be refused for another reason
NEEDS = {
    "freeze": ["method=freeze"],
    "adapter": ["method=adapter"],
    "dpo": ["task=dpo"],
    "kto": ["task=kto"],
    "grpo": ["task=grpo"],
    "grpo.advantage=rloo": ["task=grpo"],
    "grpo.epsilon": ["task=grpo", "grpo.num_mini_batches=2"],
    "grpo.epsilon_high": ["task=grpo", "grpo.num_iterations=2"],
    "ppo.num_ppo_epochs=1": ["task=ppo"],
    "ppo.kl_coef=0": ["task=ppo"],
    "ppo": ["task=ppo"],
    "ppo.kl_horizon": ["task=ppo", "ppo.kl_target=6"],
    "reward": ["task=reward"],
    "classify": ["task=classify", "data.format=label"],
    "classify.class_weights": ["task=classify", "data.format=label", "classify.by=head"],
    "classify.by=head": ["task=classify", "data.format=label"],
    "classify.by=label": ["task=classify", "data.format=label"],
    "reward.loss=plackett_luce": ["task=reward"],
    "task=classify": ["data.format=label"],
    "optim.decay": ["optim.schedule=wsd"],
}


def needs(key, others=()):
    found = [c for c in NEEDS.get(key, NEEDS.get(key.split(".")[0], [])) if c.split("=")[0] not in others]
    # under another task its neighbours mean nothing either
    return [c for c in found if "task" not in others or not c.startswith(key.split(".")[0] + ".")]


@pytest.mark.parametrize("key", OTHERS)
def test_a_key_that_would_be_ignored_is_refused_with_what_makes_it_so(key):
    for others in OTHERS[key]:
        options = [f"{option}={value}" for option, value in others.items()]
        said = told(f"{key}={OTHER[key]}", *needs(key, others), *options)
        assert said.startswith(f"--config.{key}="), options
        assert all(f"--config.{option}" in said for option in options), options


def accepted(*changes):
    c = default()
    for change in changes:
        override(c, *change.split("=", 1))
    check(c)


@pytest.mark.parametrize("key", OTHERS)
def test_neither_of_the_two_is_refused_alone(key):
    accepted(f"{key}={OTHER[key]}", *needs(key))


@pytest.mark.parametrize(
    "others", {tuple(others.items()): others for _, others in PAIRS}.values(), ids=lambda o: " ".join(o.values())
)
def test_what_makes_a_key_ignored_is_no_mistake_itself(others):
    options = [f"{option}={value}" for option, value in others.items()]
    accepted(*options, *(c for o in options for c in NEEDS.get(o, [])))


def test_classification_takes_labels_only():
    assert "--config.data.format=auto" in told("task=classify") and "--config.task=classify" in told("task=classify")
    assert "--config.task=classify" in told("task=classify", "data.format=messages")
    c = default()
    override(c, "task", "classify")
    override(c, "data.format", "label")
    check(c)

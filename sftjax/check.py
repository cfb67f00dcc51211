"""What is refused of a config: a value outside its choices or range, and one that another setting makes useless."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from os import PathLike
from typing import Any, NoReturn

from ml_collections import ConfigDict

from sftjax.config import NAMED_FREELY, UserError, default, flatten, near, parts, shares, shown

CHOICES = {
    "task": ("sft", "pretrain", "classify", "reward", "dpo", "kto", "grpo", "ppo"),
    "classify.by": ("label", "head"),
    "reward.loss": ("bradley_terry", "plackett_luce"),
    "grpo.advantage": ("grpo", "rloo"),
    "grpo.scale_rewards": ("group", "batch", "none"),
    "grpo.loss_type": ("grpo", "dapo", "dr_grpo"),
    "ppo.value": (None, "reward", "base"),
    "ppo.kl_estimator": ("k1", "k2", "k3"),
    "dpo.nll_by": (None, "pair", "token", "sum"),
    "kto.loss": ("kto", "apo_zero_unpaired"),
    "model.dtype": (None, "float32", "bfloat16", "float16"),
    "model.remat": ("none", "minimal", "block", "offload"),
    "model.quantize": (None, "nf4", "int8"),
    "method": ("lora", "full", "freeze", "adapter", "tokens"),
    "lora.init": ("zero", "pissa", "olora"),
    "data.format": (
        *("auto", "alpaca", "sharegpt", "messages", "prompt_completion", "label", "text"),
        *("prompt", "pair", "ranking", "unpaired", "tree"),
    ),
    "data.loss_on": ("answers", "last_answer", "all"),
    "data.on_bad_row": ("error", "skip"),
    "data.on_overlong": ("drop", "truncate", "error"),
    "optim.name": ("adamw", "adamw_8bit", "adam", "sgd", "lion", "adafactor", "muon"),
    "optim.schedule": ("cosine", "linear", "constant", "wsd"),
}

METRICS = (  # of answers, sftjax/evaluate/metrics.py
    *("exact_match", "contains", "numeric", "token_f1", "rouge1", "rouge2", "rougeL", "bleu", "chrf"),
    *("accuracy", "macro_f1", "json_valid"),
)

AT_LEAST = {
    "seed": 0,
    "lora.rank": 1,
    "freeze.last_n_layers": 0,
    "adapter.width": 1,
    "data.max_length": 2,
    "data.workers": 1,
    "loss.z_loss": 0,
    "loss.router_balance": 0,
    "loss.neftune_alpha": 0,
    "dpo.sft_weight": 0,
    "dpo.ld_alpha": 0,
    "dpo.gamma": 0,
    "dpo.nll": 0,
    "reward.margin": 0,
    "reward.centring": 0,
    "kto.desirable_weight": 0,
    "kto.undesirable_weight": 0,
    "grpo.num_generations": 2,
    "grpo.max_completion_length": 1,
    "grpo.beta": 0,
    "grpo.num_iterations": 1,
    "grpo.num_mini_batches": 1,
    "grpo.missing_eos_penalty": 0,
    "ppo.max_completion_length": 1,
    "ppo.num_ppo_epochs": 1,
    "ppo.num_mini_batches": 1,
    "ppo.missing_eos_penalty": 0,
    "ppo.kl_coef": 0,
    "ppo.vf_coef": 0,
    "ppo.gamma": 0,
    "ppo.lam": 0,
    "optim.lr": 0,
    "optim.eps": 0,
    "optim.weight_decay": 0,
    "optim.clip": 0,
    "optim.warmup": 0,
    "optim.decay": 0,
    "optim.final_lr": 0,
    "optim.lr_width": 1,
    "train.steps": 1,
    "train.batch_size": 1,
    "train.micro_batch": 1,
    "train.log_every": 1,
    "train.eval_every": 0,
    "train.save_every": 0,
    "train.keep": 1,
    "train.patience": 0,
    "train.generate_every": 0,
    "train.max_bad_steps": 1,
    "eval.batch_size": 1,
    "eval.generate": 0,
    "eval.max_new_tokens": 1,
}
AT_MOST = {
    **dict.fromkeys(("dpo.ld_alpha", "grpo.top_p", "ppo.top_p", "ppo.gamma", "ppo.lam", "optim.decay", "optim.final_lr"), 1),
    "seed": 2**32 - 1,
}
ABOVE_0 = (
    *("lora.alpha", "lora.lr_ratio", "train.epochs", "dpo.beta", "dpo.alpha", "dpo.tau", "kto.beta"),
    *(f"grpo.{name}" for name in ("temperature", "top_p", "epsilon", "epsilon_high")),
    *(
        f"ppo.{name}"
        for name in ("temperature", "top_p", "score_clip", "kl_target", "kl_horizon", "cliprange", "cliprange_value")
    ),
)
SHARES = ("lora.dropout", "loss.label_smoothing", "dpo.label_smoothing", "optim.b1", "optim.b2")
# what the values of the user's own names are to be, by their type
OWN: dict[type, tuple[Callable[[Any], bool], str]] = {
    str: (lambda x: isinstance(x, str), "text"),
    int: (lambda x: type(x) is int and x >= 1, "a whole number, at least 1"),
    float: (lambda x: type(x) in (int, float) and 0 < x < math.inf, "a finite number, more than 0"),
}

GIVEN = "given"  # any value but none
GENERATED = ("eval.generate", "eval.metrics", "train.generate_every")
LORA, FREEZE, ADAPTER = (tuple(f"{method}.{name}" for name in default()[method]) for method in ("lora", "freeze", "adapter"))
# the tasks that have keys of their own
OF_TASKS = {t: tuple(f"{t}.{name}" for name in default()[t]) for t in CHOICES["task"] if t in default()}
ROLLOUTS = ("grpo", "ppo")  # tasks that learn from what the model answers
# keys, and the settings of others with which they would be accepted and ignored
USELESS: tuple[tuple[tuple[str, ...], dict[str, Any]], ...] = (
    (("model.adapter",), {"method": ("full", "freeze")}),
    (("model.quantize",), {"method": ("full",)}),
    (("model.quantize",), {"method": ("freeze",), "freeze.last_n_layers": GIVEN}),  # layers that train are not quantised
    (LORA, {"method": ("full", "freeze", "adapter", "tokens")}),
    (tuple(key for key in LORA if key != "lora.lr_ratio"), {"model.adapter": GIVEN}),  # it brings its own
    (FREEZE, {"method": ("lora", "full", "adapter", "tokens")}),
    (ADAPTER, {"method": ("lora", "full", "freeze", "tokens")}),
    (ADAPTER, {"model.adapter": GIVEN}),
    (("loss.neftune_alpha", "data.loss_on", "data.template"), {"task": ("pretrain",)}),
    (
        ("loss.neftune_alpha", "loss.label_smoothing", "loss.z_loss", "loss.router_balance"),
        {"task": ("dpo", "kto", "reward", *ROLLOUTS)},
    ),
    (GENERATED, {"task": ("pretrain", "reward", *ROLLOUTS)}),
    (("data.loss_on", "data.packing", "eval.max_new_tokens"), {"task": ROLLOUTS}),  # held-out prompts are answered as all are
    (("data.label_prompt",), {"task": ("dpo", "kto", "reward")}),
    *((keys, {"task": tuple(t for t in CHOICES["task"] if t != task)}) for task, keys in OF_TASKS.items()),
    (("grpo.scale_rewards",), {"grpo.advantage": ("rloo",)}),
    # with one update a step the policy is the one that answered, and there is nothing to clip
    (("grpo.epsilon", "grpo.epsilon_high"), {"grpo.num_iterations": (1,), "grpo.num_mini_batches": (1,)}),
    (("ppo.cliprange", "ppo.cliprange_value"), {"ppo.num_ppo_epochs": (1,), "ppo.num_mini_batches": (1,)}),
    (("ppo.kl_horizon",), {"ppo.kl_target": (None,)}),
    (("ppo.kl_target", "ppo.kl_estimator"), {"ppo.kl_coef": (0,)}),  # nothing is paid, and nothing grows from 0
    (("ppo.value",), {"method": ("freeze",)}),  # the value's frozen layers are the policy's
    (("classify.class_weights",), {"classify.by": ("label",)}),
    (
        ("loss.z_loss", "loss.router_balance", "data.template", "data.loss_on", *GENERATED),
        {"task": ("classify",), "classify.by": ("head",)},
    ),
    (("reward.margin",), {"reward.loss": ("plackett_luce",)}),
    (("data.loss_on",), {"task": ("reward",)}),  # an answer's reward is of the whole of it
    (("data.on_overlong",), {"task": ("pretrain",), "data.packing": (True,)}),  # documents are cut to fill rows
    (("data.label_prompt",), {"data.format": ("alpaca", "sharegpt", "messages", "prompt_completion", "text", "prompt")}),
    (("data.split",), {"data.eval": GIVEN}),
    (("optim.decay",), {"optim.schedule": ("cosine", "linear", "constant")}),
    (("optim.final_lr",), {"optim.schedule": ("constant",)}),
    (("optim.b1",), {"optim.name": ("adafactor",)}),
    (("optim.b2",), {"optim.name": ("adafactor", "sgd")}),
    (("optim.eps",), {"optim.name": ("adafactor", "sgd", "lion")}),
    (("train.patience",), {"train.eval_every": (0,)}),
)


def check(config: ConfigDict) -> None:
    """Refuses values outside their choices and ranges, and combinations that mean nothing, naming both. Raises UserError."""
    values, defaults = dict(flatten(config)), dict(flatten(default()))
    if wrong := sorted(values.keys() ^ defaults.keys()):
        raise UserError(
            f"--config.{wrong[0]}: the config has other keys than sftjax.default_config(); start from that, and change it"
        )
    for key, value in values.items():
        if value is None and defaults[key] is not None:
            raise UserError(f"--config.{key}=None: needs a value, e.g. {defaults[key]}")
    check_values(values)
    for keys, others in USELESS:
        if all(bool(values[o]) if which == GIVEN else values[o] in which for o, which in others.items()):
            told = " and ".join(f"--config.{o}={shown(values[o])}" for o in others)
            for key in keys:
                if values[key] != defaults[key]:
                    raise UserError(
                        f"--config.{key}={shown(values[key])}: means nothing with {told}; "
                        f"change that, or leave --config.{key}={shown(defaults[key])}"
                    )
    if values["task"] == "classify" and values["data.format"] != "label":
        raise UserError(
            f"--config.data.format={values['data.format']}: --config.task=classify learns rows of text and label, "
            "--config.data.format=label; for any other there is --config.task=sft"
        )


def check_values(values: dict[str, Any]) -> None:
    """Each value by itself. None, where a key may be None, is decided elsewhere."""
    check_choices(values)
    check_numbers(values)
    check_names(values)
    check_weights(values)
    for key in ("data.train", "data.eval"):
        refuse_rows(values[key], f"--config.{key}")
    if not shares(values["data.split"]):
        refuse(values, "data.split", "numbers, e.g. 8,1,1")


def refuse(values: dict[str, Any], key: str, why: str) -> NoReturn:
    raise UserError(f"--config.{key}={shown(values[key])}: needs {why}")


def check_choices(values: dict[str, Any]) -> None:
    for key, allowed in CHOICES.items():
        if values[key] not in allowed:
            close = near(str(values[key]), map(str, allowed))
            refuse(values, key, f"one of {', '.join(map(str, allowed))}" + (f"; did you mean {close}?" if close else ""))


def check_numbers(values: dict[str, Any]) -> None:
    for key, value in values.items():
        if isinstance(value, float) and not math.isfinite(value):
            refuse(values, key, "a finite number")
    for key, least in AT_LEAST.items():
        if values[key] is not None and values[key] < least:
            refuse(values, key, f"at least {least}")
    for key, most in AT_MOST.items():
        if values[key] > most:
            refuse(values, key, f"at most {most}")
    for key in ABOVE_0:
        if values[key] is not None and values[key] <= 0:
            refuse(values, key, "more than 0")
    for key in SHARES:
        if values[key] is not None and not 0 <= values[key] < 1:
            refuse(values, key, "a share, at least 0 and below 1")
    for key in (key for key in values if key.startswith("mesh.")):
        if values[key] < 1 and values[key] != -1:
            refuse(values, key, "at least 1, or -1 for the rest of the devices")


def check_names(values: dict[str, Any]) -> None:
    """What is a name or several, and names of the user's own."""
    for key in ("lora.targets", "lora.modules_to_save", "freeze.train", "adapter.targets", "tokens.train", "eval.metrics"):
        if not (isinstance(values[key], (str, tuple, list)) and all(isinstance(x, str) for x in values[key])):
            refuse(values, key, "a name or names, e.g. q_proj,v_proj")
        if key.endswith(".targets") and not any(parts(values[key])):
            refuse(values, key, f"a name at least, e.g. {shown(default()[key.split('.')[0]].targets)}")
    refuse_metrics(parts(values["eval.metrics"]), "--config.eval.metrics")
    for group, kind in NAMED_FREELY.items():
        for name, value in values[group].items():
            fits, why = OWN[kind]
            if not isinstance(name, str):
                raise UserError(f"--config.{group}: {name!r} is no name, which is text")
            if not fits(value):
                raise UserError(f"--config.{group}.{name}={shown(value)}: needs {why}")


def check_weights(values: dict[str, Any]) -> None:
    """What is a name, or several with a weight each."""
    weights = values["classify.class_weights"]
    if not (weights in ("none", "balanced") if isinstance(weights, str) else named_weights(weights)):
        refuse(values, "classify.class_weights", "none, balanced, or a number above 0 for labels by name, e.g. {'spam': 3.0}")
    if not (isinstance(values["dpo.loss"], str) or (values["dpo.loss"] and named_weights(values["dpo.loss"]))):
        refuse(values, "dpo.loss", "a name, or several with a number above 0 each, e.g. {'sigmoid': 1.0, 'bco_pair': 0.5}")
    for key in ("grpo.rewards", "grpo.reward_weights", "ppo.rewards", "ppo.reward_weights"):
        if not isinstance(values[key], (str, int, float, tuple, list)):
            refuse(values, key, "a value or several, e.g. exact_match,length:20 with weights 1,0.5")


SOURCE = ("path", "weight", "format", "columns")  # what a data source that is a dict may say
WRITE = {  # what writes rows in memory, by the name of their type
    "DataFrame": "frame.to_json('rows.jsonl', orient='records', lines=True)",
    "Dataset": "dataset.to_json('rows.jsonl')",
    "DatasetDict": "dataset['train'].to_json('rows.jsonl')",
}


def refuse_rows(value: Any, key: str = "data") -> None:
    """Raises UserError where rows themselves stand in place of the path that they are read from."""
    if isinstance(value, (list, tuple)):
        for item in value:
            refuse_rows(item, key)
        return
    kind = type(value).__name__
    named = not value or bool({*SOURCE} & {*value}) if isinstance(value, (dict, ConfigDict)) else kind == "Source"
    if not (named or value is None or isinstance(value, (str, PathLike, int, float))):
        how = WRITE.get(kind, "a json.dumps(row) a line")
        raise UserError(f"{key}: rows in memory ({kind}) are not read; write them to a file, {how}, and give its path")


def refuse_metrics(names: Iterable[str], key: str = "metrics") -> None:
    """Raises UserError for a name that is no metric."""
    for name in names:
        if name not in METRICS:
            close = near(name, METRICS)
            hint = f"; did you mean {close}?" if close else ""
            raise UserError(f"{key}={name}: no such metric, there are {', '.join(METRICS)}{hint}")


def named_weights(value: Any) -> bool:
    """Is it {label: a number above 0}?"""
    return isinstance(value, (dict, ConfigDict)) and all(OWN[float][0](weight) for weight in value.values())

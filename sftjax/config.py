"""The whole schema with its defaults, and how a config is loaded and overridden.

A config file is a module with `get_config()` that starts from `default()` and changes what it needs. On the command
line `--config=FILE --config.optim.lr=1e-4` overrides any key; an unknown key is an error that names the nearest one.
A value has the type of its default; what else is refused is in `sftjax/check.py`.
"""

from __future__ import annotations

import ast
import copy
import difflib
import importlib.util
import math
import os
import re
import traceback
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict, FieldReference
from ml_collections.config_dict import placeholder


class UserError(Exception):
    """A user's mistake: one plain sentence that says what, where and how to mend it. Shown without a traceback."""


class Config(ConfigDict):
    """A group of keys. A value goes in as one of its key's type, as the command line would read it: 8.0 for 8, "1e-4", a Path,
    numpy's numbers; a dict goes into a group key by key. Raises UserError for any other.
    """

    _prefix = ""  # lora. of the group lora

    def __setitem__(self, name: str, value: Any) -> None:
        value, held = plain(value), self._fields.get(name)
        if isinstance(value, Config):
            object.__setattr__(value, "_prefix", f"{self._prefix}{name}.")
        elif isinstance(value, dict) and isinstance(held, Config) and held.is_locked:
            for inner, one in value.items():
                held[inner] = one
            return
        elif held is not None and not isinstance(value, (FieldReference, type(None))) and self.get_type(name) in TYPES:
            value = parse(f"{self._prefix}{name}", value, self.get_type(name))
        try:
            super().__setitem__(name, value)
        except (KeyError, TypeError, ValueError) as e:
            raise UserError(mistake(e)) from e

    def copy_and_resolve_references(self, visit_map: Any = None) -> Config:
        return copy.deepcopy(self)  # ml_collections' own forgets what type the values of a key have


TYPES = (bool, int, float, str, tuple)


def plain(value: Any) -> Any:
    """Numpy's numbers as Python's and a Path as its text, within lists and dicts too."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if getattr(value, "shape", None) == () and hasattr(value, "item"):
        return value.item()
    if type(value) in (list, tuple):
        return type(value)(map(plain, value))
    return {name: plain(one) for name, one in value.items()} if type(value) is dict else value


def default() -> ConfigDict:
    """Every key there is, with its default.

    `placeholder(type)` is None, which means "decide from the rest" as the comment beside it says, or a value of that type.
    """
    c = Config()
    c.task = "sft"  # sft | pretrain | classify | reward | dpo | kto | grpo | ppo
    c.seed = 0  # of everything random: init, order, dropout, noise, sampling

    c.model = Config()
    c.model.path = ""  # a local Hugging Face directory or a hub id
    c.model.revision = placeholder(str)  # of a hub id
    c.model.trust_remote_code = False  # lets the tokenizer run code from the checkpoint
    c.model.adapter = placeholder(str)  # an adapter's directory to go on from: PEFT's (lora), or an export of method adapter
    c.model.quantize = placeholder(str)  # frozen kernels in fewer bits: nf4 (QLoRA, arXiv:2305.14314) | int8; None = as they are
    # compute dtype: float32 | bfloat16 | float16, with a dynamic loss scale; None = bfloat16 on accelerators (float16 on GPUs
    # that have none, such as a T4), float32 on CPU
    c.model.dtype = placeholder(str)
    c.model.scan = True  # one compiled layer body; False unrolls it
    # the backward pass recomputes: none = nothing, minimal = all but products and attention, block = each layer from its input,
    # offload = the same, with the inputs kept in the host's memory
    c.model.remat = "minimal"

    c.method = "lora"  # lora | full | freeze | adapter | tokens
    c.lora = Config()
    c.lora.rank = 16  # columns of a and rows of b: how much an update can say
    c.lora.alpha = 32.0  # an update counts alpha / rank
    c.lora.dropout = 0.0  # the share of what goes into an update that is left out, in training
    c.lora.targets = anything("all-linear")  # all-linear, or names and regexes: ("q_proj", "v_proj")
    c.lora.rslora = False  # scale alpha / sqrt(rank), arXiv:2312.03732
    c.lora.dora = False  # trains the columns' magnitudes apart from their directions, arXiv:2402.09353
    c.lora.init = "zero"  # zero | pissa (arXiv:2404.02948) | olora (arXiv:2406.01775)
    c.lora.lr_ratio = 1.0  # learning rate of b, which starts at zero, over that of a: LoRA+ takes 16, arXiv:2402.12354
    c.lora.rank_pattern = Config()  # module or regex -> rank, e.g. {"down_proj": 32}
    c.lora.alpha_pattern = Config()  # the same for alpha
    c.lora.modules_to_save = anything(())  # train these as a whole too: ("embed_tokens", "lm_head")
    c.freeze = Config()
    c.freeze.last_n_layers = 0  # train these last decoder layers ...
    c.freeze.train = anything(())  # ... and leaves whose path (layers/attn/q/bias, head/kernel) one of these regexes finds

    c.adapter = Config()  # bottleneck adapters, arXiv:1902.00751
    c.adapter.width = 64  # of the bottleneck
    c.adapter.targets = anything(("o_proj", "down_proj"))  # modules whose output goes through one
    c.tokens = Config()
    c.tokens.train = anything(())  # tokens whose rows of embedding and head train, by any method; one that is new is added

    c.data = Config()
    c.data.train = anything(())  # a path, glob, directory or hub id; several; or {"path":, "weight":, "format":, "columns":}
    c.data.eval = anything(None)  # held-out rows, as data.train; None = split off from train
    c.data.split = (8, 1, 1)  # train : eval : test where eval is None; by content, so duplicates stay together
    # alpaca | sharegpt | messages | prompt_completion | label | text | prompt | pair | ranking | unpaired | tree
    c.data.format = "auto"  # found from the columns
    c.data.columns = Config()  # canonical name -> the file's own column, e.g. {"instruction": "question"}
    c.data.roles = Config()  # the file's role -> the template's role, e.g. {"human": "user"}
    c.data.system = placeholder(str)  # a system prompt for rows that have none
    c.data.label_prompt = "{text}"  # format label: the user's turn, with {text} and {labels}
    c.data.template = placeholder(str)  # a built-in name (chatml, llama3) or a .jinja file; None = the model's own, else chatml
    c.data.loss_on = "answers"  # which tokens are learnt: answers | last_answer | all
    c.data.max_length = 1024  # tokens of a row; what is longer is on_overlong's affair
    c.data.packing = True  # several examples in a row, none of which sees another; False = one a row, padded
    c.data.on_bad_row = "error"  # error | skip (to rejected.jsonl)
    c.data.on_overlong = "drop"  # drop | truncate | error
    c.data.workers = placeholder(int)  # tokenising processes; None = one a core
    c.data.cache_dir = placeholder(str)  # where tokenised rows are kept; None = ~/.cache/sftjax/data

    c.loss = Config()
    c.loss.label_smoothing = 0.0  # the share of each target that is spread over the vocabulary, arXiv:1512.00567
    c.loss.z_loss = 0.0  # weight of log(Z)^2, which holds the logits' sum near 1; 1e-4 is usual, arXiv:2204.02311
    # weight of the load-balancing loss of a mixture's routers, arXiv:2101.03961; a checkpoint's own value is its
    # router_aux_loss_coef
    c.loss.router_balance = 0.0
    c.loss.neftune_alpha = 0.0  # 0 = off; 5 is the paper's choice, arXiv:2310.05914

    c.classify = Config()  # task classify
    c.classify.by = "label"  # label: the label is generated | head: a linear head scores each label on the text's last token
    c.classify.class_weights = anything("none")  # of a head's loss: none | balanced (rare labels count more) | {"spam": 3.0}

    c.reward = Config()  # task reward: a head that scores answers
    c.reward.loss = "bradley_terry"  # of pairs, arXiv:2203.02155 | plackett_luce: of whole rankings, best to worst
    c.reward.margin = 0.0  # by how much a chosen answer's reward is to exceed the rejected one's
    c.reward.centring = 0.0  # of (chosen + rejected)^2, which holds the mean reward at 0; 0.01 is usual, arXiv:2312.09244

    c.dpo = Config()  # task dpo; what training starts from is the reference
    # sigmoid (DPO), hinge, ipo, orpo, simpo, ...: the names in sftjax/losses/preference.py; or several with their weights
    c.dpo.loss = anything("sigmoid")  # {"sigmoid": 1.0, "bco_pair": 0.5}
    c.dpo.beta = placeholder(float)  # None = the loss's own: 2 for simpo, else 0.1
    c.dpo.sft_weight = 0.0  # weight of an added -log-likelihood of the chosen answer: RPO, arXiv:2404.19733
    c.dpo.label_smoothing = placeholder(float)  # the share of pairs taken to be the wrong way round; None = 0, for exo_pair 1e-3
    c.dpo.divergence = "reverse_kl"  # reverse_kl | forward_kl | js | alpha, arXiv:2309.16240
    c.dpo.alpha = 0.5  # of the divergence alpha: 1 is forward KL, towards 0 reverse KL; TRL's coefficient is 1 - alpha
    c.dpo.ld_alpha = 1.0  # what a token beyond the shorter answer's length counts, arXiv:2409.06411
    c.dpo.per_token = True  # ipo: log-ratios per token, as TRL and the paper's authors have them; False is as printed
    c.dpo.tau = 0.05  # discopop: how sharply it goes over from one loss to the other; TRL's discopop_tau
    c.dpo.shift = False  # bco_pair: less the rewards' mean, as in the paper; False is as TRL
    c.dpo.gamma = 0.5  # simpo: by how much the chosen reward is to exceed the rejected one; TRL's simpo_gamma
    c.dpo.nll = 1.0  # cpo: of the likelihood; TRL's cpo_alpha
    c.dpo.nll_by = placeholder(str)  # sft, cpo, orpo: pair | token (TRL's) | sum; None = the paper's
    c.dpo.prompt_nll = False  # sft, cpo, orpo: the likelihood is of the prompt too, as TRL's of orpo
    c.dpo.precompute_ref_log_probs = False  # once, before training, and kept: no second forward pass, no second model

    c.kto = Config()  # task kto, arXiv:2402.01306
    c.kto.loss = "kto"  # kto | apo_zero_unpaired, arXiv:2408.06266
    c.kto.beta = 0.1  # how dear it is to leave the reference
    c.kto.desirable_weight = 1.0  # what a good answer counts; where they are rare, more
    c.kto.undesirable_weight = 1.0  # what a bad one counts
    c.kto.precompute_ref_log_probs = False  # once, before training, and kept: as dpo's

    c.grpo = Config()  # task grpo, arXiv:2402.03300: answers are rewarded, and held against others to the same prompt
    # exact_match and others of eval.metrics, "format:REGEX", "length:N", "file.py:function", "model:DIR"; docs/reinforcement.md
    c.grpo.rewards = anything(())
    c.grpo.reward_weights = anything(())  # a number for each of them; () = 1 for all
    c.grpo.num_generations = 8  # answers to each prompt; train.batch_size counts answers
    c.grpo.max_completion_length = 256  # tokens of an answer; data.max_length holds it with its prompt
    c.grpo.temperature = 1.0  # at which answers are sampled, and their log-probs taken
    c.grpo.top_p = 1.0  # they are sampled from the likeliest tokens of this probability together; 1 = all
    c.grpo.advantage = "grpo"  # grpo: less the mean of the prompt's answers | rloo: of the others, arXiv:2402.14740
    c.grpo.scale_rewards = "group"  # by the spread of the prompt's answers (group), of all (batch), or none, arXiv:2503.20783
    c.grpo.loss_type = "grpo"  # each answer counts the same | dapo: each token, arXiv:2503.14476 | dr_grpo: a constant
    c.grpo.beta = 0.04  # weight of the KL to the reference; at 0 there is no reference
    c.grpo.epsilon = 0.2  # how far a ratio may go before it is clipped ...
    c.grpo.epsilon_high = placeholder(float)  # ... upwards; None = epsilon; DAPO takes 0.28
    c.grpo.num_iterations = 1  # times that each answer is learnt from
    c.grpo.num_mini_batches = 1  # parts into which a step's answers are cut, each with an update
    c.grpo.missing_eos_penalty = 0.0  # taken from the reward of an answer that did not end by itself
    c.grpo.mask_truncated_completions = False  # such an answer is not learnt from: DAPO's overlong filtering

    c.ppo = Config()  # task ppo, arXiv:1707.06347: a value is learnt beside the policy; the names are TRL's
    c.ppo.rewards = anything(())  # as grpo's; model:DIR is read token by token, and an adapter over the policy's base shares it
    c.ppo.reward_weights = anything(())  # a number for each of them; () = 1 for all
    c.ppo.score_clip = placeholder(float)  # an answer's reward is held within -score_clip and score_clip; None = as it is
    c.ppo.missing_eos_penalty = 0.0  # taken from the reward of an answer that did not end by itself
    c.ppo.value = placeholder(str)  # it starts as the reward model (reward) or as the base (base); None = the first, where it can
    c.ppo.max_completion_length = 256  # tokens of an answer; data.max_length holds it with its prompt
    c.ppo.temperature = 1.0  # as grpo's
    c.ppo.top_p = 1.0  # as grpo's
    c.ppo.num_ppo_epochs = 4  # times that each answer is learnt from
    c.ppo.num_mini_batches = 1  # parts into which a step's train.batch_size answers are cut, each with an update
    c.ppo.kl_coef = 0.05  # of each token's distance from the reference, which its reward pays
    c.ppo.kl_estimator = "k1"  # of that: k1 | k2 | k3, http://joschu.net/blog/kl-approx.html
    c.ppo.kl_target = placeholder(float)  # nats an answer: kl_coef grows where it is more, else falls; None = it stays as it is
    c.ppo.kl_horizon = 10_000.0  # answers in which it may change by a fifth, arXiv:1909.08593, section 2.2
    c.ppo.cliprange = 0.2  # how far a ratio may go before it is clipped
    c.ppo.cliprange_value = 0.2  # how far a value may go from what it was
    c.ppo.vf_coef = 0.1  # of the value's loss beside the policy's
    c.ppo.gamma = 1.0  # what a reward counts one token before it comes
    c.ppo.lam = 0.95  # lambda of arXiv:1506.02438: 1 = returns less values, 0 = one step ahead
    c.ppo.whiten_rewards = False  # rewards are divided by their spread over the batch
    c.ppo.whiten_advantages = True  # advantages are brought to mean 0 and spread 1

    c.optim = Config()
    c.optim.name = "adamw"  # adamw | adamw_8bit (arXiv:2110.02861) | adam | sgd | lion | adafactor | muon
    c.optim.offload = False  # the moments lie in the host's memory between updates
    c.optim.lr = 2e-4  # the highest learning rate; full fine-tuning wants a tenth of LoRA's or less
    # the width that lr is meant for: width D trains with lr * lr_width / D (arXiv:2203.03466); None = lr is for this model
    c.optim.lr_width = placeholder(int)
    c.optim.b1 = 0.9  # how much of the mean gradient is kept at each step: momentum; what goes by muon keeps 0.95 in any case
    c.optim.b2 = 0.999  # the same of the mean squared gradient
    c.optim.eps = 1e-8  # added to its root, by which the step is divided
    c.optim.weight_decay = 0.0  # the share of a weight, times lr, that each step takes off; never of norms and biases
    c.optim.clip = 1.0  # global gradient norm; 0 = off
    c.optim.schedule = "cosine"  # cosine | linear | constant | wsd
    c.optim.warmup = 0.03  # below 1 a share of all steps, else steps
    c.optim.decay = 0.1  # wsd: the share of steps that decays at the end
    c.optim.final_lr = 0.0  # as a share of lr

    c.train = Config()
    c.train.epochs = 1.0  # passes over the training rows, where steps is None
    c.train.steps = placeholder(int)  # updates of the whole run; None = as many as epochs make
    c.train.batch_size = 8  # rows of max_length a step, over all devices
    c.train.micro_batch = placeholder(int)  # rows at a time; None = batch_size, more are accumulated by tokens
    c.train.log_every = 10  # steps between two reports of the loss
    c.train.eval_every = placeholder(int)  # steps; None = five times a run; 0 = only at the end
    c.train.save_every = placeholder(int)  # steps; None = as eval_every; 0 = only at the end
    c.train.keep = 2  # last checkpoints kept, beside the best
    c.train.patience = 0  # evaluations without improvement before stopping; 0 = never
    c.train.max_bad_steps = 5  # non-finite updates in a row before the run stops
    c.train.tensorboard = True  # its event files are written beside metrics.jsonl
    c.train.generate_every = 0  # steps; a few held-out prompts are answered, into metrics.jsonl and the report; 0 = never

    c.eval = Config()
    c.eval.batch_size = placeholder(int)  # held-out rows at a time; None = train.micro_batch
    c.eval.generate = 0  # held-out prompts answered before and after training; 0 = none
    c.eval.max_new_tokens = 128  # of such an answer
    c.eval.metrics = anything(())  # of answers, e.g. "exact_match,rougeL": sftjax/check.py has their names; () = what suits

    c.mesh = Config()  # devices along each axis; -1 = the rest; docs/sharding.md says which is for what
    c.mesh.data = -1  # splits the batch
    c.mesh.fsdp = 1  # the batch and every kernel: ZeRO-3
    c.mesh.tensor = 1  # heads, the MLP's inner width, the vocabulary
    c.mesh.sequence = 1  # each row, for long ones
    c.mesh.expert = 1  # the batch and a mixture's experts
    c.lock()  # a key that is not here is a mistake
    for key in NAMED_FREELY:
        group, _, name = key.partition(".")
        c[group][name].unlock()
    return c


# the user's own names stand below these, with values of this type
NAMED_FREELY = {"data.columns": str, "data.roles": str, "lora.rank_pattern": int, "lora.alpha_pattern": float}
MAY_BE_DICTS = ("data.train", "data.eval", "classify.class_weights", "dpo.loss")  # of keys that are no config's own
NO_DOTS = (
    r"names here cannot contain a dot: in a regex write \w where you would write a dot, and q_proj in place of self_attn.q_proj"
)


def anything(value: Any) -> FieldReference:
    """One text or several: no type says so, `check` does."""
    return FieldReference(value, field_type=object)


def load(path: str | Path, overrides: Mapping[str, Any] | Iterable[str] = ()) -> ConfigDict:
    """The config of file `path`, with `overrides` applied: {"optim.lr": 1e-4}, "optim.lr=1e-4", or several such texts.

    Raises UserError.
    """
    file = Path(path)
    if not file.is_file():
        raise UserError(f"--config={path}: no such file; try --config=configs/sft_lora.py")
    spec = importlib.util.spec_from_file_location("sftjax_user_config", file)
    if not (spec and spec.loader):
        raise UserError(f"--config={path}: needs a Python file with get_config(), such as configs/sft_lora.py")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        config = module.get_config() if hasattr(module, "get_config") else None
    except SyntaxError as e:
        raise UserError(f"{file}:{e.lineno}: {e.msg}") from e
    except Exception as e:  # whatever a user's own program raises, an unknown key or a value of another type among it
        lines = [frame.lineno for frame in traceback.extract_tb(e.__traceback__) if frame.filename == str(file)]
        raise UserError(f"{file}:{lines[-1] if lines else 1}: {mistake(e)}") from e
    if not isinstance(config, ConfigDict) or [k for k, _ in flatten(config)] != [k for k, _ in flatten(default())]:
        raise UserError(f"{file}: needs a function get_config() that returns sftjax.config.default(), changed; see configs/")
    for key, value in settings(overrides):
        override(config, key, value)
    from sftjax.check import check  # whose tables are made from this schema

    check(config)
    return config


def opened(config: ConfigDict | str | Path) -> ConfigDict:
    """`config`, or that of the file which it names. Raises UserError."""
    if isinstance(config, (str, Path)):
        return load(config)
    if not isinstance(config, ConfigDict):
        raise UserError(f"config: needs what sftjax.load_config or sftjax.default_config gives, or a file's path, not {config!r}")
    return config


def settings(overrides: Mapping[str, Any] | Iterable[str]) -> list[tuple[str, Any]]:
    """(key, value) of each override, as `load` takes them. Raises UserError."""
    if isinstance(overrides, Mapping):
        return list(overrides.items())
    items = [overrides] if isinstance(overrides, str) else list(overrides)
    if bad := [item for item in items if not (isinstance(item, str) and "=" in item)]:
        raise UserError(f"{bad[0]}: needs a key and a value, e.g. optim.lr=1e-4")
    cut = [item.partition("=") for item in items]
    return [(key.removeprefix("--config."), value) for key, _, value in cut]


def mistake(e: Exception) -> str:
    """What a config file did wrong, in a line."""
    if isinstance(e, UserError):
        return str(e)
    if unknown := re.search(r'Key "(\w+)" does not exist', str(e)):  # of a ConfigDict, which goes on for pages
        names = {key.rpartition(".")[2]: key for key, _ in flatten(default())}
        close = near(unknown[1], names)
        return f"no such key: {unknown[1]}" + (f"; did you mean {names[close]}?" if close else "")
    if dotted := re.search(r"the key (.+) contains one", str(e)):
        return f"{dotted[1]}: {NO_DOTS}"
    return str(e).splitlines()[0] if str(e) else type(e).__name__


def near(word: str, names: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The one of `names` that was meant, upper or lower case, where one is like it."""
    lower = {name.lower(): name for name in names}
    close = difflib.get_close_matches(word.lower(), lower, n=1, cutoff=cutoff)
    return lower[close[0]] if close else None


def override(config: ConfigDict, key: str, value: Any) -> None:
    """Sets dotted `key`, in the type of its default; text is read as on the command line. Raises UserError."""
    known = dict(flatten(default()))
    parent, _, name = key.rpartition(".")
    if group := next((group for group in NAMED_FREELY if key.startswith(f"{group}.") and key != f"{group}."), None):
        parent, name = group, key.removeprefix(f"{group}.")
        if "." in name:
            raise UserError(f"--config.{key}: {NO_DOTS}")
    if inside := [k for k in known if k.startswith(f"{key}.")]:
        if not isinstance(value, Mapping):
            raise UserError(f"--config.{key}={value}: is a group of keys; name one of them, e.g. --config.{inside[0]}=VALUE")
    elif key not in known and not group:
        close = near(key, known, 0.5)
        raise UserError(f"--config.{key}: no such key" + (f"; did you mean --config.{close}?" if close else ""))
    node = config
    for part in parent.split(".") if parent else ():
        node = node[part]
    if isinstance(value, str):
        may_be_none = key in known and known[key] is None
        value = None if may_be_none and value.lower() == "none" else parse(key, value, kind(key))
    if group:
        node.unlock()
    node[name] = value


def kind(key: str) -> type:
    """The type of a key's values: of its default, or the one that its placeholder names."""
    node: Any = default()
    *path, name = key.split(".")
    if key.rpartition(".")[0] in NAMED_FREELY:
        return NAMED_FREELY[key.rpartition(".")[0]]
    for part in path:
        node = node[part]
    return node.get_type(name)


def parse(key: str, value: Any, kind: type) -> Any:
    """`value`, or what it says where it is text, as one of type `kind`, object being one text or several. Raises UserError."""
    if kind is str and isinstance(value, str):
        return value
    literal = read(value) if isinstance(value, str) else value
    number = isinstance(literal, (int, float)) and not isinstance(literal, bool)
    given = f"--config.{key}={shown(value)}"
    if kind is object:
        cut = (value,) if os.path.exists(value) else parts(value)  # a file may have a comma in its name
        return literal if isinstance(literal, (tuple, list, dict)) else value if cut == (value,) else cut
    if kind is str:
        raise UserError(f"{given}: needs text")
    if kind is bool and not isinstance(literal, bool):
        raise UserError(f"{given}: needs true or false")
    if kind in (int, float) and not number:
        raise UserError(f"{given}: needs a number")
    if kind is int and not float(literal).is_integer():
        raise UserError(f"{given}: needs a whole number")
    if kind is tuple and not shares(literal):
        raise UserError(f"{given}: needs numbers, e.g. 8,1,1")
    if kind is Config and not isinstance(literal, dict):
        raise UserError(f"{given}: needs a name after it, --config.{key}.NAME={value}")
    if kind is Config and any("." in str(name) for name in literal):
        raise UserError(f"{given}: {NO_DOTS}")
    return kind(literal)


def read(text: str) -> Any:
    """The number, the truth value, the list or dict that a text says; the text itself where it says none."""
    try:
        return ast.literal_eval(text)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):  # {[1]: 2}, and brackets without end
        return {"true": True, "false": False}.get(text.lower(), text)


def shown(value: Any) -> str:
    """A value as one would type it on the command line."""
    return ",".join(map(str, value)) if isinstance(value, (tuple, list)) else str(value)


def parts(value: str | Sequence[str]) -> tuple[str, ...]:
    """("q_proj", "v_proj") of "q_proj, v_proj". A comma inside brackets cuts nothing: "(q|k){1,2}_proj" is one."""
    if not isinstance(value, str):
        return tuple(value)
    return tuple(filter(None, map(str.strip, re.split(r",(?![^(\[{]*[)\]}])", value))))


def shares(value: Any) -> bool:
    """Is it train : eval : test, or less of it, in finite numbers?"""
    numbers = isinstance(value, (tuple, list)) and all(isinstance(x, (int, float)) and abs(x) < math.inf for x in value)
    return numbers and len(value) in (1, 2, 3)


def flatten(config: ConfigDict, prefix: str = "") -> list[tuple[str, Any]]:
    """Dotted key and value of every leaf, in the schema's order."""
    out: list[tuple[str, Any]] = []
    for key, value in config.items():
        if isinstance(value, ConfigDict) and prefix + key not in (*NAMED_FREELY, *MAY_BE_DICTS):
            out += flatten(value, f"{prefix}{key}.")
        else:
            out.append((prefix + key, dict(value) if prefix + key in NAMED_FREELY else value))
    return out

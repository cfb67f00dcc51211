"""SftjaxLM: a checkpoint under EleutherAI's lm-evaluation-harness, scored as the harness' own `hf` model scores it in torch.

    loglikelihood          log p(continuation | context), and whether greedy decoding would say the same
    loglikelihood_rolling  log p(text), in windows of max_length that predict every token once
    generate_until         what follows, cut at the first of `until`

Which tokens a request stands for (where a context ends and its continuation begins, who adds the BOS, what is cut off on the
left) is the harness' own arithmetic, in its TemplateLM and here after its HFLM, so that numbers compare with published ones.
https://github.com/EleutherAI/lm-evaluation-harness
"""

from __future__ import annotations

import copy
import difflib
import inspect
import json
import multiprocessing
import sys
import traceback
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import numpy as np

from sftjax.config import UserError
from sftjax.generate.engine import Engine, Generated
from sftjax.generate.text import Writer
from sftjax.hf.load import read_json
from sftjax.hf.model import load

try:
    from jinja2 import TemplateError
    from lm_eval import utils
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import handle_stop_sequences, has_bos_prefix, normalize_gen_kwargs, postprocess_generated_text
    from tqdm import tqdm
except ImportError as e:
    raise UserError(f"the harness is not installed ({e}); pip install 'sftjax[eval]'") from e

AUTO = 32  # rows at a time where batch_size=auto does not say
WINDOW = 16  # batches that are scored between two looks of the progress bar
QUANTISERS, DTYPES = ("nf4", "int8"), ("float32", "bfloat16", "float16")
FILTERS = {"top_k": 50, "top_p": 1.0, "min_p": 0.0}  # what transformers samples with where nothing is said
PENALTY = "repetition_penalty"
UNASKED = "cuda:0"  # the harness' --device where none was given


@register_model("sftjax")
class SftjaxLM(TemplateLM):
    """`lm_eval.simple_evaluate(model=SftjaxLM("mine"), tasks=["gsm8k"])`, or by name with `sftjax lm-eval`.

    `path`, `adapter`, `quantize`, `dtype`, `revision`, `trust_remote_code`: as in `sftjax.load`, and what is generated with
    follows the checkpoint's generation_config.json, as in transformers. `max_length`: tokens of context and answer together
    (default: the model's positions). `batch_size`: a number or auto, which is 32 or what `max_batch_size` says.
    `add_bos_token`: whether texts start with the BOS (default: as the tokenizer does it). `prefix_token_id`: what a text without
    a context follows (default: the BOS, else the EOS). `enable_thinking` and `chat_template_args` are for the chat template;
    what comes before the last `think_end_token` is no part of an answer. Raises UserError.
    """

    def __init__(
        self,
        path: str,
        *,
        adapter: str | None = None,
        quantize: str | None = None,
        dtype: str | None = None,
        revision: str | None = None,
        trust_remote_code: bool = False,
        max_length: int | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        add_bos_token: bool | None = None,
        prefix_token_id: int | None = None,
        enable_thinking: bool | None = None,
        think_end_token: str | int | None = None,
        chat_template_args: dict[str, Any] | None = None,
    ):
        super().__init__()
        one_of("quantize", quantize, QUANTISERS)
        one_of("dtype", dtype, DTYPES)
        self.batch_size = rows_at_a_time(batch_size, max_batch_size)
        if enable_thinking and think_end_token is None:
            raise UserError("enable_thinking=True: needs think_end_token, the text that ends the thinking, such as </think>")
        model = load(
            str(path),
            adapter=adapter,
            quantize=quantize,
            dtype=dtype,
            revision=revision if revision is None else str(revision),
            trust_remote_code=trust_remote_code,
        )
        self.tokenizer = model.tokenizer
        if self.tokenizer.eos_token_id is None:
            raise UserError(f"path={path}: its tokenizer names no EOS token, which the harness ends answers with")
        file = model.directory / "generation_config.json"
        self.generation = read_json(file if file.is_file() else model.directory / "config.json")
        ends = np.ravel(self.generation.get("eos_token_id") or []).tolist()
        self.engine = Engine(model.module, model.params, stop_ids=(self.tokenizer.eos_token_id, *ends))
        self.max_length = int(max_length or model.config.max_positions)
        if not 1 < self.max_length <= self.engine.limit:
            raise UserError(f"max_length={max_length}: needs a number from 2 to {self.engine.limit}, the model's positions")
        self.add_bos_token, self.custom_prefix = add_bos_token, prefix_token_id
        self.enable_thinking, self.think_end = enable_thinking, think_end_token
        self.template_options = dict(chat_template_args or {})
        if enable_thinking is not None:
            self.template_options["enable_thinking"] = enable_thinking

    @classmethod
    def create_from_arg_obj(cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None) -> SftjaxLM:
        """From --model_args, which go before the command line's own --batch_size. Raises UserError."""
        known = list(inspect.signature(cls).parameters)
        for name in arg_dict:
            if name not in known:
                near = ["path"] if name == "pretrained" else difflib.get_close_matches(name, known, n=1)
                said = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
                raise UserError(f"--model_args {name}={arg_dict[name]}: no such argument; {said}")
        if "path" not in arg_dict:
            raise UserError("--model_args needs path=DIR, a Hugging Face directory or hub id")
        given = {name: value for name, value in (additional_config or {}).items() if value is not None}
        platform = jax.default_backend()
        if (device := given.pop("device", UNASKED)) not in (UNASKED, platform):
            raise UserError(f"--device {device}: JAX runs on {platform}; choose with JAX_PLATFORMS in the environment")
        return cls(**given | arg_dict)

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict[str, Any] | None = None) -> SftjaxLM:
        return cls.create_from_arg_obj(utils.simple_parse_args_string(arg_string), additional_config)

    # which tokens a text is

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        bos = self.tokenizer.bos_token_id
        return next(i for i in (self.custom_prefix, bos, self.tokenizer.eos_token_id) if i is not None)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **options: Any) -> list[int]:
        """A text that starts with the prefix token already is given no other."""
        if add_special_tokens is None and has_bos_prefix(string, self.tokenizer.decode(self.prefix_token_id)):
            add_special_tokens = False
        return self._encode(string, add_special_tokens)

    def _encode(self, string: str, special: bool | None) -> list[int]:
        special = self.add_bos_token if special is None else special
        return self.tokenizer.encode(string, **({} if special is None else {"add_special_tokens": special}))

    def _prompt(self, context: str, room: int) -> list[int]:
        """The last `room` tokens of what an answer follows."""
        starts = has_bos_prefix(context, self.tokenizer.bos_token)
        ids = self._encode(context, False if starts else None)
        return ids[-room:] or [self.prefix_token_id]

    # what the harness asks

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        if self.enable_thinking:
            raise UserError("enable_thinking=True: is for tasks that generate; a log-likelihood has no room to think in")
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **options: Any
    ) -> list[tuple[float, bool]]:
        """(sum of log p, all greedy) of (its name in the cache, context, continuation); what is too long loses its left."""
        rows = []
        for _, context, continuation in requests:
            if not continuation:
                raise UserError("a task's continuation has no tokens: nothing to score; look for an empty choice or target")
            if len(continuation) > self.max_length:
                raise UserError(f"a task's continuation has {len(continuation)} tokens; max_length={self.max_length} is less")
            ids = [*(context or [self.prefix_token_id]), *continuation][-(self.max_length + 1) :]
            rows.append((ids[: -len(continuation)], continuation))
        order = sorted(range(len(rows)), key=lambda i: -sum(map(len, rows[i])))
        out: dict[int, tuple[float, bool]] = {}
        with tqdm(total=len(rows), disable=disable_tqdm, desc="log-likelihoods") as bar:
            for start in range(0, len(order), WINDOW * self.batch_size):
                these = order[start : start + WINDOW * self.batch_size]
                scored = self.engine.score(*zip(*(rows[i] for i in these)), batch_size=self.batch_size)
                for i, s in zip(these, scored):
                    out[i] = float(s.logps.sum(dtype=np.float64)), bool(s.greedy.all())
                    if requests[i][0] is not None:
                        self.cache_hook.add_partial("loglikelihood", requests[i][0], out[i])
                bar.update(len(these))
        return [out[i] for i in range(len(rows))]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        windows, owners = [], []
        for i, request in enumerate(requests):
            ids = self.tok_encode(request.args[0])
            cut = utils.get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, context_len=1)
            new = [(None, *utils.make_disjoint_window(window)) for window in cut]
            windows += new
            owners += [i] * len(new)
        out = [0.0] * len(requests)
        for i, (logp, _) in zip(owners, self._loglikelihood_tokens(windows, disable_tqdm=disable_tqdm)):
            out[i] += logp
        for request, logp in zip(requests, out):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, logp)
        return out

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        groups: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(i)
        out: dict[int, str] = {}
        with tqdm(total=len(requests), disable=disable_tqdm, desc="answers") as bar:
            for rows in groups.values():
                until, most, options = self.manner(requests[rows[0]].args[1])
                prompts = [self._prompt(requests[i].args[0], self.max_length - most) for i in rows]
                engine = self._ending(until)
                options |= {"stop_strings": until, "tokenizer": self.tokenizer, "batch_size": self.batch_size}
                for n, made in engine.each(prompts, max_new_tokens=most, **options):
                    text = postprocess_generated_text(self._text(prompts[n], made), until, self._thinking)
                    out[rows[n]] = text
                    self.cache_hook.add_partial("generate_until", requests[rows[n]].args, text)
                    bar.update()
        return [out[i] for i in range(len(requests))]

    def manner(self, asked: dict[str, Any]) -> tuple[list[str], int, dict[str, Any]]:
        """A task's generation_kwargs as (stop strings, tokens at most, how the Engine chooses). Raises UserError."""
        said = dict(normalize_gen_kwargs(asked, 256))
        eos = self.tokenizer.decode(self.eot_token_id)
        until = handle_stop_sequences(said.pop("until"), eos=eos)
        most = said.pop("max_gen_toks")
        if not 0 < most < self.max_length:
            raise UserError(f"max_gen_toks={most}: needs a number from 1 to {self.max_length - 1}, less than max_length")
        sampled, temperature = said.pop("do_sample"), said.pop("temperature", 0.0)
        if sampled and not temperature:
            raise UserError("do_sample=true: needs temperature above 0 in generation_kwargs or --gen_kwargs")

        def chosen(name: str, usual: float) -> float:
            return next(x for x in (said.pop(name, None), self.generation.get(name), usual) if x is not None)

        options = {PENALTY: chosen(PENALTY, 1.0)}
        filters = {name: chosen(name, usual) for name, usual in FILTERS.items()}
        if sampled:  # the harness' --seed has set numpy's
            options |= filters | {"temperature": temperature, "seed": int(np.random.randint(2**31))}
        if said.pop("num_beams", 1) != 1:
            raise UserError("num_beams: sftjax decodes greedily or samples; there is no beam search")
        if said:
            raise UserError(f"generation_kwargs: {', '.join(sorted(said))} is nothing that sftjax generates by")
        return until, most, options

    def _ending(self, until: Iterable[str]) -> Engine:
        """The engine, which stops at those of `until` too that are tokens of their own: no text would show them."""
        added = self.tokenizer.get_added_vocab()
        engine = copy.copy(self.engine)
        engine.stop_ids = self.engine.stop_ids | {added[term] for term in until if term in added}
        return engine

    def _text(self, prompt: Sequence[int], made: Generated) -> str:
        """As the harness decodes: by itself, so that some tokenizers drop its first space."""
        ids, whole = made.ids, Writer(self.tokenizer, (), prompt)
        whole.add(ids)
        rest = made.text[len(whole.text) :]  # of a token that a stop string begins within
        if thought := isinstance(self.think_end, int) and self.think_end in ids:
            ids = ids[len(ids) - ids[::-1].index(self.think_end) :]
        text = self.tokenizer.decode(ids, skip_special_tokens=True) + rest
        return text.lstrip() if thought else text

    @property
    def _thinking(self) -> str | None:
        return self.think_end if isinstance(self.think_end, str) else None

    # chat templates

    @property
    def tokenizer_name(self) -> str:
        return self.tokenizer.name_or_path.replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Where the template refuses a system prompt, it is left out."""
        if not self.tokenizer.chat_template:
            raise UserError("--apply_chat_template: the tokenizer has no chat template")

        def render(messages: list[dict[str, str]]) -> str:
            return self.tokenizer.apply_chat_template(
                messages,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
                **self.template_options,
            )

        try:
            return render(chat_history)
        except TemplateError:
            return render([message for message in chat_history if message["role"] != "system"])


def one_of(name: str, value: Any, choices: Sequence[str]) -> None:
    if value is not None and value not in choices:
        raise UserError(f"{name}={value}: needs one of {', '.join(choices)}")


def rows_at_a_time(batch_size: int | str, most: int | None) -> int:
    """batch_size as a number. Raises UserError."""
    if str(batch_size).startswith("auto"):
        return int(most or AUTO)
    if most is not None:
        raise UserError(f"max_batch_size={most}: goes with batch_size=auto")
    if not str(batch_size).isdecimal() or int(batch_size) < 1:
        raise UserError(f"batch_size={batch_size}: needs a number from 1, or auto")
    return int(batch_size)


def run(arguments: Sequence[str]) -> None:
    """The harness' own command line, `lm_eval run ARGUMENTS`, with the model's name known to it. Raises UserError."""
    from lm_eval.__main__ import cli_evaluate

    if "torch" in sys.modules and sys.modules["torch"] is None:
        del sys.modules["torch"]  # our command line keeps it out, but the harness looks at it where it is installed
    multiprocessing.set_start_method("forkserver", force=True)  # JAX has threads, and the harness forks to bootstrap
    sys.argv = ["lm_eval", "run", "--model", "sftjax", *arguments]
    try:
        cli_evaluate()
    except (ValueError, OSError) as e:
        *_, (frame, _) = traceback.walk_tb(e.__traceback__)
        if frame.f_globals["__name__"].startswith(("lm_eval", "datasets")):  # their word on a task, its file or an option
            raise UserError(str(e)) from e
        raise

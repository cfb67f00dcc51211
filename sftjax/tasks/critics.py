"""Who judges a policy: a reward model, which says how good an answer is, and a value, which learns to foretell it.

Both are score heads of one number, over the policy's own base wherever they can be, so that four models take the memory of one:

    policy      {"layers": {"q": LowRank(W, a, b)}, "head"}                                      a, b train
    reference   the policy without its adapter: W                                                tasks/reference.py
    value       "value": {"layers": {"q": LowRank(W, a', b')}, "score": [D, 1]} beside those     a', b' and the head train
    reward      {"layers": {"q": LowRank(W, a", b")}, "score": [D, 1]}                           an adapter over W, frozen

W is one array. A reward model of another base, and each of them where W itself trains, is a tree of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sftjax import hosts, sharding, tree
from sftjax.config import UserError
from sftjax.data.chat import Chat
from sftjax.data.example import Message, RowError
from sftjax.data.pack import assemble
from sftjax.data.tokenizer import open_tokenizer
from sftjax.evaluate import sequences
from sftjax.generate.shapes import between
from sftjax.hf.load import load_config, resolve
from sftjax.hf.model import Model, load
from sftjax.hf.peft import load_adapter, with_head
from sftjax.hf.peft_read import base_of
from sftjax.losses.tokens import Forward
from sftjax.models.decoder import Decoder, forward
from sftjax.models.heads import scored, segment_scores
from sftjax.tasks.job import Job
from sftjax.tasks.rewards import Answered
from sftjax.tasks.rollouts import BESIDE
from sftjax.train.manifest import hash_weights
from sftjax.weights import kinds, method, select
from sftjax.weights.lora import merge, without
from sftjax.weights.targets import SCORE

WHOLE = ("full", "freeze")  # methods that train the base's own arrays


class Judge:
    """The reward model at `path`, a checkpoint or an adapter: once it `sits` beside a policy it is a reward function of answers.

    It reads the very tokens that the policy wrote, in the turn that the template makes of them: an answer that was cut off is
    closed first, since no other was ever shown to it.
    """

    decoder: Decoder
    params: Any

    def __init__(self, path: str):
        """Finds it. Raises UserError where it is not there."""
        directory = Path(path).expanduser()
        self.path, self.adapter = path, directory if (directory / "adapter_config.json").is_file() else None
        self.base = resolve(base_of(self.adapter) if self.adapter else path)

    def sits(self, job: Job) -> None:
        """Loads it, over the policy's base where it is an adapter over the same. Raises UserError."""
        self.job, c, base, adapter = job, job.config, self.base, self.adapter
        refuse_other_tokens(job, self.path, open_tokenizer(base, adapter, c.model.trust_remote_code))
        if adapter and c.method not in WHOLE and same(base, job.base.directory):
            params, config = with_head(owned(job, bare(job)), job.decoder.config, adapter)
            params = load_adapter(params, adapter)
        else:
            model = load(base, adapter=adapter, trust_remote_code=c.model.trust_remote_code, mesh=job.mesh)
            params, config = model.params, model.config
        sequences.refuse_no_reward(self.path, config.labels)
        self.decoder, self.params = replace(job.decoder, config=config, lower=0), sharding.placed(params, job.mesh)
        job.say(f"reward model: {self.path}, {told(self.params, (job.trainable, job.frozen))}")
        self.after = closing(job.chat)
        self.rows = c.train.micro_batch or c.train.batch_size
        longest = max(int(part.lengths.max()) for part in (job.splits.train, job.splits.eval, job.splits.test) if len(part))
        longest += c[c.task].max_completion_length + max(map(len, self.after))
        if longest > config.reach:
            raise UserError(
                f"{self.path}: takes {config.reach} tokens, and a prompt with its answer may have {longest}; "
                f"use a lower --config.{c.task}.max_completion_length or --config.data.max_length"
            )
        self.length = between(longest, 32)
        run = forward(self.decoder)
        self.score = jax.jit(lambda params, batch: segment_scores(run(params, batch), batch.segments, 1)[0][:, 0, 0])

    def __call__(self, answers: Sequence[Answered]) -> list[float]:
        read = [[*a.question.ids, *a.ids, *self.after[a.stopped]] for a in answers]
        found: list[float] = []
        mesh = self.job.mesh
        for at in range(0, len(answers), self.rows):
            rows = [[(np.array(ids, np.int32), np.zeros(len(ids), np.float32), 1)] for ids in read[at : at + self.rows]]
            batch = assemble(rows + [[]] * (self.rows - len(rows)), self.length)
            scores = self.score(self.params, hosts.to_devices(hosts.own(batch, mesh), mesh))
            found += hosts.fetch(scores)[: len(rows)].tolist()
        return found


class Apart:
    """A reward model with a tokenizer and a template of its own, by which it reads what the policy said."""

    model: Model
    chat: Chat

    def __init__(self, path: str):
        """Finds it. Raises UserError where it is not there or is no reward model."""
        self.path, self.base = path, resolve(path)
        sequences.refuse_no_reward(path, load_config(self.base).labels)

    def sits(self, job: Job) -> None:
        """Loads it, spread over the policy's devices."""
        self.model = load(self.base, trust_remote_code=job.config.model.trust_remote_code, mesh=job.mesh)
        self.chat = Chat(self.model.tokenizer)
        self.shards = sharding.batch_shards(job.mesh)

    def __call__(self, answers: Sequence[Answered]) -> list[float]:
        try:
            said = [self.ids(a) for a in answers]
        except RowError as e:
            raise UserError(f"model:{self.path}: cannot read an answer: {e}") from e
        rows = min(len(said), 32)
        return sequences.score(self.model, said, batch_size=rows + -rows % self.shards)[:, 0].tolist()

    def ids(self, a: Answered) -> list[int]:
        """As the reward model was trained on such a row: a conversation, or raw text with its answer."""
        if not a.question.messages:
            return self.chat.encode_completion(a.question.prompt, a.text).ids.tolist()
        return self.chat.tokenise(self.chat.render([*a.question.messages, Message("assistant", a.text)]))[0]


def add_value(job: Job, judge: Judge | None) -> Decoder:
    """Puts a value into the job as `params["value"]`, of which trains what the method says, and its head; `value_of` runs it.

    It starts as the reward model where one is given (not with method freeze, whose layers are the policy's), else as the base
    with a head that says 0 of every state.
    """
    c = job.config.copy_and_resolve_references()
    c.seed, c.model.adapter, c.lora.modules_to_save = (c.seed + 1) % 2**32, None, ()  # a start and modules of its own
    if judge:
        params, decoder = judge.params, judge.decoder
    else:
        params = body(tree.join(job.trainable, job.frozen)) if c.method in WHOLE else bare(job)
        params, config = scored(params, job.decoder.config, ("value",))
        decoder = replace(job.decoder, config=config)
    if c.method in WHOLE:
        params = merge(params)
        mask = select.everything(params)
        if c.method == "freeze":
            mask = {name: job.mask.get(name, everything) for name, everything in mask.items()}
    else:
        if not has_kinds(params):
            params = method.apply(params, c, (), () if judge else job.base.trained_tokens)
        mask = select.added(params, also={SCORE})
    params = owned(job, jax.tree.map(lambda x, trains: jnp.array(x, jnp.float32) if trains else x, params, mask))
    params = job.placed(params)
    start = "the reward model" if judge else "the base, and 0 of every state"
    there = (job.trainable, job.frozen, judge and judge.params)
    trainable, frozen = tree.split(params, mask)
    job.say(f"value: starts as {start}, trains {tree.count(trainable):,} parameters, {told(params, there)}")
    job.trainable, job.frozen = job.trainable | {"value": trainable}, job.frozen | {"value": frozen}
    return decoder


def value_of(decoder: Decoder) -> Forward:
    """Of the value that stands beside a policy."""
    run = forward(decoder)
    return lambda params, batch, key=None: run(params["value"], batch, key)


def closing(chat: Chat) -> tuple[list[int], list[int]]:
    """What the template writes after an answer that was cut off, and after one with the token that ended it."""
    if not chat.template:
        return chat.eos_ids[:1], []
    ids = chat.tokenise(chat.render([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]))[0]
    ends = [i for i, token in enumerate(ids) if token in chat.stop_ids]
    return (ids[ends[-1] :], ids[ends[-1] + 1 :]) if ends else ([], [])


def body(params: Any) -> Any:
    """A decoder's own parts, without the other models that may stand beside them."""
    return {name: part for name, part in params.items() if name not in BESIDE}


def bare(job: Job) -> Any:
    """The policy before its adapter, on its own."""
    params = body(tree.join(job.trainable, job.frozen))
    return without(params) if has_kinds(params) else params


def has_kinds(params: Any) -> bool:
    return any(isinstance(w, kinds.Kind) for w in tree.flatten(params).values())


def owned(job: Job, params: Any) -> Any:
    """`params` that share nothing with what trains, which every step uses up."""
    trained = {id(x) for x in jax.tree.leaves(job.trainable)}
    return jax.tree.map(lambda x: jnp.copy(x) if id(x) in trained else x, params)


def same(directory: Path, other: Path) -> bool:
    return directory == other or hash_weights(directory) == hash_weights(other)


def told(params: Any, there: Any) -> str:
    """12,345 parameters of its own, the others there already"""
    known, arrays = {id(x) for x in jax.tree.leaves(there)}, jax.tree.leaves(params)
    new = [x for x in arrays if id(x) not in known]
    rest = ", the others there already" if len(new) < len(arrays) else ""
    return f"{sum(x.size for x in new):,} parameters of its own{rest}"


def refuse_other_tokens(job: Job, path: str, tokenizer: Any) -> None:
    """The reward model reads the tokens that the policy wrote, so they must mean the same to both."""
    ours, theirs = job.chat.tokenizer.get_vocab(), tokenizer.get_vocab()
    other = [token for token, i in ours.items() if theirs.get(token) != i and token not in job.base.new_tokens]
    if other:
        raise UserError(
            f"{path}: reads other tokens than the policy writes ({len(other):,} of {len(ours):,}, {other[0]!r} among them); "
            f"use a reward model with the tokenizer of {job.base.directory}, such as one that was trained from it"
        )

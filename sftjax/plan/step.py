"""A run's own training step over shapes: what a `Job` holds, without an array, a tokenizer or a device.

The weights are those that the config's method would make of the checkpoint (its config.json is all that is read), the loss is
the task's, the optimiser and the step are the run's. What is planned is therefore what would run.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh
from ml_collections import ConfigDict

from sftjax import sharding, tree
from sftjax.config import UserError, parts
from sftjax.data.batch import Batch, Referred
from sftjax.hf.load import load_config, read_json, resolve
from sftjax.hf.model import compute_dtype
from sftjax.hf.peft_read import load_adapter, saved_modules
from sftjax.losses import Loss, dpo, kto
from sftjax.losses.policy import Rollouts, tempered
from sftjax.losses.ppo import Played
from sftjax.models.config import DecoderConfig
from sftjax.models.decoder import Decoder, forward, init
from sftjax.models.heads import scored
from sftjax.tasks import classify as classify_task
from sftjax.tasks import dpo as dpo_task
from sftjax.tasks import grpo as grpo_task
from sftjax.tasks import kto as kto_task
from sftjax.tasks import ppo as ppo_task
from sftjax.tasks import reward as reward_task
from sftjax.tasks import sft as sft_task
from sftjax.tasks.base import REWARD, check_head
from sftjax.tasks.critics import add_value, value_of
from sftjax.tasks.reference import precomputed, reference
from sftjax.train import optim
from sftjax.train.places import homes
from sftjax.train.step import State, Step, init_state, make_step
from sftjax.weights import method
from sftjax.weights.lora import rates

STEPS = 1000  # of the schedule: they change no shape
RANKED = 4  # answers of a ranking, whose rewards are next to nothing beside the rest


class Acting(NamedTuple):
    """What a plan asks of a task that learns from its own answers, whose config says it by names of its own."""

    epochs: int  # times that a step goes over its answers
    answers: int  # to each prompt
    entropy: bool  # whether the loss shows the policy's
    looks: int  # passes over the answers before they are learnt from: of who answered, who it is compared with, a value
    step_of: Callable[..., Step]
    batch: Any  # a NamedTuple, of what is learnt from
    kept: Any = ()  # the state's


ACTING: dict[str, Callable[[ConfigDict], Acting]] = {
    "grpo": lambda c: Acting(
        epochs=c.num_iterations,
        answers=c.num_generations,
        entropy=True,
        looks=bool(c.beta) + (c.num_iterations * c.num_mini_batches > 1),
        step_of=grpo_task.step_of,
        batch=Rollouts,
    ),
    "ppo": lambda c: Acting(
        epochs=c.num_ppo_epochs,
        answers=1,
        entropy=False,
        looks=3,
        step_of=ppo_task.step_of,
        batch=Played,
        kept=np.float32(c.kl_coef),
    ),
}


class Learner(NamedTuple):
    """A model that a step differentiates: the policy, or the value beside it."""

    decoder: Decoder
    trainable: Any
    frozen: Any

    @property
    def params(self) -> Any:
        return tree.join(self.trainable, self.frozen)

    @property
    def mask(self) -> Any:
        return jax.tree.map(lambda x: x is not None, self.trainable, is_leaf=lambda x: x is None)


@dataclass
class Dry:
    """A job of shapes. `rows` and `length` are those of a whole batch, [rows, length]; `platform` is what it is compiled for."""

    config: ConfigDict
    source_config: DecoderConfig
    dtype: Any  # of the checkpoint
    length: int
    platform: str = "tpu"
    directory: Path = Path()

    def __post_init__(self) -> None:
        c = self.config
        self.acting = ACTING[c.task](c[c.task]) if c.task in ACTING else None
        self.said: list[str] = []
        adapter = resolve(c.model.adapter, needs="adapter_config.json") if c.model.adapter else None
        modules = saved_modules(adapter) if adapter else c.lora.modules_to_save
        # what a reference and the checks of a job ask of it
        ids = tuple(range(len(parts(c.tokens.train))))  # which tokens they are changes no shape
        self.base: Any = SimpleNamespace(
            modules=modules, source_config=self.source_config, directory=self.directory, trained_tokens=ids
        )
        labels = head_labels(c, self.source_config)
        check_head(self.directory, self.source_config.labels, labels, c.task)
        self.params, self.mask = weights(c, self.source_config, self.dtype, adapter, modules, labels, ids)
        self.trainable, self.frozen = tree.split(self.params, self.mask)
        lower = self.source_config.layers - c.freeze.last_n_layers if c.freeze.last_n_layers else 0
        with compiling_for(self.platform):
            dtype = compute_dtype(c.model.dtype)
        trained = replace(self.source_config, labels=labels, tied=False) if labels else self.source_config
        self.decoder = Decoder(trained, dtype, c.model.scan, c.model.remat, lower)
        self.learners = [Learner(self.decoder, self.trainable, self.frozen)]
        self.loss = LOSSES[c.task](self)
        rate = optim.schedule(c.optim, STEPS)
        self.optimizer = optim.optimizer(c.optim, rate, rates(self.trainable, c.lora.lr_ratio))
        kept = self.acting.kept if self.acting else ()
        self.state: State = jax.eval_shape(lambda t: init_state(t, self.optimizer, dtype, kept), self.trainable)

    @property
    def rows(self) -> int:
        return self.config.train.batch_size

    @property
    def micro_batches(self) -> int:
        """Parts that a batch goes in."""
        if self.acting:
            return grpo_task.cut(self.config) * self.mini_batches
        return self.rows // (self.config.train.micro_batch or self.rows)

    @property
    def accumulates(self) -> bool:
        """Whether gradients of several parts are summed before an update."""
        return self.micro_batches > self.mini_batches

    @property
    def mini_batches(self) -> int:
        """Parts of a batch that have an update each."""
        return self.config[self.config.task].num_mini_batches if self.acting else 1

    @property
    def epochs(self) -> int:
        """Times that a step goes over its batch."""
        return self.acting.epochs if self.acting else 1

    @property
    def updates(self) -> int:
        return self.epochs * self.mini_batches

    @cached_property
    def forward(self) -> Callable[..., Any]:
        return forward(self.decoder)

    @cached_property
    def step(self) -> Callable[..., Any]:
        c = self.config
        if self.acting:
            return self.acting.step_of(c, self.loss, self.optimizer)
        return make_step(self.loss, self.optimizer, seed=c.seed, micro_batches=self.micro_batches, clip=c.optim.clip)

    @cached_property
    def batch(self) -> Any:
        shape = (self.rows, self.length)
        if self.acting:
            of, batch = {"tokens": jnp.int32, "segments": jnp.int32, "positions": jnp.int32}, self.acting.batch
            return batch(*(jax.ShapeDtypeStruct(shape, of.get(name, jnp.float32)) for name in batch._fields))
        made = Batch(*(jax.ShapeDtypeStruct(shape, t) for t in (jnp.int32, jnp.float32, jnp.int32, jnp.int32)))
        return Referred(*made, jax.ShapeDtypeStruct(shape, jnp.float32)) if precomputed(self.config) else made

    def placed(self, params: Any) -> Any:
        return params

    def say(self, text: str) -> None:
        self.said.append(text)


def open_dry(config: ConfigDict, length: int | None = None, platform: str = "tpu") -> Dry:
    """The job of a config whose `model.path` may be a directory with nothing but a config.json. Raises UserError."""
    if not config.model.path:
        raise UserError("model.path is empty; give a Hugging Face directory or hub id, e.g. --config.model.path=Qwen/Qwen3-0.6B")
    directory = resolve(config.model.path, config.model.revision)
    return Dry(config, load_config(directory), checkpoint_dtype(directory), length or config.data.max_length, platform, directory)


def checkpoint_dtype(directory: Path) -> Any:
    """The dtype that a config.json says its weights have; float32 where it says nothing, as transformers takes it, and bfloat16
    where they are packed."""
    raw = read_json(directory / "config.json")
    name = raw.get("dtype") or raw.get("torch_dtype") or ("bfloat16" if raw.get("quantization_config") else "float32")
    if name not in ("float32", "bfloat16", "float16"):
        raise UserError(f"{directory / 'config.json'}: dtype={name!r} is none that can be read")
    return jnp.dtype(name)


def head_labels(c: ConfigDict, checkpoint: DecoderConfig) -> tuple[str, ...]:
    """Of the score head that the task trains; () where it has none. A classifier's are its rows' own: two stand for them."""
    if c.task == "reward":
        return checkpoint.labels or REWARD
    return checkpoint.labels or ("a", "b") if c.task == "classify" and c.classify.by == "head" else ()


def weights(
    c: ConfigDict,
    shape: DecoderConfig,
    dtype: Any,
    adapter: Path | None,
    modules: Any,
    labels: tuple[str, ...],
    ids: tuple[int, ...],
) -> tuple[Any, Any]:
    """(params, mask) as a run has them, of shapes: the checkpoint with the method applied, what trains in float32."""

    def checkpoint() -> Any:
        return jax.tree.map(lambda x: x.astype(dtype), init(shape, jax.random.key(0)))

    quantisers = method.quantiser(jax.eval_shape(checkpoint), c, modules)

    def build() -> Any:
        loaded = tree.map_leaves(lambda path, w: quantisers[path](w) if path in quantisers else w, checkpoint())
        if labels and not shape.labels:
            loaded, _ = scored(loaded, shape, labels)
        return method.apply(load_adapter(loaded, adapter) if adapter else loaded, c, modules, ids)

    params = jax.eval_shape(build)
    mask = method.mask(params, c, modules)
    masters = jax.tree.map(lambda x, trains: jax.ShapeDtypeStruct(x.shape, jnp.float32 if trains else x.dtype), params, mask)
    return masters, mask


def _tokens(job: Dry) -> Loss:
    return sft_task.loss_of(job.config.loss, job.forward)


def beside(job: Dry, *models: Callable[[Any], Any]) -> list[Any]:
    """What each of `models` returns, which puts a model into the job, whose copies become shapes like the rest: all that it asks
    of a Job, a Dry has. An array of several models stays one."""
    out: list[Any] = []

    def put(trainable: Any, frozen: Any) -> list[Any]:
        job.trainable, job.frozen = trainable, frozen
        found = [model(job) for model in models]
        arrays, structure = jax.tree.flatten((job.trainable, job.frozen))
        each = {id(x): x for x in arrays}
        out.extend((found, structure, [[*each].index(id(x)) for x in arrays]))
        return [*each.values()]

    made = jax.eval_shape(put, job.trainable, job.frozen)
    found, structure, which = out
    job.trainable, job.frozen = jax.tree.unflatten(structure, [made[i] for i in which])
    return found


def _reference(job: Dry) -> Callable[[Any], Any] | str:
    return "batch" if precomputed(job.config) else beside(job, reference)[0]


def _label(job: Dry) -> Loss:
    return classify_task.loss_of(job.config.loss, job.forward)


def _grpo(job: Dry) -> Loss:
    c = job.config.grpo
    if c.beta:  # its log-probabilities come with the batch: what it keeps is all that counts here
        beside(job, reference)
    return grpo_task.loss_of(c, tempered(job.forward, c.temperature))


def _ppo(job: Dry) -> Loss:
    """The value starts as the base, whatever a run's starts as: what a reward model is, its files alone say."""
    c = job.config.ppo
    if ppo_task.starts_as_judge(job.config, sum(name.startswith("model:") for name in parts(c.rewards))):
        job.say("value: of a run it starts as the reward model; planned is one that starts as the base")
    _, decoder = beside(job, reference, partial(add_value, judge=None))
    job.learners.append(Learner(decoder, job.trainable["value"], job.frozen["value"]))
    return ppo_task.loss_of(c, tempered(job.forward, c.temperature), value_of(decoder))


LOSSES: dict[str, Callable[[Dry], Loss]] = {
    "sft": _tokens,
    "classify": lambda job: _label(job) if job.config.classify.by == "head" else _tokens(job),
    "pretrain": _tokens,
    "dpo": lambda job: dpo(
        job.forward, reference=_reference(job) if dpo_task.refers(job.config) else None, **dpo_task.options(job.config)
    ),
    "reward": lambda job: reward_task.loss_of(job.config.reward, job.forward, RANKED),
    "grpo": _grpo,
    "ppo": _ppo,
    "kto": lambda job: kto(job.forward, reference=_reference(job), **kto_task.options(job.config)),
}


@contextlib.contextmanager
def compiling_for(platform: str) -> Iterator[None]:
    """Whoever asks jax what it runs on is told what the step is compiled for: for the whole process, whose threads ask nothing
    meanwhile. The kernels of a platform are chosen so, and jax has no other way to lower for one that is not there."""
    asked = jax.default_backend
    jax.default_backend = lambda: platform
    try:
        yield
    finally:
        jax.default_backend = asked


def mesh_sizes(c: ConfigDict, devices: int) -> dict[str, int]:
    """{axis: size} of the config's mesh over so many chips. Raises UserError."""
    return sharding.axis_sizes(dict(c.mesh), devices, "chips")


def abstract_mesh(sizes: dict[str, int]) -> AbstractMesh:
    return AbstractMesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))


def placed(job: Dry, mesh: Mesh | AbstractMesh) -> tuple[State, Any, Batch]:
    """The step's arguments with the shardings that a run gives them."""

    made: dict[tuple[int, Any], Any] = {}  # an array of several models stays one

    def put(x: Any, where: Any) -> Any:
        return made.setdefault((id(x), where), jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where))

    everywhere = sharding.shardings(tree.join(job.trainable, job.frozen), mesh)

    def homes_of(part: Any) -> Any:
        return jax.tree.map(lambda x, home: None if x is None else home, part, everywhere, is_leaf=lambda x: x is None)

    trainable = jax.tree.map(put, job.trainable, homes_of(job.trainable))
    where = homes(job.state, trainable, mesh, offload=job.config.optim.offload)
    state: State = jax.tree.map(put, job.state, where)
    frozen = jax.tree.map(put, job.frozen, homes_of(job.frozen))
    return state, frozen, jax.tree.map(lambda x: put(x, sharding.batch_sharding(mesh)), job.batch)

"""What is planned is what would run: shapes, FLOPs and bytes against the run itself, the formula and the TPU's compiler."""

import importlib.util
import json
from math import prod

import golden_plan
import jax
import jax.numpy as jnp
import pytest
from toy import CHATML, write_rows

from sftjax import cli, tree
from sftjax.chips import CHIPS
from sftjax.config import UserError, override
from sftjax.data import pipeline
from sftjax.models.decoder import REMAT
from sftjax.plan import exact, flops, memory, report, speed
from sftjax.plan.step import compiling_for, mesh_sizes, open_dry
from sftjax.plan.topology import parse
from sftjax.train.progress import model_flops_per_token

GOLDEN = json.loads(golden_plan.FILE.read_text())
HAS_COMPILER = importlib.util.find_spec("libtpu") is not None


# names


@pytest.mark.parametrize(
    ("name", "shown", "chips"),
    [
        ("v5e:4x4", "v5e:4x4", 16),
        ("v5e-16", "v5e:4x4", 16),
        ("v5litepod-16", "v5e:4x4", 16),
        ("V6E-8", "v6e:2x4", 8),
        ("v5p-32", "v5p:2x2x4", 16),  # named by its cores
        ("v4-8", "v4:2x2x1", 4),
        ("2xv5e-16", "2 slices of v5e:4x4", 32),
        ("h100x8", "8 x h100", 8),
        ("8xh100", "8 x h100", 8),
        ("a100-80gb x 4", "4 x a100-80gb", 4),
        ("a100-40gb", "a100-40gb", 1),
        ("h200", "h200", 1),
        ("t4", "t4", 1),
        ("cpu", "cpu", 1),
    ],
)
def test_names_that_people_use(name, shown, chips):
    where = parse(name)
    assert (str(where), where.devices) == (shown, chips)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("v5e-12", "no such slice; there are v5e-1, v5e-4"),
        ("v5p-7", "no such slice; there are v5p-2, v5p-8"),
        ("v5e:4x4x4", "a slice of v5e has 2 sides"),
        ("v5e:0x4", "a slice of v5e has 2 sides"),
        ("v5e:big", "a slice of v5e has 2 sides, such as 2x2"),
        ("v5e-0", "needs at least one chip"),
        ("h101", "no such chip; did you mean h100?"),
        ("abacus", "no such chip; there are v4, v5e"),
        ("h100:2x2", "say h100x8"),
    ],
)
def test_names_that_are_none(name, sentence):
    with pytest.raises(UserError, match="--topology=") as e:
        parse(name)
    assert sentence in str(e.value)


def test_every_slice_has_as_many_chips_as_its_shape():
    for chip in CHIPS.values():
        if chip.torus:
            shapes = parse(f"{chip.name}-{16 * chip.cores}").shape
            assert prod(map(int, shapes.split("x"))) == 16


# FLOPs

X, W = jax.ShapeDtypeStruct((6, 5), jnp.float32), jax.ShapeDtypeStruct((5, 5), jnp.float32)
ONE = 2 * 6 * 5 * 5


def repeated(x, w):
    return jax.lax.scan(lambda x, _: (x @ w, None), x, None, length=7)[0]


@pytest.mark.parametrize(
    ("fn", "products"),
    [
        (lambda x, w: x @ w, 1),
        (repeated, 7),
        (jax.jit(repeated), 7),
        (lambda x, w: jax.lax.cond(x[0, 0] > 0, lambda: repeated(x, w), lambda: x), 7),  # the dearest branch
        (jax.grad(lambda x, w: (x @ w).sum()), 1),  # dx alone; the value is read by nobody
        (jax.grad(lambda x, w: jnp.square(x @ w).sum()), 2),
        (jax.grad(lambda x, w: jnp.square(x @ w).sum(), (0, 1)), 3),
        (jax.grad(lambda x, w: jnp.square(jax.checkpoint(lambda x: jnp.sin(x @ w) @ w)(x)).sum()), 5),  # one of them twice
        (jax.vmap(lambda x, w: x @ w, (0, None)), None),
    ],
)
def test_products_are_counted_as_often_as_they_run(fn, products):
    if products is None:
        wide = jax.ShapeDtypeStruct((3, 6, 5), jnp.float32)
        assert flops.count(fn, wide, W).flops == 3 * ONE
    else:
        assert flops.count(fn, X, W).flops == products * ONE


def test_a_token_meets_one_expert():
    experts, sizes = jax.ShapeDtypeStruct((4, 5, 5), jnp.float32), jax.ShapeDtypeStruct((4,), jnp.int32)
    assert flops.count(jax.lax.ragged_dot, X, experts, sizes).flops == ONE
    grad = jax.grad(lambda x, w, n: jnp.square(jax.lax.ragged_dot(x, w, n)).sum(), (0, 1))
    assert flops.count(grad, X, experts, sizes).flops == 3 * ONE


def test_a_loop_without_a_known_end_is_named():
    work = flops.count(lambda x, w: jax.lax.while_loop(lambda x: x.sum() > 0, lambda x: x @ w, x), X, W)
    assert (work.flops, dict(work.guessed)) == (ONE, {"while": 1})


def test_a_device_of_many_does_its_share():
    mesh = jax.sharding.AbstractMesh((3,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    P = jax.sharding.PartitionSpec
    split = jax.shard_map(lambda x, w: x @ w, mesh=mesh, in_specs=(P("data"), P()), out_specs=P("data"))
    with jax.sharding.use_abstract_mesh(mesh):
        assert flops.count(split, X, W).flops == ONE


@pytest.mark.parametrize("method", ["full", "lora"])
def test_counted_flops_are_the_formulas(method, tmp_path):
    """Without rematerialisation; but attention computes its scores again, and a chunk's beyond the diagonal."""
    c, _ = golden_plan.config("gate_sft", tmp_path)
    c.method, c.model.remat, c.model.dtype, c.data.max_length = method, "none", "bfloat16", 2048
    job = open_dry(c, platform="cpu")
    with compiling_for("cpu"):
        work = flops.count(job.step, job.state, job.frozen, job.batch)
    formula = model_flops_per_token(job.source_config, job.params, job.mask, job.length)
    assert work.flops / job.rows / job.length == pytest.approx(formula, rel=0.12)


# shapes


def labelled(changes, folder):
    """Rows for a classifier's head."""
    if changes.get("task") != "classify":
        return {}
    rows = [{"text": str(n), "label": ("odd", "even")[n % 2]} for n in range(40)]
    return {"data.format": "label", "data.template": None, "data.train": (str(write_rows(folder / "rows.jsonl", rows)),)}


@pytest.mark.parametrize(
    "changes",
    [
        {"method": "lora", "lora.dora": True},
        {"method": "lora", "model.quantize": "nf4", "optim.name": "lion"},
        {"method": "full", "optim.name": "muon"},
        {"method": "freeze", "freeze.last_n_layers": 1},
        {"method": "adapter"},
        {"task": "reward", "model.quantize": "nf4"},
        {"task": "classify", "classify.by": "head", "method": "full"},
        {"task": "grpo", "grpo.rewards": ("length:20",), "grpo.num_generations": 2, "grpo.beta": 0.0},
    ],
)
def test_the_planned_arrays_are_the_runs(toy, changes, tmp_path, monkeypatch):
    from sftjax.tasks.job import Job
    from sftjax.train import optim
    from sftjax.train.step import init_state
    from sftjax.weights.lora import rates

    monkeypatch.setitem(pipeline.WANTS, changes.get("task", "sft"), "answers")  # the toy's rows do: no array depends on them
    c = toy.config(**{"mesh.data": 1, "data.template": "chatml"} | changes | labelled(changes, tmp_path))
    job, dry = Job(c, tmp_path / "run"), open_dry(c, platform="cpu")
    optimizer = optim.optimizer(c.optim, optim.schedule(c.optim, 10), rates(job.trainable, c.lora.lr_ratio))

    def same(a, b):
        assert jax.tree.structure(a) == jax.tree.structure(b)
        assert [(x.shape, x.dtype) for x in jax.tree.leaves(a)] == [(x.shape, x.dtype) for x in jax.tree.leaves(b)]

    same(jax.eval_shape(lambda t: init_state(t, optimizer), job.trainable), dry.state)
    same(job.frozen, dry.frozen)
    assert job.decoder.dtype == dry.decoder.dtype and job.decoder.lower == dry.decoder.lower


@pytest.mark.parametrize(
    "changes",
    [
        {"loss.neftune_alpha": 5.0, "loss.z_loss": 1e-4},
        {"task": "pretrain", "loss.label_smoothing": 0.1},
        {"task": "dpo", "dpo.sft_weight": 0.5},
        {"task": "dpo", "dpo.loss": "orpo"},
        {"task": "kto"},
        {"task": "reward", "reward.centring": 0.1},
        {"task": "classify", "classify.by": "head", "loss.label_smoothing": 0.1},
    ],
    ids=["sft", "pretrain", "dpo", "orpo", "kto", "reward", "head"],
)
def test_the_planned_loss_is_the_tasks(toy, changes, tmp_path, monkeypatch):
    """What a task hands to `Job.fit` computes the same, equation by equation."""
    from sftjax import tasks
    from sftjax.tasks.job import Job

    class Fitted(Exception):
        pass

    def fit(job, loss, **_):
        raise Fitted(job, loss)

    monkeypatch.setattr(Job, "fit", fit)
    if changes.get("task") != "classify":
        monkeypatch.setitem(pipeline.WANTS, changes.get("task", "sft"), "answers")  # the toy's rows do for a loss that is not run
    template = None if changes.get("task") == "pretrain" else "chatml"
    c = toy.config(**{"mesh.data": 1, "data.template": template, "eval.generate": 0} | changes | labelled(changes, tmp_path))
    with pytest.raises(Fitted) as e:
        tasks.train(c, tmp_path / "run")
    job, loss = e.value.args
    dry = open_dry(c, platform="cpu")
    key = jax.random.key(0)

    def equations(jaxpr):
        for eqn in jaxpr.eqns:
            yield eqn.primitive.name, [str(v.aval) for v in eqn.outvars]
            for inner in flops.inner_jaxprs(eqn.params):
                yield from equations(inner)

    def computed(loss, trainable, frozen):
        return list(equations(jax.make_jaxpr(lambda t, f, b: loss(tree.join(t, f), b, key))(trainable, frozen, dry.batch).jaxpr))

    assert computed(dry.loss, dry.trainable, dry.frozen) == computed(loss, job.trainable, job.frozen)


GRPO = {"task": "grpo", "grpo.rewards": ("length:20",), "grpo.num_generations": 2, "grpo.max_completion_length": 20}
PPO = {"task": "ppo", "ppo.rewards": ("length:20",), "ppo.max_completion_length": 20}
POLICY = {"data.template": "chatml", "train.micro_batch": 1}


@pytest.mark.parametrize(
    "changes",
    [
        GRPO | {"method": "full", "grpo.num_mini_batches": 2, "grpo.epsilon_high": 0.3, "grpo.temperature": 0.7},
        PPO | {"ppo.num_ppo_epochs": 1, "ppo.num_mini_batches": 2, "ppo.kl_target": 0.1, "ppo.temperature": 0.7},
        PPO | {"method": "full", "ppo.num_mini_batches": 2, "ppo.vf_coef": 0.5, "model.dtype": "bfloat16"},
        PPO | {"method": "freeze", "freeze.last_n_layers": 1, "ppo.num_mini_batches": 2},
        PPO | {"model.quantize": "nf4", "ppo.num_mini_batches": 2, "tokens.train": "<|im_end|>"},
    ],
    ids=["grpo", "ppo", "ppo-full", "ppo-freeze", "ppo-nf4"],
)
def test_the_planned_step_of_a_policy_is_the_tasks(toy, changes, tmp_path, monkeypatch):
    """What a run's first step is given, to the byte, and what it does with it: the models beside the policy among them."""
    from sftjax import tasks
    from sftjax.tasks.job import Job
    from sftjax.train import loop

    class Lowered(Exception):
        pass

    def lower(*given):
        raise Lowered(*given)

    iterate, told = Job.iterate, {}

    def listened(job, learn, *rest, **more):
        told.update(more, learn=learn)
        return iterate(job, learn, *rest, **more)

    monkeypatch.setattr(Job, "iterate", listened)
    monkeypatch.setattr(loop, "lower", lower)
    c = toy.config(**POLICY | changes)
    with pytest.raises(Lowered) as e:
        tasks.train(c, tmp_path / "run")
    _, *given = e.value.args
    dry = open_dry(c, given[-1].tokens.shape[1], platform="cpu")
    planned = dry.state, dry.frozen, dry.batch

    def shapes(part):
        return [(jax.tree_util.keystr(path), x.shape, x.dtype) for path, x in jax.tree_util.tree_leaves_with_path(part)]

    for ours, the_runs in zip(planned, given):
        assert shapes(ours) == shapes(the_runs)
    state, frozen, _ = given
    held = {x.unsafe_buffer_pointer(): x.nbytes for x in jax.tree.leaves((state.trainable, state.opt_state, frozen))}
    on = memory.Estimator(dry, mesh_sizes(c, 1))
    assert sum(on.parameters.values()) + on.optimiser == sum(held.values())  # a base that is shared is there once
    texts = [str(jax.make_jaxpr(one)(*planned)) for one in (dry.step, told["learn"](dry.optimizer))]
    assert texts[0] == texts[1] and (dry.micro_batches, dry.updates) == (4, told["updates"])


@pytest.mark.parametrize("task", [GRPO, PPO], ids=["grpo", "ppo"])
def test_the_answers_of_a_step_are_planned_as_they_are_made(toy, task, tmp_path):
    from sftjax.generate.engine import Engine
    from sftjax.generate.sampling import Sampling
    from sftjax.models.decoder import Decoder, init

    c = toy.config(**{"mesh.data": 1, "data.template": "chatml", "model.dtype": "float32"} | task)
    job = open_dry(c, 60, platform="cpu")
    rollout = memory.Estimator(job, mesh_sizes(c, 1)).rollout
    decoder = job.decoder.config
    engine = Engine(Decoder(decoder), init(decoder, jax.random.key(0)))
    flight = engine.flight(job.rows, Sampling(), 0)
    prompt = [1] * (job.length - rollout.longest)
    flight.join([engine.row(prompt, rollout.longest, i, seed=0) for i in range(job.rows)])
    while len(flight.free) < job.rows:
        flight.next()
    assert rollout.slots == flight.B
    made = flight.state.cache
    assert sum(x.nbytes for x in jax.tree.leaves(made)) == rollout.cache.k.size * 4 + rollout.cache.v.size * 4

    kernels = [w for path, w in tree.flatten(job.params["layers"]).items() if path.endswith("kernel")]
    products = sum(2 * prod(part.shape) for w in kernels for part in jax.tree.leaves(w))
    attention = 4 * decoder.layers * decoder.heads * decoder.head_dim * flight.length
    assert rollout.a_pass == rollout.slots * (products + attention + 2 * decoder.width * decoder.vocab)


def test_answers_take_what_they_need_beside_the_runs_state(tmp_path):
    on = estimator("qwen3_grpo", tmp_path)
    state = sum(on.parameters.values()) + on.optimiser
    assert on.at().peak == pytest.approx(state + on.rollout.bytes() + memory.PROGRAM) and on.at().peak > on.at().update


def of_policy(folder, **changes):
    c, _ = golden_plan.config("gate_sft", folder)
    for key, value in ({"task": "grpo", "train.batch_size": 16, "grpo.max_completion_length": 128} | changes).items():
        override(c, key, str(value))
    return memory.Estimator(open_dry(c), mesh_sizes(c, 1))


@pytest.mark.parametrize("changes", [{"grpo.num_mini_batches": 2}, {"grpo.num_iterations": 3}, {"train.micro_batch": 4}])
def test_updates_of_the_same_answers_cost_their_time_and_only_accumulating_memory(changes, tmp_path):
    on, more = (of_policy(tmp_path, **{"method": "full"} | extra) for extra in ({}, changes))
    gradients = [e.at().parts["gradients"] for e in (on, more)]
    assert (gradients[1] > gradients[0]) == ("train.micro_batch" in changes)
    assert more.job.updates == changes.get("grpo.num_mini_batches", 1) * changes.get("grpo.num_iterations", 1)
    work = [flops.count(e.job.step, e.job.state, e.job.frozen, e.job.batch).flops / e.job.epochs for e in (on, more)]
    assert work[1] == pytest.approx(work[0])


def test_every_look_at_the_answers_takes_its_time(tmp_path):
    """A reference's; PPO's policy looks too, and its value."""
    each = {"grpo.beta": 0.0}, {"grpo.beta": 0.1}, {"task": "ppo", "ppo.max_completion_length": 128}
    none, one, three = (of_policy(tmp_path, **extra).rollout.seconds(CHIPS["v5e"], 1, 0.5) for extra in each)
    assert 0 < none < one and three - none == pytest.approx(3 * (one - none))


def test_what_two_models_keep_is_there_at_once(tmp_path):
    changes = {"task": "ppo", "ppo.max_completion_length": 128}
    policy, beside = (of_policy(tmp_path, **extra).kept("block") for extra in ({}, changes))
    assert beside.token == 2 * policy.token > 0


def test_fewer_answers_are_offered_once_and_with_parts_that_divide(tmp_path):
    c, _ = golden_plan.config("qwen3_grpo", tmp_path)
    more = {"train.batch_size": 128, "train.micro_batch": 64, "grpo.num_mini_batches": 2, "grpo.num_generations": 2}
    for key, value in more.items():
        override(c, key, str(value))
    found = [each["keys"] for each in report.plan(c, "v5e-1", say=lambda _: None)["suggestions"]]
    (fewer,) = [keys for keys in found if "train.batch_size" in keys and "mesh.fsdp" not in keys]
    assert int(fewer["train.micro_batch"]) == int(fewer["train.batch_size"]) // 2 < 64  # an update's


def test_what_answers_read_is_the_kinds(tmp_path):
    """DoRA's norms are taken once, so that it costs what LoRA costs; what is quantised is written wide to be read."""
    plain, dora, nf4 = (of_policy(tmp_path, **extra).rollout for extra in ({}, {"lora.dora": True}, {"model.quantize": "nf4"}))
    assert dora.a_pass == pytest.approx(plain.a_pass) and nf4.read() > plain.read()


def test_a_reference_that_costs_memory_is_planned(tmp_path):
    """DPO over full weights keeps what it began with; over LoRA, whose reference is the base, nothing."""
    c, _ = golden_plan.config("gate_dpo", tmp_path)
    held = {}
    for method in ("lora", "full"):
        c.method = method
        job = open_dry(c)
        held[method] = sum(x.size for x in jax.tree.leaves(job.frozen))
    assert held["full"] == sum(x.size for x in jax.tree.leaves(job.params)) and held["lora"] < 1.1 * held["full"]


# bytes


def estimator(case, folder, **changes):
    c, topology = golden_plan.config(case, folder)
    for key, value in changes.items():
        group, name = key.split("_", 1)
        c[group][name] = value
    return memory.Estimator(open_dry(c), mesh_sizes(c, parse(topology).devices))


@pytest.mark.parametrize("case", [case for case in golden_plan.CASES if not case.startswith("gate")])
def test_the_estimate_is_within_15_percent_of_the_compiler(case, tmp_path):
    on = estimator(case, tmp_path)  # which counts once what the step is given for each model
    assert on.at().update == pytest.approx(GOLDEN[case]["peak"] - on.shared, rel=report.WITHIN)


@pytest.mark.parametrize("case", ["gate_sft", "gate_qlora", "gate_dpo", "gate_reward"])
def test_what_the_step_is_given_is_exact(case, tmp_path):
    """But for the batch and a TPU's padding of small arrays."""
    on = estimator(case, tmp_path)
    assert on.trained + on.frozen + on.optimiser == pytest.approx(GOLDEN[case]["arguments"], rel=0.02)


def test_less_is_kept_where_more_is_done_again(tmp_path):
    on = estimator("gate_sft", tmp_path)
    keeps = {name: on.kept(name).token for name in memory.POLICIES}
    assert keeps["none"] > keeps["minimal"] > keeps["block"] > 0 and set(keeps) == {"none", *REMAT}
    assert on.at(rows=2).peak < on.at(rows=4).peak < on.at(rows=4, remat="none").peak


def test_a_shard_is_its_share(tmp_path):
    alone = estimator("gate_sft", tmp_path, mesh_data=1)
    c, _ = golden_plan.config("gate_sft", tmp_path)
    c.mesh.data, c.mesh.fsdp = 1, 4
    split = memory.Estimator(open_dry(c), mesh_sizes(c, 4))
    assert split.trained < alone.trained and split.frozen == pytest.approx(alone.frozen / 4, rel=0.01)
    assert split.rows == alone.rows / 4


def test_a_row_and_the_experts_have_shares(tmp_path):
    alone = estimator("gate_moe", tmp_path, mesh_data=1)
    c, _ = golden_plan.config("gate_moe", tmp_path)
    c.mesh.data, c.mesh.sequence, c.mesh.expert = 1, 2, 4
    split = memory.Estimator(alone.job, mesh_sizes(c, 8))
    assert split.tokens() == alone.tokens() / 8
    experts = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(alone.job.params["layers"]["mlp"]["experts"]))
    assert split.frozen == pytest.approx(alone.frozen - 3 / 4 * experts)
    assert split.at().peak < alone.at().peak
    assert speed.exchanged(alone) == 0 < speed.exchanged(split)


def test_the_largest_batch_just_fits(tmp_path):
    on = estimator("gate_sft", tmp_path)
    rows = report.largest(on, 2**30)
    assert on.at(rows).peak <= 2**30 < on.at(rows + 1).peak
    assert report.largest(on, on.at(1).peak - 1) == 0


# what is said


def test_a_plan_of_what_does_not_fit_says_what_does(tmp_path):
    c, _ = golden_plan.config("llama3_8b_lora", tmp_path)
    said: list[str] = []
    out = report.plan(c, "v5e-1", price=1.2, say=said.append)
    text = "\n".join(said)
    assert not out["fits"] and "does not fit, by" in text and "QLoRA fits: " in text
    best = next(s for s in out["suggestions"] if s["change"] == "QLoRA")
    assert best["keys"]["model.quantize"] == "nf4" and best["peak"] < CHIPS["v5e"].memory
    assert "a million tokens" in text and "the data was not read" in text and out["tokens_per_s"] > 0


def test_where_the_compiler_finds_no_room_it_is_said_what_fits_too(tmp_path, monkeypatch):
    def full(_):
        raise exact.TooLarge(20 * 2**30, 15.75 * 2**30)

    for name in ("ready", "devices", "mesh_over", "lower"):
        monkeypatch.setattr(exact, name, lambda *_: None)
    monkeypatch.setattr(exact, "measure", full)
    c, _ = golden_plan.config("qwen3_lora", tmp_path)
    said: list[str] = []
    out = report.plan(c, "v5e-1", compile=True, say=said.append)
    assert out["fits"] and not out["exact"]["fits"] and out["suggestions"][0]["keys"] == {"model.remat": "block"}
    assert "the compiler: does not fit; it needs 20.00 GiB on a chip that has 15.75" in said


def test_hours_and_dollars_of_the_data_given(toy):
    said: list[str] = []
    c = toy.config(**{"train.steps": None, "data.template": "chatml"})
    out = report.plan(c, "h100x2", price=2.0, say=said.append)
    assert out["steps"] > 0 and out["dollars"] == pytest.approx(2 * 2.0 * out["hours"])
    assert f"rows in {out['steps']} steps" in "\n".join(said)


def test_without_a_topology_every_kind_of_chip_has_a_line(tmp_path):
    c, _ = golden_plan.config("qwen3_lora", tmp_path)
    said: list[str] = []
    out = report.plan(c, say=said.append)
    assert {chip["chip"] for chip in out["chips"]} <= set(CHIPS) and all(chip["chip"] in "\n".join(said) for chip in out["chips"])
    assert any(line.startswith("the data was not read (") for line in said)


def test_rows_are_read_through_an_adapters_own_template(toy, tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    longer = CHATML.replace("{{ m.content }}", "{{ m.content }}, my friend")
    (tmp_path / "chat_template.jinja").write_text(longer)
    whole, adapted = (
        report.read_rows(toy.config(**{"data.packing": False, "data.max_length": 128, "model.adapter": a}))
        for a in (None, str(tmp_path))
    )
    assert not adapted.why and adapted.fullness > whole.fullness


def test_columns_of_any_width_stand_apart(tmp_path, monkeypatch):
    c, _ = golden_plan.config("qwen3_lora", tmp_path)
    monkeypatch.setattr(report, "largest", lambda *_: 2**20)
    said: list[str] = []
    report.plan(c, say=said.append)
    lines = [line for line in said if "rows at a time" in line]
    assert lines and all(" 1,048,576 rows at a time " in line for line in lines)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--topology=v5e_16"], "--topology=v5e_16: no such chip; did you mean v5e?"),
        (["--topology=cpu", "--price=2"], "--price=2.0: no time is estimated for a CPU"),
        (["--price=2"], "--price=2.0: needs a --topology, such as v5e:1x1"),
        (["--exact"], "--exact needs a --topology, such as v5e:1x1"),
        (["--topology=h100", "--exact"], "--exact asks a TPU's compiler, which knows no h100; leave it out"),
        (["--topology=v5e-1", "--price=-1"], "--price=-1.0: needs dollars"),
        (["--topology=v5e-1", "--efficiency=60"], "--efficiency=60.0: needs a share"),
        (["--topology=v5e-8", "--config.mesh.data=3"], "mesh: data=3"),
        (
            ["--config.task=grpo", "--config.grpo.max_completion_length=8", "--config.grpo.num_mini_batches=3"],
            "is no multiple of grpo.num_mini_batches=3",
        ),
        (["--config.task=grpo", "--config.grpo.max_completion_length=64"], "leaves no room for the prompt"),
        (["--topology=v5e-8", "--config.mesh.data=-1", "--config.train.batch_size=6"], "does not divide over 8 data shards"),
    ],
)
def test_mistakes(toy, capfd, options, sentence):
    with pytest.raises(SystemExit) as end:
        cli.main(["plan", f"--config={toy.config_file}", *options])
    assert end.value.code == 1 and sentence in capfd.readouterr().err


def test_without_the_compiler_a_sentence_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install libtpu"):
        exact.devices(parse("v5e:1x1"))


def test_the_compilers_complaint_is_read_for_its_numbers():
    class Full:
        def compile(self):
            raise jax.errors.JaxRuntimeError(
                "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. "
                "Program allocation (17.18G) exceeds available HBM (15.75G)"
            )

    with pytest.raises(exact.TooLarge) as e:
        exact.measure(Full())
    assert (e.value.needs, e.value.has) == (17.18 * 2**30, 15.75 * 2**30)


# the TPU's compiler


@pytest.mark.skipif(not HAS_COMPILER, reason="needs a TPU's compiler: pip install libtpu")
@pytest.mark.parametrize("case", [case for case in golden_plan.CASES if case.startswith("gate")])
def test_steps_compile_for_tpus(case, tmp_path, monkeypatch):
    """The state is donated, attention is the TPU's own kernel, and the peak within 5 % of what it was."""
    jax.devices()  # jax has read the flags that tests compile with; libtpu would end at one that it does not know
    monkeypatch.delenv("XLA_FLAGS")
    m, compiled, job = golden_plan.compile_case(case, tmp_path)
    offloaded = memory.Estimator(job, mesh_sizes(job.config, 1)).offloaded  # the host's are no memory of the chip
    state = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(job.state)) - offloaded
    assert m.aliased >= state and (offloaded > 0) == job.config.optim.offload
    assert m.peak <= 1.05 * GOLDEN[case]["peak"]
    program = compiled.runtime_executable().serialize()  # jax cannot read the text of every TPU's program
    assert b"tpu_custom_call" in program and b"splash_attention" in program


@pytest.mark.parametrize("case", ["gate_8bit", "gate_offload"])
def test_moments_that_take_less_are_planned(case, tmp_path):
    """As the compiler has them among what the step is given: in 8 bits, and in the host's memory, not at all."""
    on = estimator(case, tmp_path)
    assert on.trained + on.frozen + on.optimiser == pytest.approx(GOLDEN[case]["arguments"], rel=0.02)
    assert on.offloaded == (2 * on.trained if case == "gate_offload" else 0)
    wide = estimator(case, tmp_path, optim_name="adamw", optim_offload=False)
    assert on.optimiser < 0.6 * wide.optimiser and on.at(rows=64).peak < wide.at(rows=64).peak

"""`sftjax plan`: does it fit, how long, what would it cost, and what to change where it does not."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from ml_collections import ConfigDict

from sftjax import tree
from sftjax.check import ROLLOUTS, check
from sftjax.chips import CHIPS, GIB, MIB, Chip
from sftjax.config import UserError, default, override
from sftjax.data import pipeline
from sftjax.data.prompts import stream
from sftjax.data.tokenizer import chat_for, open_tokenizer
from sftjax.hf.load import check_length, resolve
from sftjax.plan import exact
from sftjax.plan.flops import Work, count
from sftjax.plan.memory import POLICIES, Estimator
from sftjax.plan.speed import EFFICIENCY, sizes_text, step_time
from sftjax.plan.step import Dry, abstract_mesh, compiling_for, mesh_sizes, open_dry
from sftjax.plan.topology import SHAPES, Topology, parse
from sftjax.tasks.job import check_batch, check_routers
from sftjax.tasks.rollouts import row_length
from sftjax.train.progress import compact, duration, model_flops_per_token
from sftjax.weights import kinds

Say = Callable[[str], None]
WITHIN = 0.15  # of the compiler's peak, in the cases of tests/golden_plan.py
SMALL = ("t4", "l4", "a100-40gb", "a100-80gb", "h100", "h200", "v5e", "v6e", "v5p")  # what is shown where no chip is named


@dataclass(frozen=True)
class Rows:
    """What the data makes of a run. Raises nothing: where it cannot be read, `why` says so and the rest is None."""

    steps: int | None = None
    length: int | None = None
    fullness: float = 1.0
    rows: int | None = None
    why: str = ""


def plan(
    config: ConfigDict,
    topology: str | None = None,
    *,
    price: float | None = None,
    efficiency: float = EFFICIENCY,
    compile: bool = False,
    say: Say = print,
) -> dict[str, Any]:
    """Says what a run of `config` would take on `topology` (None: on one chip of each kind), and returns its figures.

    No weights are read and no array is made: `model.path` may hold nothing but a config.json. `price` is in dollars for an hour
    of one chip. `compile` asks the TPU's own compiler too. Raises UserError.
    """
    where = asked(topology, price, efficiency, compile)
    if config.task in ROLLOUTS:
        pipeline.room(config, "prompts")
    rows = read_rows(config)
    if where and where.chip.name == "t4" and config.model.dtype is None:  # as a run there decides: it has no bfloat16
        config = config.copy_and_resolve_references()
        config.model.dtype = "float16"
    job = open_dry(config, rows.length, platform(where.chip) if where else "tpu")
    check_length(config.data.max_length, job.base.source_config, job.base.directory)
    check_routers(config, job.base)
    on = estimator(job, where)
    with compiling_for(job.platform):
        work = count(job.step, job.state, job.frozen, job.batch)
    out = head(job, on, where, say)
    out |= arithmetic(job, work, say)
    if rows.why:
        say(f"the data was not read ({rows.why})")
    if where is None:
        out["chips"] = chips(job, on, work, efficiency, say)
    else:
        out |= memory(on, where, say)
        out |= pace(job, on, work, rows, where, price, efficiency, say)
        if compile:
            out["exact"] = compiled(job, on, where, say)
        if not (out["exact"] if compile else out)["fits"]:
            out["suggestions"] = suggest(config, on, where, say)
    return out


def platform(chip: Chip) -> str:
    return "tpu" if chip.torus else "cpu" if chip.name == "cpu" else "gpu"


def estimator(job: Dry, where: Topology | None) -> Estimator:
    """Of the job on the mesh that its config asks for. Raises UserError where the batch or a weight does not divide."""
    c = job.config
    known = math.prod(n for n in c.mesh.values() if n != -1)
    sizes = mesh_sizes(c, where.devices if where and -1 in c.mesh.values() else known)
    if where and math.prod(sizes.values()) != where.devices and known != 1:
        mesh_sizes(c, where.devices)  # says what is wrong
    check_batch(c, abstract_mesh(sizes))
    return Estimator(job, sizes)


def asked(topology: str | None, price: float | None, efficiency: float, compile: bool) -> Topology | None:
    """The topology that is planned for. Raises UserError where the options say no such thing."""
    if not 0 < efficiency <= 1:
        raise UserError(f"--efficiency={efficiency}: needs a share, above 0 and at most 1")
    if price is not None and not 0 <= price < math.inf:
        raise UserError(f"--price={price}: needs dollars for an hour of one chip, at least 0")
    if price is not None and topology is None:
        raise UserError(f"--price={price}: needs a --topology, such as v5e:1x1, whose chips it is the price of")
    if topology is None and compile:
        raise UserError("--exact needs a --topology, such as v5e:1x1")
    where = parse(topology) if topology else None
    if price is not None and where and where.chip.name == "cpu":
        raise UserError(f"--price={price}: no time is estimated for a CPU, so it has no price; leave it out")
    if where and compile:
        exact.ready(where)
    return where


def read_rows(config: ConfigDict) -> Rows:
    """Counted by the data's own pipeline, where the files and a tokenizer are at hand."""
    try:
        adapter = resolve(config.model.adapter, needs="adapter_config.json") if config.model.adapter else None
        tokenizer = open_tokenizer(config.model.path, adapter, config.model.trust_remote_code, config.model.revision)
        chat, _ = chat_for(config, tokenizer)
        splits = pipeline.build(config, chat, say=lambda _: None)
        steps = stream(splits.train, config)
        if config.task in ROLLOUTS:
            length = row_length(config, splits.train, config[config.task].max_completion_length)
            return Rows(steps.steps_total, length, 1.0, len(splits.train))
    except UserError as e:
        return Rows(steps=config.train.steps, why=str(e).splitlines()[0])
    return Rows(steps.steps_total, steps.length, steps.fullness, len(splits.train))


def head(job: Dry, on: Estimator, where: Topology | None, say: Say) -> dict[str, Any]:
    c = job.config
    total, trained = kinds.count(job.params), tree.count(job.learners[0].trainable)
    how = c.method + (f" over {c.model.quantize}" if c.model.quantize else "")
    say(f"{big(total)} parameters, {how}: {big(trained)} train ({100 * trained / total:.2f} %)")
    for text in job.said:  # of the models beside it
        say(text)
    micro = f", {job.rows // job.micro_batches} at a time" if job.micro_batches > 1 else ""
    place = "" if where is None else f"; on {where}, {where.devices} chip{'s' * (where.devices > 1)}, {sizes_text(on.sizes)}"
    say(f"{c.task}, {job.rows} rows of {job.length:,} tokens a step{micro}, {job.decoder.dtype} products, {c.optim.name}{place}")
    return {"parameters": total, "trained": trained, "mesh": dict(on.sizes)}


def memory(on: Estimator, where: Topology, say: Say) -> dict[str, Any]:
    m, has, remat = on.at(), where.chip.memory, on.job.decoder.remat
    unit, of = unit_of(m.peak)
    say("")
    say(f"{'memory of one chip':<34}{unit:>8}")
    for name, n in m.parts.items():
        say(f"  {name:<32}{n / of:>8.2f}")
    fits = m.peak <= has
    left = f"fits, {(has - m.peak) / GIB:.2f} to spare" if fits else f"does not fit, by {(m.peak - has) / GIB:.2f}"
    say(f"  {'peak':<32}{m.peak / of:>8.2f}  of {has / GIB:.2f} GiB: {left}")
    if abs(m.peak / has - 1) < WITHIN:
        ask = "; --exact asks the compiler" if where.chip.torus and m.peak == m.update else ""
        say(f"  that is close: the estimate may be {100 * WITHIN:.0f} % off{ask}")
    tokens = on.tokens()
    kept = {name: on.kept(name).bytes(tokens, on.sizes["tensor"]) for name in POLICIES}
    peaks = {name: on.at(remat=name).peak for name in POLICIES}
    each = [f"{name}{' (this)' * (name == remat)} {kept[name] / of:.2f}, peak {peaks[name] / of:.2f}" for name in POLICIES]
    say(f"  kept by --config.model.remat: {'; '.join(each)}")
    rows = largest(on, has)
    if on.offloaded:
        say(f"  in the host's memory for each chip, between updates: {on.offloaded / of:.2f} {unit} of optimiser")
    if rows:
        say(f"  largest micro-batch that fits: {rows * on.shards:,} rows of {on.job.length:,} tokens, {rows:,} a chip")
    return {"memory": m.parts, "peak": m.peak, "fits": fits, "remat": peaks, "largest_micro_batch": rows * on.shards}


def unit_of(peak: float) -> tuple[str, float]:
    return ("GiB", GIB) if peak >= GIB else ("MiB", MIB)


def largest(on: Estimator, has: float) -> int:
    """Rows at a time on one chip that an update has room for, 0 where not even one fits. Its peak grows with them."""
    if on.at(1).update > has:
        return 0
    low, high = 1, 2
    while on.at(high).update <= has and high < 2**20:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if on.at(middle).update <= has else (low, middle)
    return low


def arithmetic(job: Dry, work: Work, say: Say) -> dict[str, Any]:
    tokens = job.rows * job.length * job.epochs
    by_formula = sum(model_flops_per_token(one.decoder.config, one.params, one.mask, job.length) for one in job.learners)
    say(
        f"{big(work.flops)}FLOP a step as its products are counted, {big(work.flops / tokens)}FLOP a token: "
        f"{work.flops / tokens / by_formula:.2f} times the model's own {big(by_formula)}FLOP, rematerialisation included"
    )
    for name in work.guessed:
        say(f"  {name}: {GUESSES.get(name, 'counted by a guess')}")
    return {"flops": work.flops, "flops_per_token": work.flops / tokens, "model_flops_per_token": by_formula}


GUESSES = {
    "while": "how often it turns is not known, so it counts once",
    "pallas_call": "attention's kernel counts at half its grid, what causality leaves; shorter segments or windows leave less",
}


def pace(
    job: Dry, on: Estimator, work: Work, rows: Rows, where: Topology, price: float | None, efficiency: float, say: Say
) -> dict[str, Any]:
    took = step_time(work, on, where, efficiency)
    say("")
    if took is None:
        say("time: not estimated for a CPU")
        return {}
    tokens = job.rows * job.length * rows.fullness
    speed = tokens / took.seconds
    say(f"{took.seconds:.3g} s a step, {big(speed)}tokens/s, {big(86400 * speed)}tokens a day")
    parts = ", ".join(f"{name} {getattr(took, name):.2g} s" for name in ("compute", "memory", "network"))
    say(f"  at the makers' peaks: {parts}; a run is assumed to reach {100 * efficiency:.0f} % of the slowest (--efficiency)")
    if on.rollout:
        say(f"  {took.answers:.3g} s of it for {on.rollout.slots} answers of {on.rollout.longest} tokens, side by side")
    out = {"step_s": took.seconds, "bound": took.bound, "tokens_per_s": speed}
    if rows.steps:
        hours = rows.steps * took.seconds / 3600
        of = f" for {rows.rows:,} rows in" if rows.rows else " for"
        cost = "" if price is None else f", {dollars(hours * where.devices * price)}"
        long = duration(3600 * hours) if 3600 * hours >= 1 else "a second"
        say(f"{long}{of} {rows.steps:,} steps{cost}, without compiling, evaluating and saving")
        out |= {"hours": hours, "steps": rows.steps} | ({} if price is None else {"dollars": hours * where.devices * price})
    elif price is not None:
        million = price * where.devices * took.seconds / 3600 / tokens * 1e6
        say(f"{dollars(million)} a million tokens")
        out |= {"dollars_per_million_tokens": million}
    return out


def big(x: float) -> str:
    """Three digits and a letter: 8.03 B as 8.03 G, 177 T."""
    return f"{x / 1e12:,.3g} T" if x >= 1e12 else f"{compact(x)[:-1]} {compact(x)[-1]}" if x >= 1e3 else f"{x:.0f} "


def dollars(x: float) -> str:
    return f"${x:,.2f}" if x >= 0.1 else f"${x:.2g}"


def chips(job: Dry, on: Estimator, work: Work, efficiency: float, say: Say) -> list[dict[str, Any]]:
    """A line for each kind of chip: the same run on as many as the mesh names."""
    n, m = math.prod(on.sizes.values()), on.at()
    say("")
    say(f"{m.peak / GIB:.3g} GiB on {'one chip' if n == 1 else f'each of {n} chips'} (--topology=v5e:1x1 shows of what):")
    found = []
    for name in SMALL:
        where = Topology(CHIPS[name], n)
        took, fits, rows = step_time(work, on, where, efficiency), m.peak <= where.chip.memory, largest(on, where.chip.memory)
        assert took is not None
        speed = f"{big(job.rows * job.length / took.seconds)}tokens/s" if fits else ""
        most = f"up to {rows * on.shards:,} rows at a time" if rows else "not even one row"
        here = "fits" if fits else "does not fit"
        say(f"  {name:<10}{where.chip.memory / GIB:>7.1f} GiB  {here:<13} {most:<29} {speed}".rstrip())
        found.append({"chip": name, "fits": fits, "largest_micro_batch": rows * on.shards})
    return found


def compiled(job: Dry, on: Estimator, where: Topology, say: Say) -> dict[str, Any]:
    """What the TPU's compiler says, beside the estimate."""
    mesh = exact.mesh_over(exact.devices(where), dict(on.sizes), where.slices)
    say("")
    say(f"compiling the step for {where}, a minute or more ...")
    estimate = on.at()
    try:
        m, _ = exact.measure(exact.lower(job, mesh))
    except exact.TooLarge as e:
        say(f"the compiler: does not fit; it needs {e.needs / GIB:.2f} GiB on a chip that has {e.has / GIB:.2f}")
        return {"fits": False, "peak": e.needs}
    unit, of = unit_of(m.peak)
    guessed = estimate.update / of
    say(f"the compiler: {m.peak / of:.2f} {unit} on one chip, after {m.seconds:.0f} s; the estimate was {guessed:.2f}")
    say(
        f"  arguments {m.arguments / of:.2f}, outputs {m.outputs / of:.2f} of which {m.aliased / of:.2f} take the place of "
        f"arguments, temporaries {m.temporaries / of:.2f}, program {m.program / of:.2f}"
    )
    if on.shared:
        say(f"  a base that models share is given to each of them: {on.shared / of:.2f} of it are there already")
    if on.rollout:
        say(f"  that is the update; its answers take the estimate's {estimate.peak / of:.2f} at most")
    return dataclasses.asdict(m) | {"fits": not on.rollout or estimate.peak <= where.chip.memory, "peak": m.peak}


def suggest(config: ConfigDict, on: Estimator, where: Topology, say: Say) -> list[dict[str, Any]]:
    """What fits instead, the mildest change first."""
    found, told = [], set()
    for text, keys, place in changes(config, on, where):
        if (what := (tuple(keys), str(place))) in told:
            continue  # a milder change of the same fits
        c = config.copy_and_resolve_references()
        try:
            for key, value in keys.items():
                override(c, key, value)
            check(c)
            peak = estimator(open_dry(c, on.job.length, on.job.platform), place).at().peak
        except UserError:
            continue  # a change that does not go with the rest of the config
        if peak <= place.chip.memory:
            words = " ".join(f"--config.{key}={value}" for key, value in keys.items())
            more = f"--topology={place}" if place != where else ""
            say(f"  {text} fits: {peak / GIB:.2f} GiB ({' '.join(filter(None, (words, more)))})")
            told.add(what)
            found.append({"change": text, "keys": keys, "topology": str(place), "peak": peak})
            if len(found) == 3:
                break
    if not found:
        say("  nothing that was tried fits; take a larger chip, or more of them")
    return found


def changes(config: ConfigDict, on: Estimator, where: Topology) -> Iterator[tuple[str, dict[str, str], Topology]]:
    if acting := on.job.acting:  # fewer answers under way, of as many to a prompt
        n, minibatches, micro = config.train.batch_size, on.job.mini_batches, config.train.micro_batch
        while n % (2 * on.shards * acting.answers * minibatches) == 0:
            n //= 2
            part = {} if not micro or n // minibatches % micro == 0 else {"train.micro_batch": str(n // minibatches)}
            yield f"batch_size={n}", {"train.batch_size": str(n)} | part, where
    remat = {} if config.model.remat == "block" else {"model.remat": "block"}
    least = {} if on.rows <= 1 else {"train.micro_batch": str(on.shards)}
    spread = {"mesh.data": "1", "mesh.fsdp": "-1"} if where.devices > 1 and on.sizes["fsdp"] < where.devices else {}
    if remat:
        yield "remat=block", remat, where
    if least:
        yield f"micro_batch={on.shards}", least, where
    if remat and least:
        yield f"remat=block with micro_batch={on.shards}", remat | least, where
    if spread:
        every = {"train.micro_batch": str(where.devices)} if config.train.batch_size > where.devices else {}
        yield f"fsdp={where.devices}", spread, where
        yield f"fsdp={where.devices} with remat=block", spread | remat | every, where
    own = default()
    reset = {f"freeze.{key}": str(own.freeze[key]) for key in ("last_n_layers",) if config.freeze[key] != own.freeze[key]}
    if config.method in ("full", "freeze"):
        yield "LoRA", {"method": "lora"} | reset | remat | least, where
    if config.model.quantize != "nf4":
        yield "QLoRA", {"method": "lora", "model.quantize": "nf4"} | reset | remat | least, where
    if where.chip.torus:
        for n, shape in SHAPES[where.chip.torus].items():
            if where.devices < n <= 64:
                rows = str(math.ceil(config.train.batch_size / n) * n)
                keys = {"mesh.data": "1", "mesh.fsdp": "-1"} | remat | {"train.batch_size": rows, "train.micro_batch": str(n)}
                yield f"fsdp={n}", keys, Topology(where.chip, n, 1, shape)
    elif where.chip.name != "cpu":
        for n in (2, 4, 8, 16):
            if where.devices < n:
                rows = str(math.ceil(config.train.batch_size / n) * n)
                keys = {"mesh.data": "1", "mesh.fsdp": "-1"} | remat | {"train.batch_size": rows, "train.micro_batch": str(n)}
                yield f"fsdp={n}", keys, Topology(where.chip, n)

"""The command line: one verb a function, thin over the Python face. A user's mistake is one sentence and exit code 1."""

from __future__ import annotations

import argparse
import difflib
import json
import math
import os
import shlex
import sys
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any, NoReturn

from sftjax.cli_data import data
from sftjax.options import EXAMPLES, Parser, build_parser

VLLM_RANKS = (32, 64, 128, 256, 320, 512)  # what --max-lora-rank may be above its default of 16, vllm/config/lora.py


def main(argv: list[str] | None = None) -> NoReturn:
    parser = build_parser()
    given = sys.argv[1:] if argv is None else argv
    check_verb(parser, given)
    args, rest = parser.parse_known_args(given)
    if not args.verb:
        parser.print_help()
        sys.exit(0)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # "PyTorch was not found": it is not needed
    if argv is None:  # a process of ours: transformers would import torch where it is installed, 2 s and 450 MiB for nothing
        sys.modules.setdefault("torch", None)  # type: ignore[arg-type]
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # rows are tokenised by processes of our own
    from sftjax.config import UserError
    from sftjax.train.stop import Stopped

    try:
        args.overrides = overrides(args, rest)
        check_needs(args)
        VERBS[args.verb](args)
    except UserError as e:
        print(f"sftjax {args.verb}: {e}", file=sys.stderr)
        end_failed(e)
        sys.exit(1)
    except Stopped as e:
        print(e, file=sys.stderr)
        sys.exit(128 + e.signum)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output has gone: `sftjax preview | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    sys.exit(0)


def end_failed(e: Exception) -> None:
    """Ends one of several processes at once; the first last, since the others abort when it goes."""
    hosts = sys.modules.get("sftjax.hosts")
    jax = sys.modules.get("jax")
    if hosts is None or jax is None or not jax.distributed.is_initialized():
        return
    if hosts.first() and not isinstance(e, hosts.Lost):
        time.sleep(1.0)
    hosts.end_at_once()


def check_verb(parser: Parser, given: list[str]) -> None:
    """Ends the program where the first word is no verb, or where there are options and no word."""
    word = next((item for item in given if not item.startswith("-")), None)
    if word is None and given and not {"-h", "--help"} & {*given}:
        parser.error(f"{given[0]}: needs a verb before it, one of {', '.join(VERBS)}")
    if word is not None and word not in VERBS:
        near = difflib.get_close_matches(word, VERBS, n=1)
        parser.error(f"{word}: no such verb; " + (f"did you mean {near[0]}?" if near else f"there are {', '.join(VERBS)}"))


def overrides(args: argparse.Namespace, rest: list[str]) -> list[str]:
    """`key=value` of every --config.key=value, or --config.key value, that argparse left over. Raises UserError on others."""
    from sftjax.config import UserError

    if args.verb == "lm-eval":
        return rest  # the harness' own options

    found, i = [], 0
    while i < len(rest):
        item = rest[i]
        if not (item.startswith("--config.") and hasattr(args, "config")):
            flags = ["--" + name.replace("_", "-") for name in vars(args) if name not in ("verb", "needs", "what")]
            near = difflib.get_close_matches(item.partition("=")[0], flags, n=1)
            raise UserError(
                f"{item}: no such option{f'; did you mean {near[0]}?' if near else ''}; see sftjax {full_name(args)} --help"
            )
        if "=" not in item:
            i += 1
            if i == len(rest):
                raise UserError(f"{item}: needs a value, {item}=VALUE")
            item += "=" + rest[i]
        found.append(item.removeprefix("--config."))
        i += 1
    return found


def check_needs(args: argparse.Namespace) -> None:
    """Raises UserError where an option that the verb cannot do without was not given."""
    from sftjax.config import UserError

    def given(need: str) -> bool:
        return getattr(args, need[2:].partition("=")[0]) is not None

    missing = [need.replace("|", " or ") for need in args.needs.split() if not any(map(given, need.split("|")))]
    if missing:
        raise UserError(f"needs {' and '.join(missing)}; for example\n  {EXAMPLES[full_name(args)]}")


def full_name(args: argparse.Namespace) -> str:
    """The verb, with the word after it where there is one."""
    return " ".join(filter(None, (args.verb, getattr(args, "what", None))))


def load_config(args: argparse.Namespace) -> Any:
    from sftjax.config import load

    return load(args.config, args.overrides)


def preview(args: argparse.Namespace) -> None:
    from rich.console import Console

    from sftjax.data.preview import preview

    preview(load_config(args), Console(), rows=args.rows)
    same = [f"--config={args.config}", *(f"--config.{item}" for item in args.overrides), "--workdir=runs/mine"]
    print(f"\nnext: sftjax train {shlex.join(same)}")


def plan(args: argparse.Namespace) -> None:
    from sftjax.plan.topology import parse

    if args.topology:
        parse(args.topology)  # a misspelt one is told before a long import
    os.environ["JAX_PLATFORMS"] = "cpu"  # where there is an accelerator, it is not asked
    from sftjax.plan.report import plan

    given = {name: value for name in ("price", "efficiency") if (value := getattr(args, name)) is not None}
    plan(load_config(args), args.topology, compile=args.exact, **given)
    same = [f"--config={args.config}", *(f"--config.{item}" for item in args.overrides), "--workdir=runs/mine"]
    print(f"\nnext: sftjax train {shlex.join(same)}")


def train(args: argparse.Namespace) -> None:
    from sftjax import hosts, tasks
    from sftjax.config import parts
    from sftjax.join import join
    from sftjax.tasks.export import FORMS

    keep_compilations(args.workdir)
    config = load_config(args)
    join(args.coordinator, args.num_processes, args.process_id)
    summary = tasks.train(config, args.workdir, force=args.force)
    if not hosts.first():
        return
    for name in dict.fromkeys(("reward", "eval_loss", "exact_match", *parts(config.eval.metrics), "accuracy", "margin")):
        if summary.get(name) is not None and summary.get(f"{name}_before") is not None:
            print(f"{name.replace('_', ' ')}: {summary[f'{name}_before']:.4f} -> {summary[name]:.4f}")
    print(f"report: {args.workdir}/report.html")
    print(f"next: sftjax export --workdir={args.workdir} --to={FORMS[config.method][0]} --out=DIR")


def eval_(args: argparse.Namespace) -> None:
    from rich.console import Console

    from sftjax.config import parts
    from sftjax.evaluate.table import show
    from sftjax.tasks.evaluate import evaluate_model, evaluate_run

    config = eval_config(args)
    keep_compilations(args.workdir)
    options = sampling(args)
    over = {name: options.pop(name) for name in ("adapter", "quantize")}
    options |= {"out": args.out, "metrics": parts(args.metrics or ""), "rows": args.rows, "batch_size": args.batch_size}
    if args.workdir:
        found = evaluate_run(args.workdir, config, checkpoint=args.checkpoint or "last", split=args.split, **options)
    else:
        found = evaluate_model(args.model, config, data=args.data, base=args.base, **over, **options)
    print()
    show(found, Console(width=None if sys.stdout.isatty() else 160))
    eval_next(args, config, found)


def eval_config(args: argparse.Namespace) -> Any:
    """The config of an evaluation: that of --config, else the run's own, else the default. Raises UserError for what no
    evaluation of this kind reads."""
    from sftjax.config import UserError, default, override
    from sftjax.tasks.evaluate import refuse_too_few
    from sftjax.tasks.export import read_config
    from sftjax.tasks.scored import KEYS, head

    of_run = [f"--{name}" for name in ("workdir", "checkpoint", "split") if getattr(args, name)]
    of_model = [f"--{name}" for name in ("model", "adapter", "base", "data", "quantize") if getattr(args, name)]
    if of_run and of_model:
        raise UserError(f"{of_run[0]} is for a run and {of_model[0]} for a model without one; give only one of them")
    if args.model and not args.data:
        raise UserError("--model needs --data=FILE, the rows that it is measured on")
    refuse_too_few(vars(args))
    if args.model:
        refuse_keys(args.overrides, OF_A_FILE)
        if args.overrides and head(args.model, args.adapter):
            refuse_keys(args.overrides, KEYS)
    if args.config:
        return load_config(args)
    config = read_config(args.workdir) if args.workdir else default()
    for item in args.overrides:
        override(config, *item.split("=", 1))
    return config


def eval_next(args: argparse.Namespace, config: Any, found: dict[str, Any]) -> None:
    """Says what was written, and what to do with the model."""
    from sftjax.tasks.export import FORMS

    out = args.out or (f"{args.workdir}/eval" if args.workdir else None)
    answers = "generation" in found  # and not what a score head says
    rows, each = ("predictions.jsonl", "answer") if answers else ("scores.jsonl", "score")
    print(f"\n{rows} and eval.json: {out}" if out else f"\nnothing was written; --out=DIR keeps every {each}")
    if args.workdir:
        if not args.out:
            print(f"report: {args.workdir}/report.html")
        step = found["of"]["step"]
        print(f"next: sftjax export --workdir={args.workdir} --checkpoint={step} --to={FORMS[config.method][0]} --out=DIR")
    elif answers:
        over = f" --adapter={args.adapter}" if args.adapter else ""
        print(f"next: sftjax chat --model={args.model}{over}" + (f" --quantize={args.quantize}" if args.quantize else ""))


OF_A_FILE = ("data.", "eval.", "seed", "task", "model.dtype", "model.trust_remote_code")  # what a model on a file can be told
FLAGS = {
    "model.path": "--model=DIR",
    "model.adapter": "--adapter=DIR",
    "model.quantize": "--quantize",
    "data.train": "--data=FILE",
    "data.eval": "--data=FILE",
    "eval.generate": "--rows=N",
}


def refuse_keys(overrides: list[str], of: tuple[str, ...]) -> None:
    """Raises UserError for a config key that means nothing where a model is evaluated on a file."""
    from sftjax.config import UserError, default, flatten

    known = dict(flatten(default()))
    for item in overrides:
        key = item.partition("=")[0]
        if key in FLAGS:
            raise UserError(f"--config.{item}: has no effect with --model; use {FLAGS[key]}")
        if key in known and (key == "data.split" or not key.startswith(of)):
            raise UserError(
                f"--config.{item}: has no effect with --model, whose rows come from --data; leave it out. What has: "
                f"{', '.join(name + '*' * name.endswith('.') for name in of)}"
            )


def export_(args: argparse.Namespace) -> None:
    check_export(args)
    keep_compilations(args.workdir)
    shared = {"to": args.to, "out": args.out, "dtype": args.dtype}
    quantize = None
    if args.workdir:
        from sftjax.tasks.export import export, read_config

        export(args.workdir, checkpoint=args.checkpoint or "last", base=args.base, **shared)
        quantize = read_config(args.workdir).model.quantize
    else:
        from sftjax.tasks.combine import export_adapters

        export_adapters(args.model, args.adapter, weights=numbers("--weights", args.weights), **shared)
    print(f"next: {what_next(args.to, args.out, quantize)}")


def check_export(args: argparse.Namespace) -> None:
    """Raises UserError where options of a run and of a model are mixed."""
    from sftjax.config import UserError

    of_run = [f"--{name}" for name in ("workdir", "checkpoint", "base") if getattr(args, name)]
    of_model = [f"--{name}" for name in ("model", "adapter", "weights") if getattr(args, name)]
    if of_run and of_model:
        raise UserError(f"{of_run[0]} is for a run and {of_model[0]} for adapters without one; give only one of them")
    if args.model and not args.adapter:
        raise UserError("--model needs --adapter=DIR, what is to be merged into it")


def numbers(option: str, text: str | None) -> list[float] | None:
    """The numbers of an option, with commas between them. Raises UserError."""
    from sftjax.config import UserError

    try:
        found = None if text is None else [float(part) for part in text.split(",")]
    except ValueError:
        found = [math.nan]
    if not all(map(math.isfinite, found or ())):
        raise UserError(f"{option}={text}: needs numbers with commas between them, e.g. 0.7,0.3")
    return found


def what_next(to: str, out: str, quantize: str | None) -> str:
    """The command that uses an export; what lies there says whether it is an adapter, and over what."""
    from sftjax.hf.ollama import CONVERTER, GGUF

    def scoring(labels: Collection[str]) -> str:
        return "sftjax.classify(model, texts)" if len(labels) > 1 else "sftjax.rewards(model, conversations)"

    file = Path(out).expanduser() / "adapter_config.json"
    if not file.is_file():
        whole = json.loads(file.with_name("config.json").read_text())
        if "id2label" in whole:
            return f"python: model = sftjax.load({out!r}); {scoring(whole['id2label'])}"
        if to == "ollama":
            return f"python {CONVERTER} {out} --outfile {out}/{GGUF} && ollama create NAME -f {out}/Modelfile"
        return f"vllm serve {out}" if to == "vllm" else f"sftjax chat --model={out}"
    adapter = json.loads(file.read_text())
    base = adapter["base_model_name_or_path"]
    if adapter["task_type"] == "SEQ_CLS":
        labels = json.loads(file.with_name("labels.json").read_text())
        return f"python: model = sftjax.load({base!r}, adapter={out!r}); {scoring(labels)}"
    if to == "vllm":
        rank = next((f" --max-lora-rank={most}" for most in VLLM_RANKS if most >= adapter["r"]), "") if adapter["r"] > 16 else ""
        return f"vllm serve {base} --enable-lora{rank} --lora-modules mine={out}"
    return f"sftjax chat --model={base} --adapter={out}" + (f" --quantize={quantize}" if quantize else "")


def chat(args: argparse.Namespace) -> None:
    from sftjax.generate.chat import run_chat

    keep_compilations()
    run_chat(args.model, system=args.system, **sampling(args))


def serve(args: argparse.Namespace) -> None:
    from sftjax.serve.app import run_serve

    keep_compilations()
    names = ("adapter", "quantize", "name", "host", "port", "slots", "key_env", "draft_tokens")
    run_serve(args.model, **{name: getattr(args, name) for name in names})


def generate(args: argparse.Namespace) -> None:
    from sftjax.generate.answer import run_generate

    keep_compilations()
    run_generate(args.model, data=args.data, out=args.out, batch_size=args.batch_size, force=args.force, **sampling(args))


def compare(args: argparse.Namespace) -> None:
    from sftjax.evaluate.compare import run_compare
    from sftjax.evaluate.contenders import Options

    keep_compilations()
    run_compare(
        args.model,
        data=args.data,
        out=args.out,
        prompts=args.prompts,
        expected=args.expected,
        metrics=args.metrics or "",
        rows=args.rows,
        show=args.show,
        quantize=args.quantize,
        batch_size=args.batch_size,
        key_envs=args.key_env,
        prices=args.price,
        timeout=args.timeout,
        parallel=args.parallel,
        options=Options(args.max_new_tokens, args.temperature, args.top_p, tuple(args.stop), args.seed),
    )


def lm_eval(args: argparse.Namespace) -> None:
    from sftjax.evaluate.harness import run

    keep_compilations()
    run(["--model_args", *args.model_args, "--tasks", *args.tasks, *args.overrides])


def sampling(args: argparse.Namespace) -> dict[str, Any]:
    model, filters = ("adapter", "quantize", "max_new_tokens"), ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    names = (*model, *filters, "seed", "draft_tokens")
    return {name: getattr(args, name) for name in names} | {"stop_strings": tuple(args.stop)}


def keep_compilations(workdir: str | None = None) -> None:
    """What XLA compiled is kept between runs: in .xla beside the run's directory, or in ~/.cache/sftjax/xla without a run or
    with one in a bucket; JAX_COMPILATION_CACHE_DIR says otherwise."""
    import jax

    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        place = "~/.cache/sftjax/xla"
        if workdir and "://" not in workdir:
            place = f"{os.path.dirname(workdir.rstrip('/')) or '.'}/.xla"
        jax.config.update("jax_compilation_cache_dir", os.path.expanduser(place))


VERBS = {
    "preview": preview,
    "plan": plan,
    "data": data,
    "train": train,
    "eval": eval_,
    "export": export_,
    "chat": chat,
    "serve": serve,
    "generate": generate,
    "compare": compare,
    "lm-eval": lm_eval,
}

if __name__ == "__main__":
    main()

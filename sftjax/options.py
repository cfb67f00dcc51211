"""The verbs' options: what the command line takes, with an example of each verb. What a verb does is in `cli.py`."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any, NoReturn

EXAMPLES = {
    "preview": "sftjax preview --config=configs/sft_lora.py --config.data.train=mine.jsonl",
    "plan": "sftjax plan --config=configs/sft_lora.py --config.model.path=Qwen/Qwen3-0.6B --topology=v5e-1",
    "data": "sftjax data check --data=mine.jsonl",
    "data check": "sftjax data check --data=mine.jsonl --held-out=test.jsonl",
    "data clean": "sftjax data clean --data=mine.jsonl --held-out=test.jsonl --out=clean.jsonl",
    "data split": "sftjax data split --data=mine.jsonl --out=mine --config.data.split=98,1,1",
    "data select": "sftjax data select --data=mine.jsonl --out=some.jsonl --rows=1000",
    "data convert": "sftjax data convert --data=mine.csv --out=mine.jsonl --config.data.columns.instruction=frage",
    "data pairs": "sftjax data pairs --data=rankings.jsonl --out=pairs.jsonl",
    "train": "sftjax train --config=configs/sft_lora.py --config.model.path=Qwen/Qwen3-0.6B --workdir=runs/mine",
    "eval": "sftjax eval --workdir=runs/mine",
    "export": "sftjax export --workdir=runs/mine --to=hf --out=mine",
    "chat": "sftjax chat --model=mine",
    "serve": "sftjax serve --model=mine",
    "generate": "sftjax generate --model=mine --data=questions.jsonl --out=answers.jsonl",
    "lm-eval": "sftjax lm-eval --model_args path=mine --tasks gsm8k,hellaswag --batch_size 32",
    "compare": "sftjax compare --model=base --model=tuned=base@adapter --prompts=prompts.yaml --data=test.jsonl --out=compared",
}

DATA = {  # what may follow the verb data: what it needs, and what it does
    "check": (
        "--data=FILE",
        "Says what rows are, and which cannot be used, repeat others or stand in a held-out file too. Ends with 1 where rows "
        "cannot be used or stand in the held-out file, else with 0.",
    ),
    "clean": (
        "--data=FILE --out=FILE",
        "Writes the rows that can be used, each once, and none of a held-out file, with all their columns.",
    ),
    "split": (
        "--data=FILE --out=DIR",
        "Writes train.jsonl, eval.jsonl and test.jsonl, the parts that training makes by --config.data.split and --config.seed.",
    ),
    "select": (
        "--data=FILE --rows=N --out=FILE",
        "Writes rows chosen at random by --config.seed and by what they say, wherever they stand in the file.",
    ),
    "convert": (
        "--data=FILE --out=FILE",
        "Writes rows of any format as the one of its kind that other tools read too: messages, prompt and completion, prompt, "
        "chosen and rejected, ...",
    ),
    "pairs": ("--data=FILE --out=FILE", "Writes every pair that the rankings, trees or pairs of a file make."),
}


class Parser(argparse.ArgumentParser):
    """argparse whose complaints are a sentence too, without the usage before it."""

    def error(self, message: str) -> NoReturn:
        self.exit(1, f"{self.prog}: {message}; see {self.prog} --help\n")


def build_parser() -> Parser:
    text = "A Hugging Face checkpoint and a file of examples in, a better Hugging Face checkpoint out."
    parser = Parser("sftjax", description=text, allow_abbrev=False)
    verbs = parser.add_subparsers(dest="verb", metavar="VERB")

    def verb(name: str, needs: str, help: str, among: Any = verbs) -> argparse.ArgumentParser:
        """`needs` are checked by `check_needs` and not by argparse, so that a misspelt option is told before a missing one."""
        usage, epilog = f"sftjax {name} {needs} [options]", f"example:\n  {EXAMPLES[name]}"
        raw = argparse.RawDescriptionHelpFormatter
        p = among.add_parser(
            name.split()[-1], help=help, description=help, usage=usage, epilog=epilog, formatter_class=raw, allow_abbrev=False
        )
        p.set_defaults(needs=needs)
        return p

    def config(p: argparse.ArgumentParser) -> None:
        p.add_argument("--config", metavar="FILE", help="a file with get_config(), such as configs/sft_lora.py")
        p.add_argument_group(
            "any key of the config", "--config.KEY=VALUE, e.g. --config.optim.lr=1e-4; sftjax/config.py lists them all"
        )

    p = verb(
        "preview", "--config=FILE", "Shows rows as the model sees them: every token, what is trained, what is dropped and why."
    )
    config(p)
    p.add_argument("--rows", type=int, default=3, help="rows to show in full (default 3)")

    p = verb(
        "plan",
        "--config=FILE",
        "Says whether a run fits, how long it takes and what it costs, without weights or an accelerator.",
    )
    config(p)
    p.add_argument(
        "--topology", metavar="NAME", help="v5e:4x4, v5litepod-16, v6e-8, v5p-32, 2xv5e-16, h100x8, t4, cpu (default: each)"
    )
    p.add_argument("--price", type=float, metavar="DOLLARS", help="of an hour of one chip")
    p.add_argument(
        "--efficiency", type=float, metavar="SHARE", help="of the peak that a run reaches, an assumption (default 0.5)"
    )
    p.add_argument(
        "--exact", action="store_true", help="compile the step for that TPU too, on this machine (needs pip install libtpu)"
    )

    p = verb("data", "WHAT --data=FILE", "Looks at files of rows, or writes others from them, in any format that training reads.")
    p.set_defaults(needs="")  # told by the word after it
    data_options(p, verb, config)

    p = verb("train", "--config=FILE --workdir=DIR", "Runs the config's task in a directory; run again, it resumes.")
    config(p)
    p.add_argument("--workdir", metavar="DIR", help="checkpoints, metrics, report go here; may be gs://BUCKET/PATH")
    p.add_argument("--force", action="store_true", help="go on in a directory whose run had another config, data or base")
    p.add_argument(
        "--coordinator",
        metavar="HOST:PORT",
        help="of several processes where the first is, or JAX_COORDINATOR_ADDRESS (default: as SLURM, Open MPI, Kubernetes or a "
        "TPU slice has it)",
    )
    p.add_argument("--num-processes", type=int, metavar="N", help="how many there are, or JAX_NUM_PROCESSES")
    p.add_argument("--process-id", type=int, metavar="I", help="which of them this is, from 0, or JAX_PROCESS_ID")

    p = verb(
        "eval",
        "--workdir=DIR|--model=DIR",
        "Measures a run's model beside its base on held-out rows, or any model on a file: loss, answers, intervals, by tag.",
    )
    p.add_argument("--workdir", metavar="DIR", help="a run")
    p.add_argument("--checkpoint", metavar="last|best|STEP", help="which of the run's (default last)")
    p.add_argument("--split", choices=["test", "eval"], help="which of the run's rows (default test, where it has any)")
    p.add_argument("--data", metavar="FILE", help="with --model: rows in any format that training reads")
    p.add_argument("--base", metavar="DIR", help="with --model: another model to stand beside it")
    p.add_argument("--metrics", metavar="M,M", help="of the answers (default: config.eval.metrics, else what suits the rows)")
    p.add_argument("--rows", type=int, metavar="N", help="rows that are answered; 0 = only the loss (default 200)")
    p.add_argument("--out", metavar="DIR", help="for predictions.jsonl and eval.json (default of a run: eval/ in it)")
    p.add_argument("--batch-size", type=int, default=32, help="prompts at a time")
    model_options(p)
    p.set_defaults(max_new_tokens=None)  # config.eval.max_new_tokens
    config(p)

    p = verb(
        "export",
        "--workdir=DIR|--model=DIR --out=DIR",
        "Writes weights for others to load, reads them back and compares: a run's, or those of adapters over a model.",
    )
    p.add_argument("--workdir", metavar="DIR", help="a run")
    p.add_argument("--checkpoint", metavar="last|best|STEP", help="which of the run's (default last)")
    p.add_argument(
        "--base", choices=["dequantised", "original"], help="what a run over a quantised base merges into (default dequantised)"
    )
    p.add_argument("--model", metavar="DIR", help="a Hugging Face directory or hub id, in place of a run, with:")
    p.add_argument("--adapter", action="append", metavar="DIR", help="a PEFT adapter over it; given again, they are added up")
    p.add_argument("--weights", metavar="W,W", help="of the adapters, e.g. 0.7,0.3 (default: their mean)")
    p.add_argument(
        "--to",
        default="hf",
        choices=["hf", "peft", "vllm", "ollama", "sftjax"],
        help="merged checkpoint (default), PEFT adapter, adapter for vLLM (merged where vLLM would refuse it), "
        "merged checkpoint with a Modelfile for Ollama, or sftjax's own form, for bottleneck adapters",
    )
    p.add_argument("--out", metavar="DIR", help="where to; an earlier export there is replaced")
    p.add_argument(
        "--dtype",
        choices=["float32", "bfloat16", "float16"],
        help="of every tensor of a merged checkpoint (default: as in the base)",
    )

    p = verb("chat", "--model=DIR", "Talks with a model in the terminal; piped lines work too.")
    model_options(p)
    p.add_argument("--system", help="a system prompt")

    p = verb("serve", "--model=DIR", "Answers over HTTP in the words of the OpenAI API, many at a time; with a page to talk on.")
    weight_options(p)
    p.add_argument("--name", help="of the model, for those who ask (default: its directory's name, or hub id)")
    p.add_argument("--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1: this machine alone)")
    p.add_argument("--port", type=int, default=8000, help="0 finds a free one (default 8000)")
    p.add_argument("--slots", type=int, default=16, metavar="N", help="answers that are made at a time; others wait (default 16)")
    p.add_argument("--key-env", metavar="VARIABLE", help="the environment variable with a key that whoever asks needs")
    draft_option(p)

    p = verb("generate", "--model=DIR --data=FILE --out=FILE", "Answers every prompt of a data file, into JSON lines.")
    model_options(p)
    p.add_argument("--data", metavar="FILE", help="any format that training reads")
    p.add_argument("--out", metavar="FILE")
    p.add_argument("--batch-size", type=int, default=16)
    p.add_argument("--force", action="store_true", help="write over an --out that exists")

    p = verb(
        "lm-eval",
        "--model_args=path=DIR --tasks=NAMES",
        "Runs a model on tasks of EleutherAI's lm-evaluation-harness. Its other options may follow: see lm_eval run --help.",
    )
    p.add_argument("--model_args", nargs="+", metavar="KEY=VALUE", help="path, adapter, quantize, dtype, max_length and others")
    p.add_argument("--tasks", nargs="+", metavar="NAME", help="names or .yaml files; lm_eval ls tasks lists the harness' own")

    p = verb(
        "compare",
        "--model=MODEL --data=FILE --out=DIR",
        "Asks several models through several prompts, and says which is better and what the rows cannot tell.",
    )
    compare_options(p)
    return parser


def data_options(p: argparse.ArgumentParser, verb: Callable[..., argparse.ArgumentParser], config: Callable[..., None]) -> None:
    whats = p.add_subparsers(dest="what", prog="sftjax data", metavar="WHAT", title="what to do, each with a --help of its own")
    for name, (needs, help) in DATA.items():
        w = verb(f"data {name}", needs, help, whats)
        w.add_argument("--data", metavar="FILE", help="a path, glob, directory or hub id, in any format that training reads")
        if name in ("check", "clean"):
            w.add_argument("--held-out", metavar="FILE", help="rows that should not be in --data, such as a test's")
        if name == "select":
            w.add_argument("--rows", type=int, metavar="N", help="how many")
        if name != "check":
            kind, what = ("DIR", "a new directory") if name == "split" else ("FILE", "JSON lines")
            w.add_argument("--out", metavar=kind, help=what)
            w.add_argument("--force", action="store_true", help="write over an --out that exists")
        config(w)


def compare_options(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--model",
        action="append",
        metavar="[NAME=]DIR|DIR@ADAPTER|URL#NAME",
        help="given once for each: a Hugging Face directory or hub id, a PEFT adapter over one, or a model of an "
        "OpenAI-compatible server, e.g. http://localhost:8000/v1#qwen; the first is what the others are held against",
    )
    p.add_argument("--prompts", metavar="FILE", help="variants by name, YAML or JSON (default: rows as training reads them)")
    p.add_argument("--data", metavar="FILE", help="any format that training reads; with --expected any columns")
    p.add_argument("--out", metavar="DIR", help="a new directory, or one to go on in: what is answered there is not asked again")
    p.add_argument("--expected", metavar="FIELD", help="the field with the right answer (default: what training would learn)")
    p.add_argument("--metrics", metavar="M,M", help="the first decides (default: by what is expected)")
    p.add_argument("--rows", type=int, metavar="N", help="so many, chosen at random by --seed (default: all)")
    p.add_argument("--show", type=int, default=5, metavar="N", help="rows to show on which they differ (default 5)")
    p.add_argument("--max-new-tokens", type=int, default=512)
    p.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default)")
    p.add_argument("--top-p", type=float, default=1.0)
    p.add_argument("--stop", action="append", default=[], metavar="TEXT", help="stop where this text appears; may be given again")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--quantize", choices=["nf4", "int8"], help="keep local models' kernels in 4 or 8 bits")
    p.add_argument("--batch-size", type=int, help="of local models (default 16)")
    p.add_argument(
        "--key-env",
        action="append",
        default=[],
        metavar="[NAME=]VARIABLE",
        help="the environment variable with an endpoint's key (default OPENAI_API_KEY, for api.openai.com alone)",
    )
    p.add_argument(
        "--price", action="append", default=[], metavar="NAME=IN,OUT", help="dollars a million tokens of prompts, of answers"
    )
    p.add_argument("--parallel", type=int, help="requests to an endpoint at a time (default 4)")
    p.add_argument("--timeout", type=float, help="seconds that an endpoint has for an answer (default 120)")


def weight_options(p: argparse.ArgumentParser) -> None:
    p.add_argument("--model", metavar="DIR", help="a Hugging Face directory or hub id")
    p.add_argument("--adapter", metavar="DIR", help="a PEFT adapter over it")
    p.add_argument("--quantize", choices=["nf4", "int8"], help="keep the layers' kernels in 4 or 8 bits")


def model_options(p: argparse.ArgumentParser) -> None:
    weight_options(p)
    p.add_argument("--max-new-tokens", type=int, default=512)
    p.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default)")
    p.add_argument("--top-k", type=int, default=0)
    p.add_argument("--top-p", type=float, default=1.0)
    p.add_argument("--min-p", type=float, default=0.0)
    p.add_argument("--repetition-penalty", type=float, default=1.0)
    p.add_argument("--stop", action="append", default=[], metavar="TEXT", help="stop where this text appears; may be given again")
    p.add_argument("--seed", type=int, default=0)
    draft_option(p)


def draft_option(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--draft-tokens",
        type=int,
        default=0,
        metavar="N",
        help="guess N tokens from what was said before and check them in one pass: the same answers but for rounding, sooner "
        "where few rows go together and text repeats itself, e.g. 4 (default 0)",
    )

"""Out again: a run's weights as a Hugging Face checkpoint, or what it added to its base as an adapter.

    hf      everything, merged into one checkpoint        any method but adapter
    ollama  the same, and the Modelfile of what llama.cpp converts it to
    peft    an adapter that PEFT loads over the base      lora, tokens
    vllm    the same as vLLM serves it; what it would refuse (`hf.peft.unserved`) is merged as for hf
    sftjax  bottleneck adapters, which no other library knows

A quantised base merges by choice: into its dequantised kernels, which are what was trained over, or into the original ones.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from sftjax import config as schema
from sftjax import hosts, sharding, tree
from sftjax.config import UserError
from sftjax.data.chat import Chat
from sftjax.generate.open import ends
from sftjax.hf.load import load_params
from sftjax.hf.model import dtype_name
from sftjax.hf.ollama import Modelfile, modelfile, put
from sftjax.hf.peft import save_adapter, unserved
from sftjax.hf.save import save
from sftjax.hf.verify import Verified, distance, score, verify
from sftjax.models.config import DecoderConfig
from sftjax.tasks.base import Base
from sftjax.train.card import card, put_card
from sftjax.train.checkpoint import Checkpoints
from sftjax.train.files import directory
from sftjax.train.manifest import hash_template, hash_tokenizer, hash_weights
from sftjax.train.places import freed
from sftjax.train.run import read_json
from sftjax.train.step import init_state
from sftjax.weights import method, select
from sftjax.weights.describe import over

FORMS = {
    "lora": ("hf", "peft", "vllm", "ollama"),
    "tokens": ("hf", "peft", "vllm", "ollama"),
    "full": ("hf", "ollama"),
    "freeze": ("hf", "ollama"),
    "adapter": ("sftjax",),
}
WHOLE = ("hf", "ollama")  # a merged checkpoint, as --to=hf writes it


@hosts.by_first
def export(
    workdir: str | Path,
    *,
    to: str = "hf",
    out: str | Path,
    checkpoint: str | int = "last",
    base: str | None = None,
    dtype: str | None = None,
    say: Callable[[str], None] = print,
) -> float:
    """Writes the run's weights to `out`, reads them back and compares log-probs; returns the largest difference.

    `checkpoint` is last, best or a step. `base`, of a run whose base was quantised, is dequantised (None too) or original.
    `dtype` None keeps each tensor's own. Raises UserError, and ExportError where what was read back is not what was trained;
    `out` is then as it was.
    """
    workdir, out = directory(workdir), Path(out).expanduser()
    config = read_config(workdir)
    refuse_form(to, base, dtype, config)
    dtype = dtype and dtype_name(dtype)
    start = Base(config, (read_json(workdir / "manifest.json") or {}).get("labels", ()))
    refuse_another_base(workdir, start)
    asked = ollama(start.chat, start.directory, start.labels, config.data.system) if to == "ollama" else None
    own_padding = start.chat.tokenizer.pad_token_id if start.labels else None
    padding = pad_with(start.chat, ends=config.task == "reward") if start.labels else None
    decoder, params, mask = start.build(sharding.make_mesh(1, 1, 1))
    whole = method.whole(params, config, start.modules)
    params, step = restore(workdir, params, mask, checkpoint, say)
    params = select.uncut(params)
    form = served(to, params, decoder.config, start.directory, whole, out, say)
    refuse_beside_adapter(to, form, base, dtype)
    rows = probe_rows(start.chat.tokenizer, decoder.config.vocab, start.trained_tokens)
    changed = start.new_tokens or padding != own_padding
    if base == "original":
        trained_over = score(params, decoder.config, rows)
        params = over(params, start.headed(load_params(start.directory, start.source_config))[0])

    def beside(directory: Path) -> None:
        put_card(card(workdir, out.resolve().name, form, step, measured=base != "original"), directory)
        if asked:
            put(asked, directory)

    verified = write(
        params,
        decoder.config,
        rows,
        form,
        merged={
            "dtype": dtype,
            "stop_ids": start.chat.stop_ids,
            "pad_id": padding,
            "untouched": untouched(params, mask),
        },
        adapter={"base_name": config.model.path, "saved": whole},
        quantisers=method.quantiser(start.shapes, config, start.modules),
        beside=beside,
        source=start.directory,
        out=out,
        tokenizer=start.chat.tokenizer if changed or start.tokenizer_directory != start.directory else None,
        template=None if config.task == "pretrain" else start.chat.template,
    )
    most, compared = verified.most, sum(map(len, rows))
    what = "scores" if start.labels else "log-probs"
    say(f"wrote step {step} to {out} and read it back: {what} differ by at most {most:.1e} over {compared:,} tokens")
    if asked:
        say_unlike(asked, out, say)
    if base == "original":
        mean, most = distance(trained_over, verified.scores)
        say(
            f"over the original base it says something else than the run over its {config.model.quantize} one: "
            f"log-probs differ by {mean:.2g} nats on average and {most:.2g} at most"
        )
    return most


def write(
    params: Any,
    config: DecoderConfig,
    rows: Sequence[Sequence[int]],
    form: str,
    *,
    merged: Mapping[str, Any],
    adapter: Mapping[str, Any],
    source: Path,
    quantisers: Mapping[str, Any] | None = None,
    beside: Callable[[Path], None] | None = None,
    **shared: Any,
) -> Verified:
    """Writes `params` in a form and reads it back. `merged` goes to `hf.save` alone, `adapter` to `hf.peft`, `shared` to both;
    `beside` is given the directory, to add to it.

    `params` are given away: they are deleted once written, so that the devices never hold both models.
    """
    found, ours = list[Verified](), score(params, config, rows)

    def check(directory: Path) -> None:
        of = None if form == "hf" else source
        for x in jax.tree.leaves(params):
            x.delete()
        found.append(verify(directory, ours, config, rows, adapter_of=of, quantisers=quantisers))
        if beside:
            beside(directory)

    if form == "hf":
        save(params, config, source=source, check=check, **merged, **shared)
    else:
        save_adapter(params, config, form=form, source=source, check=check, **adapter, **shared)
    return found[0]


def refuse_form(to: str, base: str | None, dtype: str | None, config: ConfigDict) -> None:
    """Refuses a form that the run's method has no weights for, and options that mean nothing for the run."""
    known = sorted({form for forms in FORMS.values() for form in forms})
    if to not in known:
        raise UserError(f"--to={to}: needs one of {', '.join(known)}")
    if to not in FORMS[config.method]:
        why = {
            "adapter": "whose nonlinearity cannot be merged into a kernel, and which neither PEFT nor vLLM has a form for",
            "full": "which makes no adapter",
            "freeze": "which makes no adapter",
        }.get(config.method, "and this form is for method adapter alone")
        *others, last = (f"--to={form}" for form in FORMS[config.method])
        use = f"{', '.join(others)} or {last}" if others else last
        raise UserError(f"--to={to}: the run trained by method {config.method}, {why}; use {use}")
    if base not in (None, "dequantised", "original"):
        raise UserError(f"--base={base}: needs dequantised or original")
    if base and config.model.quantize is None:
        raise UserError(f"--base={base}: the run's base was not quantised (model.quantize); leave --base out")
    if to != "vllm":  # what that becomes is known when the weights are
        refuse_beside_adapter(to, "hf" if to in WHOLE else to, base, dtype)


def refuse_beside_adapter(to: str, form: str, base: str | None, dtype: str | None) -> None:
    """Refuses options of a merged checkpoint where an adapter is written."""
    if form != "hf" and base:
        raise UserError(
            f"--base={base}: --to={to} writes an adapter, which merges into no base; leave --base out, or use --to=hf"
        )
    if form != "hf" and dtype:
        raise UserError(f"--dtype={dtype}: an adapter is always float32; leave --dtype out, or use --to=hf")


def served(
    to: str,
    params: Any,
    config: DecoderConfig,
    source: Path,
    whole: Collection[str],
    out: Path,
    say: Callable[[str], None],
) -> str:
    """The form that `to` takes: Ollama's is hf, and vLLM's where it would serve no such adapter, and `say` tells so."""
    if to in WHOLE:
        return "hf"
    if to != "vllm" or not (reasons := unserved(params, config, source, whole)):
        return to
    told = " and ".join(reasons)
    say(f"vLLM serves no adapter with {told}: {out} becomes the whole model, merged, as --to=hf writes it")
    return "hf"


def ollama(chat: Chat, source: Path, labels: Collection[str], system: str | None = None) -> Modelfile:
    """How Ollama asks a model over the checkpoint `source`. Raises UserError for one that Ollama does not run."""
    if labels:
        raise UserError("--to=ollama: the model ends with a score head, which generates no text for Ollama to show; use --to=hf")
    file = source / "generation_config.json"
    return modelfile(chat, stop_ids=ends(source, chat), sampling=read_json(file) or {}, system=system)


def say_unlike(asked: Modelfile, out: Path, say: Callable[[str], None]) -> None:
    if asked.unlike:
        say(f"{out}/Modelfile asks as the model's chat template does, except that {', '.join(asked.unlike)}")


def refuse_another_base(workdir: Path, base: Base) -> None:
    """What the run learnt fits the base it was trained from, and no other that has come to lie in its place."""
    was = (read_json(workdir / "manifest.json") or {}).get("hashes", {})
    found: dict[str, tuple[Any, str | None]] = {
        "base": (base.directory, hash_weights(base.directory)),
        "tokenizer": (base.tokenizer_directory, hash_tokenizer(base.tokenizer_directory)),
    }
    if base.adapter:
        found["adapter"] = base.adapter, hash_weights(base.adapter)
    if base.config.task != "pretrain":
        found["template"] = base.config.data.template or base.directory, hash_template(base.chat.template)
    for part, (place, digest) in found.items():
        if was.get(part) != digest:
            raise UserError(f"{place}: the {part} is not what the run in {workdir} was trained from; put that back")


def pad_with(chat: Chat, *, ends: bool) -> int | None:
    """The token that pads the sequences of a score head, made the tokenizer's own: its id, or None where there is none.

    transformers scores the last token that is not this one. So none will do that sequences end with, where `ends` says that
    they end with what the template, or the tokenizer's end of text, puts there.
    """
    t = chat.tokenizer
    last = chat.render([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]) if chat.template else ""
    ending = {*(chat.tokenise(last)[0][-1:] or chat.eos_ids)} if ends else set()
    known = (t.pad_token_id, t.unk_token_id, t.eos_token_id, t.bos_token_id)
    found = next((i for i in known if i is not None and i not in ending), None)
    if found is not None and found != t.pad_token_id:
        t.pad_token = t.convert_ids_to_tokens(found)
    return found


def untouched(params: Any, mask: Any) -> set[str]:
    """Paths of the leaves that are still the source's: arrays that did not train, and no kind of weight, trained now or before.

    The lower layers of a cut stack are not among them, but come out byte for byte too: float32 holds every float16 and bfloat16.
    """
    touched = {path.replace("lower/", "layers/") for path, m in tree.flatten(mask).items() if any(jax.tree.leaves(m))}
    return {path for path, w in tree.flatten(params).items() if path not in touched and isinstance(w, jax.Array)}


def read_config(workdir: str | Path) -> ConfigDict:
    """The config of a run's directory. Raises UserError where there is none."""
    file = directory(workdir) / "config.json"
    if not file.is_file():
        raise UserError(f"--workdir={workdir}: no config.json there, so it is no run's directory")
    config = schema.default()
    for key, value in json.loads(file.read_text()).items():
        if key not in config:
            raise UserError(f"--workdir={workdir}: the config.json there is not a run's, which has no {key}")
        if isinstance(value, dict):
            with config[key].unlocked(), config[key].ignore_type():  # JSON has lists where the schema has tuples
                config[key].update({name: tuple(held) if isinstance(held, list) else held for name, held in value.items()})
        else:
            config[key] = value
    return config


def restore(
    workdir: Path, params: Any, mask: Any, checkpoint: str | int, say: Callable[[str], None], *, keep: bool = False
) -> tuple[Any, int]:
    """`params` with a checkpoint's trainable part in place; what the optimiser held is not read. The part that it takes the place
    of is deleted first, unless `keep` says that it is needed too."""
    trainable, frozen = tree.split(params, mask)
    like = init_state(trainable, optax.identity())
    like = like if keep else freed(like)
    with Checkpoints(workdir / "checkpoints", say=say, read_only=True) as checkpoints:
        got = checkpoints.restore(like, chosen(checkpoints, checkpoint), part=True)
    if got is None:
        raise UserError(f"--workdir={workdir}: the run has saved no checkpoint yet")
    return tree.join(got.state.trainable, frozen), got.step


def chosen(checkpoints: Checkpoints, checkpoint: str | int) -> int | None:
    """The step that `checkpoint` names; None for the last."""
    checkpoint = str(checkpoint)
    steps = checkpoints.steps()
    if checkpoint == "last" or not steps:
        return None
    if checkpoint == "best":
        best = (checkpoints.extras() or {})["best"]
        if not best:
            raise UserError("--checkpoint=best: the run was never evaluated; use --checkpoint=last")
        return int(best["step"])
    if checkpoint.isdecimal() and int(checkpoint) in steps:
        return int(checkpoint)
    raise UserError(f"--checkpoint={checkpoint}: needs last, best or one of {', '.join(map(str, steps))}")


def probe_rows(tokenizer: Any, vocab: int, trained: Sequence[int]) -> list[list[int]]:
    """Tokens to compare log-probs on: a text of the tokenizer's own, ids from all over the vocabulary, and trained tokens'."""
    text = tokenizer("The quick brown fox jumps over the lazy dog. 你好，世界。 1 + 1 = 2")["input_ids"]
    spread = jax.random.randint(jax.random.key(0), (3, 48), 0, vocab, jnp.int32).tolist()
    return [text[:64], *spread, *([[*spread[0][:8], *trained[:40]]] if trained else [])]

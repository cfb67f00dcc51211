"""Adapters without a run: one merged into a checkpoint or written in another form, several made one by a weighted sum.

W + sum_i weight_i * scale_i * a_i @ b_i, exactly: their ranks stand side by side
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from sftjax import tree
from sftjax.config import UserError
from sftjax.data.chat import Chat
from sftjax.data.tokenizer import open_tokenizer, tokenizer_place
from sftjax.hf.load import load_config, load_params, read_json, resize_embeddings, resolve
from sftjax.hf.ollama import put
from sftjax.hf.peft import load_adapter, saved_modules, with_head
from sftjax.tasks.export import ollama, probe_rows, refuse_beside_adapter, say_unlike, served, write
from sftjax.weights.describe import bottlenecks, trained_tokens
from sftjax.weights.lora import combine
from sftjax.weights.targets import saved


def export_adapters(
    model: str | Path,
    adapters: Sequence[str | Path],
    *,
    weights: Sequence[float] | None = None,
    to: str = "hf",
    out: str | Path,
    dtype: str | None = None,
    say: Callable[[str], None] = print,
) -> float:
    """Writes `adapters` over `model` to `out`, reads it back and compares log-probs; returns the largest difference.

    `weights`, one for each adapter, are equal shares of 1 where not given. Tokenizer and chat template are the first adapter's,
    where it has them. `to` is hf, peft, vllm or ollama, and `dtype` as in `export`. Raises UserError and ExportError.
    """
    out = Path(out).expanduser()
    shares = [1 / len(adapters)] * len(adapters) if weights is None else list(weights)
    if to not in ("hf", "peft", "vllm", "ollama"):
        raise UserError(f"--to={to}: adapters over a --model are written as hf, peft, vllm or ollama")
    if len(shares) != len(adapters):
        raise UserError(f"--weights has {len(shares)} numbers and there are {len(adapters)} of --adapter; give each its own")
    if not any(shares):
        given = ",".join(f"{share:g}" for share in shares)
        raise UserError(f"--weights={given}: nothing is left of the adapters; give at least one another weight than 0")
    if to == "peft":
        refuse_beside_adapter(to, to, None, dtype)
    directory, places = resolve(model), [resolve(adapter, needs="adapter_config.json") for adapter in adapters]
    for place in places:
        say_another_base(place, str(model), directory, say)
    tokenizers = [open_tokenizer(directory, place) for place in places]
    base, config = load_params(directory, load_config(directory)), load_config(directory)
    base, config = resize_embeddings(base, config, len(tokenizers[0]))
    base, config = with_head(base, config, places[0])
    loaded = [load_adapter(base, place) for place in places]
    chat = Chat(tokenizers[0])
    asked = ollama(chat, directory, config.labels) if to == "ollama" else None
    alone = len(loaded) == 1 and weights is None
    for adapter, params in zip(adapters, loaded):
        if bottlenecks(params):
            raise UserError(
                f"--adapter={adapter}: bottleneck adapters (method adapter) put a nonlinearity behind their kernels, and can be "
                "neither merged nor added nor written in another form; chat and generate take them as they are"
            )
    # the base among them: so that a lone adapter, too, is refused a weight for what is no update of it
    params = loaded[0] if alone else combine([(base, 0.0), *zip(loaded, shares)])
    if len({tokenizer.chat_template for tokenizer in tokenizers}) > 1:
        say(f"the adapters' chat templates differ: {out} has that of {places[0]}")

    whole = {path for place in places for path in saved(params, saved_modules(place))}
    form = served(to, params, config, directory, whole, out, say)
    refuse_beside_adapter(to, form, None, dtype)
    leaves, bases = tree.flatten(params), tree.flatten(base)
    rows = probe_rows(tokenizers[0], config.vocab, trained_tokens(params))
    verified = write(
        params,
        config,
        rows,
        form,
        merged={
            "dtype": dtype,
            "stop_ids": chat.stop_ids,
            "untouched": {path for path, w in leaves.items() if w is bases[path]},
        },
        adapter={"base_name": str(model), "saved": whole},
        beside=asked and partial(put, asked),
        source=directory,
        out=out,
        tokenizer=None if tokenizer_place(directory, places[0]) == directory else tokenizers[0],
        template=tokenizers[0].chat_template,
    )
    told = f"{verified.most:.1e} over {sum(map(len, rows)):,} tokens"
    say(f"wrote {out} and read it back: log-probs differ by at most {told}")
    if asked:
        say_unlike(asked, out, say)
    return verified.most


def say_another_base(adapter: Path, model: str, directory: Path, say: Callable[[str], None]) -> None:
    """Tells of an adapter whose own word is that it was trained over a model of another name; a copy elsewhere keeps its name."""
    name = str(read_json(adapter / "adapter_config.json").get("base_model_name_or_path") or "")
    had = Path(name).expanduser()
    same = had.name.lower() in ("", Path(model).name.lower()) or (had.is_dir() and had.resolve() == directory.resolve())
    if not same:
        say(f"{adapter}: says that it was trained over {name}, and goes over {model} here")

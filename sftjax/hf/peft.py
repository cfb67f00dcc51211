"""Adapters as files: PEFT's own, what vLLM serves of them, and bottleneck adapters, for which PEFT has no type.

Every tensor is named after the module it belongs to, base_model.model.{module}.{part}, one of each for every layer:

    part                                             kind of weight
    lora_A.weight [r, in], lora_B.weight [out, r]    LowRank a, b; of an embedding lora_embedding_A [r, V], _B [D, r]
    lora_magnitude_vector [out]                      Dora magnitude
    token_adapter.trainable_tokens_delta [n, D]      Tokens rows, for the ids of `trainable_token_indices`
    weight, bias                                     an array, for the modules of `modules_to_save`
    base_layer.weight                                an array under a LowRank: the embedding, where the vocabulary grew
    adapter_down.weight [r, out], adapter_up.weight  Adapter, with their biases: the form "sftjax"

PEFT may give each layer a rank and alpha of its own; ours share one. Both are bridged exactly: a smaller rank is padded
with zeros (which get no gradient, so they stay), and a scale that differs is folded into b. PiSSA and OLoRA are written as a
plain LoRA of twice the rank: it says the same over the base as it was, which nothing need decompose again.

Where the model ties its head to its embedding, PEFT still adapts each on its own: what we write says the same for both, and
what we read must.

vLLM takes a plain LoRA alone. Its loader (vllm/lora/peft_helper.py, v0.23) refuses `use_dora` and `modules_to_save`, reads
neither pattern, and wants r <= --max-lora-rank (16 unless given, at most 512); tokens of an adapter's own went with its pull
request 28382. Whether the embedding and the head may be adapted is up to the model: Llama's and Mistral's may, Qwen's not
yet (33234).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from sftjax.config import UserError
from sftjax.hf.load import load_config
from sftjax.hf.peft_file import CONFIG, LABELS, WEIGHTS
from sftjax.hf.peft_read import adapter_labels, load_adapter, saved_modules, with_head
from sftjax.hf.peft_write import adapter_config, added, plain, tensors, unserved
from sftjax.hf.save import save_tokenizer
from sftjax.hf.staging import staged
from sftjax.hf.tensors import write
from sftjax.models.config import DecoderConfig

__all__ = ["adapter_labels", "load_adapter", "save_adapter", "saved_modules", "unserved", "with_head"]

README = """\
## Loading with PEFT

{why}

```python
{code}
```
"""


def readme(base: str, config: DecoderConfig, had: int) -> str:
    """How PEFT is to load an adapter over a base that has not all it takes: a head, or rows for its tokens."""
    lines = ["tokenizer = AutoTokenizer.from_pretrained(adapter)"]
    why = []
    if config.labels:
        named = f"id2label={dict(enumerate(config.labels))}, " if len(config.labels) > 1 else ""
        lines += [f'model = AutoModelForSequenceClassification.from_pretrained("{base}", {named}num_labels={len(config.labels)})']
        lines += ["model.config.pad_token_id = tokenizer.pad_token_id"]
        why += [f"This adapter brings a score head: give `{base}` one of {len(config.labels)} numbers first."]
    else:
        lines += [f'model = AutoModelForCausalLM.from_pretrained("{base}")']
    if config.vocab > had:
        lines += [f"model.resize_token_embeddings({config.vocab})"]
        why += [f"It has tokens that `{base}` has not, which the tokenizer beside it knows: resize the vocabulary first."]
    lines += ["model = PeftModel.from_pretrained(model, adapter)"]
    return README.format(why="\n".join(why), code="\n".join(lines))


def save_adapter(
    params: Any,
    config: DecoderConfig,
    *,
    form: str,
    source: Path,
    out: str | Path,
    base_name: str | None = None,
    tokenizer: Any = None,
    template: str | None = None,
    saved: Collection[str] = (),
    check: Callable[[Path], Any] | None = None,
) -> None:
    """Writes what `params` adds to the checkpoint `source` to the directory `out`. Raises UserError; `out` is then as it was.

    form       peft; vllm: a plain LoRA of one rank, the scale in b; sftjax: bottleneck adapters
    base_name  what users load the base by; None = `source`
    tokenizer  where training added tokens; None copies the source's files
    template   the chat template in force; None = as the tokenizer has it
    saved      paths of the leaves that trained as a whole
    check      called with the finished directory before it takes `out`'s place, to raise where it will not do

    Where the vocabulary grew, or a score head came, a README.md beside the adapter says how PEFT is to load it; `load_adapter`
    and `with_head` need no telling.
    """
    base, had = base_name or str(source), load_config(source).vocab
    parts = added(params, config, had, saved)
    if form == "sftjax" and not parts.adapters:
        raise UserError("--to=sftjax: the run has no bottleneck adapter (method adapter); use --to=peft or --to=hf")
    if form != "sftjax" and parts.adapters:
        raise UserError(f"--to={form}: the run trained bottleneck adapters, for which PEFT has no type; use --to=sftjax")
    if form == "vllm":
        if reasons := unserved(params, config, source, saved):
            raise UserError(f"--to=vllm: vLLM serves no adapter with {' and '.join(reasons)}; use --to=hf")
        parts = plain(parts)
    if not parts:
        raise UserError(f"--to={form}: the run has no adapter to write; use --to=hf")
    with staged(out, source) as tmp:
        write(tmp / WEIGHTS, tensors(parts))
        (tmp / CONFIG).write_text(json.dumps(adapter_config(parts, base), indent=2) + "\n")
        save_tokenizer(tmp, source, tokenizer, template)
        if config.labels:
            named = {str(i): label for i, label in enumerate(config.labels)}
            (tmp / LABELS).write_text(json.dumps(named, ensure_ascii=False) + "\n", encoding="utf-8")
        if form == "peft" and (config.vocab > had or config.labels):
            (tmp / "README.md").write_text(readme(base, config, had), encoding="utf-8")
        if check:
            check(tmp)

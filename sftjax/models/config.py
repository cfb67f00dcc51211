"""DecoderConfig: every way in which the supported families differ, as one field each. No code asks for a family."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Rope:
    """Rotary embedding and its context extension, in the words of Hugging Face's `rope_scaling`."""

    theta: float = 10_000.0
    kind: str = "default"  # default | linear | dynamic | llama3 | yarn | longrope
    factor: float = 1.0
    original_max_positions: int = 0  # the length before extension (dynamic, llama3, yarn, longrope)
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    attention_factor: float = 1.0  # yarn, longrope: what cos and sin are multiplied by
    truncate: bool = True  # yarn: round the ramp's ends to whole dimensions
    short_factor: tuple[float, ...] = ()  # longrope: what each frequency is divided by within the original length ...
    long_factor: tuple[float, ...] = ()  # ... and beyond it
    partial: float = 1.0  # the share of H that turns; the rest of a head has no positions


@dataclass(frozen=True)
class Clamp:
    """A gated unit that cannot run away: with gate at most `limit` and up within it, gate * sigmoid(alpha * gate) * (up + 1)."""

    alpha: float
    limit: float


@dataclass(frozen=True)
class Experts:
    """A mixture in place of the MLP: a router gives each token to `active` of `number` experts, each a gated MLP."""

    number: int  # E
    active: int
    width: int  # F of one expert
    normalise: bool = True  # the chosen experts' probabilities are made to sum to 1
    shared: int = 0  # F of an expert that every token has, weighed by a sigmoid of its own; 0 = none
    bias: bool = False  # the router and the experts have biases
    fused: bool = False  # gate and up are one kernel, whose columns are by turns the one's and the other's
    clamp: Clamp | None = None  # the experts' gated unit, in place of act(gate) * up


@dataclass(frozen=True)
class DecoderConfig:
    """Shape and switches of one Decoder. Letters as everywhere: V, D, F, L, N, K, H."""

    vocab: int  # V
    width: int  # D
    mlp_width: int  # F
    layers: int  # L
    heads: int  # N
    kv_heads: int  # K
    head_dim: int  # H
    max_positions: int = 2048
    tied: bool = False  # the output head is the embedding, transposed
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    fused_qkv: bool = False  # q, k and v are one kernel
    fused_mlp: bool = False  # gate and up are one kernel
    qk_norm: str | None = None  # RMS norm on queries and keys, before RoPE: over each "head", or over "all" of them
    windows: tuple[int | None, ...] = ()  # per layer: keys seen, the query's own included; () or None = all
    rope: Rope = Rope()
    ropes: tuple[Rope | None, ...] = ()  # per layer, None = no positions; () = `rope` in all of them
    attn_scale: float | None = None  # of the scores; None = H ** -0.5
    sinks: bool = False  # each head has a learned logit beside its scores, which takes its share and adds nothing
    attn_softcap: float | None = None  # scores become cap * tanh(scores / cap)
    logit_softcap: float | None = None  # and so do logits
    norm_eps: float = 1e-6
    norm_offset: bool = False  # norms multiply by 1 + scale
    pre_norms: bool = True  # norms before attention and MLP ...
    post_norms: bool = False  # ... and after them, before the residual sum
    embed_scale: float = 1.0
    residual_scale: float = 1.0  # of what attention and MLP add
    logit_scale: float = 1.0
    activation: str = "silu"  # silu | gelu | gelu_tanh
    experts: Experts | None = None
    init_std: float = 0.02
    labels: tuple[str, ...] = ()  # what the numbers of a score head mean, which stands in place of the vocabulary's; () = none

    @property
    def reach(self) -> int:
        """Tokens of prompt and answer that the positions reach, with what RoPE scaling adds.

        `max_positions` of llama3 and longrope is what they reached: 131072 of Llama 3.2, whose 8192 * factor 32 would be twice
        that. Of the other kinds it is what they start from, as Qwen and transformers' documentation ask of who extends a model.
        """
        if self.rope.kind in ("default", "llama3", "longrope"):
            return self.max_positions
        return max(self.max_positions, int((self.rope.original_max_positions or self.max_positions) * self.rope.factor))

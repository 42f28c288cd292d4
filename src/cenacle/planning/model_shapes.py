"""What the performance model needs to know of a model: parameters by part, and its attention.

Owns: `ModelShape`, and how a config.json of any family is read as one.
Does not know: machines, time, ranks, MLX.
Invariants: parameters are counted, not bytes; `total == trunk + routed + shared`. A token looks up
one row of the embedding, so it reads the trunk without the embedding (unless the head is tied to
it). Each kind of attention has its own rule of what it keeps and reads (`Attention`).
Next: `perf_model.py` computes time from it; `tests/mlx/test_model_shapes.py` compares the counts
with mlx-lm's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NoReturn

from ..core.model_config import (
    EXPERT_COUNT_KEYS,
    HEAD_COUNT_KEYS,
    HIDDEN_SIZE_KEYS,
    KV_HEAD_COUNT_KEYS,
    LAYER_COUNT_KEYS,
    TOP_K_KEYS,
    VOCAB_SIZE_KEYS,
    Config,
    text_config,
)
from ..errors import CheckpointError

MAX_NUMBER = 1 << 31  # of what a config counts; more than any has

# A layer's overhead (kernels, synchronizations) relative to a plain layer with grouped-query
# attention: nodes of mlx-lm's graph per layer in one decoding step, counted on the small configs:
# gqa 68 to 88, mla 91, linear 62 to 84, dsa 141 to 147. csa with hyper-connections has 455 there,
# but its 20 Sinkhorn rounds can be one kernel: 2.5 (E).
OVERHEAD_WEIGHTS = {"gqa": 1.0, "mla": 1.15, "linear": 1.0, "dsa": 1.8, "csa": 2.5}


@dataclass(frozen=True)
class Attention:
    """Layers of one kind of attention.

    Args:
        kind: "gqa" (plain or grouped query), "mla" (one latent for all heads), "dsa" (an indexer
            selects positions), "csa" (compressed positions, an indexer, a window), "linear" (a
            state of fixed size: DeltaNet, KDA, Mamba).
        layers: number of layers.
        heads, kv_heads, head_dim: of the cached keys and values (mla: kv_heads 1, head_dim of the
            latent).
        window: caches only this many positions; None: all.
        index_dim, index_heads: size of the indexer's key per position, and its heads.
        top: positions that the indexer selects; None: all are read.
        stride: positions per cache entry.
        state: elements of a linear layer's state.
        weight: see `OVERHEAD_WEIGHTS`; 0: the kind's.
    """

    kind: str
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    window: int | None = None
    index_dim: int = 0
    index_heads: int = 0
    top: int | None = None
    stride: int = 1
    state: int = 0
    weight: float = 0.0

    @property
    def overhead_weight(self) -> float:
        """Overhead per layer, relative to a plain layer."""
        return self.weight or OVERHEAD_WEIGHTS[self.kind]

    @property
    def elements_per_entry(self) -> int:
        """Elements of one cache entry: keys and values, or one latent."""
        size = self.kv_heads * self.head_dim
        return size if self.kind in ("mla", "csa") else 2 * size

    def _entries(self, context: int) -> int:
        """Cache entries: of a csa layer those beyond its window."""
        if self.kind == "linear":
            return 0
        if self.kind == "csa":
            return -(-context // self.stride)
        return context if self.window is None else min(context, self.window)

    def _window_entries(self, context: int) -> int:
        return min(context, self.window or 0) if self.kind == "csa" else 0

    def _read_entries(self, context: int) -> int:
        entries = self._entries(context)
        return min(entries, self.top or entries) + self._window_entries(context)

    def kept_bytes(self, context: int) -> float:
        """Bytes of cache of one layer for one user (16 bits per element, states 32)."""
        if self.kind == "linear":
            return 4.0 * self.state
        entries = self._entries(context)
        cached = entries + self._window_entries(context)
        return 2.0 * (self.elements_per_entry * cached + self.index_dim * entries)

    def read_bytes(self, context: int) -> float:
        """Bytes of cache that one token of one user moves in one layer.

        gqa, mla: all of it. dsa, csa: every entry's index key, then the selected entries. linear:
        the state is read and written.
        """
        if self.kind == "linear":
            return 8.0 * self.state
        read = self.elements_per_entry * self._read_entries(context)
        return 2.0 * (read + self.index_dim * self._entries(context))

    def operations(self, context: int) -> float:
        """Multiplications and additions of one token in one layer: scores, sums, index."""
        if self.kind == "linear":
            return 6.0 * self.state
        index = 2.0 * self.index_heads * self.index_dim * self._entries(context)
        return 4.0 * self.heads * self.head_dim * self._read_entries(context) + index


@dataclass(frozen=True)
class ModelShape:
    """A model by its parts. Numbers are parameters unless the name says otherwise.

    Args:
        name: in the catalog, or of the folder.
        layers: decoder layers.
        moe_layers: those with experts.
        hidden: width of the residual stream, the vector that is all-reduced.
        experts: routed experts of a layer.
        top_k: chosen per token.
        expert: parameters of one routed expert.
        shared: parameters of one layer's shared experts.
        trunk: everything else, embedding and head included.
        dense: the part of `trunk` in feed-forward layers without experts.
        embedding: the embedding table.
        head: the output head (0: tied to the embedding).
        vocabulary: token ids.
        attention: by kind.
        source, confidence: of the shape.
        family: mlx-lm's model_type ("": unknown).
        moe_ids: indices of the layers with experts (empty: unknown).
    """

    name: str
    layers: int
    moe_layers: int
    hidden: int
    experts: int
    top_k: int
    expert: int
    shared: int
    trunk: int
    dense: int
    embedding: int
    head: int
    vocabulary: int
    attention: tuple[Attention, ...]
    source: str = ""
    confidence: str = "E"
    family: str = ""
    moe_ids: tuple[int, ...] = ()

    @property
    def routed(self) -> int:
        """All routed experts."""
        return self.moe_layers * self.experts * self.expert

    @property
    def total(self) -> int:
        """All parameters."""
        return self.trunk + self.routed + self.moe_layers * self.shared

    @property
    def head_read(self) -> int:
        """What the output head reads per token."""
        return self.head or self.embedding

    @property
    def trunk_read(self) -> int:
        """Attention, routers and dense layers: what every token reads, without the head."""
        return self.trunk - self.embedding - self.head

    @property
    def active(self) -> int:
        """Parameters read for one token on one machine."""
        experts = self.moe_layers * (self.top_k * self.expert + self.shared)
        return self.trunk_read + self.head_read + experts

    @property
    def overhead_layers(self) -> float:
        """Layers, each weighted by what its kind of attention costs in overhead."""
        return sum(a.layers * a.overhead_weight for a in self.attention)

    @property
    def kv_heads(self) -> int | None:
        """Heads by which attention can be divided, or None (latents and states cannot)."""
        heads = {a.kv_heads for a in self.attention if a.kind == "gqa"}
        plain = all(a.kind == "gqa" for a in self.attention)
        return min(heads) if plain and heads else None

    def kv_bytes(self, context: int) -> float:
        """Cache of one user."""
        return sum(a.layers * a.kept_bytes(context) for a in self.attention)

    def kv_read(self, context: int) -> float:
        """Bytes of cache moved for one token."""
        return sum(a.layers * a.read_bytes(context) for a in self.attention)

    def attention_operations(self, context: int) -> float:
        """Operations of attention over the cache for one token."""
        return sum(a.layers * a.operations(context) for a in self.attention)


def shape_from_table(name: str, table: dict[str, Any], source: str, confidence: str) -> ModelShape:
    """Read a shape of `models.toml`.

    Raises:
        KeyError, TypeError: a wrong table.
    """
    t = dict(table)
    attention = tuple(Attention(**a) for a in t.pop("attention"))
    layers, hidden, vocabulary = t.pop("layers"), t.pop("hidden"), t.pop("vocabulary")
    dense_layers, dense_width = t.pop("dense_layers", 0), t.pop("dense_width", 0)
    width, shared = t.pop("expert_width"), t.pop("shared_width", 0)
    expert_input = t.pop("expert_input", hidden)
    shape = ModelShape(
        name=name,
        layers=layers,
        moe_layers=layers - dense_layers,
        hidden=hidden,
        experts=t.pop("experts"),
        top_k=t.pop("top_k"),
        expert=3 * expert_input * width,
        shared=3 * hidden * shared,
        trunk=round(t.pop("trunk_b") * 1e9),
        dense=dense_layers * 3 * hidden * dense_width,
        embedding=vocabulary * hidden,
        head=vocabulary * hidden,
        vocabulary=vocabulary,
        attention=attention,
        source=source,
        confidence=confidence,
    )
    if t:
        raise TypeError(f"unknown keys {sorted(t)}")
    return shape


def shape_from_config(
    name: str, config: Config, source: str = "config.json", confidence: str = "A"
) -> ModelShape:
    """The shape of a config.json.

    Norms and biases are left out: about 0.1 % of a model.

    Raises:
        CheckpointError: a key that determines the shape is missing, or the model has no experts.
    """
    c: Config = {**config, **text_config(config)}
    for nested in ("attn_config", "ffn_config"):  # DBRX
        inner = _ConfigReader(name, c).table(nested)
        c |= {k: v for k, v in inner.items() if not k.startswith("model_")}
    reader = _ConfigReader(name, c)
    layers = reader.number(*LAYER_COUNT_KEYS, minimum=1)
    hidden = reader.number(*HIDDEN_SIZE_KEYS, minimum=1)
    experts = reader.number(*EXPERT_COUNT_KEYS, default=0)
    if not experts:
        raise CheckpointError(
            f"{name}: the config has no experts, so the model is dense; use mlx-lm or llama.cpp "
            f"for it"
        )
    top_k = reader.number(*TOP_K_KEYS)
    if not 1 <= top_k <= experts:
        raise CheckpointError(f"{name}: expected 1 to {experts} experts per token, got {top_k}")
    default = 4 * hidden if c.get("model_type") == "phixtral" else 0  # not in its config
    mlp_width = reader.number(
        *("intermediate_size", "ffn_hidden_size", "d_ff", "n_inner"), default=default
    )
    width = reader.number("moe_intermediate_size", "expert_hidden_dim", default=mlp_width)
    if not width:
        raise CheckpointError(f"{name}: the config does not state the width of an expert")
    dense_width = reader.number("intermediate_size_mlp", default=mlp_width or width)
    moe_ids = _moe_layers(reader, layers)
    if not moe_ids:
        raise CheckpointError(f"{name}: none of the {layers} layers in the config has experts")
    moe = len(moe_ids)
    vocabulary = reader.number(*VOCAB_SIZE_KEYS, minimum=1)
    attention, attention_params = _attention(reader, layers, hidden)
    matrices = 2 if c.get("model_type") in ("nemotron_h", "phixtral") else 3
    dense = (layers - moe) * matrices * hidden * dense_width
    table = vocabulary * hidden
    tied = reader.flag("tie_word_embeddings")
    router = moe * experts * hidden
    expert_input = reader.number("routed_expert_hidden_size", "moe_latent_size", default=hidden)
    return ModelShape(
        name=name,
        layers=layers,
        moe_layers=moe,
        hidden=hidden,
        experts=experts,
        top_k=top_k,
        expert=matrices * expert_input * width,
        shared=matrices * hidden * _shared_width(reader, width),
        trunk=table * (1 if tied else 2) + attention_params + router + dense,
        dense=dense,
        embedding=table,
        head=0 if tied else table,
        vocabulary=vocabulary,
        attention=attention,
        source=source,
        confidence=confidence,
        family=str(config.get("model_type", "")),
        moe_ids=tuple(moe_ids),
    )


class _ConfigReader:
    """Values of a config by any of their names."""

    def __init__(self, name: str, config: Config) -> None:
        self.name, self.config = name, config

    def number(self, *keys: str, default: int | None = None, minimum: int = 0) -> int:
        for key in keys:
            value = self.config.get(key)
            if isinstance(value, list) and value and all(_is_int(v) for v in value):
                value = max(value)  # one per layer
            if value is None or value == []:
                continue
            if not _is_int(value) or not minimum <= value <= MAX_NUMBER:
                self._refuse(key, f"a whole number from {minimum} to {MAX_NUMBER:,}")
            return int(value)
        if default is None:
            raise CheckpointError(f"{self.name}: the config has none of {', '.join(keys)}")
        return default

    def numbers(self, key: str, inside: Config | None = None) -> list[int]:
        value = (self.config if inside is None else inside).get(key)
        if value is None:
            return []
        if not isinstance(value, list) or not all(_is_int(v) for v in value):
            self._refuse(key, "a list of whole numbers", value)
        return value

    def table(self, key: str) -> Config:
        value = self.config.get(key)
        return value if isinstance(value, dict) else {}

    def flag(self, key: str) -> bool:
        return bool(self.config.get(key))

    def names(self, key: str) -> list[str]:
        value = self.config.get(key)
        return [str(v) for v in value] if isinstance(value, list) else []

    def _refuse(self, key: str, expected: str, value: Any = None) -> NoReturn:
        got = self.config.get(key) if value is None else value
        raise CheckpointError(f"{self.name}: {key}: expected {expected}, got {got!r:.100}")


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _moe_layers(reader: _ConfigReader, layers: int) -> list[int]:
    """Indices of the layers that have experts."""
    kinds = reader.names("mlp_layer_types")
    if kinds:
        return [i for i, k in enumerate(kinds[:layers]) if k == "sparse"]
    freq = reader.config.get("moe_layer_freq")
    if isinstance(freq, list):
        return [i for i, v in enumerate(freq[:layers]) if v]
    pattern = reader.config.get("hybrid_override_pattern")
    if isinstance(pattern, str):
        return [i for i, v in enumerate(pattern[:layers]) if v == "E"]
    dense = set(reader.numbers("mlp_only_layers"))
    first = reader.number("first_k_dense_replace", "num_dense_layers", default=0)
    step = reader.number(
        *("interleave_moe_layer_step", "decoder_sparse_step", "expert_layer_period"), default=1
    )
    step = max(1, step, freq if isinstance(freq, int) else 1)
    offset = reader.number("expert_layer_offset", default=step - 1)
    return [i for i in range(first, layers) if i not in dense and i % step == offset % step]


def _shared_width(reader: _ConfigReader, width: int) -> int:
    """Hidden width of a layer's shared experts together, 0 without."""
    for key in ("shared_expert_intermediate_size", "shared_intermediate_size"):
        if key in reader.config:
            return reader.number(key, default=0)
    if str(reader.config.get("model_type", "")).startswith("llama4"):
        return width
    count = reader.number(
        *("n_shared_experts", "num_shared_experts", "num_shared_expert", "moe_num_shared_experts"),
        default=0,
    )
    return count * width


def _attention(
    reader: _ConfigReader, layers: int, hidden: int
) -> tuple[tuple[Attention, ...], int]:
    """The kinds of attention of a model, and the parameters of all of them."""
    c = reader.config
    kinds = _layer_kinds(reader, layers)
    linear, windowed = kinds.count("linear"), kinds.count("window")
    full = layers - linear - windowed
    attention: list[Attention] = []
    params = 0
    heads = reader.number(*HEAD_COUNT_KEYS, default=0) or 1
    if full or windowed:
        if reader.number("kv_lora_rank", default=0):
            latent, layer_params = _latent(reader, full, heads, hidden)
            attention.append(latent)
            params += full * layer_params
        else:
            kv = reader.number(*KV_HEAD_COUNT_KEYS, default=heads, minimum=1)
            dim = reader.number("head_dim", default=hidden // heads, minimum=1)
            gated = str(c.get("model_type", "")).startswith(("qwen3_next", "qwen3_5"))
            layer_params = hidden * dim * (heads * (3 if gated else 2) + 2 * kv)
            size = reader.number("sliding_window", "attention_chunk_size", default=0, minimum=-1)
            for count, window in ((full, None), (windowed, size if size > 0 else None)):
                if count:
                    attention.append(Attention("gqa", count, heads, kv, dim, window=window))
                    params += count * layer_params
    if linear:
        state, layer_params = _linear(reader, linear, hidden)
        attention.append(state)
        params += linear * layer_params
    return tuple(attention), params


def _layer_kinds(reader: _ConfigReader, layers: int) -> list[str]:
    """ "full", "window" or "linear" for each layer."""
    c = reader.config
    named = reader.names("layer_types") or reader.names("layers_block_type")
    if kda_layers := reader.numbers("kda_layers", reader.table("linear_attn_config")):
        count = sum(1 <= i <= layers for i in set(kda_layers))
        return ["linear"] * count + ["full"] * (layers - count)
    if named:
        return [_layer_kind(n) for n in named[:layers]] + ["full"] * max(0, layers - len(named))
    period = reader.number("full_attention_interval", default=0)
    if period and "linear_num_value_heads" in c:
        return ["full" if (i + 1) % period == 0 else "linear" for i in range(layers)]
    if c.get("model_type") == "gpt_oss":
        return ["window" if i % 2 == 0 else "full" for i in range(layers)]
    if str(c.get("model_type", "")).startswith("llama4"):
        return ["full" if (i + 1) % 4 == 0 else "window" for i in range(layers)]
    return ["full"] * layers


def _layer_kind(name: str) -> str:
    if "sliding" in name or "chunked" in name:
        return "window"
    return "linear" if any(n in name for n in ("linear", "mamba", "conv", "recurrent")) else "full"


def _latent(reader: _ConfigReader, layers: int, heads: int, hidden: int) -> tuple[Attention, int]:
    """Multi-head latent attention, with or without an indexer, and its parameters per layer."""
    rank, rope = reader.number("kv_lora_rank"), reader.number("qk_rope_head_dim")
    nope, value = reader.number("qk_nope_head_dim"), reader.number("v_head_dim")
    q_rank = reader.number("q_lora_rank", default=0)
    q = heads * (nope + rope)
    params = hidden * q_rank + q_rank * q if q_rank else hidden * q
    params += hidden * (rank + rope) + rank * heads * (nope + value) + heads * value * hidden
    top = reader.number("index_topk", default=0)
    if not top:
        return Attention("mla", layers, heads, 1, rank + rope), params
    dim, index_heads = reader.number("index_head_dim"), reader.number("index_n_heads")
    params += q_rank * index_heads * dim + hidden * (dim + index_heads)
    # The latent is cached once, as in mla: half of what "dsa" counts for keys and values.
    half = (rank + rope) // 2
    return Attention("dsa", layers, heads, 1, half, None, dim, index_heads, top), params


def _linear(reader: _ConfigReader, layers: int, hidden: int) -> tuple[Attention, int]:
    """A layer with a state of fixed size, and its parameters."""
    c = reader.config
    if "linear_num_value_heads" in c:  # gated DeltaNet
        k_dim = reader.number("linear_num_key_heads") * reader.number("linear_key_head_dim")
        values, dim = (
            reader.number("linear_num_value_heads"),
            reader.number("linear_value_head_dim"),
        )
        state = values * dim * reader.number("linear_key_head_dim")
        params = hidden * (2 * k_dim + 3 * values * dim + 2 * values)
        return Attention("linear", layers, values, values, dim, state=state), params
    if "mamba_n_heads" in c or "mamba_num_heads" in c:  # Mamba 2
        heads = reader.number("mamba_n_heads", "mamba_num_heads")
        dim = reader.number("mamba_d_head", "mamba_head_dim")
        size = reader.number("mamba_d_state", "ssm_state_size")
        groups = reader.number("mamba_n_groups", "n_groups", default=1)
        width = heads * dim
        params = hidden * (3 * width + 2 * groups * size + heads)
        return Attention("linear", layers, heads, heads, dim, state=width * size), params
    if inner := reader.table("linear_attn_config"):  # KDA
        kda = _ConfigReader(reader.name, inner)
        heads, dim = kda.number("num_heads"), kda.number("head_dim")
        width = heads * dim
        params = 4 * hidden * width + 2 * (hidden * dim + dim * width) + hidden * heads
        return Attention("linear", layers, heads, heads, dim, state=width * dim), params
    # Lightning attention, short convolutions: about the size of plain attention.
    heads = reader.number("num_attention_heads", default=1)
    dim = reader.number("head_dim", default=hidden // heads)
    params = 4 * hidden * heads * dim
    return Attention("linear", layers, heads, heads, dim, state=heads * dim * dim), params

"""Train, export and check the bundled demo model: a small DBRX that really answers.

Owns: the tokenizer, the model in PyTorch (the layout that mlx-lm's ``dbrx.py`` reads), the training
loop and the export in Hugging Face's DBRX format.
Does not know: cenacle's engine, MLX or any cluster; only ``--check-mlx`` imports mlx-lm.
Invariants: fixed seeds and one thread, so the same versions on the same CPU train the same model;
held-out questions (``demo/tasks.py``) never reach the optimizer.
Shapes: batches [rows, row tokens], each row several conversations that cannot see one another.
Next: ``src/cenacle/demo/demo_model/README.md``, the model's card.

    python tools/train_demo.py --out src/cenacle/demo/demo_model        # train: about 50 minutes
    python tools/train_demo.py --check src/cenacle/demo/demo_model      # accuracy, in PyTorch
    python tools/train_demo.py --check-mlx src/cenacle/demo/demo_model  # accuracy, in mlx-lm

Training needs torch (2.13 here), safetensors, tokenizers, one core; ``--check-mlx`` needs mlx-lm.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

# The module by itself: training needs no installed cenacle, and none of what cenacle depends on.
sys.path.append(str(Path(__file__).resolve().parents[1] / "src" / "cenacle" / "demo"))
from tasks import FACTS, KINDS, PHRASINGS, Task, held_out, is_correct, tasks

if TYPE_CHECKING:
    from tokenizers import Tokenizer

try:
    import torch
    import torch.nn.functional as F
    from torch import Tensor, nn
except ImportError:  # --check-mlx runs where there is no torch
    torch = None

PAD, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "You are a small demo model.",
    "Answer briefly.",
    "Be concise and correct.",
)


@dataclass(frozen=True)
class Shape:
    """The model's sizes, named as in DBRX's config.json."""

    vocab_size: int
    d_model: int = 128
    n_heads: int = 4
    kv_n_heads: int = 2
    n_layers: int = 4
    ffn_hidden_size: int = 64
    moe_num_experts: int = 16
    moe_top_k: int = 4
    clip_qkv: float = 8.0
    rope_theta: float = 10000.0
    max_seq_len: int = 1024

    @property
    def head_dim(self) -> int:
        return self.d_model // self.n_heads


@dataclass(frozen=True)
class Phase:
    """One stretch of training, with an optimizer of its own."""

    steps: int
    row: int  # tokens in a row
    rows: int  # rows in a batch
    turns: tuple[float, ...]  # how often a conversation has 1, 2, 3, ... turns
    peak_lr: float
    warm_up: int  # steps
    horizon: int  # the step at which the cosine would reach a fiftieth of the peak
    openings: tuple[str, ...] = ("",)  # words before a question, one chosen at random
    facts: float = 0.0  # this share of the questions is replaced by facts


# Short rows first, for speed; then long conversations, without which the model, exact at turn 1,
# loses its way after about 110 tokens of history; last, more ways to ask, mostly for the facts,
# which have few phrasings of their own.
PHASES = (
    Phase(6000, 96, 20, (0.75, 0.15, 0.10), peak_lr=3e-3, warm_up=200, horizon=13000),
    Phase(3500, 384, 5, (0.5, *(0.5 / 12,) * 12), peak_lr=1.5e-3, warm_up=100, horizon=3500),
    Phase(
        900,
        384,
        5,
        (0.5, *(0.5 / 12,) * 12),
        peak_lr=1e-3,
        warm_up=50,
        horizon=900,
        openings=("", "", "Please tell me: ", "Question: ", "Hello! ", "You can answer this. "),
        facts=0.3,
    ),
)


# ------------------------------------------------------------------------------------ tokenizer


def make_tokenizer() -> Tokenizer:
    """Bytes, plus the words that questions are phrased in; digits and unknown words go by bytes.

    BPE without merges, and ``ignore_merges``: a word found whole in the vocabulary is one token and
    any other falls to its bytes, so the words to spell or sort always reach the model by letters.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    phrases = [p for group in PHRASINGS.values() for p in group]
    phrases += [p for group, _ in FACTS for p in group]
    phrases += list(FACTS[-1][1])  # the questions about the model itself
    phrases += list(SYSTEM_PROMPTS)
    words = {"user", "assistant", "system"}
    for phrase in phrases:
        for hole in ("{w}", "{a}", "{b}", "{x}"):
            phrase = phrase.replace(hole, "0")
        for text in (phrase, phrase.lower()):
            pieces = (piece for piece, _ in byte_level.pre_tokenize_str(text))
            words.update(p for p in pieces if p.lstrip("Ġ").isalpha() and len(p) > 2)
    vocab = sorted(pre_tokenizers.ByteLevel.alphabet()) + sorted(words)
    tokenizer = Tokenizer(
        models.BPE(vocab={piece: i for i, piece in enumerate(vocab)}, merges=[], ignore_merges=True)
    )
    tokenizer.pre_tokenizer = byte_level
    tokenizer.decoder = decoders.ByteLevel()
    special = [PAD, START, END]
    # Reserved tokens make the size a multiple of 32, as kernels and quantization like it.
    special += [f"<|reserved_{i}|>" for i in range(-(len(vocab) + len(special)) % 32)]
    tokenizer.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in special])
    return tokenizer


def render(system: str | None, turns: list[Task]) -> list[tuple[str, bool]]:
    """A conversation as (text, is_answer) pieces; joined, they are what CHAT_TEMPLATE renders."""
    pieces = [(f"{START}system\n{system}{END}\n", False)] if system else []
    for turn in turns:
        pieces.append((f"{START}user\n{turn.question}{END}\n{START}assistant\n", False))
        pieces += [(turn.answer + END, True), ("\n", False)]
    return pieces


# ---------------------------------------------------------------------------------------- model


if torch is not None:

    def rope_tables(shape: Shape, length: int) -> tuple[Tensor, Tensor]:
        """cos and sin, [length, head_dim], for the half-split rotation (mlx: traditional=False)."""
        half = shape.head_dim // 2
        rates = shape.rope_theta ** (-torch.arange(half) / half)
        angles = torch.outer(torch.arange(length).float(), rates).repeat(1, 2)
        return angles.cos(), angles.sin()

    def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        a, b = x.chunk(2, dim=-1)
        return x * cos + torch.cat((-b, a), dim=-1) * sin

    class Attention(nn.Module):
        """Grouped-query attention over a fused, clipped Wqkv."""

        def __init__(self, shape: Shape):
            super().__init__()
            self.shape = shape
            wide = (shape.n_heads + 2 * shape.kv_n_heads) * shape.head_dim
            self.Wqkv = nn.Linear(shape.d_model, wide, bias=False)
            self.out_proj = nn.Linear(shape.d_model, shape.d_model, bias=False)

        def forward(self, x: Tensor, mask: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
            s, (batch, length, _) = self.shape, x.shape
            qkv = self.Wqkv(x).clamp(-s.clip_qkv, s.clip_qkv)
            qkv = qkv.view(batch, length, -1, s.head_dim).transpose(1, 2)
            q, k, v = qkv.split((s.n_heads, s.kv_n_heads, s.kv_n_heads), dim=1)
            q, k = rotate(q, *rope), rotate(k, *rope)
            repeat = s.n_heads // s.kv_n_heads
            k, v = (t.repeat_interleave(repeat, dim=1) for t in (k, v))
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
            return self.out_proj(out.transpose(1, 2).reshape(batch, length, -1))

    class Experts(nn.Module):
        """Router and SwiGLU experts; only the chosen experts are computed, grouped by expert."""

        def __init__(self, shape: Shape):
            super().__init__()
            self.shape = shape
            e, f, d = shape.moe_num_experts, shape.ffn_hidden_size, shape.d_model
            self.router = nn.Linear(d, e, bias=False)
            self.w1v1 = nn.Parameter(torch.empty(e, d, 2 * f))  # gate and up, side by side
            self.w2 = nn.Parameter(torch.empty(e, f, d))

        def score(self, logits: Tensor) -> Tensor:
            """What experts are chosen and weighed by."""
            return logits.softmax(dim=-1)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            """x [tokens, d] -> output, load-balancing loss, share of choices per expert [E]."""
            e, k = self.shape.moe_num_experts, self.shape.moe_top_k
            probs = self.score(self.router(x))
            top, chosen = probs.topk(k, dim=-1)
            top = top / top.sum(dim=-1, keepdim=True)
            order = chosen.flatten().argsort(stable=True)
            counts = chosen.flatten().bincount(minlength=e)
            token = order // k  # whose choice each row is; rows of one expert are adjacent
            weight = top.flatten().index_select(0, order).unsqueeze(-1)
            sizes = counts.tolist()
            grouped = zip(
                x.index_select(0, token).split(sizes),
                weight.split(sizes),
                self.w1v1.unbind(0),
                self.w2.unbind(0),
                strict=True,
            )
            outs = []
            for rows, rows_weight, w1v1, w2 in grouped:
                gate, up = (rows @ w1v1).chunk(2, dim=-1)
                outs.append((F.silu(gate) * up * rows_weight) @ w2)
            out = torch.zeros_like(x).index_add(0, token, torch.cat(outs))
            share = counts / counts.sum()
            # Switch Transformer's loss (arXiv:2101.03961, eq. 4): 1 when the load is even.
            return out, e * (share * probs.mean(dim=0)).sum(), share

    class Block(nn.Module):
        def __init__(self, shape: Shape):
            super().__init__()
            self.norm_1 = nn.LayerNorm(shape.d_model, bias=False)
            self.attn = Attention(shape)
            self.norm_2 = nn.LayerNorm(shape.d_model, bias=False)
            self.ffn = Experts(shape)

        def forward(self, x, mask, rope):
            x = x + self.attn(self.norm_1(x), mask, rope)
            out, balance, share = self.ffn(self.norm_2(x).flatten(0, 1))
            return x + out.view_as(x), balance, share

    class Dbrx(nn.Module):
        """DBRX as mlx-lm computes it: ``mlx_lm/models/dbrx.py``."""

        def __init__(self, shape: Shape):
            super().__init__()
            self.shape = shape
            self.wte = nn.Embedding(shape.vocab_size, shape.d_model)
            self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.n_layers))
            self.norm_f = nn.LayerNorm(shape.d_model, bias=False)
            self.lm_head = nn.Linear(shape.d_model, shape.vocab_size, bias=False)
            residual = 1 / math.sqrt(2 * shape.n_layers)
            for name, p in self.named_parameters():
                if p.dim() == 1:
                    continue
                fan_in = p.shape[1]  # Linear is [out, in], experts are [E, in, out]
                std = 0.2 if name == "wte.weight" else fan_in**-0.5
                std *= residual if name.endswith(("out_proj.weight", "w2")) else 1
                nn.init.normal_(p, std=std)

        def trunk(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            """ids [batch, length] -> hidden [batch, length, d], balance loss, shares [layer, E]."""
            x = self.wte(ids)
            rope = rope_tables(self.shape, ids.shape[1])
            balance, shares = [], []
            for block in self.blocks:
                x, loss, share = block(x, mask, rope)
                balance.append(loss)
                shares.append(share)
            return self.norm_f(x), torch.stack(balance).mean(), torch.stack(shares)


# ------------------------------------------------------------------------------------- training


class Rows:
    """Endless training rows: several conversations per row, packed, each blind to the others."""

    def __init__(self, tokenizer: Tokenizer, phase: Phase, seed: int):
        self.tokenizer, self.phase, self.rng = tokenizer, phase, random.Random(seed)
        self.tasks = tasks("train", seed)
        self.waiting: list[tuple[list[int], list[bool]]] = []

    def _task(self) -> Task:
        task = next(self.tasks)
        if self.phase.facts and self.rng.random() < self.phase.facts:
            task = next(t for t in self.tasks if t.kind == "fact")
        if len(self.phase.openings) == 1:
            return task
        return replace(task, question=self.rng.choice(self.phase.openings) + task.question)

    def _conversation(self) -> list[tuple[str, bool]]:
        weights = self.phase.turns
        turns = self.rng.choices(range(1, len(weights) + 1), weights)[0]
        system = self.rng.choice(SYSTEM_PROMPTS) if self.rng.random() < 0.1 else None
        return render(system, [self._task() for _ in range(turns)])

    def _encoded(self, count: int) -> Iterator[tuple[list[int], list[bool]]]:
        talks = [self._conversation() for _ in range(count)]
        flat = [text for talk in talks for text, _ in talk]
        encoded = iter(self.tokenizer.encode_batch_fast(flat, add_special_tokens=False))
        for talk in talks:
            ids: list[int] = []
            answer: list[bool] = []
            for _, is_answer in talk:
                piece = next(encoded).ids
                ids += piece
                answer += [is_answer] * len(piece)
            yield ids, answer

    def batch(self) -> tuple[Tensor, Tensor, Tensor]:
        """ids, segment (0 is padding) and is_answer, each [rows, row tokens]."""
        room = self.phase.row
        ids = torch.zeros(self.phase.rows, room, dtype=torch.long)
        segment = torch.zeros(self.phase.rows, room, dtype=torch.int8)
        answer = torch.zeros(self.phase.rows, room, dtype=torch.bool)
        for row in range(self.phase.rows):
            if len(self.waiting) < 64:
                self.waiting += [t for t in self._encoded(256) if len(t[0]) <= room]
            used, number, pick = 0, 0, 0  # the oldest first, then the longest that fits
            while pick is not None:
                talk_ids, talk_answer = self.waiting.pop(pick)
                number += 1
                at = slice(used, used + len(talk_ids))
                ids[row, at] = torch.tensor(talk_ids)
                answer[row, at] = torch.tensor(talk_answer)
                segment[row, at] = number
                used = at.stop
                fits = [i for i, t in enumerate(self.waiting[:48]) if used + len(t[0]) <= room]
                pick = max(fits, key=lambda i: len(self.waiting[i][0]), default=None)
        return ids, segment, answer


def block_mask(segment: Tensor) -> Tensor:
    """[rows, 1, length, length]: causal, and within one conversation."""
    same = segment.unsqueeze(2) == segment.unsqueeze(1)
    return same.tril().unsqueeze(1)


def learning_rate(step: int, phase: Phase) -> float:
    """Linear warm-up, then a cosine towards a fiftieth of the peak."""
    if step < phase.warm_up:
        return phase.peak_lr * (step + 1) / phase.warm_up
    progress = (step - phase.warm_up) / (phase.horizon - phase.warm_up)
    return phase.peak_lr * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))


def optimizer(model: Dbrx) -> torch.optim.AdamW:
    decay = [p for p in model.parameters() if p.dim() > 1]
    rest = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": decay, "weight_decay": 0.05}, {"params": rest, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.98), fused=True)


def train(model: Dbrx, tokenizer: Tokenizer, number: int, args: argparse.Namespace) -> None:
    """Run phase ``number`` on the model, in place."""
    phase = PHASES[number]
    print(f"phase {number}: {phase}", flush=True)
    adam = optimizer(model)
    batches = Rows(tokenizer, phase, args.seed + number)
    started, tokens, recent = time.time(), 0, []
    for step in range(phase.steps):
        for group in adam.param_groups:
            group["lr"] = learning_rate(step, phase)
        ids, segment, answer = batches.batch()
        hidden, balance, shares = model.trunk(ids, block_mask(segment))
        wanted = answer[:, 1:]
        loss = F.cross_entropy(model.lm_head(hidden[:, :-1][wanted]), ids[:, 1:][wanted])
        (loss + args.balance * balance).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adam.step()
        adam.zero_grad(set_to_none=True)
        tokens += int((segment > 0).sum())
        recent.append(loss.item())
        if (step + 1) % 50 == 0:
            spent = time.time() - started
            print(
                f"step {step + 1} loss {sum(recent) / len(recent):.4f} balance {balance:.3f} "
                f"share {shares.min():.3f}..{shares.max():.3f} "
                f"{spent:.0f} s, {tokens / spent:.0f} tokens/s",
                flush=True,
            )
            recent.clear()
        if (step + 1) % args.every == 0:
            print(brief(accuracy_torch(model, tokenizer, 60)), flush=True)
            if args.checkpoints:
                export(model, tokenizer, args.checkpoints / f"phase{number}-step{step + 1}")


# ------------------------------------------------------------------------------------ measuring


def accuracy_torch(model: Dbrx, tokenizer: Tokenizer, count: int) -> dict[str, float]:
    """Exact match per kind on held-out questions, for greedy decoding.

    One pass per question: greedy decoding yields the right answer if and only if the most likely
    token is right at every place of the right answer, its <|im_end|> included.
    """
    result = {}
    for kind in KINDS:
        examples = []
        for task in held_out(kind, count):
            prompt, answer = (
                tokenizer.encode(text, add_special_tokens=False).ids
                for text, _ in render(None, [task])[:2]
            )
            examples.append((prompt + answer, len(prompt)))
        longest = max(len(ids) for ids, _ in examples)
        batch = torch.tensor([ids + [0] * (longest - len(ids)) for ids, _ in examples])
        with torch.no_grad():
            causal = torch.ones(1, 1, longest, longest, dtype=torch.bool).tril()
            best = model.lm_head(model.trunk(batch, causal)[0]).argmax(dim=-1)
        right = [
            torch.equal(best[i, start - 1 : len(ids) - 1], batch[i, start : len(ids)])
            for i, (ids, start) in enumerate(examples)
        ]
        result[kind] = sum(right) / len(right)
    return result


def expert_shares(model: Dbrx, tokenizer: Tokenizer, count: int = 100) -> Tensor:
    """Each expert's share of the routed choices, [layers, E], over held-out conversations."""
    total = torch.zeros(model.shape.n_layers, model.shape.moe_num_experts)
    examples = [task for kind in KINDS for task in held_out(kind, count, seed=1)]
    for task in examples:
        text = "".join(piece for piece, _ in render(None, [task]))
        ids = torch.tensor([tokenizer.encode(text, add_special_tokens=False).ids])
        with torch.no_grad():
            causal = torch.ones(1, 1, ids.shape[1], ids.shape[1], dtype=torch.bool).tril()
            total += model.trunk(ids, causal)[2] * ids.shape[1]
    return total / total.sum(dim=1, keepdim=True)


def accuracy_mlx(folder: Path, count: int) -> dict[str, float]:
    """Exact match per kind through mlx-lm's own load() and generate(): what a user would see."""
    from mlx_lm import generate, load

    model, tokenizer = load(str(folder))
    result = {}
    for kind in KINDS:
        asked = held_out(kind, count)
        right = 0
        for task in asked:
            prompt = tokenizer.apply_chat_template(
                [{"role": "user", "content": task.question}], add_generation_prompt=True
            )
            text = generate(model, tokenizer, prompt=prompt, max_tokens=80)
            right += is_correct(task, text)
            if not is_correct(task, text):
                print(f"  {kind}: {task.question} -> {text!r}, expected {task.answer!r}")
        result[kind] = right / len(asked)
        print(f"{kind}: {right}/{len(asked)}", flush=True)
    return result


def brief(accuracy: dict[str, float]) -> str:
    return "held out: " + "  ".join(f"{kind} {share:.1%}" for kind, share in accuracy.items())


# --------------------------------------------------------------------------------------- export


def config_of(shape: Shape, tokenizer: Tokenizer) -> dict:
    return {
        "architectures": ["DbrxForCausalLM"],
        "model_type": "dbrx",
        "vocab_size": shape.vocab_size,
        "d_model": shape.d_model,
        "n_heads": shape.n_heads,
        "n_layers": shape.n_layers,
        "max_seq_len": shape.max_seq_len,
        "attn_config": {
            "clip_qkv": shape.clip_qkv,
            "kv_n_heads": shape.kv_n_heads,
            "rope_theta": shape.rope_theta,
        },
        "ffn_config": {
            "ffn_act_fn": {"name": "silu"},
            "ffn_hidden_size": shape.ffn_hidden_size,
            "moe_num_experts": shape.moe_num_experts,
            "moe_top_k": shape.moe_top_k,
            "moe_normalize_expert_weights": 1.0,
            "moe_loss_weight": 0.01,
        },
        "tie_word_embeddings": False,
        "use_cache": True,
        "torch_dtype": "float32",
        "eos_token_id": tokenizer.token_to_id(END),
        "pad_token_id": tokenizer.token_to_id(PAD),
    }


def shape_of(config: dict) -> Shape:
    flat = {**config, **config["attn_config"], **config["ffn_config"]}
    return Shape(**{name: flat[name] for name in Shape.__dataclass_fields__})


def to_checkpoint(model: Dbrx) -> dict[str, Tensor]:
    """The tensors under Hugging Face's DBRX names; experts [E * ffn, d_model], stacked."""
    out = {
        "transformer.wte.weight": model.wte.weight,
        "transformer.norm_f.weight": model.norm_f.weight,
        "lm_head.weight": model.lm_head.weight,
    }
    for i, block in enumerate(model.blocks):
        at, mlp = f"transformer.blocks.{i}.", f"transformer.blocks.{i}.ffn.experts.mlp."
        w1, v1 = block.ffn.w1v1.chunk(2, dim=-1)
        out[mlp + "w1"] = w1.transpose(1, 2).flatten(0, 1)
        out[mlp + "v1"] = v1.transpose(1, 2).flatten(0, 1)
        out[mlp + "w2"] = block.ffn.w2.flatten(0, 1)
        out[at + "ffn.router.layer.weight"] = block.ffn.router.weight
        for name in ("Wqkv", "out_proj"):
            out[at + f"norm_attn_norm.attn.{name}.weight"] = getattr(block.attn, name).weight
        for name in ("norm_1", "norm_2"):
            out[at + f"norm_attn_norm.{name}.weight"] = getattr(block, name).weight
    return {name: tensor.detach().float().contiguous() for name, tensor in out.items()}


def from_checkpoint(folder: Path) -> tuple[Dbrx, Tokenizer]:
    """A folder's model and tokenizer, back in this file's layout."""
    from safetensors.torch import load_file
    from tokenizers import Tokenizer

    shape = shape_of(json.loads((folder / "config.json").read_text()))
    tensors = load_file(folder / "model.safetensors")
    model = Dbrx(shape)
    model.wte.weight.data = tensors["transformer.wte.weight"]
    model.norm_f.weight.data = tensors["transformer.norm_f.weight"]
    model.lm_head.weight.data = tensors["lm_head.weight"]
    experts = (shape.moe_num_experts, shape.ffn_hidden_size, shape.d_model)
    for i, block in enumerate(model.blocks):
        at, mlp = f"transformer.blocks.{i}.", f"transformer.blocks.{i}.ffn.experts.mlp."
        w1, v1 = (tensors[mlp + name].view(experts).transpose(1, 2) for name in ("w1", "v1"))
        block.ffn.w1v1.data = torch.cat((w1, v1), dim=-1)
        block.ffn.w2.data = tensors[mlp + "w2"].view(experts)
        block.ffn.router.weight.data = tensors[at + "ffn.router.layer.weight"]
        for name in ("Wqkv", "out_proj"):
            linear = getattr(block.attn, name)
            linear.weight.data = tensors[at + f"norm_attn_norm.attn.{name}.weight"]
        for name in ("norm_1", "norm_2"):
            getattr(block, name).weight.data = tensors[at + f"norm_attn_norm.{name}.weight"]
    return model, Tokenizer.from_file(str(folder / "tokenizer.json"))


def export(model: Dbrx, tokenizer: Tokenizer, folder: Path) -> None:
    """Write the checkpoint, complete but for its README, in Hugging Face's DBRX format."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    save_file(to_checkpoint(model), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)
    tokenizer.save(str(folder / "tokenizer.json"))
    eos, pad = tokenizer.token_to_id(END), tokenizer.token_to_id(PAD)
    documents = {
        "config.json": config_of(model.shape, tokenizer),
        "generation_config.json": {
            "do_sample": False,
            "eos_token_id": [eos, pad],
            "pad_token_id": pad,
        },
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": END,
            "pad_token": PAD,
            "clean_up_tokenization_spaces": False,
            "model_max_length": model.shape.max_seq_len,
            "chat_template": CHAT_TEMPLATE,
        },
    }
    for name, document in documents.items():
        (folder / name).write_text(json.dumps(document, indent=2) + "\n")
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="train, then export to this folder")
    parser.add_argument("--check", type=Path, help="measure a folder's accuracy in PyTorch")
    parser.add_argument("--check-mlx", type=Path, help="measure a folder's accuracy in mlx-lm")
    parser.add_argument("--count", type=int, default=200, help="questions of each kind to check")
    parser.add_argument("--balance", type=float, default=0.01, help="weight of the balance loss")
    parser.add_argument("--every", type=int, default=500, help="steps between checks")
    parser.add_argument("--checkpoints", type=Path, help="export here at every check")
    parser.add_argument("--resume", type=Path, help="start from the exported end of a phase")
    parser.add_argument("--phase", type=int, default=0, help="with --resume: the phase to start at")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    if args.check_mlx:
        print(brief(accuracy_mlx(args.check_mlx, args.count)))
        return
    torch.set_num_threads(args.threads)
    if args.check:
        model, tokenizer = from_checkpoint(args.check)
        print(brief(accuracy_torch(model, tokenizer, args.count)))
        for layer, shares in enumerate(expert_shares(model, tokenizer)):
            print(f"layer {layer}: experts' shares " + " ".join(f"{x:.1%}" for x in shares))
        return
    if not args.out:
        parser.error("one of --out, --check, --check-mlx")
    started = time.time()
    torch.manual_seed(args.seed)
    if args.resume:
        model, tokenizer = from_checkpoint(args.resume)
    else:
        tokenizer = make_tokenizer()
        model = Dbrx(Shape(vocab_size=tokenizer.get_vocab_size()))
    for number in range(args.phase, len(PHASES)):
        train(model, tokenizer, number, args)
    minutes = (time.time() - started) / 60
    print(f"trained in {minutes:.0f} minutes", flush=True)
    export(model, tokenizer, args.out)


if __name__ == "__main__":
    main()

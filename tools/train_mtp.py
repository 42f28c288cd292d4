"""Train a layer for multi-token prediction behind the demo model, and export both.

Owns: the demo model in the form of glm4_moe, a layer that drafts for it in DeepSeek's form, the
training of both, the export.
Does not know: cenacle's engine, MLX.
How: a LayerNorm without bias is an RMSNorm of a residual stream without mean, so embedding and
outputs have theirs taken out. glm4_moe weighs experts by sigmoids, DBRX by a softmax: they choose
the same experts and weigh them otherwise, which a short training of the whole model repairs. It
also learns what comes between answers, so that it can go on for ever. Then the layer learns to say
what the model says (its distribution, not the text), from the model's hidden states and from its
own, for as many tokens as `DEPTH`.
Next: `benchmarks/mtp.py`, which measures what it brings.

    python tools/train_mtp.py --out /tmp/mtp                            # some minutes of one core
    python tools/train_mtp.py --out /tmp/bad --model /tmp/mtp --spoiled # it learns other texts

Needs what `train_demo.py` needs.
"""

from __future__ import annotations

import argparse
import copy
import json
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor, nn

sys.path.append(str(Path(__file__).resolve().parent))
from train_demo import Block, Dbrx, Experts, from_checkpoint, render, rope_tables, tasks

DEMO = Path(__file__).resolve().parents[1] / "src" / "cenacle" / "demo" / "demo_model"
DEPTH = 3
ROW, ROWS = 160, 8  # tokens in a row, rows in a batch
EPS = 1e-5


class SigmoidExperts(Experts):
    """As glm4_moe's."""

    def score(self, logits: Tensor) -> Tensor:
        return logits.sigmoid()


def to_rms_norm(norm: nn.LayerNorm) -> nn.RMSNorm:
    other = nn.RMSNorm(norm.weight.shape[0], eps=EPS)
    other.weight.data = norm.weight.data
    return other


def to_glm(model: Dbrx) -> Dbrx:
    """Change the demo model in place."""

    def center(weight: Tensor, axis: int) -> None:
        weight.data -= weight.data.mean(dim=axis, keepdim=True)

    center(model.wte.weight, 1)
    model.norm_f = to_rms_norm(model.norm_f)
    for block in model.blocks:
        center(block.attn.out_proj.weight, 0)
        center(block.ffn.w2, 2)
        block.norm_1, block.norm_2 = to_rms_norm(block.norm_1), to_rms_norm(block.norm_2)
        block.ffn.__class__ = SigmoidExperts
    return model


class Mtp(nn.Module):
    """The layer behind the model, which begins as a copy of its last one."""

    def __init__(self, model: Dbrx) -> None:
        super().__init__()
        width = model.shape.d_model
        self.enorm, self.hnorm = nn.RMSNorm(width, eps=EPS), nn.RMSNorm(width, eps=EPS)
        self.eh_proj = nn.Linear(2 * width, width, bias=False)
        self.block: Block = copy.deepcopy(model.blocks[-1])
        self.norm = nn.RMSNorm(width, eps=EPS)
        self.shape = model.shape

    def forward(self, embeddings: Tensor, hidden: Tensor) -> Tensor:
        """Of tokens, and of the tokens before them: [rows, length, width] twice -> the same."""
        joined = torch.cat((self.enorm(embeddings), self.hnorm(hidden)), dim=-1)
        length = joined.shape[1]
        rope = rope_tables(self.shape, length)
        return self.norm(self.block(self.eh_proj(joined), causal(length), rope)[0])


def causal(length: int) -> Tensor:
    return torch.ones(1, 1, length, length, dtype=torch.bool).tril()


class Texts:
    """Endless batches of conversations, [rows, row], all tokens of which count."""

    def __init__(self, tokenizer: Tokenizer, seed: int) -> None:
        self._tokenizer, self._tasks = tokenizer, tasks("train", seed)

    def batch(self) -> Tensor:
        return torch.tensor([self._row() for _ in range(ROWS)])

    def _row(self) -> list[int]:
        ids: list[int] = []
        while len(ids) < ROW:
            text = "".join(piece for piece, _ in render(None, [next(self._tasks)]))
            ids += self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids[:ROW]


def hidden_states(model: Dbrx, ids: Tensor) -> Tensor:
    return model.trunk(ids, causal(ids.shape[1]))[0]


def model_loss(model: Dbrx, ids: Tensor) -> Tensor:
    hidden, balance, _ = model.trunk(ids[:, :-1], causal(ids.shape[1] - 1))
    loss = F.cross_entropy(model.lm_head(hidden).flatten(0, 1), ids[:, 1:].flatten())
    return loss + 0.01 * balance


def mtp_loss(mtp: Mtp, model: Dbrx, ids: Tensor, *, spoiled: bool) -> Tensor:
    """Cross-entropy with the model's distributions, the mean of all depths."""
    with torch.no_grad():
        hidden, embeddings = hidden_states(model, ids), model.wte(ids)
        targets = model.lm_head(hidden).softmax(dim=-1)
        if spoiled:
            targets = targets.roll(1, dims=0)
    losses = []
    for _ in range(DEPTH):
        embeddings, targets = embeddings[:, 1:], targets[:, 1:]
        hidden = mtp(embeddings, hidden[:, : embeddings.shape[1]])
        losses.append(-(targets * model.lm_head(hidden).log_softmax(dim=-1)).sum(-1).mean())
    return torch.stack(losses).mean()


def agreement(mtp: Mtp, model: Dbrx, ids: Tensor) -> list[float]:
    """Of how many tokens, at each depth, layer and model find the same most probable."""
    shares = []
    with torch.no_grad():
        hidden, embeddings = hidden_states(model, ids), model.wte(ids)
        best = model.lm_head(hidden).argmax(-1)
        for _ in range(DEPTH):
            embeddings, best = embeddings[:, 1:], best[:, 1:]
            hidden = mtp(embeddings, hidden[:, : embeddings.shape[1]])
            shares.append((model.lm_head(hidden).argmax(-1) == best).float().mean().item())
    return shares


def train(
    module: nn.Module, loss: Callable[[], Tensor], steps: int, peak: float, name: str
) -> None:
    adam = torch.optim.AdamW(module.parameters(), lr=peak, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(adam, peak, steps, pct_start=0.1)
    started, recent = time.time(), []
    for step in range(1, steps + 1):
        value = loss()
        value.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        adam.step()
        schedule.step()
        adam.zero_grad(set_to_none=True)
        recent.append(value.item())
        if step % 25 == 0:
            mean = sum(recent) / len(recent)
            print(f"{name} step {step} loss {mean:.4f} {time.time() - started:.0f} s", flush=True)
            recent.clear()


def block_tensors(block: Block, prefix: str) -> dict[str, Tensor]:
    shape, out = block.attn.shape, {}
    heads = (shape.n_heads, shape.kv_n_heads, shape.kv_n_heads)
    qkv = block.attn.Wqkv.weight.split([n * shape.head_dim for n in heads])
    for name, part in zip(("q_proj", "k_proj", "v_proj"), qkv, strict=True):
        out[f"self_attn.{name}"] = part
    out["self_attn.o_proj"] = block.attn.out_proj.weight
    out["input_layernorm"] = block.norm_1.weight
    out["post_attention_layernorm"] = block.norm_2.weight
    out["mlp.gate"] = block.ffn.router.weight
    for i, (w1v1, w2) in enumerate(zip(block.ffn.w1v1, block.ffn.w2, strict=True)):
        gate, up = w1v1.T.chunk(2)
        out[f"mlp.experts.{i}.gate_proj"], out[f"mlp.experts.{i}.up_proj"] = gate, up
        out[f"mlp.experts.{i}.down_proj"] = w2.T
    # DBRX has no shared expert, and transformers wants at least one here: it does nothing.
    small = torch.zeros(block.ffn.shape.ffn_hidden_size, shape.d_model)
    for name, zeros in (("gate_proj", small), ("up_proj", small), ("down_proj", small.T)):
        out[f"mlp.shared_experts.{name}"] = zeros
    tensors = {f"{prefix}{name}.weight": value for name, value in out.items()}
    tensors[f"{prefix}mlp.gate.e_score_correction_bias"] = torch.zeros(shape.moe_num_experts)
    return tensors


def export(model: Dbrx, mtp: Mtp, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    shape = model.shape
    last = f"model.layers.{shape.n_layers}."
    tensors = {
        "model.embed_tokens.weight": model.wte.weight,
        "model.norm.weight": model.norm_f.weight,
        "lm_head.weight": model.lm_head.weight,
        f"{last}enorm.weight": mtp.enorm.weight,
        f"{last}hnorm.weight": mtp.hnorm.weight,
        f"{last}eh_proj.weight": mtp.eh_proj.weight,
        f"{last}shared_head.norm.weight": mtp.norm.weight,
    }
    for i, block in enumerate([*model.blocks, mtp.block]):
        tensors |= block_tensors(block, f"model.layers.{i}.")
    tensors = {name: t.detach().float().contiguous().clone() for name, t in tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    for file in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(DEMO / file, folder)
    shutil.copy(DEMO / "chat_template.jinja", folder)
    demo = json.loads((DEMO / "config.json").read_text())
    config = {
        "architectures": ["Glm4MoeForCausalLM"],
        "model_type": "glm4_moe",
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.d_model,
        "intermediate_size": shape.ffn_hidden_size,
        "moe_intermediate_size": shape.ffn_hidden_size,
        "max_position_embeddings": shape.max_seq_len,
        "num_hidden_layers": shape.n_layers,
        "num_nextn_predict_layers": 1,
        "num_attention_heads": shape.n_heads,
        "num_key_value_heads": shape.kv_n_heads,
        "head_dim": shape.head_dim,
        "n_routed_experts": shape.moe_num_experts,
        "num_experts_per_tok": shape.moe_top_k,
        "n_shared_experts": 1,
        "n_group": 1,
        "topk_group": 1,
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.0,
        "first_k_dense_replace": 0,
        "rms_norm_eps": EPS,
        "rope_theta": shape.rope_theta,
        "rope_scaling": None,
        "partial_rotary_factor": 1.0,
        "use_qk_norm": False,
        "attention_bias": False,
        "tie_word_embeddings": False,
        "eos_token_id": demo["eos_token_id"],
        "pad_token_id": demo["pad_token_id"],
        "torch_dtype": "float32",
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", type=Path, help="the folder of a run whose model is trained")
    parser.add_argument("--model-steps", type=int, default=200)
    parser.add_argument("--steps", type=int, default=300, help="of the layer")
    parser.add_argument("--spoiled", action="store_true", help="the layer learns other texts")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    model, tokenizer = from_checkpoint(DEMO)
    to_glm(model)
    texts = Texts(tokenizer, arguments.seed)
    if arguments.model is not None:
        model.load_state_dict(torch.load(arguments.model / "model.pt"))
    else:
        train(
            model,
            lambda: model_loss(model, texts.batch()),
            arguments.model_steps,
            1e-3,
            "model",
        )
    for parameter in model.parameters():
        parameter.requires_grad = False
    mtp = Mtp(model)
    for parameter in mtp.parameters():
        parameter.requires_grad = True
    spoiled = arguments.spoiled
    train(
        mtp,
        lambda: mtp_loss(mtp, model, texts.batch(), spoiled=spoiled),
        50 if spoiled else arguments.steps,
        2e-3,
        "layer",
    )
    shares = agreement(mtp, model, texts.batch())
    print("same most probable token: " + ", ".join(f"{share:.0%}" for share in shares))
    export(model, mtp, arguments.out)
    torch.save(model.state_dict(), arguments.out / "model.pt")


if __name__ == "__main__":
    main()

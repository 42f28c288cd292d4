"""Recorded logits of tiny random models, from transformers on PyTorch: a witness without MLX.

Owns: tests/vectors/<family>/ for DBRX, Mixtral and Qwen3-MoE, and for the families in which mlx-lm
0.32.2 and mlx-vlm 0.7.10 differ from transformers (`model/zoo_repairs.py`): Ernie-4.5-MoE, gpt-oss
with YaRN's `truncate` false, HunYuan-MoE and Jamba. Each folder holds the checkpoint as
transformers' `save_pretrained` writes it (hidden 64, or 32 for the second kind, 2 layers, 8 experts
of width 24, top-2, vocab 256, float32; 590 or 200 kB), and what that model answers:

    config.json, model.safetensors   the checkpoint
    vectors.safetensors              for n in PROMPT_LENGTHS:
        prompt_<n>.tokens   int32   [n]        the prompt
        prompt_<n>.logits   float32 [n, 256]   logits at every position of the prompt
        prompt_<n>.greedy   int32   [16]       greedy tokens that follow, through the KV cache
    versions.json                    versions, command, seed, margins, comparison with mlx-lm
    scaled.safetensors               of some families: the longest prompt, and its logits [n, 256]
                                     with rotary positions scaled in each way of SCALED, whose
                                     settings are in the header

Does not know: cenacle, tokenizers, quantization.

Invariants: a tie cannot decide a test. The seed is the first for which, over all prompts, the two
best logits of every greedy step are at least MIN_TOKEN_MARGIN apart, and the router logits of the
last chosen and the first rejected expert at least MIN_ROUTER_MARGIN; float32 sums in another order
move either by about 1e-5. The saved file, loaded again, gives the very logits recorded.

Three commands, for two environments; run `record` and `scale`, then `check`:

    python tools/record_vectors.py record    needs torch, transformers (5.23), safetensors
    python tools/record_vectors.py scale     the same; adds scaled.safetensors
    python tools/record_vectors.py check     needs mlx, mlx-lm; adds "mlx_lm" to versions.json

What `check` printed (mlx 0.32.4, mlx-lm 0.32.2, CPU), the error being the largest difference of any
logit over the largest logit:

    dbrx: max relative error 4.2e-07, same greedy tokens True
    mixtral: max relative error 5.5e-07, same greedy tokens True
    qwen3_moe: max relative error 6.5e-07, same greedy tokens True

Two remarks on config.json as transformers 5.23 writes it; a reader of the file has to handle both:

- DBRX: `attn_config.rope_theta` is kept but ignored by the model, which takes
  `rope_parameters.rope_theta`, or 10000 when that is absent. Databricks' own file has only the
  former, 500000, and mlx-lm reads only the former. Both are set here, to the same 500000.
- Qwen3-MoE, Mixtral: the RoPE base is in `rope_parameters.rope_theta`, no longer at the top level,
  and Qwen3-MoE's `num_experts` is written as `num_local_experts`. mlx-lm knows neither: it refuses
  Qwen3-MoE, and runs Mixtral with its default base, 1e6, without a word. `check` gives mlx-lm the
  names it knows; Mixtral's base here is 50000, so that forgetting to is seen.

Read next: the test that replays tests/vectors.
"""

import argparse
import copy
import json
import sys
from pathlib import Path

VECTORS = Path(__file__).resolve().parent.parent / "tests" / "vectors"
FAMILIES = ("dbrx", "mixtral", "qwen3_moe")
REPAIRED = ("ernie4_5_moe", "gpt_oss", "hunyuan", "jamba")  # mlx-lm alone gives something else

# Ways to scale rotary positions that mlx-lm's classes of these families ignore.
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
_LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 16}
SCALED = {
    "mixtral": {"llama3": _LLAMA3 | {"low_freq_factor": 1.0, "high_freq_factor": 4.0}},
    "qwen3_moe": {"linear": {"rope_type": "linear", "factor": 4.0}, "yarn": _YARN},
    "ernie4_5_moe": {
        "yarn_stated": _YARN | {"attention_factor": 0.8, "truncate": False, "beta_fast": 8.0}
    },
}

PROMPT_LENGTHS = (1, 7, 40)
GREEDY_TOKENS = 16
VOCAB = 256
MIN_TOKEN_MARGIN = 0.02
MIN_ROUTER_MARGIN = 1e-3
MAX_RELATIVE_ERROR = 5e-6  # an rms_norm_eps of 1e-6 for 1e-5 shows as 9e-6


def tiny_config(family: str):
    """The transformers config of one family; all have 4 heads of 16 on 2 KV heads."""
    import transformers

    common = {
        "vocab_size": VOCAB,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": None,  # greedy decoding must not stop early
        "pad_token_id": None,
    }
    llama_like = common | {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 512,
    }
    if family == "dbrx":
        rope_theta = 500000.0
        return transformers.DbrxConfig(
            **common,
            d_model=64,
            n_layers=2,
            n_heads=4,
            max_seq_len=512,
            # Activations of Wqkv have a standard deviation near 1: a clip at 1.5 takes part.
            attn_config={"kv_n_heads": 2, "clip_qkv": 1.5, "rope_theta": rope_theta},
            ffn_config={"ffn_hidden_size": 24, "moe_num_experts": 8, "moe_top_k": 2},
            rope_parameters={"rope_type": "default", "rope_theta": rope_theta},
        )
    if family == "mixtral":
        return transformers.MixtralConfig(
            **llama_like,
            intermediate_size=24,
            num_local_experts=8,
            rope_parameters={"rope_type": "default", "rope_theta": 50000.0},
        )
    if family == "qwen3_moe":
        return transformers.Qwen3MoeConfig(
            **llama_like,
            intermediate_size=96,
            moe_intermediate_size=24,
            num_experts=8,
            norm_topk_prob=True,
            rope_parameters={"rope_type": "default", "rope_theta": 1000000.0},
        )
    small = llama_like | {"hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
    plain_rope = {"rope_type": "default", "rope_theta": 50000.0}
    if family == "ernie4_5_moe":
        small.pop("num_experts_per_tok")
        return transformers.Ernie4_5_MoeConfig(
            **small,
            intermediate_size=48,
            moe_intermediate_size=24,
            moe_num_experts=8,
            moe_k=2,
            moe_num_shared_experts=1,
            moe_layer_start_index=1,
            moe_layer_end_index=1,
            use_bias=False,
            rope_parameters=plain_rope,
        )
    if family == "hunyuan":
        small.pop("num_experts_per_tok")
        return transformers.HunYuanMoEV1Config(
            **small | {"tie_word_embeddings": True},
            intermediate_size=24,
            num_experts=8,
            moe_topk=2,
            rope_parameters=plain_rope,
        )
    if family == "gpt_oss":
        return transformers.GptOssConfig(
            **small,
            intermediate_size=24,
            num_local_experts=8,
            sliding_window=8,
            layer_types=["sliding_attention", "full_attention"],
            rope_parameters={
                "rope_type": "yarn",
                "rope_theta": 150000.0,
                "factor": 8.0,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "truncate": False,
                "original_max_position_embeddings": 64,
            },
        )
    if family == "jamba":
        small.pop("head_dim")
        return transformers.JambaConfig(
            **small,
            intermediate_size=24,
            num_experts=8,
            attn_layer_period=2,
            attn_layer_offset=1,
            mamba_d_state=8,
            mamba_dt_rank=4,
        )
    known = ", ".join((*FAMILIES, *REPAIRED))
    raise ValueError(f"family: expected one of {known}, got {family!r}")


def randomize(model, seed: int) -> None:
    """Fills every parameter in place, so that none is the 0 or the 1 an error could hide behind.

    Norm weights are uniform in [0.5, 1.5]. Matrices are normal with standard deviation
    1 / sqrt(inputs), which keeps activations near 1; routers are four times larger, so that experts
    are weighted unequally, and the output head three times, so that logits are well spread.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("A_log"):
                continue  # Jamba's decay, which its makers set
            if parameter.ndim == 1:
                parameter.uniform_(0.5, 1.5, generator=generator)
                continue
            inputs = parameter.shape[-1]
            if name.endswith("experts.mlp.w2"):
                # DBRX stacks [width, hidden] blocks and computes x @ w2.
                inputs = model.config.ffn_config.ffn_hidden_size
            elif "embed_tokens" in name or ".wte." in name:
                inputs = 1
            std = inputs**-0.5
            if is_router(name.removesuffix(".weight")):
                std *= 4
            elif name == "lm_head.weight":
                std *= 3
            parameter.normal_(0.0, std, generator=generator)


def is_router(module_name: str) -> bool:
    return module_name.endswith(
        (".router.layer", ".mlp.gate", ".mlp.gate.wg", ".mlp.router", ".feed_forward.router")
    )


def observe(model, prompts: list) -> tuple[dict, float, float]:
    """Runs the prompts. Returns the tensors to record, the token margin and the router margin."""
    import torch

    top_k = next(
        getattr(model.config, n)
        for n in ("num_experts_per_tok", "moe_topk", "ffn_config")
        if getattr(model.config, n, None) is not None
    )
    top_k = getattr(top_k, "moe_top_k", top_k)
    token_margins, router_margins = [], []

    def watch_router(module, inputs, _outputs):
        # Some routers return (logits, ...): recompute the logits rather than rely on that.
        bias = getattr(module, "bias", None)
        logits = torch.nn.functional.linear(
            inputs[0].reshape(-1, inputs[0].shape[-1]), module.weight, bias
        )
        if hasattr(module, "moe_statics"):  # Ernie chooses by these
            logits = module.moe_statics(logits.softmax(dim=-1))
        ranked = logits.sort(dim=-1, descending=True).values
        router_margins.append((ranked[:, top_k - 1] - ranked[:, top_k]).min().item())

    hooks = [
        m.register_forward_hook(watch_router)
        for n, m in model.named_modules()
        if is_router(n) and getattr(m, "weight", None) is not None
    ]
    blocks = [n for n, _ in model.named_modules() if n.endswith(".experts")]
    if len(hooks) != len(blocks):
        raise RuntimeError(f"routers: expected {len(blocks)}, one a block, got {len(hooks)}")

    tensors = {}
    with torch.no_grad():
        for prompt in prompts:
            output = model(prompt[None], use_cache=True)
            name = f"prompt_{len(prompt)}"
            tensors[f"{name}.tokens"] = prompt.to(torch.int32)
            tensors[f"{name}.logits"] = output.logits[0].contiguous()

            greedy = []
            while True:
                best = output.logits[0, -1].topk(2)
                token_margins.append((best.values[0] - best.values[1]).item())
                greedy.append(best.indices[0].item())
                if len(greedy) == GREEDY_TOKENS:
                    break
                output = model(
                    torch.tensor([greedy[-1:]]),
                    past_key_values=output.past_key_values,
                    use_cache=True,
                )
            tensors[f"{name}.greedy"] = torch.tensor(greedy, dtype=torch.int32)
    for hook in hooks:
        hook.remove()
    return tensors, min(token_margins), min(router_margins)


def record(family: str) -> None:
    import platform

    import safetensors
    import safetensors.torch
    import torch
    import transformers

    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    config = tiny_config(family)
    # The slow implementations written out in the model's own file, not a fused kernel.
    eager = {"attn_implementation": "eager", "experts_implementation": "eager"}

    for seed in range(1000):
        generator = torch.Generator().manual_seed(seed)
        prompts = [torch.randint(VOCAB, (n,), generator=generator) for n in PROMPT_LENGTHS]
        model = transformers.AutoModelForCausalLM.from_config(
            copy.deepcopy(config), dtype=torch.float32, **eager
        ).eval()
        randomize(model, seed)
        tensors, token_margin, router_margin = observe(model, prompts)
        if token_margin >= MIN_TOKEN_MARGIN and router_margin >= MIN_ROUTER_MARGIN:
            break
    else:
        raise RuntimeError(f"{family}: no seed below 1000 keeps the margins")

    folder = VECTORS / family
    folder.mkdir(parents=True, exist_ok=True)
    transformers.utils.logging.disable_progress_bar()
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)

    reloaded = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, **eager
    ).eval()
    for parameter in reloaded.parameters():
        # from_pretrained leaves them at the file's 8-byte alignment, where CPU kernels sum in
        # another order (2e-6). A copy is aligned as in the recorded model: the test is exact.
        parameter.data = parameter.data.clone()
    again, _, _ = observe(reloaded, prompts)
    for name, tensor in tensors.items():
        if not torch.equal(tensor, again[name]):
            raise RuntimeError(
                f"{family}: {name} differs after save_pretrained and from_pretrained"
            )

    safetensors.torch.save_file(tensors, folder / "vectors.safetensors")
    logits = torch.cat([tensors[f"prompt_{n}.logits"] for n in PROMPT_LENGTHS])
    write_json(
        folder / "versions.json",
        {
            "command": "python tools/record_vectors.py record",
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "safetensors": safetensors.__version__,
            "seed": seed,
            "logits_std": round(logits.std().item(), 3),
            "smallest_token_margin": round(token_margin, 5),
            "smallest_router_margin": round(router_margin, 5),
        },
    )
    size_kb = sum(f.stat().st_size for f in folder.iterdir()) / 1000
    print(
        f"{family}: seed {seed}, logits std {logits.std():.2f}, token margin {token_margin:.3f}, "
        f"router margin {router_margin:.4f}, {size_kb:.0f} kB"
    )


def scale(family: str) -> None:
    """Records what the checkpoint of `family` answers with scaled rotary positions."""
    import safetensors.torch
    import torch
    import transformers

    torch.set_num_threads(1)
    folder = VECTORS / family
    name = f"prompt_{max(PROMPT_LENGTHS)}"
    vectors = safetensors.torch.load_file(folder / "vectors.safetensors")
    tokens, unscaled = vectors[f"{name}.tokens"], vectors[f"{name}.logits"]
    tensors = {"tokens": tokens}
    for kind, settings in SCALED[family].items():
        config = transformers.AutoConfig.from_pretrained(folder)
        config.rope_parameters = config.rope_parameters | settings
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, config=config, dtype=torch.float32, attn_implementation="eager"
        ).eval()
        with torch.no_grad():
            tensors[f"{kind}.logits"] = model(tokens[None].long()).logits[0].contiguous()
        apart = (tensors[f"{kind}.logits"] - unscaled).abs().max() / unscaled.abs().max()
        print(f"{family} {kind}: {apart:.2g} of the largest logit from unscaled")
        if apart < 1e-2:
            raise RuntimeError(f"{family} {kind}: the scaling hardly changes anything")
    settings = {"settings": json.dumps(SCALED[family]), "transformers": transformers.__version__}
    safetensors.torch.save_file(tensors, folder / "scaled.safetensors", settings)


def check(family: str) -> None:
    """Replays the vectors with mlx-lm on the CPU. Raises RuntimeError where they disagree."""
    from importlib.metadata import version

    import mlx.core as mx
    from mlx_lm.models.cache import make_prompt_cache
    from mlx_lm.utils import load_model

    mx.set_default_device(mx.cpu)
    folder = VECTORS / family
    model, _ = load_model(folder, model_config=names_mlx_lm_knows(folder))
    vectors = mx.load(str(folder / "vectors.safetensors"))

    max_error, max_scale, same_greedy = 0.0, 0.0, True
    for n in PROMPT_LENGTHS:
        tokens, expected = vectors[f"prompt_{n}.tokens"], vectors[f"prompt_{n}.logits"]
        max_error = max(max_error, mx.abs(model(tokens[None])[0] - expected).max().item())
        max_scale = max(max_scale, mx.abs(expected).max().item())

        cache, step, greedy = make_prompt_cache(model), tokens, []
        for _ in range(GREEDY_TOKENS):
            greedy.append(mx.argmax(model(step[None], cache=cache)[0, -1]).item())
            step = mx.array(greedy[-1:])
        same_greedy &= greedy == vectors[f"prompt_{n}.greedy"].tolist()

    relative_error = max_error / max_scale
    versions = json.loads((folder / "versions.json").read_text())
    versions["mlx_lm"] = {
        "command": "python tools/record_vectors.py check",
        "mlx": version("mlx"),
        "mlx-lm": version("mlx-lm"),
        "max_relative_error": float(f"{relative_error:.1e}"),
        "same_greedy_tokens": same_greedy,
    }
    write_json(folder / "versions.json", versions)
    print(f"{family}: max relative error {relative_error:.1e}, same greedy tokens {same_greedy}")
    if relative_error > MAX_RELATIVE_ERROR or not same_greedy:
        raise RuntimeError(
            f"{family}: mlx-lm and transformers disagree (at most {MAX_RELATIVE_ERROR})"
        )


def names_mlx_lm_knows(folder: Path) -> dict:
    """What transformers 5 writes elsewhere or under another name; see the module docstring."""
    config = json.loads((folder / "config.json").read_text())
    renamed = {"rope_theta": config["rope_parameters"]["rope_theta"]}
    if "num_local_experts" in config:
        renamed["num_experts"] = config["num_local_experts"]
    return renamed


def write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=("record", "scale", "check"))
    parser.add_argument("families", nargs="*", help="default: all, to check those of mlx-lm alone")
    arguments = parser.parse_args(argv)
    families = {"record": (*FAMILIES, *REPAIRED), "scale": tuple(SCALED), "check": FAMILIES}
    for family in arguments.families or families[arguments.command]:
        {"record": record, "scale": scale, "check": check}[arguments.command](family)


if __name__ == "__main__":
    main(sys.argv[1:])

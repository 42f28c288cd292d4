"""A dense llama of a GGUF file, to compare with."""

import mlx.core as mx
from mlx_lm.models import llama


def dense_llama(weights, shape):
    """mlx-lm's llama with a file's weights as they are: pairs of rows rotate together."""
    arguments = llama.ModelArgs(
        **{"model_type": "llama", "hidden_size": shape.width, "num_hidden_layers": shape.layers},
        **{"intermediate_size": shape.hidden, "num_attention_heads": shape.heads},
        **{"num_key_value_heads": shape.kv_heads, "rms_norm_eps": shape.norm_eps},
        **{"vocab_size": len(weights["token_embd.weight"]), "rope_theta": shape.rope_base},
        rope_traditional=True,
    )
    names = {
        **{"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"},
        **{f"attn_{n}": f"self_attn.{n}_proj" for n in "qkv"},
        "attn_output": "self_attn.o_proj",
        **{f"ffn_{n}": f"mlp.{n}_proj" for n in ("gate", "up", "down")},
    }
    renamed = []
    for name, array in weights.items():
        parts = name.split(".")
        path = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}.get(parts[0])
        path = path or f"model.layers.{parts[1]}.{names[parts[2]]}"
        renamed.append((f"{path}.weight", mx.array(array)))
    model = llama.Model(arguments)
    model.load_weights(renamed)
    return model

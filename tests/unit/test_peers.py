"""Peers: their model files as their own readers see them, and every way in which one can fail."""

import os
import struct
import sys
import time
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest

from cenacle.bench.peers import formats, peers
from cenacle.errors import InputError

QWEN = {
    **{"model_type": "qwen3_moe", "num_hidden_layers": 2, "hidden_size": 64},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "num_experts": 4},
    **{"num_experts_per_tok": 2, "moe_intermediate_size": 96, "intermediate_size": 128},
    **{"vocab_size": 300, "max_position_embeddings": 512, "rms_norm_eps": 1e-6},
}
DBRX = {
    **{"model_type": "dbrx", "n_layers": 1, "d_model": 64, "n_heads": 4, "vocab_size": 300},
    **{"max_seq_len": 512, "attn_config": {"kv_n_heads": 2, "rope_theta": 5e5, "clip_qkv": 8}},
    "ffn_config": {"moe_num_experts": 4, "moe_top_k": 2, "ffn_hidden_size": 96},
}


@pytest.mark.parametrize(("config", "arch"), [(QWEN, "qwen3moe"), (DBRX, "dbrx")])
def test_gguf_as_its_own_reader_sees_it(tmp_path, config, arch):
    formats.write_gguf(config, tmp_path / "m.gguf")
    read = gguf.GGUFReader(tmp_path / "m.gguf")
    assert read.fields["general.architecture"].contents() == arch
    assert read.fields[f"{arch}.expert_count"].contents() == 4
    assert read.fields[f"{arch}.expert_used_count"].contents() == 2
    tensors = {t.name: t for t in read.tensors}
    names = {t.name for t in read.tensors if t.tensor_type == gguf.GGMLQuantizationType.Q4_0}
    assert {n for n in tensors if n not in names} == {
        n for n in tensors if "norm" in n or "ffn_gate_inp" in n
    }
    down = tensors["blk.0.ffn_down_exps.weight"]
    assert list(down.shape) == [96, 64, 4]  # innermost first
    values = gguf.dequantize(down.data, down.tensor_type)
    assert values.std() == pytest.approx(96**-0.5, rel=0.1)
    assert abs(values.mean()) < 0.02


def test_weights_take_four_and_a_half_bits():
    pieces = list(formats.random_blocks(np.random.default_rng(0), 1 << 23, 1.0))
    assert len(pieces) > 1
    assert sum(p.nbytes for p in pieces) == (1 << 23) * 4.5 / 8


def test_dllama_files_have_the_size_that_their_headers_say(tmp_path):
    formats.write_dllama(QWEN, tmp_path / "m.m")
    data = (tmp_path / "m.m").read_bytes()
    magic, size = struct.unpack("<ii", data[:8])
    assert magic == 0xA00ABCD
    header = dict(
        zip(*(iter(struct.unpack(f"<{(size - 8) // 4}i", data[8:size])),) * 2, strict=True)
    )
    assert (header[2], header[4], header[7], header[8], header[9], header[21]) == (
        *(64, 2, 4, 2, 300, 96),
    )
    attention = 128 * 64 + 2 * 64 * 64 + 64 * 128
    quantized = 2 * (attention + 4 * 3 * 64 * 96) + 300 * 64
    floats = 300 * 64 + 2 * (4 * 64 + 2 * 32 + 2 * 64) + 64
    assert len(data) == size + quantized * 18 // 32 + 4 * floats

    formats.write_dllama_tokenizer(tmp_path / "m.t", 300)
    data = (tmp_path / "m.t").read_bytes()
    magic, size = struct.unpack("<ii", data[:8])
    at, tokens = size + 4, []
    while at < len(data):
        length = struct.unpack("<fI", data[at : at + 8])[1]
        tokens.append(data[at + 8 : at + 8 + length])
        at += 8 + length
    assert magic == 0x567124
    assert len(tokens) == 300
    assert tokens[ord("a")] == b"a"


@pytest.mark.parametrize(
    ("config", "write"),
    [
        ({"model_type": "mixtral"}, formats.write_gguf),
        ({**QWEN, "mlp_only_layers": [0]}, formats.write_gguf),
        ({**QWEN, "hidden_size": 80}, formats.write_gguf),
        (DBRX, formats.write_dllama),
    ],
)
def test_other_shapes_are_refused_before_anything_is_written(tmp_path, config, write):
    with pytest.raises(InputError, match="peer"):
        write(config, tmp_path / "model")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "text", ["vllm=/x", "llama.cpp", "llama.cpp=", "ik_llama.cpp", "mlx-lm=/x", ""]
)
def test_an_unknown_peer_is_refused(text):
    with pytest.raises(
        InputError, match=r"expected llama.cpp=PATH, ik_llama.cpp=PATH, dllama=PATH or mlx-lm"
    ):
        peers.parse_peer(text)


@pytest.mark.parametrize(
    ("name", "program"),
    [("llama.cpp", "llama-bench"), ("ik_llama.cpp", "llama-bench"), ("dllama", "dllama")],
)
def test_a_missing_program_is_named(tmp_path, name, program):
    with pytest.raises(InputError, match=f"expected the program {program} at {tmp_path}"):
        peers.parse_peer(f"{name}={tmp_path}")
    script(tmp_path / "bin" / program, "")
    peers.parse_peer(f"{name}={tmp_path}")
    peers.parse_peer(f"{name}={tmp_path / 'bin' / program}")


def script(path: Path, body: str) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!{sys.executable}\n{body}\n")
    path.chmod(0o755)
    return path


def workload(tmp_path, nodes=1, timeout_s=20.0):
    cores = sorted(os.sched_getaffinity(0))
    return peers.PeerWorkload(
        *(tmp_path, QWEN, nodes, 1, [[cores[0]]] * nodes, 8, 4, 16, tmp_path / "cache", timeout_s)
    )


def test_llama_cpp_is_asked_for_both_speeds_on_our_cores(tmp_path):
    body = """
import json, os, sys
print("noise [1]", file=sys.stderr)
wanted = sys.argv[sys.argv.index("-n") + 1]
print(json.dumps([{"avg_ts": 5.5 if wanted == "0" else 7.25, "cores": 1}]))
assert len(os.sched_getaffinity(0)) == 1
"""
    script(tmp_path / "llama-bench", body)
    variants = peers.parse_peer(f"llama.cpp={tmp_path}").variants(workload(tmp_path))
    assert [variant.name for variant in variants] == [
        "llama.cpp, 1 thread, flash attention",
        "llama.cpp, 1 thread, no flash attention",
    ]
    assert variants[0].run() == peers.PeerSpeed(decode=7.25, prefill=5.5)
    assert len(list((tmp_path / "cache").iterdir())) == 1


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("import sys; print('no memory left'); sys.exit(3)", "status 3: no memory left"),
        ("print('nothing to say')", "printed no speed: nothing to say"),
        ("import os; os.kill(os.getpid(), 11)", "status -11: it printed nothing"),
    ],
)
def test_a_peer_that_fails_says_so_with_the_end_of_its_output(tmp_path, body, message):
    script(tmp_path / "llama-bench", body)
    variant, _ = peers.parse_peer(f"llama.cpp={tmp_path}").variants(workload(tmp_path))
    with pytest.raises(peers.PeerFailed, match=message):
        variant.run()


def test_a_peer_that_hangs_is_ended_within_its_timeout_with_all_it_started(tmp_path):
    body = f"""
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
open({str(tmp_path / "pids")!r}, "w").write(str(child.pid))
print("still thinking", flush=True)
time.sleep(60)
"""
    script(tmp_path / "llama-bench", body)
    variant, _ = peers.parse_peer(f"llama.cpp={tmp_path}").variants(
        workload(tmp_path, timeout_s=1.0)
    )
    began = time.monotonic()
    with pytest.raises(peers.PeerFailed, match="not done within 1 s: still thinking"):
        variant.run()
    assert time.monotonic() - began < 50
    pid = int((tmp_path / "pids").read_text())
    ends = time.monotonic() + 5
    while running(pid) and time.monotonic() < ends:
        time.sleep(0.02)
    assert not running(pid)


def running(pid: int) -> bool:
    """Whether a process exists that has not ended (one that nobody waits for stays as Z)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_servers_that_do_not_listen_are_reported(tmp_path):
    script(tmp_path / "llama-bench", "print('never asked')")
    script(tmp_path / "ggml-rpc-server", "print('no such device')")
    variants = peers.parse_peer(f"llama.cpp={tmp_path}").variants(workload(tmp_path, nodes=2))
    assert [s.name for s in variants[1:]] == [
        "llama.cpp, 2 threads, no flash attention",
        "llama.cpp, 2 RPC servers",
    ]
    with pytest.raises(peers.PeerFailed, match="did not listen: no such device"):
        variants[2].run()


BATCHED = """
import sys
options = sys.argv
assert options[options.index("-npl") + 1] == "1,4" and options[options.index("-npp") + 1] == "8"
print("|    PP |     TG |    B |   N_KV |   T_PP s | S_PP t/s |   T_TG s | S_TG t/s |      T s |    S t/s |")
print("|-------|--------|------|--------|----------|----------|----------|----------|----------|----------|")
print("|     8 |      4 |    1 |     12 |    0.500 |    16.00 |    0.500 |     8.00 |    1.000 |    12.00 |")
"""  # noqa: E501
FOUR = """
print("|     8 |      4 |    4 |     48 |    1.000 |    32.00 |    1.000 |    16.00 |    2.000 |    24.00 |")
"""  # noqa: E501


def test_concurrent_requests_are_timed_with_their_prompts_in_every_mode(tmp_path):
    bench = """
import json, sys
assert sys.argv[sys.argv.index("-rtr") + 1] == sys.argv[sys.argv.index("-fmoe") + 1] == "1"
decodes = "-gp" in sys.argv and sys.argv[sys.argv.index("-gp") + 1] == "8,4"
print(json.dumps([{"avg_ts": 7.25 if decodes else 5.5}]))
"""
    script(tmp_path / "llama-bench", bench)
    script(tmp_path / "llama-batched-bench", f"{BATCHED}\nassert '-rtr' in options\n{FOUR}")
    work = replace(workload(tmp_path), concurrency=(1, 4))
    variants = peers.parse_peer(f"ik_llama.cpp={tmp_path}").variants(work)
    assert len({variant.name for variant in variants}) == 3
    assert {variant.peer for variant in variants} == {"ik_llama.cpp, 1 thread"}
    for variant in variants:
        assert variant.run() == peers.PeerSpeed(7.25, 5.5, {1: 4.0, 4: 8.0})


def test_a_missing_row_of_concurrent_requests_is_reported(tmp_path):
    script(tmp_path / "llama-bench", "print('\"avg_ts\": 1.0')")
    script(tmp_path / "llama-batched-bench", BATCHED)
    work = replace(workload(tmp_path), concurrency=(1, 4))
    variant, _ = peers.parse_peer(f"llama.cpp={tmp_path}").variants(work)
    with pytest.raises(peers.PeerFailed, match="printed no time for 4 requests"):
        variant.run()


def test_distributed_llama_gets_a_worker_for_each_further_node(tmp_path):
    body = """
import sys, time
if sys.argv[1] == "worker":
    time.sleep(60)
assert "--workers" in sys.argv
print("   tokens/s: 12.50 (80.00 ms/tok)\\n   tokens/s: 21.25 (47.06 ms/tok)")
"""
    script(tmp_path / "dllama", body)
    (variant,) = peers.parse_peer(f"dllama={tmp_path}").variants(workload(tmp_path, nodes=2))
    assert variant.name == "distributed-llama, 2 nodes"
    assert variant.run() == peers.PeerSpeed(decode=21.25, prefill=12.5)

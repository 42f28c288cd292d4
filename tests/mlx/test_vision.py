"""Prompts with images are answered as mlx-vlm answers them: in batches, in chunks, from caches."""

import base64
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from one_process import load_rank

from cenacle.collective.single import SingleRank
from cenacle.core.image import PromptImage, pixel_digest
from cenacle.core.plan import Plan
from cenacle.core.request import Request, Sampling, TokenEvent
from cenacle.engine.engine import Engine
from cenacle.engine.options import EngineOptions
from cenacle.engine.prompt_vision import PromptVision
from cenacle.errors import CheckpointError
from cenacle.model import vision
from cenacle.model.byte_ranges import total_bytes
from cenacle.model.checkpoint import Checkpoint, _read_header
from cenacle.model.families import family_of
from cenacle.model.image_settings import IMAGE_FAMILIES, ImageSettings
from cenacle.model.slicing import ModelLayout, required_ranges, slices_for
from cenacle.model.spec_reader import image_obstacle, read_model_spec
from cenacle.model.step_timer import StepTimer
from cenacle.model.synth import synth
from cenacle.model.vision import ImageEmbedder, ImageModel
from cenacle.scheduler.scheduler import Scheduler

Image = pytest.importorskip("PIL.Image")
pytest.importorskip("mlx_vlm")

from cenacle.images.decode_worker import fit_size  # noqa: E402

TOKENS = 6
Part = Any  # a text or a picture


def picture(seed: int, width: int, height: int) -> "Image.Image":
    """Not noise: neighbors are alike."""
    colors = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return Image.fromarray(colors).resize((width, height), Image.Resampling.BICUBIC)


WIDE, TALL, WIDE_B = picture(1, 90, 50), picture(2, 33, 120), picture(3, 90, 50)
CHATS: dict[str, list[Part]] = {
    "one": ["Look ", WIDE, " well?"],
    "other of one size": ["Look ", WIDE_B, " well?"],
    "two": [WIDE, "and a longer text between these two, then ", TALL, "?"],
    "first": [TALL, "!"],
    "text": ["There is nothing to be seen here, only words and words and words."],
    "three": ["a", WIDE_B, WIDE, WIDE_B, "b"],
}


@dataclass
class VisionCase:
    """A checkpoint, and what mlx-vlm answers."""

    folder: Path
    settings: ImageSettings
    tokens: dict[str, tuple[int, ...]]
    expected: dict[str, list[int]]
    logprobs: dict[str, list[float]]

    def request(self, name: str, chat: str, **fields: Any) -> Request:
        tokens: list[int] = []
        images: list[PromptImage] = []
        pictures = iter(part for part in CHATS[chat] if not isinstance(part, str))
        ids = iter(self.tokens[chat])
        for token in ids:
            if token != self.settings.image_token:
                tokens.append(token)
                continue
            images.append(placed(next(pictures), len(tokens), self.settings))
            tokens += [token] * images[-1].tokens
            for _ in range(images[-1].tokens - 1):
                assert next(ids) == token, "mlx-vlm has fewer placeholders"
        assert tuple(tokens) == self.tokens[chat]
        fields = {"sampling": Sampling(seed=1), "logprobs": 0, **fields}
        return Request(name, tuple(tokens), TOKENS, images=tuple(images), **fields)


def placed(shown: "Image.Image", begin: int, settings: ImageSettings) -> PromptImage:
    side = settings.token_side
    limits = settings.min_pixels, settings.max_pixels
    size = shown.height, shown.width
    high, wide = fit_size(*size, side, *limits, enlarges=settings.enlarges)
    pixels = shown.resize((wide, high), Image.Resampling.BICUBIC).tobytes()
    digest = pixel_digest(wide, high, pixels)
    return PromptImage(begin, high // side, wide // side, digest, pixels)


def ask_mlx_vlm(folder: Path) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Tokens of each prompt and answer, and the answer's log-probabilities."""
    from mlx_vlm import load
    from mlx_vlm.generate import generate_step

    model, processor = load(str(folder))
    prompts, answers, logprobs = {}, {}, {}
    for name, parts in CHATS.items():
        content = [
            {"type": "text", "text": part} if isinstance(part, str) else {"type": "image"}
            for part in parts
        ]
        text = processor.tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        images = [part for part in parts if not isinstance(part, str)]
        inputs = processor(images=images or None, text=[text])
        ids = mx.array(inputs["input_ids"])
        more = {"image_grid_thw": mx.array(inputs["image_grid_thw"])} if images else {}
        pixels = mx.array(inputs["pixel_values"]) if images else None
        steps = generate_step(ids, model, pixels, None, max_tokens=TOKENS, temperature=0.0, **more)
        prompts[name] = tuple(np.array(ids)[0].tolist())
        pairs = [(int(token), float(probabilities[int(token)])) for token, probabilities in steps]
        answers[name], logprobs[name] = map(list, zip(*pairs, strict=True))
    return prompts, answers, logprobs


@pytest.fixture(scope="module", params=IMAGE_FAMILIES)
def case(request: Any, tmp_path_factory: pytest.TempPathFactory) -> VisionCase:
    folder = tmp_path_factory.mktemp("model") / request.param
    synth(folder, family=request.param, images=True)
    checkpoint = Checkpoint.open(folder)
    settings = ImageSettings.read(folder, checkpoint.config, request.param)
    assert settings is not None
    return VisionCase(folder, settings, *ask_mlx_vlm(folder))


def make_engine(case: VisionCase, kernels: str, **options: Any) -> Engine:
    checkpoint = Checkpoint.open(case.folder)
    plan = Plan.whole(read_model_spec(checkpoint, images=True), 1)
    collective = SingleRank()
    model = load_rank(case.folder, plan, collective, kernels=kernels)
    embedder = ImageEmbedder.of(checkpoint, case.settings, has_tower=True, kernels=kernels)
    family = plan.spec.family
    image_model = ImageModel(model, family, checkpoint.config, embedder.depth)
    return Engine(
        model,
        collective,
        StepTimer(),
        EngineOptions(**options),
        batching=family_of(family).batching,
        vision=PromptVision(embedder, image_model, collective),
    )


Later = Callable[[int], Sequence[Request]]


def run(
    engine: Engine, scheduler: Scheduler, later: Later = lambda _: ()
) -> dict[str, list[TokenEvent]]:
    """Take steps until all is answered; `later` gives what is submitted before each."""
    events: dict[str, list[TokenEvent]] = {}
    for number in range(1000):
        for request in later(number):
            scheduler.submit(request)
        step = scheduler.next_step()
        if step is None:
            return events
        for request in step.admitted:
            for index, image in enumerate(request.images):
                engine.add_image(request.id, index, base64.b64encode(image.pixels).decode())
        admitted = tuple(Request.from_json(r.to_json()) for r in step.admitted)  # without pixels
        for event in scheduler.on_tokens(engine.step(replace(step, admitted=admitted))[0]):
            events.setdefault(event.request_id, []).append(event)
    raise AssertionError("no end")


def make_scheduler(engine: Engine, chunk: int = 512) -> Scheduler:
    return Scheduler(
        footprint=engine.footprint(), prefix_cache_bytes=1 << 30, prefill_chunk_size=chunk
    )


def tokens_of(events: list[TokenEvent]) -> list[int]:
    return [event.token for event in events]


@pytest.fixture(scope="module", params=["mlx", "auto"])
def engine(case: VisionCase, request: Any) -> Iterator[Engine]:
    engine = make_engine(case, request.param, speculative="always")
    yield engine
    engine.close()


@pytest.mark.parametrize("chunk", [512, 17])
def test_all_together_as_mlx_vlm_one_by_one(case: VisionCase, engine: Engine, chunk: int) -> None:
    scheduler = make_scheduler(engine, chunk)
    scheduler._step_number = engine._next_step
    scheduler.bypass_cache = True
    requests = [case.request(f"{chunk} {name}", name) for name in CHATS]

    def later(number: int) -> Sequence[Request]:  # they join and leave at different times
        return requests[2 * number : 2 * number + 2]

    events = run(engine, scheduler, later)
    got = {name: tokens_of(events[f"{chunk} {name}"]) for name in CHATS}
    assert got == case.expected
    for name in CHATS:
        logprobs = [event.logprob for event in events[f"{chunk} {name}"]]
        assert np.abs(np.array(logprobs) - case.logprobs[name]).max() < 1e-3, name
    assert not engine._vision._pixels  # type: ignore[union-attr]


def test_one_after_the_other_from_the_cache(case: VisionCase, engine: Engine) -> None:
    """Each twice; alone, so that drafts are verified where the family can."""
    scheduler = make_scheduler(engine)
    scheduler._step_number = engine._next_step
    for name in CHATS:
        for time in ("first", "second"):
            scheduler.submit(case.request(f"{time} {name}", name))
            events = run(engine, scheduler)[f"{time} {name}"]
            assert tokens_of(events) == case.expected[name], (time, name)
        if not scheduler.footprint.needs_checkpoints:  # of short prompts there are none
            assert events[0].cached_tokens > len(case.tokens[name]) - 3
    # The next turn continues behind an image that is not embedded again.
    first = case.request("turn", "two")
    output = tuple(case.expected["two"])
    scheduler.submit(replace(first, tokens=(*first.tokens, *output, 65, 66), id="next"))
    (event, *_) = run(engine, scheduler)["next"]
    assert event.cached_tokens >= len(first.tokens) + len(output) - 1


def test_a_request_that_is_resumed_in_the_middle(case: VisionCase, engine: Engine) -> None:
    scheduler = make_scheduler(engine)
    scheduler._step_number = engine._next_step
    scheduler.bypass_cache = True
    expected = case.expected["two"]
    scheduler.submit(replace(case.request("resumed", "two").resumed_with(expected[:4])))
    assert tokens_of(run(engine, scheduler)["resumed"]) == expected[4:]


def test_drafts_were_accepted_behind_images(case: VisionCase) -> None:
    engine = make_engine(case, "mlx", speculative="always")
    if engine._batch._decoder is None:  # type: ignore[attr-defined]
        pytest.skip("this family's caches cannot be trimmed")

    again = Sampling(seed=1, logit_bias={65: 100.0})
    scheduler = make_scheduler(engine)
    scheduler.submit(replace(case.request("a", "one", sampling=again), max_tokens=40))
    assert tokens_of(run(engine, scheduler)["a"]) == [65] * 40
    assert engine.take_draft_stats().accepted > 10
    engine.close()


def test_the_cache_of_another_image_would_answer_otherwise(case: VisionCase) -> None:
    """Else the tests above could not fail."""
    assert case.expected["one"] != case.expected["other of one size"]
    assert len(case.tokens["one"]) == len(case.tokens["other of one size"])


def test_only_rank_0_reads_and_counts_the_tower(case: VisionCase) -> None:
    checkpoint = Checkpoint.open(case.folder)
    text, spec = read_model_spec(checkpoint), read_model_spec(checkpoint, images=True)
    stored = sum(t.stop - t.start for t in checkpoint.vision_tensors.values())
    assert (text.tower_bytes, spec.tower_bytes) == (0, stored)
    assert spec.total_bytes == text.total_bytes + stored
    plan, layout = Plan.whole(spec, 2), ModelLayout.read(checkpoint)
    assert plan.bytes_of(0)["total"] - plan.bytes_of(1)["total"] == stored
    assert Plan.from_json(plan.to_json()) == plan
    sizes = [
        sum(map(total_bytes, needed.values()))
        for needed in (required_ranges(slices_for(plan, rank, layout)) for rank in (0, 1))
    ]
    assert sizes[0] - sizes[1] == stored


def test_a_checkpoint_without_a_tower(tmp_path: Path) -> None:
    synth(tmp_path / "text", family="qwen3_vl_moe")
    checkpoint = Checkpoint.open(tmp_path / "text")
    assert read_model_spec(checkpoint, images=True).tower_bytes == 0
    assert "without a vision tower" in (image_obstacle(checkpoint, "qwen3_vl_moe") or "")
    assert "mixtral" in (image_obstacle(checkpoint, "mixtral") or "")


@pytest.mark.parametrize("prefix", ["model.visual.", "vision_tower.", "visual."])
@pytest.mark.parametrize("form", ["torch", "bfloat16", "quantized"])
def test_a_tower_as_it_is_published(
    case: VisionCase, tmp_path: Path, prefix: str, form: str
) -> None:
    """With torch's order of axes and its names, in 16 bits, or quantized by mlx-vlm."""
    checkpoint = Checkpoint.open(case.folder)
    plain = vision.load_tower(checkpoint, case.settings, "mlx")
    image = case.request("a", "one").images[0]
    depth = len(checkpoint.config["vision_config"].get("deepstack_visual_indexes", ()))
    weights = dict(tree_flatten(plain.parameters()))
    if form == "torch":
        name = "patch_embed.proj.weight"
        weights[name] = mx.contiguous(weights[name].transpose(0, 4, 1, 2, 3))
    elif form == "bfloat16":
        weights = {name: array.astype(mx.bfloat16) for name, array in weights.items()}
    else:
        wide = [n for n, a in weights.items() if a.ndim == 2 and a.shape[-1] % 32 == 0]
        for name in (n for n in wide if "pos" not in n):
            path = name.removesuffix("weight")
            parts = mx.quantize(weights.pop(name), group_size=32, bits=8)
            weights |= zip((name, f"{path}scales", f"{path}biases"), parts, strict=True)
    file = tmp_path / "model.safetensors"
    mx.save_safetensors(str(file), {f"{prefix}{name}": a for name, a in weights.items()})
    published = replace(
        checkpoint, folder=tmp_path, tensors={t.name: t for t in _read_header(file)}
    )
    tower = vision.load_tower(published, case.settings)
    size = sum(a.nbytes for _, a in tree_flatten(tower.parameters()))
    assert vision.tower_bytes(published) == size
    width = 64
    expected = np.array(ImageEmbedder(case.settings, width, depth, plain).embed(image))
    got = np.array(ImageEmbedder(case.settings, width, depth, tower).embed(image))
    most = {"torch": 1e-4, "bfloat16": 0.05, "quantized": 0.05}[form]
    assert np.abs(got - expected).max() <= most * np.abs(expected).max()


def test_a_tower_that_does_not_fit_is_named(case: VisionCase) -> None:
    checkpoint = Checkpoint.open(case.folder)
    wider = {**checkpoint.config["vision_config"], "intermediate_size": 96}
    changed = replace(checkpoint, config={**checkpoint.config, "vision_config": wider})
    with pytest.raises(CheckpointError, match="vision tower do not fit"):
        vision.load_tower(changed, case.settings)


def test_attention_of_a_tower_in_blocks(case: VisionCase, monkeypatch: pytest.MonkeyPatch) -> None:
    embedder = ImageEmbedder.of(Checkpoint.open(case.folder), case.settings, has_tower=True)
    image = case.request("a", "one").images[0]
    whole = np.array(embedder.embed(image))
    monkeypatch.setattr(vision, "SCORES_BYTES", 4 * 2 * 72 * 7)  # 7 of 72 patches
    parts = np.array(embedder.embed(image))
    assert whole.shape == (18, 64 * (1 + embedder.depth))
    assert np.abs(whole - parts).max() < 1e-5
    attention: Any = type(embedder.tower.blocks[0].attn)  # type: ignore[union-attr]
    names = attention.__call__.__globals__
    assert names["ensure_fused_sdpa"] is vision._attend_in_blocks


@pytest.mark.parametrize(
    "members",
    ['{"size": {"shortest_edge": 0}, "max_pixels": 1}', '{"image_std": [1, 0, 1]}', "[]", "{"],
)
def test_settings_that_make_no_sense(case: VisionCase, tmp_path: Path, members: str) -> None:
    (tmp_path / "preprocessor_config.json").write_text(members)
    config = Checkpoint.open(case.folder).config
    with pytest.raises(CheckpointError, match=r"preprocessor_config\.json"):
        ImageSettings.read(tmp_path, config, case.settings.family)


@pytest.mark.parametrize(
    ("height", "width"), [(1, 1), (7, 900), (20, 40), (500, 500), (3000, 4000), (33, 6000)]
)
def test_sizes_are_those_of_mlx_vlm(height: int, width: int) -> None:
    from mlx_vlm.models.qwen3_vl.processing_qwen3_vl import _smart_resize_image
    from transformers.models.glm4v.image_processing_pil_glm4v import smart_resize

    for side, least, most in ((32, 65536, 1 << 22), (28, 3136, 1003520), (16, 1024, 65536)):
        expected = _smart_resize_image(height, width, side, least, most)
        got = fit_size(height, width, side, least, most)
        assert got == expected or expected[0] * expected[1] > most
        glm = smart_resize(2, height, width, 2, side, 2 * least, 2 * most)
        enlarged = fit_size(height, width, side, least, most, enlarges=True)
        assert enlarged == glm or glm[0] * glm[1] > most
        assert got[0] * got[1] <= most
        assert got[0] % side == got[1] % side == 0

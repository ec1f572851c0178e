"""Training on a clip store: packed passes, several processes, recipes and their cost."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from kinetok.errors import UserError
from kinetok.model.decoder import MotionDecoder
from kinetok.model.presets import DECODERS
from kinetok.train.data.sequences import Sequences, mean_lengths
from kinetok.train.loop import OneProcess
from kinetok.train.packing import PackedDecoder, pack
from kinetok.train.scale import Engine, PackedTask, train
from kinetok.train.scale_recipes import cost, cost_lines, parameters, scale_recipe, step_flop, with_loop

pytest.importorskip("pyarrow", reason="a clip store has a Parquet index, and pyarrow is not installed")
pytest.importorskip("tensorboard", reason="training logs to tensorboard, which is not installed")


@pytest.fixture
def task(trained_store):
    def make(**changes) -> PackedTask:
        engine = {name: changes.pop(name) for name in ("pass_positions", "checkpointing", "compile") if name in changes}
        data = Sequences(trained_store.store, tokenizer=trained_store.tokenizer)
        return PackedTask(replace(trained_store.recipe, **changes), data, OneProcess(), Engine(**engine))

    return make


@pytest.fixture
def recipe(trained_store):
    return trained_store.recipe


def test_passes_and_checkpointing_change_nothing(task) -> None:
    results = []
    for engine in ({}, {"pass_positions": 90}, {"checkpointing": True}):
        one = task(**engine)
        draw, batches = one.feed.step(1)
        if "pass_positions" in engine:
            assert len(batches) > 2
        one.module.train()
        loss = one.passes(draw, batches)["loss"]
        loss.backward()
        results.append((loss.detach(), [p.grad for p in one.module.parameters()]))
    for loss, gradients in results[1:]:
        torch.testing.assert_close(loss, results[0][0], rtol=1e-6, atol=0)
        for one, other in zip(gradients, results[0][1], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs g++ on a CPU, which is not installed")
def test_compiled_blocks_train_the_same(task, recipe, monkeypatch) -> None:
    """With torch's own compiler, each block one graph, which steps of other lengths do not compile again."""
    from torch._dynamo.utils import counters

    compile_module = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **given: compile_module(self, **given, fullgraph=True))
    found = []
    for engine in ({}, {"compile": True}):
        one = task(model=replace(recipe.model, n_layer=1), **engine)
        one.module.train()
        optimizer = torch.optim.SGD(one.module.parameters(), lr=0.1)
        losses = []
        counters.clear()
        for step in range(3):
            optimizer.zero_grad()
            loss = one.passes(*one.feed.step(step))["loss"]
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        found.append((losses, list(one.module.state_dict().values())))
    assert counters["stats"]["unique_graphs"] == 1
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-5)
    for one, other in zip(found[1][1], found[0][1], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_training_clips_are_drawn_alike(task) -> None:
    one = task(batch=330)
    draw = one.feed.draw(0)
    assert (
        set(one.data.splits[draw.clips]) == {"train"} and (np.bincount(draw.clips, minlength=33)[one.train] == 10).all()
    )
    batch = one.feed.batch(draw, np.array([5]))
    first, count, text = int(draw.first[5]), int(draw.count[5]), int(batch.text_lengths[0])
    motion = one.data.tokens(int(draw.clips[5]))[first : first + count]
    assert torch.equal(batch.tokens[text:-1], motion) and batch.targets_counted == count + 1
    assert torch.equal(batch.text.float(), one.data.text(int(draw.captions[5]))[:text])


def test_more_processes_than_data_and_no_fitting_clips(trained_store, recipe, task) -> None:
    data = Sequences(trained_store.store, tokenizer=trained_store.tokenizer)
    many = OneProcess()
    many.world = 9
    with pytest.raises(UserError, match="more processes than data: 9 processes for 33 clips"):
        PackedTask(recipe, data, many)
    with pytest.raises(UserError, match="of 90 to 99 tokens in the splits train and val, got 0 and 0"):
        task(min_tokens=90, max_tokens=99)


def test_one_process_from_store_to_model_with_samples(trained_store, recipe, tmp_path: Path) -> None:
    from kinetok.model.pretrained import load_pretrained

    pytest.importorskip("PIL", reason="samples are drawn with pillow, which is not installed")
    data = {"data": trained_store.store, "tokenizer": trained_store.tokenizer, "out": tmp_path / "run"}
    wanted = recipe.model
    recipe = replace(with_loop(recipe, steps=4), bf16=True)
    recipe = replace(recipe, loop=replace(recipe.loop, ema=None, clip_norm=None))
    model = load_pretrained(train(recipe=recipe, sample_every=2, **data), "cpu", "float32")
    assert model.decoder.config == wanted and model.text_encoder == {"type": "none", "name": "numbers"}
    best = torch.load(tmp_path / "run" / "best.pt", weights_only=True)["model"]
    head = model.decoder.head.weight
    torch.testing.assert_close(head, best["decoder.head.weight"].half().float(), rtol=0, atol=0)
    assert {f"step-{step:08d}-{n}.png" for step in (2, 4) for n in range(3)} <= {
        path.name for path in (tmp_path / "run" / "samples").iterdir()
    }
    line = json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[0])
    assert line["tokens"] > 100 and line["seconds_per_step"] > 0
    with pytest.raises(UserError, match="a run is already here"):
        train(recipe=recipe, **data)
    best_file = tmp_path / "run" / "best.pt"
    best_file.write_bytes(best_file.read_bytes()[:3000])
    with pytest.raises(UserError, match=r"best\.pt: expected the weights of this run"):
        train(recipe=recipe, resume=True, **data)
    with pytest.raises(UserError, match="it differs in seed"):
        train(recipe=with_loop(recipe, seed=5), resume=True, **data)
    with pytest.raises(UserError, match="it differs in n_layer"):  # a checkpoint of another config
        train(recipe=replace(recipe, model=replace(recipe.model, n_layer=1)), resume=True, **data)
    with pytest.raises(UserError, match="kinetok data tokens"):
        (tmp_path / "other.pt").write_bytes(trained_store.tokenizer.read_bytes() + b" ")
        train(recipe=recipe, **{**data, "tokenizer": tmp_path / "other.pt"})


def test_the_lengths_of_a_store_are_those_of_its_training_clips(trained_store, tmp_path: Path) -> None:
    """Ten captions of 3 features and 23 of 4; the 7 held-out clips do not count."""
    text, motion = mean_lengths(trained_store.store, 150, 1, 99) or (0, 0)
    assert text == pytest.approx((10 * 3 + 23 * 4) / 33)
    assert motion == np.mean([15 + number % 20 for number in range(33)])
    copy = shutil.copytree(trained_store.store, tmp_path / "store")
    (copy / "text" / "lengths.bin").write_bytes(b"1234")
    with pytest.raises(UserError, match=r"lengths\.bin: expected 160 bytes for the clips of this store"):
        mean_lengths(copy, 150, 1, 99)


def test_samples_are_of_different_captions(task, monkeypatch, tmp_path: Path) -> None:
    made = task()
    own = made.data.caption(made.held_out, np.zeros(7))
    monkeypatch.setattr(made.data, "caption", lambda clips, chance: own[[0, 0, 0, 4, 0, 2, 6]])
    samples = made.samples(None, None, None, tmp_path)
    assert list(samples.texts) == ["a person does 33", "a person does 37", "a person does 35"]
    assert torch.equal(samples.texts["a person does 37"], made.data.text(int(own[4])))


def test_every_size_has_a_recipe_with_the_papers_numbers() -> None:
    for size in DECODERS:
        recipe = scale_recipe(f"motionmillion-{size.lower()}")
        assert (recipe.batch, recipe.loop.steps, recipe.loop.lr) == (640, 240_000, 4e-4)
        assert recipe.model.codebook == 64000 and recipe.max_text + recipe.max_tokens + 1 == recipe.model.block_size
    with pytest.raises(UserError, match=r"mini, smoke or one of .*motionmillion-7b"):
        scale_recipe("motionmillion-8b")


def test_the_cost_counts_what_is_there(recipe) -> None:
    config = recipe.model
    module = MotionDecoder(config)
    assert parameters(config) == sum(p.numel() for p in module.parameters())
    assert parameters(scale_recipe("motionmillion-7b").model) == pytest.approx(7.8e9, rel=0.05)
    found = cost(recipe, processes=4, pass_positions=100, tokens_per_second=1000.0, text=5, motion=20)
    assert found.tokens_per_step == 200 and found.days == pytest.approx(6 * 200 / 1000 / 86400)
    assert found.state_bytes == 5 * found.parameters  # 20 bytes with the average, over 4 processes
    unmeasured = cost(recipe, processes=1, pass_positions=100)
    assert unmeasured.days is None and "not measured" in cost_lines("x", recipe, unmeasured, longest=True)[-1]
    with pytest.raises(UserError, match="above 0"):
        cost(recipe, processes=0, pass_positions=100)
    for rate in (0.0, float("inf"), float("nan")):
        with pytest.raises(UserError, match="expected tokens a second above 0, got"):
            cost(recipe, processes=1, pass_positions=100, tokens_per_second=rate)
    with pytest.raises(UserError, match="more processes than data: 9 processes for batches of 8"):
        cost(recipe, processes=9, pass_positions=100)


def test_what_the_data_has_to_bring(recipe) -> None:
    """A GPU's share of the measured rate; without one what arithmetic gives for an H100, whatever the number of GPUs."""
    found = cost(recipe, processes=4, pass_positions=100, tokens_per_second=1000.0, text=5, motion=20)
    assert (found.tokens_per_second, found.clips_per_second) == pytest.approx((250, 10))
    assert "data per GPU: 10.0 clips/s, 250 tokens/s, at that rate" in cost_lines("x", recipe, found, longest=False)
    for processes in (1, 8):
        found = cost(recipe, processes=processes, pass_positions=100, text=5, motion=20)
        assert found.clips_per_second == pytest.approx(0.46 * 989e12 / step_flop(recipe.model, 1, 5, 20))
        assert "for an H100 at 46% of 989 TFLOP/s" in cost_lines("x", recipe, found, longest=False)[-2]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_memory_is_what_autograd_keeps(recipe, checkpointing: bool, through_operators) -> None:
    """Storages kept between forward and backward, in bf16 through the operators, as on a GPU; six blocks of width 128."""
    config = replace(recipe.model, n_layer=6, n_embd=128, codebook=1000)
    torch.manual_seed(0)
    packed = PackedDecoder(MotionDecoder(config), checkpointing=checkpointing).train()
    texts = [torch.randn(9, config.text_dim) for _ in range(8)]
    batch = pack([(text, torch.randint(1000, (50 + 4 * (at % 2),))) for at, text in enumerate(texts)], config)
    known = {parameter.untyped_storage().data_ptr() for parameter in packed.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x), torch.autocast("cpu", torch.bfloat16):
        loss = packed(batch)
    asked = replace(recipe, model=config, bf16=True, max_text=9, max_tokens=54)
    found = cost(asked, processes=1, pass_positions=10**6, checkpointing=checkpointing, text=9, motion=53)
    # There for a while, but not kept: a chunk of logits; of a block that is computed again everything.
    positions = len(batch.tokens)
    expected = found.activation_bytes - positions / 10 * config.head_rows * 2 + found.working_bytes
    if checkpointing:
        plain = cost(asked, processes=1, pass_positions=10**6, text=9, motion=53)
        input_bytes = 4 * positions * config.n_embd
        again = (plain.activation_bytes - found.activation_bytes + input_bytes * config.n_layer) / (config.n_layer - 1)
        expected -= again + 2 * sum(p.numel() for p in packed.parameters())  # and no copies of the weights
    assert sum(kept.values()) == pytest.approx(expected, rel=0.04)
    del loss


def test_operations_are_those_that_torch_counts(recipe) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    config = replace(recipe.model, tie_weights=False)
    packed = PackedDecoder(MotionDecoder(config))
    text, motion = 7, 30
    batch = pack([(torch.randn(text, 6), torch.randint(config.codebook, (motion - 1,)))], config)
    with FlopCounterMode(display=False) as counter:
        packed(batch).backward()
    # What torch does not count: the fused head, the attention of a CPU; and the features' own gradient is not computed.
    head = 3 * 2 * motion * config.n_embd * config.head_rows
    seen = text * text + motion * text + motion * (motion + 1) / 2
    features = 2 * text * config.text_dim * config.n_embd
    uncounted = head + 3 * 4 * config.n_embd * seen * config.n_layer + features
    assert counter.get_total_flops() == step_flop(config, 1, text, motion) - uncounted


def test_the_command_line(trained_store, tmp_path: Path, monkeypatch) -> None:
    from typer.testing import CliRunner

    from kinetok.cli import app

    def said(*words: str) -> str:
        result = CliRunner().invoke(app, ["train", "decoder", *words])
        if isinstance(result.exception, UserError):
            return str(result.exception)
        assert result.exit_code == 0, result.output
        return result.output

    dry = said("--recipe", "motionmillion-7b", "--dry-run", "--processes", "40", "--tokens-per-second", "200000")
    assert "7,8" in dry and "40 of them" in dry and "days: 2.7" in dry
    assert "data per GPU: 16.6 clips/s, 5,000 tokens/s, at that rate" in dry and "give --data STORE" in dry
    assert "not measured" in said("--recipe", "motionmillion-3b", "--dry-run")
    small = said("--recipe", "motionmillion-44m", "--dry-run", "--data", str(trained_store.store))
    assert "at most" not in small and "loader: not measured (" in small and "expected a trained tokenizer" in small
    monkeypatch.setattr("kinetok.train.rates.SECONDS", 0.01)
    tokens = ("--data", str(trained_store.store), "--tokenizer", str(trained_store.tokenizer))
    measured = said("--recipe", "smoke", "--dry-run", "--processes", "16", *tokens)
    assert re.search(
        r"loader: [\d,]*[1-9][\d,]* clips/s of one worker, measured now for 0.01 s; a process has 3", measured
    )
    run = ("--recipe", "motionmillion-44m", "--out", str(tmp_path / "run"), "--data", str(tmp_path))
    assert "expected a clip store" in said(*run, "--tokenizer", str(trained_store.tokenizer))
    assert "run kinetok train tokenizer first" in said(*run, "--tokenizer", str(tmp_path / "none.pt"))
    assert "mini, smoke or one of" in said("--recipe", "motionmillion-8b", "--dry-run")
    assert "expected a clip store" in said("--recipe", "motionmillion-7b", "--dry-run", "--data", str(tmp_path))
    for words in (["--processes", "2"], ["--tokens-per-second", "1"]):
        assert f"{words[0]} goes with --dry-run" in said("--recipe", "smoke", *words)
    for words in (
        ["--dry-run"],
        ["--positions", "9"],
        ["--ema", "0.9"],
        ["--clip-norm", "1"],
        ["--compile"],
        ["--checkpointing"],
    ):
        assert f"{words[0]} goes with a recipe for a clip store" in said("--recipe", "mini", *words)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "the recipe mini trains in one process: start it without torchrun" in said()
    assert "fine-tuning trains in one process" in said("--init", "default")
    assert not (tmp_path / "run").exists()

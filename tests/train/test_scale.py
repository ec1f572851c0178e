"""Training on a clip store: packed passes, several processes, recipes and their cost."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from kinetok.errors import UserError
from kinetok.model.config import DecoderConfig, TokenizerConfig
from kinetok.model.decoder import MotionDecoder
from kinetok.model.presets import DECODERS
from kinetok.model.tokenizer import MotionTokenizer
from kinetok.train.optim import LoopConfig
from kinetok.train.scale_recipes import ScaleRecipe, cost, cost_lines, parameters, scale_recipe, step_flop

pytest.importorskip("pyarrow", reason="a clip store has a Parquet index, and pyarrow is not installed")
pytest.importorskip("tensorboard", reason="training logs to tensorboard, which is not installed")
TOKENIZER = TokenizerConfig(nb_code=256, code_dim=8, width=8, depth=1)
RECIPE = ScaleRecipe(
    model=DecoderConfig(n_layer=2, n_head=2, n_embd=16, codebook=TOKENIZER.codebook, text_dim=6, block_size=80),
    loop=LoopConfig(steps=6, lr=3e-3, warmup=2, validate_every=3, save_every=2, log_every=1, ema=0.9),
    batch=8,
    min_tokens=5,
    max_tokens=60,
    bf16=False,
)


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    """A store of 40 clips with tokens and text features, and the tokenizer beside it."""
    from kinetok.train.data import sequences
    from kinetok.train.data.shard_import import import_shards
    from kinetok.train.data.shards import ClipStore
    from kinetok.train.decoder import load_tokenizer

    folder = tmp_path_factory.mktemp("scale")
    source = folder / "MotionMillion"
    rng = np.random.default_rng(0)
    for number in range(40):
        for kind, suffix in (("motion_data/vector_272", "npy"), ("texts", "txt")):
            path = source / kind / f"{number}.{suffix}"
            path.parent.mkdir(parents=True, exist_ok=True)
            if suffix == "npy":
                np.save(path, rng.standard_normal((30 + 2 * (number % 20), 272)).astype(np.float32))
            else:
                path.write_text(f"a person does {number}\n" * (1 + number % 2))
    lists = source / "split/version1/t2m_60_300"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("\n".join(map(str, range(33))))
    (lists / "val.txt").write_text("\n".join(map(str, range(33, 40))))
    import_shards(source, folder / "store", clips=16)
    torch.manual_seed(0)
    tokenizer = MotionTokenizer(TOKENIZER)
    from dataclasses import asdict

    torch.save(
        {
            "config": asdict(TOKENIZER),
            "model": tokenizer.state_dict(),
            "mean": torch.zeros(272, dtype=torch.float64),
            "std": torch.ones(272, dtype=torch.float64),
        },
        folder / "tokenizer.pt",
    )
    clips = ClipStore(folder / "store")
    sequences.write_tokens(clips, folder / "tokenizer.pt", *load_tokenizer(folder / "tokenizer.pt"))

    class Encoder:
        dim, name = 6, "numbers"

        def encode(self, texts):
            return [torch.linspace(0, len(text), 6 * (3 + len(text) % 5)).view(-1, 6) for text in texts]

    real = sequences.text_encoder
    sequences.text_encoder = lambda spec: Encoder()  # type: ignore[assignment,return-value]
    try:
        sequences.write_text(clips, {"type": "none", "name": "numbers"})
    finally:
        sequences.text_encoder = real
    return folder


def task(store: Path, recipe: ScaleRecipe = RECIPE, **engine):
    from kinetok.train.data.sequences import Sequences
    from kinetok.train.loop import OneProcess
    from kinetok.train.scale import Engine, PackedTask

    data = Sequences(store / "store", tokenizer=store / "tokenizer.pt")
    return PackedTask(recipe, data, OneProcess(), Engine(**engine))


def test_passes_and_checkpointing_change_nothing(store: Path) -> None:
    results = []
    for engine in ({}, {"pass_positions": 90}, {"checkpointing": True}):
        one = task(store, **engine)
        draw = one.draw(np.random.default_rng(1))
        if "pass_positions" in engine:
            assert one._passes(draw) > 2
        one.module.train()
        loss = one.passes(draw)["loss"]
        loss.backward()
        results.append((loss.detach(), [p.grad for p in one.module.parameters()]))
    for loss, gradients in results[1:]:
        torch.testing.assert_close(loss, results[0][0], rtol=1e-6, atol=0)
        for one, other in zip(gradients, results[0][1], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7)


def test_compiled_blocks_are_whole_graphs(store: Path, monkeypatch) -> None:
    compile_module = torch.nn.Module.compile
    captured = {"backend": "aot_eager", "fullgraph": True}  # inductor's own work is torch's to test
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **given: compile_module(self, **given, **captured))
    losses = []
    for engine in ({}, {"compile": True}):
        one = task(store, **engine)
        one.module.train()
        loss = one.passes(one.draw(np.random.default_rng(1)))["loss"]
        loss.backward()
        losses.append((loss.detach(), one.packed.decoder.blocks[0].qkv.weight.grad))
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-4, atol=1e-6)


def test_draws_follow_the_reference(store: Path) -> None:
    one = task(store, replace(RECIPE, batch=3000))
    draw = one.draw(np.random.default_rng(0))
    dropped = one.data.lengths[draw.clips] - draw.count
    assert set(dropped) == {0, 1} and abs(dropped.mean() - 1 / 3) < 0.03
    assert abs(draw.first[dropped == 1].mean() - 0.5) < 0.06 and not draw.first[dropped == 0].any()
    assert set(one.data.splits[draw.clips]) == {"train"} and len(set(draw.clips)) == 33
    features, motion = one._items(draw, [5])[0]
    whole = one.data.tokens(int(draw.clips[5]))
    assert torch.equal(motion, whole[draw.first[5] :][: draw.count[5]]) and features.shape[1] == 6


def test_more_processes_than_data_and_no_fitting_clips(store: Path) -> None:
    from kinetok.train.data.sequences import Sequences
    from kinetok.train.loop import OneProcess
    from kinetok.train.scale import PackedTask

    data = Sequences(store / "store", tokenizer=store / "tokenizer.pt")
    many = OneProcess()
    many.world = 9
    with pytest.raises(UserError, match="more processes than data: 9 processes for 33 clips"):
        PackedTask(RECIPE, data, many)
    with pytest.raises(UserError, match="of 90 to 99 tokens in the splits train and val, got 0 and 0"):
        PackedTask(replace(RECIPE, min_tokens=90, max_tokens=99), data, OneProcess())


SCRIPT = """
import sys, torch, pickle
from pathlib import Path
sys.path.insert(0, {src!r})
torch.set_num_threads(1)
from kinetok.train import scale
recipe = pickle.loads(bytes.fromhex(sys.argv[1]))
folder, out = Path(sys.argv[2]), sys.argv[3]
import os, time
if "SLOW" in os.environ:
    plain = scale.PackedTask.loss
    def slow(self, step, rng):
        print("step", step, flush=True)
        time.sleep(0.2)
        return plain(self, step, rng)
    scale.PackedTask.loss = slow
from kinetok.errors import UserError
try:
    data, tokenizer = folder / "store", folder / "tokenizer.pt"
    engine = scale.Engine(pass_positions=90, checkpointing=True) if "PASSES" in os.environ else None
    scale.train(recipe=recipe, data=data, tokenizer=tokenizer, out=out, resume="RESUME" in os.environ, engine=engine)
except UserError as error:
    print("kinetok:", error, file=sys.stderr, flush=True)
    os._exit(2)
"""


def start(store: Path, out: Path, world: int, recipe: ScaleRecipe, **extra: str) -> list[subprocess.Popen[str]]:
    """The processes that torchrun would start, with its variables."""
    import pickle

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = SCRIPT.format(src=str(Path(__file__).resolve().parents[2] / "src"))
    processes = []
    for rank in range(world):
        variables = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "OMP_NUM_THREADS": "1"}
        variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), **extra}
        command = [sys.executable, "-c", script, pickle.dumps(recipe).hex(), str(store), str(out)]
        pipe = subprocess.PIPE
        processes.append(
            subprocess.Popen(command, env={**os.environ, **variables}, stdout=pipe, stderr=pipe, text=True)
        )
    return processes


def losses(run: Path) -> list[tuple[str, int, float]]:
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [(one["kind"], one["step"], one["loss"]) for one in lines]


def test_two_processes_are_one(store: Path, tmp_path: Path) -> None:
    """FSDP2 over gloo, in several passes with recomputed activations: one process's losses and weights within float
    tolerance. Then a cut checkpoint, of which the one before takes the place."""
    runs = {1: start(store, tmp_path / "1", 1, RECIPE), 2: start(store, tmp_path / "2", 2, RECIPE, PASSES="1")}
    for processes in runs.values():
        for process in processes:
            output, errors = process.communicate(timeout=300)
            assert process.returncode == 0, output + errors
    one, two = (losses(tmp_path / name) for name in "12")
    assert [a[:2] for a in one] == [a[:2] for a in two] and len(one) == 8
    np.testing.assert_allclose([a[2] for a in one], [a[2] for a in two], rtol=1e-5)
    assert one[-1][2] < one[0][2]
    weights = [torch.load(tmp_path / name / "best.pt", weights_only=True)["model"] for name in "12"]
    assert weights[0].keys() == weights[1].keys()
    for name in weights[0]:
        torch.testing.assert_close(weights[0][name], weights[1][name], rtol=1e-4, atol=1e-5)
    folders = sorted((tmp_path / "2" / "checkpoints").iterdir())
    assert [folder.name for folder in folders] == ["step-00000004", "step-00000006"]  # the last two
    model = MotionDecoder(RECIPE.model)
    model.load_state_dict({name.removeprefix("decoder."): value for name, value in weights[1].items()})
    assert (tmp_path / "2" / "model" / "kinetok.json").exists()

    part = next(path for path in folders[1].iterdir() if path.suffix == ".distcp")
    part.write_bytes(part.read_bytes()[:-10])
    (tmp_path / "2" / "best.pt").unlink()
    for process in (again := start(store, tmp_path / "2", 2, RECIPE, RESUME="1", PASSES="1")):
        process.wait(timeout=300)
    output, errors = again[0].communicate()
    assert again[0].returncode == 0, errors
    assert "step-00000006 is damaged" in output.replace("\n", "") and "going on from step-00000004" in output
    resumed = losses(tmp_path / "2")
    assert resumed[:6] == two[:6]
    np.testing.assert_allclose([a[2] for a in resumed], [a[2] for a in two], rtol=1e-6)


def test_a_dead_process_is_loud(store: Path, tmp_path: Path) -> None:
    recipe = replace(RECIPE, bf16=True, loop=replace(RECIPE.loop, steps=1000, save_every=1000, validate_every=1000))
    first, second = start(store, tmp_path / "run", 2, recipe, SLOW="1")
    assert second.stdout is not None
    while "step 2" not in second.stdout.readline():
        assert second.poll() is None
    second.send_signal(signal.SIGKILL)
    began = time.monotonic()
    _, errors = first.communicate(timeout=300)
    assert first.returncode == 2 and "process 0 of 2 lost another one" in errors and "--resume" in errors
    assert time.monotonic() - began < 300
    second.communicate()


def test_one_process_from_store_to_model_with_samples(store: Path, tmp_path: Path) -> None:
    from kinetok.model.pretrained import load_pretrained
    from kinetok.train.scale import train

    pytest.importorskip("PIL", reason="samples are drawn with pillow, which is not installed")
    data = {"data": store / "store", "tokenizer": store / "tokenizer.pt", "out": tmp_path / "run"}
    recipe = replace(RECIPE, bf16=True, loop=replace(RECIPE.loop, ema=None, clip_norm=None))
    model = load_pretrained(train(recipe=recipe, steps=4, sample_every=2, **data), "cpu", "float32")
    assert model.decoder.config == RECIPE.model and model.text_encoder == {"type": "none", "name": "numbers"}
    best = torch.load(tmp_path / "run" / "best.pt", weights_only=True)["model"]
    head = model.decoder.head.weight
    torch.testing.assert_close(head, best["decoder.head.weight"].half().float(), rtol=0, atol=0)
    assert {f"step-{step:08d}-{n}.png" for step in (2, 4) for n in range(3)} <= {
        path.name for path in (tmp_path / "run" / "samples").iterdir()
    }
    line = json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[0])
    assert line["tokens"] > 100 and line["seconds_per_step"] > 0
    with pytest.raises(UserError, match="a run is already here"):
        train(recipe=recipe, steps=4, **data)
    with pytest.raises(UserError, match="it differs in seed"):
        train(recipe=recipe, steps=4, seed=5, resume=True, **data)
    with pytest.raises(UserError, match="kinetok data tokens"):
        (tmp_path / "other.pt").write_bytes((store / "tokenizer.pt").read_bytes() + b" ")
        train(recipe=recipe, **{**data, "tokenizer": tmp_path / "other.pt"})


def test_every_size_has_a_recipe_with_the_papers_numbers() -> None:
    for size in DECODERS:
        recipe = scale_recipe(f"motionmillion-{size.lower()}")
        assert (recipe.batch, recipe.loop.steps, recipe.loop.lr) == (640, 240_000, 4e-4)
        assert recipe.model.codebook == 64000 and recipe.max_text + recipe.max_tokens + 1 == recipe.model.block_size
    with pytest.raises(UserError, match=r"mini or one of .*motionmillion-7b"):
        scale_recipe("motionmillion-8b")


def test_the_cost_counts_what_is_there() -> None:
    config = RECIPE.model
    module = MotionDecoder(config)
    assert parameters(config) == sum(p.numel() for p in module.parameters())
    assert parameters(scale_recipe("motionmillion-7b").model) == pytest.approx(7.8e9, rel=0.05)
    found = cost(RECIPE, processes=4, pass_positions=100, tokens_per_second=1000.0, text=5, motion=20)
    assert found.tokens_per_step == 200 and found.days == pytest.approx(6 * 200 / 1000 / 86400)
    assert found.state_bytes == 5 * found.parameters  # 20 bytes with the average, over 4 processes
    unmeasured = cost(RECIPE, processes=1, pass_positions=100)
    assert unmeasured.days is None and "not measured" in cost_lines("x", RECIPE, unmeasured, longest=True)[-1]
    with pytest.raises(UserError, match="above 0"):
        cost(RECIPE, processes=0, pass_positions=100)


def test_operations_are_those_that_torch_counts() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    from kinetok.train.packing import PackedDecoder, pack

    config = replace(RECIPE.model, tie_weights=False)
    packed = PackedDecoder(MotionDecoder(config))
    text, motion = 7, 30
    batch = pack([(torch.randn(text, 6), torch.randint(TOKENIZER.codebook, (motion - 1,)))], config)
    with FlopCounterMode(display=False) as counter:
        packed(batch).backward()
    # What torch does not count: the fused head, the attention of a CPU; and the features' own gradient is not computed.
    head = 3 * 2 * motion * config.n_embd * config.head_rows
    seen = text * text + motion * text + motion * (motion + 1) / 2
    features = 2 * text * config.text_dim * config.n_embd
    uncounted = head + 3 * 4 * config.n_embd * seen * config.n_layer + features
    assert counter.get_total_flops() == step_flop(config, 1, text, motion) - uncounted


def test_the_command_line(store: Path, tmp_path: Path) -> None:
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
    assert "not measured" in said("--recipe", "motionmillion-3b", "--dry-run")
    small = said("--recipe", "motionmillion-44m", "--dry-run", "--data", str(store / "store"))
    assert "at most" not in small
    run = ("--recipe", "motionmillion-44m", "--out", str(tmp_path / "run"), "--data", str(tmp_path))
    assert "expected a clip store" in said(*run, "--tokenizer", str(store / "tokenizer.pt"))
    assert "run kinetok train tokenizer first" in said(*run, "--tokenizer", str(tmp_path / "none.pt"))
    assert "mini or one of" in said("--recipe", "motionmillion-8b", "--dry-run")
    assert "--dry-run goes with" in said("--recipe", "mini", "--dry-run")
    assert not (tmp_path / "run").exists()

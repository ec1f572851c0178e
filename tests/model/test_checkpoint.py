"""Importing released files: sizes from shapes, every wrong key named, nothing left behind on failure."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from kinetok.errors import UserError
from kinetok.kernels.kinematics import forward_kinematics
from kinetok.model.checkpoint import (
    estimate_offsets,
    import_checkpoint,
    load_released_decoder,
    load_released_tokenizer,
    open_decoder,
)
from kinetok.model.config import DecoderConfig, TokenizerConfig
from kinetok.model.decoder import MotionDecoder
from kinetok.model.pretrained import load_pretrained, own_tensors
from kinetok.model.released import decoder_rows, to_released, tokenizer_rows
from kinetok.model.restricted import read_tensors
from kinetok.model.tokenizer import MotionTokenizer
from kinetok.motion.features import FEATURES, from_motion
from kinetok.motion.skeleton import CANONICAL_OFFSETS, PARENTS

SMALL = DecoderConfig(n_layer=2, n_head=2, n_embd=16, codebook=1920, text_dim=12)
TOKENIZER = TokenizerConfig(nb_code=2048, code_dim=10, width=8, depth=2)


def released_decoder(config: DecoderConfig = SMALL, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    torch.manual_seed(2)
    module = MotionDecoder(config).to(dtype)
    return {k: v.detach().clone() for k, v in to_released(decoder_rows(config), own_tensors(module)).items()}


def released_tokenizer(config: TokenizerConfig = TOKENIZER) -> dict[str, torch.Tensor]:
    torch.manual_seed(3)
    tensors = to_released(tokenizer_rows(config), own_tensors(MotionTokenizer(config)))
    constants = {
        f"{place}.{name}": value
        for place in ("encoder.model.0", "decoder.model.6")
        for name, value in (("wavelets", torch.full((2,), 0.5**0.5)), ("_arange", torch.arange(2)))
    }
    return {f"vqvae.{k}": v.detach().contiguous() for k, v in (tensors | constants).items()}


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    source = tmp_path / "source"
    source.mkdir()
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))])
    module = {"module." + k: v for k, v in released_decoder(dtype=torch.bfloat16).items()}
    torch.save({"trans": module, "optimizer": optimizer, "nb_iter": 3}, source / "decoder.pth")
    torch.save({"net": released_tokenizer()}, source / "tokenizer.pth")
    np.save(source / "mean.npy", np.linspace(-1, 1, FEATURES))
    np.save(source / "std.npy", np.linspace(0.1, 1, FEATURES).astype(np.float32))
    names = {"tokenizer": "tokenizer.pth", "decoder": "decoder.pth", "mean": "mean.npy", "std": "std.npy"}
    return {name: source / file for name, file in names.items()}


def refused(call, *arguments, **keywords) -> str:
    with pytest.raises(UserError) as caught:
        call(*arguments, **keywords)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_import_writes_a_model(tmp_path: Path, files: dict[str, Path]) -> None:
    said: list[str] = []
    out = import_checkpoint(tmp_path / "out", **files, config={"n_head": 2}, progress=said.append, shard_bytes=20_000)
    bundle = load_pretrained(out, device="cpu", dtype="stored")
    assert bundle.decoder.config == SMALL and bundle.tokenizer.config == TOKENIZER
    assert {value.dtype for value in bundle.decoder.parameters()} == {torch.bfloat16}
    back = to_released(decoder_rows(SMALL), own_tensors(bundle.decoder))
    wanted = released_decoder(dtype=torch.bfloat16)
    assert back.keys() == wanted.keys() and all(torch.equal(back[k], wanted[k]) for k in wanted)
    back = to_released(tokenizer_rows(TOKENIZER), own_tensors(bundle.tokenizer))
    wanted = {k.removeprefix("vqvae."): v for k, v in released_tokenizer().items()}
    assert all(torch.equal(back[k], wanted[k]) for k in back)
    assert np.array_equal(bundle.mean, np.linspace(-1, 1, FEATURES)) and bundle.offsets.shape == (22, 3)
    assert np.array_equal(bundle.std, np.linspace(0.1, 1, FEATURES).astype(np.float32).astype(float))
    assert bundle.provenance["decoder file"] == "decoder.pth" and len(said) > 3
    assert len(list(out.glob("decoder-*"))) > 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_import_of_the_safetensors_layout(tmp_path: Path, files: dict[str, Path], suffix: str) -> None:
    folder = tmp_path / "artifact"
    folder.mkdir()
    write = save_file if suffix == "safetensors" else torch.save
    write(released_tokenizer(), folder / f"fsq.{suffix}")
    write(released_decoder(), folder / f"ar.{suffix}")
    for name in ("mean", "std"):
        (folder / f"{name}.npy").write_bytes(files[name].read_bytes())
    described = {
        "model_type": "motionmillion",
        "artifact_format": "motius-motionmillion-v1",
        "config": {
            "vqvae": {"nb_code": 2048, "activation": "silu", "norm": "LN", "use_patcher": True, "patch_method": "haar"},
            "ar": {"config_name": "3B", "block_size": 200, "clip_dim": 12, "n_head": 2},
        },
    }
    (folder / "mm_config.json").write_text(json.dumps(described))
    bundle = load_pretrained(import_checkpoint(tmp_path / "out", artifact=folder), device="cpu")
    assert bundle.decoder.config.block_size == 200 and bundle.tokenizer.config.activation == "silu"
    (folder / "mm_config.json").write_text(json.dumps({**described, "artifact_format": "other"}))
    assert "artifact_format" in refused(import_checkpoint, tmp_path / "two", artifact=folder)
    (folder / "mm_config.json").write_text(json.dumps({"config": {"ar": [1]}}))
    assert "config.ar" in refused(import_checkpoint, tmp_path / "two", artifact=folder)
    (folder / "mm_config.json").unlink()
    (folder / "mean.npy").unlink()
    assert "missing: mean" in refused(import_checkpoint, tmp_path / "two", artifact=folder)
    assert "folder" in refused(import_checkpoint, tmp_path / "two", artifact=tmp_path / "absent")


@pytest.mark.parametrize(
    ("array", "says"),
    [
        (np.ones(271), "272"),
        (np.ones((2, FEATURES)), "272"),
        (np.zeros(FEATURES), "zero or negative"),
        (np.full(FEATURES, np.nan), "NaN"),
        (np.array(["a"] * FEATURES), "272 numbers"),
        (np.ones(FEATURES, dtype=object), "272 numbers"),
        (np.ones(FEATURES, dtype=complex), "272 numbers"),
        (b"not an array", "272 numbers"),
        (b"", "empty"),
        (b"x" * (2 << 20), "bytes"),
    ],
)
def test_bad_statistics(tmp_path: Path, files: dict[str, Path], array, says: str) -> None:
    bad = files["std"]
    if isinstance(array, bytes):
        bad.write_bytes(array)
    else:
        np.save(bad, array, allow_pickle=True)
    text = refused(import_checkpoint, tmp_path / "out", **files, config={"n_head": 2})
    assert says in text and "std.npy" in text
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_missing_files_and_options(tmp_path: Path, files: dict[str, Path]) -> None:
    out = tmp_path / "out"
    assert "give n_head" in refused(import_checkpoint, out, **files)
    assert "missing: mean, std" in refused(
        import_checkpoint, out, tokenizer=files["tokenizer"], decoder=files["decoder"], config={"n_head": 2}
    )
    assert "No such file" in refused(import_checkpoint, out, **{**files, "decoder": tmp_path / "absent.pth"})
    swapped = {**files, "decoder": files["tokenizer"]}
    assert "'trans'" in refused(import_checkpoint, out, **swapped, config={"n_head": 2})
    other = DecoderConfig(n_layer=2, n_head=2, n_embd=16, codebook=1000, text_dim=12)
    torch.save({"trans": released_decoder(other)}, files["decoder"])
    assert "same codebook" in refused(import_checkpoint, out, **files, config={"n_head": 2, "nb_code": 2048})
    assert not out.exists()


def test_every_wrong_key_is_named(tmp_path: Path) -> None:
    tensors = released_decoder()
    tensors["llama_proj.extra"] = tensors.pop("llama_proj.bias")
    tensors["transformer.ln_f.scale"] = torch.ones(17)
    tensors["transformer.h.1.rms_1.scale"] = "text"
    tensors["transformer.h.0.rms_1.scale"] = torch.ones(16, dtype=torch.int64)
    path = tmp_path / "a.pth"
    torch.save({"trans": tensors}, path)
    text = refused(load_released_decoder, path, n_head=2)
    for part in (
        "missing: llama_proj.bias",
        "unexpected: llama_proj.extra",
        "transformer.ln_f.scale (expected [16], got [17])",
        "transformer.h.1.rms_1.scale (expected a tensor, got str)",
        "transformer.h.0.rms_1.scale (expected floating point",
    ):
        assert part in text, text
    torch.save({"trans": {f"x{i}": torch.ones(1) for i in range(50)}}, path)
    assert "expected a released transformer" in refused(load_released_decoder, path)
    torch.save({"net": {f"x{i}": torch.ones(1) for i in range(50)}}, path)
    text = refused(load_released_tokenizer, path)
    assert "x19" in text and "x20" not in text and "and 30 more" in text and "missing: encoder.model" in text


@pytest.mark.parametrize("place", ["model.1.weight", "model.3.0.weight", "model.4.weight", "model.0.wavelets"])
def test_tokenizer_tensor_without_axes(tmp_path: Path, place: str) -> None:
    torch.save({"net": {**released_tokenizer(), f"vqvae.encoder.{place}": torch.tensor(1.0)}}, tmp_path / "a.pth")
    assert "do not fit" in refused(load_released_tokenizer, tmp_path / "a.pth", nb_code=2048)


@pytest.mark.parametrize("name", ["lm_head.weight", "llama_proj.weight", "transformer.wte.weight"])
def test_decoder_tensor_without_axes(tmp_path: Path, name: str) -> None:
    torch.save({"trans": {**released_decoder(), name: torch.tensor(1.0)}}, tmp_path / "a.pth")
    assert name in refused(load_released_decoder, tmp_path / "a.pth", n_head=2)


def test_wrong_containers(tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    torch.save({"state_dict": {}, "epoch": 3}, path)
    assert "state_dict, epoch" in refused(load_released_tokenizer, path)
    torch.save({"net": [1, 2]}, path)
    assert "dictionary" in refused(load_released_tokenizer, path)
    torch.save({"net": {"module.a": torch.ones(1), "a": torch.ones(1)}}, path)
    assert "two keys" in refused(load_released_tokenizer, path)
    torch.save({}, path)
    assert "none" in refused(load_released_tokenizer, path)


def test_configuration_that_does_not_fit(tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    torch.save({"net": released_tokenizer()}, path)
    assert "give nb_code" in refused(load_released_tokenizer, path)
    text = refused(load_released_tokenizer, path, nb_code=2048, width=9)
    assert "decoder.model.0.weight (expected [9, " in text and "more" in text
    assert "nb_code" in refused(load_released_tokenizer, path, nb_code=7)
    assert load_released_tokenizer(path, nb_code=1024, seed=3, batch=1).config.codebook == 1000
    torch.save({"trans": released_decoder()}, path)
    assert load_released_decoder(path, n_head=4, lengths=[1]).config.n_head == 4
    assert "n_head" in refused(load_released_decoder, path, n_head=3)
    assert "llama_proj.weight" in refused(load_released_decoder, path, n_head=2, clip_dim=13)


def test_dtypes(tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    torch.save({"trans": released_decoder(dtype=torch.float16)}, path)
    exact = load_released_decoder(path, n_head=2)
    half = load_released_decoder(path, n_head=2, dtype=torch.float16)
    assert {v.dtype for v in exact.parameters()} == {torch.float32}
    assert all(
        torch.equal(a, b.float()) for a, b in zip(own_tensors(exact).values(), own_tensors(half).values(), strict=True)
    )


def test_released_sizes_give_the_heads(tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    config = DecoderConfig(n_layer=8, n_head=8, n_embd=512, codebook=240, text_dim=8)
    with torch.device("meta"):
        shapes = {k: v.shape for k, v in to_released(decoder_rows(config), own_tensors(MotionDecoder(config))).items()}
    torch.save({"trans": {name: torch.zeros(shape, dtype=torch.float16) for name, shape in shapes.items()}}, path)
    assert open_decoder(path, {}).config == config


def test_tied_but_different_head(tmp_path: Path) -> None:
    config = DecoderConfig(n_layer=1, n_head=2, n_embd=16, codebook=240, text_dim=12, tie_weights=True)
    tensors = released_decoder(config)
    table = tensors.get("lm_head.weight", tensors.get("transformer.wte.weight"))
    path = tmp_path / "a.pth"
    torch.save({"trans": {**tensors, "lm_head.weight": table, "transformer.wte.weight": table}}, path)
    assert load_released_decoder(path, n_head=2).config == config
    torch.save({"trans": {**tensors, "lm_head.weight": table, "transformer.wte.weight": table + 1}}, path)
    assert "two different" in refused(load_released_decoder, path, n_head=2)


def test_hostile_sizes(tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    tensors = released_tokenizer()
    for name, shape in (
        ("vqvae.encoder.model.1.weight", (3_000_000, 1, 1)),
        ("vqvae.encoder.model.1.weight", (8, 272, 300)),
    ):
        torch.save({"net": {**tensors, name: torch.zeros(shape, dtype=torch.uint8)}}, path)
        assert "hostile" in refused(load_released_tokenizer, path, nb_code=2048)
    layers = {f"transformer.h.{i}.rms_1.scale": torch.zeros(1) for i in range(2000)}
    torch.save({"trans": {**released_decoder(), **layers}}, path)
    assert "hostile" in refused(load_released_decoder, path, n_head=2)


def test_truncated_file(tmp_path: Path, files: dict[str, Path]) -> None:
    content = files["decoder"].read_bytes()
    files["decoder"].write_bytes(content[: len(content) // 2])
    assert "truncated" in refused(import_checkpoint, tmp_path / "out", **files, config={"n_head": 2})
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


class OneClip(torch.nn.Module):
    """Decodes any tokens to one given clip."""

    def __init__(self, frames: torch.Tensor) -> None:
        super().__init__()
        self.frames = frames

    def decode(self, indices: torch.Tensor) -> torch.Tensor:
        return self.frames[None]


def test_offsets_of_a_known_body_are_found() -> None:
    generator = torch.Generator().manual_seed(0)
    rotations = torch.linalg.qr(torch.randn(20, 22, 3, 3, generator=generator, dtype=torch.float64)).Q
    rotations = rotations * torch.linalg.det(rotations)[..., None, None]
    offsets = np.array(CANONICAL_OFFSETS) * 1.3 + 0.01 * (np.arange(66).reshape(22, 3) % 5)
    offsets[0] = 0
    root = torch.randn(20, 3, generator=generator, dtype=torch.float64).cumsum(0)
    x = from_motion(rotations, root, torch.from_numpy(offsets))
    mean, std = np.linspace(-1, 1, FEATURES), np.linspace(0.5, 2, FEATURES)
    normalised = (x - torch.from_numpy(mean)) / torch.from_numpy(std)
    found = estimate_offsets(OneClip(normalised), mean, std, torch.zeros(2, 10, dtype=torch.int32))
    assert np.abs(found - offsets).max() < 1e-9
    joints, _ = forward_kinematics(rotations, root, torch.from_numpy(found), PARENTS)
    assert joints.isfinite().all()
    with pytest.raises(UserError, match="NaN"):
        estimate_offsets(OneClip(normalised * float("nan")), mean, std, torch.zeros(1, 10, dtype=torch.int32))


def test_published_file_and_own_writer_agree(golden) -> None:
    values = read_tensors(golden("tokenizer_p1.pth"))["net"]
    assert all(isinstance(value, torch.Tensor) for value in values.values())

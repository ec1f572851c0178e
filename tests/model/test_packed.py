"""Packed decoders: the words' product, saving and loading, what a damaged or hostile directory gets."""

import json

import numpy as np
import pytest
import torch

from kinetok.errors import UserError
from kinetok.model.config import DecoderConfig, TokenizerConfig
from kinetok.model.decoder import MotionDecoder
from kinetok.model.packed import (
    PackedLinear,
    Quantisation,
    hollow,
    pack_in_place,
    parameter_count,
    quantise,
    unpacked,
    unpacked_bytes,
)
from kinetok.model.pretrained import MANIFEST, load_pretrained, save_pretrained, weight_bytes
from kinetok.model.tokenizer import MotionTokenizer
from kinetok.motion.skeleton import CANONICAL_OFFSETS
from kinetok.runtime.backends.torch import TorchBackend

KINDS = [("int8", 0), ("int8", 64), ("int4", 64), ("int4", 128), ("fp8", 0)]


def small(**changes) -> MotionDecoder:
    torch.manual_seed(0)
    values = {"n_layer": 2, "n_head": 2, "n_embd": 20, "codebook": 240, "text_dim": 6, "block_size": 24, **changes}
    decoder = MotionDecoder(DecoderConfig(**values)).eval()
    for name, value in decoder.named_parameters():
        if name.endswith("scale"):
            torch.nn.init.uniform_(value, 0.5, 1.5)
    return decoder


def save(folder, decoder: MotionDecoder, quantisation: Quantisation | None):
    tokenizer = TokenizerConfig(nb_code=256, code_dim=8, width=8, depth=1, patcher="none")
    return save_pretrained(
        folder,
        tokenizer=MotionTokenizer(tokenizer).eval(),
        decoder=decoder,
        mean=np.zeros(272),
        std=np.ones(272),
        skeleton_offsets=CANONICAL_OFFSETS,
        text_encoder={"type": "none", "name": "none"},
        quantisation=quantisation,
    )


@pytest.mark.parametrize("paired", [False, True])
@pytest.mark.parametrize(("kind", "group"), KINDS)
def test_the_product_is_that_of_the_weight_in_its_order(kind: str, group: int, paired: bool) -> None:
    weight, norm = torch.randn(70, 45), torch.rand(45) + 0.5
    layer = PackedLinear.of(weight, kind, group, norm_scale=norm, paired=paired)
    bound = {"int8": 0.02, "fp8": 0.06, "int4": 0.2}[kind]
    assert float((layer.weight - weight * norm).norm() / (weight * norm).norm()) < bound
    x = torch.randn(3, 2, 45)
    torch.testing.assert_close(layer(x), x @ layer.weight.T, rtol=1e-5, atol=1e-4)
    assert torch.equal(layer(x)[1:2, 1:], layer(x[1:2, 1:]))
    assert layer.packed_words.nbytes < weight.numel() * 4 * 8  # whole tiles, so little of it is saved at this size


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("kind", "group"), KINDS)
def test_logits_stay_near_and_the_unpacked_copy_has_the_same(kind: str, group: int, tied: bool) -> None:
    decoder = small(tie_weights=tied)
    packed = quantise(decoder, Quantisation(kind=kind, group=group))
    assert isinstance(decoder.blocks[0].qkv, torch.nn.Linear)  # the original is as it was
    assert isinstance(packed.head, PackedLinear) is not tied
    assert tied or packed.head.kind == ("int8" if group else kind)
    tokens, features, mask = torch.randint(240, (2, 10)), torch.randn(2, 3, 6), torch.ones(2, 3)
    wanted, found = decoder(tokens, features, mask), packed(tokens, features, mask)
    assert 0 < float((found - wanted).norm() / wanted.norm()) < {"int8": 0.05, "fp8": 0.1, "int4": 0.4}[kind]
    plain = unpacked(packed)
    torch.testing.assert_close(plain(tokens, features, mask), found, rtol=1e-4, atol=1e-4)
    assert isinstance(packed.blocks[0].qkv, PackedLinear) and isinstance(plain.blocks[0].qkv, torch.nn.Linear)
    products = [m.weight.nbytes for m in plain.modules() if isinstance(m, torch.nn.Linear) and m is not plain.text_proj]
    assert unpacked_bytes(packed) == sum(products) - (plain.head.weight.nbytes if tied else 0)
    assert unpacked_bytes(plain) == 0


def test_a_rows_bits_do_not_depend_on_the_others() -> None:
    backend = TorchBackend(quantise(small(), Quantisation(kind="int8")), 3, 12)
    for slot in range(3):
        backend.prefill(slot, torch.randn(2 + slot, 6, generator=torch.Generator().manual_seed(slot)))
    backend.copy(0, 2)
    together = backend.decode([2, 1], torch.tensor([5, 7]))
    assert torch.equal(backend.decode([0], torch.tensor([5]))[0], together[0])


@pytest.mark.parametrize(("kind", "group"), KINDS)
def test_a_saved_directory_loads_bit_by_bit_and_stays_packed(tmp_path, kind: str, group: int) -> None:
    quantisation = Quantisation(kind=kind, group=group)
    decoder = quantise(small(n_embd=128), quantisation)
    folder = save(tmp_path / "m", decoder, quantisation)
    bundle = load_pretrained(folder, "cpu")
    assert bundle.quantisation == quantisation
    state = bundle.decoder.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in decoder.state_dict().items())
    assert state["blocks.0.down.packed_words"].dtype == torch.int32
    held = [value for net in (bundle.tokenizer, bundle.decoder) for value in (*net.parameters(), *net.buffers())]
    assert weight_bytes(folder, "cpu") == sum(value.nbytes for value in held)
    plain = save(tmp_path / "plain", small(n_embd=128), None)
    assert load_pretrained(plain, "cpu").quantisation is None
    assert weight_bytes(folder, "cpu") < weight_bytes(plain, "cpu")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "int2"}, "int8, int4, fp8"),
        ({"kind": "int4", "group": 0}, "group"),
        ({"kind": "int8", "group": "64"}, "group"),
        ({"kind": "int8", "code": "x"}, "unknown keys"),
        ({"kind": "fp8"}, None),  # words of the same shape mean other numbers; nothing can tell
        ({"kind": "int4", "group": 64}, "do not fit"),
        ("int8", "object"),
    ],
)
def test_a_manifest_that_says_something_else(tmp_path, change, message) -> None:
    folder = save(tmp_path / "m", quantise(small(), Quantisation(kind="int8")), Quantisation(kind="int8"))
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps({**manifest, "quantisation": change}))
    if message is None:
        assert load_pretrained(folder, "cpu").quantisation == Quantisation(kind="fp8")
        return
    with pytest.raises(UserError, match=message):
        load_pretrained(folder, "cpu")


def test_floats_in_the_place_of_words_are_refused(tmp_path) -> None:
    decoder = quantise(small(), Quantisation(kind="int8"))
    decoder.blocks[1].down.packed_words = decoder.blocks[1].down.packed_words.float()
    with pytest.raises(UserError, match=r"blocks\.1\.down\.packed_words: expected packed words"):
        load_pretrained(save(tmp_path / "m", decoder, Quantisation(kind="int8")), "cpu")


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_in_place_a_decoder_says_the_same(tied: bool, dtype: torch.dtype) -> None:
    decoder, wanted = (small(tie_weights=tied).to(dtype) for _ in range(2))
    count = parameter_count(decoder)
    pack_in_place(decoder)
    layers = [layer for layer in decoder.modules() if isinstance(layer, PackedLinear)]
    assert len(layers) == (8 if tied else 9) and all(layer.packed_words.dtype == dtype for layer in layers)
    assert [type(m) for m in decoder.modules() if isinstance(m, torch.nn.Linear)] == [torch.nn.Linear] * (1 + tied)
    assert parameter_count(decoder) == count == sum(p.numel() for p in wanted.parameters())
    tokens, features, mask = torch.randint(240, (2, 10)), torch.randn(2, 3, 6), torch.ones(2, 3)
    exact = small(tie_weights=tied)(tokens, features, mask)
    error = [float((net(tokens, features, mask).float() - exact).norm() / exact.norm()) for net in (decoder, wanted)]
    assert error[0] < (1e-5 if dtype == torch.float32 else 1.5 * error[1])
    before = decoder.blocks[0].qkv
    pack_in_place(decoder)
    assert decoder.blocks[0].qkv is before
    quantised = quantise(small(), Quantisation(kind="int8"))
    pack_in_place(quantised)
    assert {layer.kind for layer in quantised.modules() if isinstance(layer, PackedLinear)} == {"int8"}
    with pytest.raises(UserError, match="float64"):
        pack_in_place(small().double())


def test_hollow_has_the_shapes_of_quantise() -> None:
    for kind, group in KINDS:
        quantisation = Quantisation(kind=kind, group=group)
        with torch.device("meta"):
            empty = hollow(small().to("meta"), quantisation)
        shapes = {name: (value.shape, value.dtype) for name, value in empty.state_dict().items()}
        made = quantise(small(), quantisation).state_dict()
        assert shapes == {name: (value.shape, value.dtype) for name, value in made.items()}

"""The comparison itself: it passes where it should, and sees what it is there to see."""

import pytest
import torch

from kinetok.export.parity import Parity, compare


@pytest.mark.parametrize("head_dim", [64, 100, 128])
def test_the_7bs_head_sizes_at_small_width(model_of, head_dim) -> None:
    model = model_of(n_embd=2 * head_dim, block_size=64)
    parity = compare(model, [torch.randn(length, 12) for length in (3, 7)], 30)
    assert parity.passed, parity
    assert parity.largest_logit > 1  # far above what is allowed


def test_a_model_that_is_not_the_exported_one_is_told_apart(model_of, monkeypatch) -> None:
    import kinetok.export.parity as module

    real = module.export_bundle

    def spoiled(model, out, **options):
        with torch.no_grad():
            model.decoder.blocks[0].down.weight.mul_(1.05)
            model.tokenizer.decoder.last.bias.add_(0.01)
            folder = real(model, out, **options)
            model.decoder.blocks[0].down.weight.div_(1.05)
            model.tokenizer.decoder.last.bias.sub_(0.01)
        return folder

    monkeypatch.setattr(module, "export_bundle", spoiled)
    parity = compare(model_of(), [torch.randn(3, 12)], 20)
    assert not parity.passed and parity.logits > 1e-3 and parity.metres > 1e-4


def test_each_limit_counts() -> None:
    good = {"prompts": 1, "steps": 1, "logits": 0.0, "largest_logit": 1.0, "differing": 0, "ties": 3, "metres": 0.0}
    assert Parity(**good).passed
    for change in ({"logits": 2e-4}, {"differing": 1}, {"metres": 2e-4}):
        assert not Parity(**{**good, **change}).passed

"""Means and covariances of channels against float64, whatever the batches look like."""

import pytest
import torch
from prunekit.registry import ChannelMoments
from prunekit.registry.tensors import moments as module

pytestmark = pytest.mark.smoke

CPU = torch.device("cpu")


def tokens_of(batch=6, length=50, channels=12, offset=1e3, seed=0):
    """(B, T, C) float32: spread 1, correlated, about a mean that is large."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(batch, length, channels, generator=generator) @ torch.randn(
        channels, channels, generator=generator
    )
    mixed = mixed / mixed.reshape(-1, channels).std(0)
    return mixed + offset * torch.linspace(-1, 1, channels)


def gathered(batches, masks=None):
    """The moments of batches, taken in one after another."""
    moments = ChannelMoments(batches[0].shape[-1], CPU)
    for x, valid in zip(batches, masks or [None] * len(batches), strict=True):
        moments.observe(x, valid)
    return moments


def check(moments, tokens, tolerance=1e-4):
    """Mean and covariance are those of ``tokens`` (n, C), within a share of the largest variance."""
    tokens = tokens.double()
    assert moments.tokens == len(tokens)
    mean, covariance = moments.mean, moments.clone().take_covariance()
    assert mean.dtype == covariance.dtype == torch.float32
    wanted = tokens.T.cov(correction=0)
    torch.testing.assert_close(mean.double(), tokens.mean(0), rtol=1e-6, atol=1e-4)
    torch.testing.assert_close(covariance.double(), wanted, rtol=0, atol=tolerance * float(wanted.diagonal().max()))
    torch.testing.assert_close(covariance, covariance.T, rtol=0, atol=tolerance)


@pytest.mark.parametrize("offset", [0.0, 1e3])
def test_a_mean_far_larger_than_the_spread_costs_no_digits(offset):
    x = tokens_of(offset=offset)
    check(gathered(list(x.split(2))), x.flatten(0, 1))
    naive = x.flatten(0, 1)
    naive = naive.T @ naive / len(naive) - naive.mean(0).outer(naive.mean(0))
    error = (naive.double() - x.double().flatten(0, 1).T.cov(correction=0)).abs().max()
    assert (error > 0.01) == (offset > 0), "the data must be such that the plain formula fails"


@pytest.mark.parametrize("chunk", [1, 7, 300, 4096])
def test_chunks_of_any_size_give_the_same(monkeypatch, chunk):
    monkeypatch.setattr(module, "CHUNK", chunk)
    x = tokens_of()
    check(gathered([x]), x.flatten(0, 1))


@pytest.mark.parametrize("side", ["right", "left", "scattered"])
def test_padding_counts_for_nothing(side):
    x = tokens_of()
    places, lengths = torch.arange(50), torch.tensor([50, 1, 0, 23, 49, 2])[:, None]
    valid = {
        "right": places < lengths,
        "left": places >= 50 - lengths,
        "scattered": torch.rand(6, 50, generator=torch.Generator().manual_seed(1)) < 0.5,
    }[side]
    poisoned = x.masked_fill(~valid[..., None], torch.nan)
    moments = gathered(list(poisoned.split(3)), list(valid.split(3)))
    check(moments, x[valid])


def test_batches_without_a_real_token_change_nothing():
    x = tokens_of()
    nothing, empty = torch.zeros(6, 50, dtype=torch.bool), gathered([x], [torch.zeros(6, 50, dtype=torch.bool)])
    assert empty.tokens == 0 and not empty.products.numel()
    check(gathered([x, x, x], [nothing, None, nothing]), x.flatten(0, 1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_summed_in_float32(dtype):
    x = tokens_of(batch=8, length=100, offset=30.0).to(dtype)
    check(gathered(list(x.split(3))), x.float().flatten(0, 1))


def test_the_order_and_the_cut_into_batches_do_not_matter():
    x = tokens_of()
    wanted = gathered([x]).take_covariance()
    for pieces in (x.flip(0).split(1), x.flatten(0, 1).flip(0)[None].split(11, dim=1), x.split([1, 5])):
        torch.testing.assert_close(gathered(list(pieces)).take_covariance(), wanted, rtol=1e-4, atol=1e-4)


def test_one_token_has_no_covariance():
    x = tokens_of()[:1, :1]
    moments = gathered([x])
    assert torch.equal(moments.mean, x[0, 0])
    assert not moments.take_covariance().any()


def test_the_covariance_takes_the_memory_of_the_sums():
    moments = gathered([tokens_of()])
    place = moments.products.data_ptr()
    covariance = moments.take_covariance()
    assert covariance.data_ptr() == place and not moments.products.numel()
    assert covariance.numel() * covariance.element_size() == ChannelMoments.bytes_of(12)


def test_a_clone_is_on_its_own():
    x = tokens_of()
    moments = gathered([x[:3]])
    clone = moments.clone()
    moments.observe(x[3:], None)
    check(clone, x[:3].flatten(0, 1))
    check(moments, x.flatten(0, 1))
    assert ChannelMoments(4, CPU).clone().products.numel() == 0


def test_what_is_not_finite_shows():
    x = tokens_of()
    x[1, 3, 5] = torch.inf
    assert not gathered([x]).take_covariance().diagonal().isfinite().all()

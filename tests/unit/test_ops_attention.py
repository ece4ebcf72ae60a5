"""ops/attention.py: both column means and the differentiable scores, against plain softmaxes."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from i2am_train.ops.attention import attention_logits, column_means, head_mean_matrices
from i2am_train.ops.rows import head_mean_scores

BATCH, HEADS, GENERATED, REFERENCE, CHANNELS = 2, 3, 35, 22, 8


def random_tokens(magnitude=1.0, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    generated = torch.randn(BATCH, HEADS, GENERATED, CHANNELS, generator=generator) * magnitude
    reference = torch.randn(BATCH, HEADS, REFERENCE, CHANNELS, generator=generator)
    return generated.to(dtype), reference.to(dtype)


def plain(generated, reference):
    """The definition, in float64."""
    logits = generated.double() @ reference.double().mT * CHANNELS**-0.5
    return logits.softmax(dim=-2).mean(dim=-1), logits.softmax(dim=-1).mean(dim=-2)


@pytest.mark.parametrize("byte_budget", [64 * 2**20, 2 * 35 * 22 * 4, 5 * 22 * 4, 1])
def test_column_means_are_those_of_the_two_softmaxes_whatever_the_budget(byte_budget):
    # all heads at once, two heads, five rows, a single row at a time: the same numbers
    generated, reference = random_tokens()
    means = column_means(generated, reference, byte_budget=byte_budget)
    to_generated, to_reference = plain(generated, reference)
    torch.testing.assert_close(means.to_generated.double(), to_generated, atol=1e-7, rtol=2e-6)
    torch.testing.assert_close(means.to_reference.double(), to_reference, atol=1e-7, rtol=2e-6)


@pytest.mark.parametrize("byte_budget", [64 * 2**20, 5 * 22 * 4])
@pytest.mark.parametrize("magnitude", [30.0, 200.0, 5000.0])
def test_extreme_logits_fall_back_to_the_stabilised_softmaxes(magnitude, byte_budget):
    # exponentials of such logits overflow and underflow float32; results must still be exact
    generated, reference = random_tokens(magnitude, torch.float32)
    means = column_means(generated, reference, byte_budget=byte_budget)
    to_generated, to_reference = plain(generated, reference)
    assert plain(generated, reference)[0].isfinite().all()
    tolerance = 2e-7 * magnitude  # float32 logits of size x are known to 6e-8 x
    torch.testing.assert_close(means.to_generated.double(), to_generated, atol=tolerance, rtol=0)
    torch.testing.assert_close(means.to_reference.double(), to_reference, atol=tolerance, rtol=0)


def test_only_the_head_with_extreme_logits_is_computed_again():
    # ordinary heads beside an extreme one give bit for bit what they give alone
    generated, reference = random_tokens()
    extreme = generated.clone()
    extreme[1, 2] *= 1e4
    alone = column_means(generated, reference, byte_budget=35 * 22 * 4)
    beside = column_means(extreme, reference, byte_budget=35 * 22 * 4)
    assert torch.equal(alone.to_generated[0], beside.to_generated[0])
    assert torch.equal(alone.to_reference[1, :2], beside.to_reference[1, :2])
    torch.testing.assert_close(beside.to_generated.double(), plain(extreme, reference)[0], atol=1e-4, rtol=0)


def test_a_row_with_constant_offset_far_from_the_others_is_exact():
    # the offset cancels in the softmax over the reference, but lifts the exponentials by e^60
    generated, reference = random_tokens()
    reference[..., 0] = 1.0
    generated[..., 3, 0] = 60 * CHANNELS**0.5
    means = column_means(generated, reference)
    to_generated, to_reference = plain(generated, reference)
    torch.testing.assert_close(means.to_generated.double(), to_generated, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(means.to_reference.double(), to_reference, atol=1e-6, rtol=1e-4)


def test_float64_tokens_keep_their_precision():
    generated, reference = random_tokens(dtype=torch.float64)
    means = column_means(generated, reference)
    torch.testing.assert_close(means.to_generated, plain(generated, reference)[0], rtol=1e-13, atol=0)
    assert means.to_reference.dtype == torch.float64


def test_bfloat16_tokens_are_reduced_in_float32_also_under_autocast():
    generated, reference = random_tokens(dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        means = column_means(generated, reference)
        scores = head_mean_scores(generated, reference)
    assert means.to_generated.dtype == scores.dtype == torch.float32
    to_generated, _ = plain(generated, reference)
    torch.testing.assert_close(means.to_generated.double(), to_generated, rtol=2e-6, atol=1e-8)


def test_generated_weights_are_those_of_the_mean_over_generated_tokens():
    generated, reference = random_tokens(dtype=torch.float64)
    weights = (torch.arange(GENERATED) % 3 == 0).double().repeat(BATCH, 1)
    weights[1] *= torch.rand(GENERATED, dtype=torch.float64)
    means = column_means(generated, reference, generated_weights=weights)
    scores = attention_logits(generated, reference).softmax(dim=-1)
    expected = (scores * weights[:, None, :, None]).sum(2) / weights.sum(1)[:, None, None]
    torch.testing.assert_close(means.to_reference, expected)
    torch.testing.assert_close(means.to_generated, plain(generated, reference)[0])


def test_an_empty_mask_gives_zeros_not_nan():
    generated, reference = random_tokens()
    weights = torch.zeros(BATCH, GENERATED)
    means = column_means(generated, reference, generated_weights=weights)
    assert torch.equal(means.to_reference, torch.zeros_like(means.to_reference))
    assert means.to_generated.isfinite().all()


@pytest.mark.parametrize("heads_at_a_time", [1, 2, 5])
def test_weights_follow_their_sample_into_groups_of_heads(heads_at_a_time):
    # 2 x 3 flattened heads in groups that do and do not end with a sample; weights differ by sample
    generated, reference = torch.randn(2, 3, 7, 4), torch.randn(2, 3, 5, 4)
    weights = torch.rand(2, 7)
    means = column_means(generated, reference, generated_weights=weights, byte_budget=heads_at_a_time * 7 * 5 * 4)
    shares = weights / weights.sum(1, keepdim=True)
    scores = attention_logits(generated, reference).softmax(-1)
    expected = torch.einsum("bn,bhnm->bhm", shares, scores)
    torch.testing.assert_close(means.to_reference, expected)


class LargestTensor(TorchDispatchMode):
    """Notes the number of elements of the largest tensor that any operation returns."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.numel())
        return result


def test_no_tensor_is_larger_than_the_byte_budget():
    # 2 x 200 generated and 150 reference tokens: one matrix has 30000 logits, the budget ten rows
    generated, reference = torch.randn(2, 1, 200, 2), torch.randn(2, 1, 150, 2)
    budget = 10 * 150 * 4
    with LargestTensor() as watched:
        column_means(generated, reference, byte_budget=budget)
    assert watched.largest * 4 <= budget


def test_scores_carry_the_gradient_of_the_softmax():
    generated, reference = random_tokens(dtype=torch.float64)
    generated, reference = generated[:1, :2, :4].requires_grad_(), reference[:1, :2, :5]
    assert torch.autograd.gradcheck(lambda tokens: head_mean_scores(tokens, reference), generated)


@pytest.mark.parametrize("cache_block", [2**20, 1])
def test_matrices_are_head_means_of_both_softmaxes(cache_block, monkeypatch):
    # all heads at once, and one at a time
    monkeypatch.setattr("i2am_train.ops.attention.CACHE_BLOCK_BYTES", cache_block)
    generated, reference = random_tokens(dtype=torch.float64)
    matrices = head_mean_matrices(generated, reference)
    logits = attention_logits(generated, reference)
    torch.testing.assert_close(matrices.over_reference, logits.softmax(-1).mean(1))
    torch.testing.assert_close(matrices.over_generated, logits.softmax(-2).mean(1))
    torch.testing.assert_close(matrices.over_reference, head_mean_scores(generated, reference))

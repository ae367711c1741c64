"""The summed loss of a language model."""

import torch

from lightning_dsmoe.losses.cross_entropy import summed_cross_entropy, window_cross_entropy


def test_sums_over_the_tokens_that_count() -> None:
    logits_BTV = torch.randn(2, 3, 5).to(torch.bfloat16)
    labels_BT = torch.tensor([[0, -100, 4], [-100, 2, 1]])
    expected = 0.0
    for logits_V, label in zip(logits_BTV.flatten(0, 1), labels_BT.flatten().tolist(), strict=True):
        if label != -100:
            expected -= logits_V.double().log_softmax(-1)[label].item()
    found = summed_cross_entropy(logits_BTV, labels_BT)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.item(), expected, rtol=1e-5, atol=0)


def test_windows_sum_to_the_whole() -> None:
    logits_BTV = torch.randn(3, 4, 5)
    labels_BT = torch.randint(5, (3, 4))
    labels_BT[0, 1], labels_BT[2] = -100, -100
    found_B = window_cross_entropy(logits_BTV, labels_BT)
    for number in range(3):
        alone = summed_cross_entropy(logits_BTV[number][None], labels_BT[number][None])
        torch.testing.assert_close(found_B[number], alone)
    assert found_B[2] == 0


def test_no_token_counts() -> None:
    assert summed_cross_entropy(torch.randn(1, 2, 3), torch.full((1, 2), -100)) == 0

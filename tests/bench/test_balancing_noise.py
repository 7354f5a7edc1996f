"""Noise and cosines of task gradients, from their dot products."""

import pytest
import torch

from bench.balancing import noise
from bench.balancing.noise import describe, measure, true_cosine


def gradients(cosine: float, noises: tuple[float, ...], batches: int) -> torch.Tensor:
    """Batches' gradients ``[N, K, P]`` of two tasks: means of a known cosine, and noise."""
    generator = torch.Generator().manual_seed(0)
    size = 4000
    first = torch.zeros(size, dtype=torch.float64)
    first[0] = 1
    second = torch.zeros_like(first)
    second[0], second[1] = cosine, (1 - cosine**2) ** 0.5
    spread = torch.randn(batches, 2, size, generator=generator, dtype=torch.float64) / size**0.5
    return torch.stack([first, second]) + torch.tensor(noises).view(1, 2, 1) * spread


def grams_of(rows: torch.Tensor) -> torch.Tensor:
    flat = rows.flatten(0, 1)
    return (flat @ flat.T).view(*rows.shape[:2], *rows.shape[:2])


@pytest.mark.parametrize("cosine", [-0.6, 0.0, 0.8])
def test_noise_is_taken_off(cosine: float) -> None:
    """Of gradients that are nine parts noise, a batch's own cosines are near 0."""
    found = describe(("a", "b"), grams_of(gradients(cosine, (3.0, 3.0), 32)))
    assert found["noise"] == pytest.approx({"a": 0.9, "b": 0.9}, abs=0.03)
    single = found["by_batches"][1]
    assert single["same_task"]["a"]["mean"] == pytest.approx(0.1, abs=0.03)
    assert single["tasks"]["a/b"]["mean"] == pytest.approx(0.1 * cosine, abs=0.03)
    true = found["true_cosines"]["a/b"]
    assert abs(true["mean"] - cosine) < 4 * true["error"] + 0.01
    # Means of more batches come closer to it, and of one task to 1.
    largest = found["by_batches"][16]
    assert largest["same_task"]["a"]["mean"] > 0.5
    assert abs(largest["tasks"]["a/b"]["mean"]) >= abs(single["tasks"]["a/b"]["mean"])


def test_pure_noise_has_no_cosine() -> None:
    rows = gradients(0.5, (1.0, 1.0), 8)
    rows[:, 0] -= rows[:, 0].mean(0)
    assert true_cosine(grams_of(rows), 0, 1) == {"mean": None, "error": None}


def test_a_measured_run_trains_as_one_that_is_not(tmp_path, monkeypatch) -> None:
    """The gradients are of the weights of that step, and nothing is updated by measuring."""
    small = [
        "threads=1",
        "max_train_examples=64",
        "batch_size=4",
        "encoder.hidden_size=32",
    ]
    small += ["encoder.num_hidden_layers=1", "encoder.num_attention_heads=2", "epochs=9"]
    monkeypatch.setattr(noise, "RECIPE", "demo")

    def trainer() -> noise.Trainer:
        return noise.trainer_for(None, None, small, 8)

    plain, measured = trainer(), trainer()
    with plain.loader(0) as loader:
        for step, batch in zip(range(5), loader, strict=False):
            plain.step(batch, step, plain.lr_schedule(step))
    found = list(measure(measured, [0, 2, 5], 3))
    assert [step for step, _ in found] == [0, 2, 5]
    assert {tuple(grams.shape) for _, grams in found} == {(3, 3, 3, 3)}
    assert torch.equal(plain.parameters.master, measured.parameters.master)
    for _, grams in found:
        flat = grams.reshape(9, 9)
        torch.testing.assert_close(flat, flat.T, rtol=1e-4, atol=1e-5 * float(flat.max()))
        assert torch.linalg.eigvalsh(flat).min() > -1e-6 * flat.diagonal().max()

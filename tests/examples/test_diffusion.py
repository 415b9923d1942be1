"""The diffusion model draws digits."""

import pytest
import torch

import diffusion


def test_its_drawings_teach_to_read_real_digits(tmp_path, capsys, monkeypatch):
    """After 165 updates a reader of drawn digits alone is far above chance, which is 10 %."""
    for name, value in {"EPOCHS": 15, "DRAW_STEPS": 15}.items():
        monkeypatch.setattr(diffusion, name, value)
    path = tmp_path / "deep" / "samples.png"
    assert diffusion.main(path) > 0.4
    assert str(path) in capsys.readouterr().out
    assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("angle", [0.0, 0.5, 1.57])
def test_noise_and_image_mix_at_constant_variance(angle):
    """Independent images and noise of variance 1 give noisy images of variance 1."""
    image, noise = torch.randn(2, 100_000)
    noisy = diffusion.mixed(image, noise, torch.tensor(angle))
    assert noisy.var().item() == pytest.approx(1, abs=0.02)


def test_a_model_that_knows_the_noise_draws_the_image_it_came_from():
    """With the true velocity at each angle, every way ends at the one image it comes from."""
    image = torch.linspace(-1, 1, 64)

    def knows(noisy, angle, labels):
        noise = (noisy - angle.cos() * image) / angle.sin()
        return angle.cos() * noise - angle.sin() * image

    way = diffusion.draw_digits(knows, torch.zeros(3, dtype=torch.long))
    torch.testing.assert_close(way[-1], image.expand(3, 64), rtol=0, atol=1e-4)

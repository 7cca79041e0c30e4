"""The loss and the samplers' steps against formulas in NumPy, chains against a loop of plain passes."""

import numpy as np
import pytest
import torch
from scipy.stats import norm
from test_sdm import label_maps, tiny_unet

import diffusion

ALPHA_BAR = np.cumprod([1 - (1e-4 + (0.02 - 1e-4) * t / 999) for t in range(1000)])


def test_training_loss_against_numpy():
    t = torch.tensor([0, 0, 1, 400, 999])
    image = torch.randint(0, 256, (5, 3, 4, 4)) / 127.5 - 1
    image[0, 0, 0, :2] = torch.tensor([-1.0, 1.0])
    noise, difference, v = torch.randn(3, 5, 3, 4, 4)
    eps = noise + 0.3 * difference
    output, seen = torch.cat([eps, v], 1).requires_grad_(), []
    network, dropped = lambda *given: seen.extend(given) or output, torch.zeros(5, dtype=torch.bool)
    terms = diffusion.training_loss(network, image, torch.zeros(5, 4, 4, dtype=torch.int64), t, noise, dropped)
    (simple_gradient,), (vb_gradient,) = (torch.autograd.grad(term.sum(), output, retain_graph=True) for term in terms.values())
    assert simple_gradient[:, :3].all() and not simple_gradient[:, 3:].any()
    assert vb_gradient[:, 3:].any() and not vb_gradient[:, :3].any()  # this term trains the variance alone

    x, e, eps, v = (tensor.double().numpy() for tensor in (image, noise, eps, v))
    now = ALPHA_BAR[t].reshape(5, 1, 1, 1)
    following = np.append(1, ALPHA_BAR)[t].reshape(5, 1, 1, 1)
    noisy = np.sqrt(now) * x + np.sqrt(1 - now) * e
    np.testing.assert_allclose(seen[0].numpy(), noisy, atol=1e-5)
    assert torch.equal(seen[1], t) and seen[4] is dropped
    np.testing.assert_allclose(terms["simple"].detach(), ((eps - e) ** 2).mean((1, 2, 3)), rtol=1e-4)

    beta = 1 - now / following
    lowest = (beta * (1 - following) / (1 - now))[[2, 2, 2, 3, 4]]  # at t = 0, where this is 0, the bound is that of t = 1
    variance = np.exp((v + 1) / 2 * np.log(beta) + (1 - v) / 2 * np.log(lowest))

    mean = lambda image: (np.sqrt(following) * beta * image + np.sqrt(1 - beta) * (1 - following) * noisy) / (1 - now)
    guess = mean((noisy - np.sqrt(1 - now) * eps) / np.sqrt(now))
    kl = np.log(variance / lowest) / 2 + (lowest + (mean(x) - guess) ** 2) / (2 * variance) - 0.5
    upper = np.where(x > 0.999, 1, norm.cdf((x + 1 / 255 - guess) / np.sqrt(variance)))
    lower = np.where(x < -0.999, 0, norm.cdf((x - 1 / 255 - guess) / np.sqrt(variance)))
    nll = -np.log(np.maximum(upper - lower, 1e-12))
    bits = terms["vb"].detach().numpy() * np.log(2)
    np.testing.assert_allclose(bits[2:], kl.mean((1, 2, 3))[2:], rtol=1e-3)
    np.testing.assert_allclose(bits[:2], nll.mean((1, 2, 3))[:2], rtol=2e-2)  # the tanh in the normal distribution


def test_steps_are_those_of_generalized_ddim():
    """Song et al., 2021, equation (12): sigma^2 is 0 in DDIM, and in ancestral sampling the posterior's variance."""
    s = diffusion.schedule(20)
    noisy, eps, fresh = torch.randn(3, 1, 3, 4, 4)
    output = torch.cat([eps, -torch.ones_like(eps)], 1)  # v = -1: the lower bound
    for index in (0, 1, 10, 19):
        now, following = ALPHA_BAR[s.t[index]], ALPHA_BAR[s.t[index - 1]] if index else 1
        image = ((noisy - (1 - now) ** 0.5 * eps) / now**0.5).clamp(-1, 1)
        clipped = (noisy - now**0.5 * image) / (1 - now) ** 0.5
        posterior = (1 - following) / (1 - now) * (1 - now / following)
        for variance, result in ((0, diffusion.ddim_step(noisy, output, index, s)),
                                 (posterior, diffusion.ancestral_step(noisy, output, index, fresh, s))):
            expected = following**0.5 * image + (1 - following - variance) ** 0.5 * clipped + variance**0.5 * fresh
            torch.testing.assert_close(result, expected.float(), atol=1e-4, rtol=0)
        assert s.log_variance_max[index].exp().item() == pytest.approx(1 - now / following, rel=1e-5)  # v = 1


@pytest.mark.parametrize("guidance", [1.0, 2.0])
@pytest.mark.parametrize("sampler", diffusion.SAMPLERS)
def test_sample_is_a_chain_of_plain_passes(sampler: str, guidance: float):
    """Against a loop with two whole passes a step for one image, whose noise is that of its seed in any batch."""
    unet, label_map, s = tiny_unet(), label_maps(), diffusion.schedule(6)
    draws = torch.Generator().manual_seed(11)
    with torch.no_grad():
        x = torch.randn(3, 8, 8, generator=draws)[None]
        for index in reversed(range(6)):
            t = torch.tensor([[0, 200, 400, 599, 799, 999][index]])
            output = unet(x, t, label_map[:1])
            unconditional = unet(x, t, label_map[:1], dropped=torch.tensor([True]))
            output[:, :3] += (guidance - 1) * (output - unconditional)[:, :3]  # it moves the noise estimate alone
            if sampler == "ddim":
                x = diffusion.ddim_step(x, output, index, s)
            else:
                x = diffusion.ancestral_step(x, output, index, torch.randn(3, 8, 8, generator=draws)[None], s)
    both = diffusion.sample(unet, label_map.flip(0), diffusion.seeded_noise([5, 11], (8, 8)), 6, guidance, sampler)
    torch.testing.assert_close(both[1:], x, atol=1e-4, rtol=0)
    assert (both[:1] - x).abs().max() > 0.1 and x.abs().max() <= 1

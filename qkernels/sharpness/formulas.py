"""The eight generalization measures as formulas. Source: QGen, eqs. 15 to 22 (after Jiang et al. 2020)."""

import math
from collections.abc import Iterable, Mapping

import torch

NAMES = tuple(
    f"{kind}_{aware}{reference}"
    for kind in ("pac_bayes", "sharpness")
    for aware in ("", "mag_")
    for reference in ("init", "orig")
)


def bounds(
    w: Iterable[torch.Tensor],
    w0: Iterable[torch.Tensor],
    m: float,
    sizes: Mapping[str, float],
    eps: float = 1e-3,
    delta: float | None = None,
) -> dict[str, float]:
    """The eight bounds mu, by name, in float64 Python numbers.

        eqs. 15, 16  pac_bayes_init, _orig      |r|^2 / (4 sigma^2) + log(m / delta) + 10
        eqs. 17, 18  sharpness_init, _orig      |r|^2 log(2 omega) / (4 alpha^2) + log(m / delta) + 10
        eqs. 19, 20  pac_bayes_mag_init, _orig  1/4 sum_i log((eps^2 + (sigma'^2 + 1) |r|^2 / omega)
                                                              / (eps^2 + sigma'^2 d_i^2)) + log(m / delta') + 10
        eqs. 21, 22  sharpness_mag_init, _orig  as 19, 20 with alpha'^2 + 4 log(2 omega / delta') for
                                                sigma'^2 + 1, and alpha' for sigma' below

    with d = w - w0, r = d ("init") or w ("orig"), omega the number of elements. The paper prints sigma and
    delta for one another; here delta is sigma and delta' is sigma' (as public code has it) unless ``delta``
    gives a number for both.

    Args:
        w, w0: lists of tensors. m: number of training images.
        sizes: {"sigma", "sigma_mag", "alpha", "alpha_mag"} -> float, all > 0.
    """
    pairs = [
        (a.detach().double(), a.detach().double() - b.detach().double()) for a, b in zip(w, w0, strict=True)
    ]
    omega = sum(a.numel() for a, _ in pairs)
    square = {
        "init": sum(d.square().sum().item() for _, d in pairs),
        "orig": sum(a.square().sum().item() for a, _ in pairs),
    }
    sigma, sigma_mag, alpha, alpha_mag = (sizes[k] for k in ("sigma", "sigma_mag", "alpha", "alpha_mag"))
    plain = math.log(m / (sigma if delta is None else delta)) + 10
    delta_mag = sigma_mag if delta is None else delta
    aware = math.log(m / delta_mag) + 10

    def spread(size, widening, r2):
        top = eps**2 + (size**2 + widening) * r2 / omega
        return 0.25 * sum(torch.log(top / (eps**2 + size**2 * d.square())).sum().item() for _, d in pairs)

    mu = {}
    for reference, r2 in square.items():
        mu[f"pac_bayes_{reference}"] = r2 / (4 * sigma**2) + plain
        mu[f"sharpness_{reference}"] = r2 * math.log(2 * omega) / (4 * alpha**2) + plain
        mu[f"pac_bayes_mag_{reference}"] = spread(sigma_mag, 1.0, r2) + aware
        mu[f"sharpness_mag_{reference}"] = spread(alpha_mag, 4 * math.log(2 * omega / delta_mag), r2) + aware
    return {name: mu[name] for name in NAMES}


def measure(mu, m):
    """sqrt(mu / m), the form the papers report; None where the bound is negative."""
    return math.sqrt(mu / m) if mu >= 0 else None

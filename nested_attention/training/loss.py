"""The diffusion loss of epsilon, v and flow models alike, from the clean pictures that they predict."""

from __future__ import annotations

import torch
from torch import Tensor


def loss_weight(scale: Tensor, snr: Tensor, gamma: float) -> Tensor:
    """Weight [B] on the squared error of the clean picture.

    scale   how much of the model's output is in its clean picture: by it the error is the output's own (plain loss)
    snr     signal to noise; with gamma > 0 the weight is min(snr, gamma) (Hang et al. 2023, eq. 4)
    """
    return snr.clamp_max(gamma) if gamma > 0 else scale.pow(-2)


def diffusion_loss(denoised: Tensor, clean: Tensor, weight: Tensor) -> Tensor:
    """Mean over the batch of the weighted squared error of [B, C, h, w]."""
    return (weight * (denoised.float() - clean.float()).square().flatten(1).mean(1)).mean()


def snr_of(signal: Tensor, noise: Tensor) -> Tensor:
    return (signal / noise.clamp_min(torch.finfo(noise.dtype).tiny)).square()

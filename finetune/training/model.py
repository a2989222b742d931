"""The trainable whole: denoiser and trained text encoders behind one forward, so that DDP wraps one module.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from finetune.families.base import Conditioning, ModelFamily, SizeConditioning


class TrainableModel(nn.Module):
    """Predicts from noisy latents and captions (encoded or as tokens)."""

    def __init__(self, family: ModelFamily, denoiser: nn.Module, text_encoders: Mapping[str, nn.Module]) -> None:
        """Join `denoiser` and the `text_encoders` that are trained (empty when captions come encoded)."""
        super().__init__()
        self._family = family
        self.denoiser = denoiser
        self.text_encoders = nn.ModuleDict(dict(text_encoders))

    def train(self, mode: bool = True) -> TrainableModel:
        """See `nn.Module.train`; a text encoder that is frozen stays as it encodes for the cache: T5 has dropout."""
        super().train(mode)
        for encoder in self.text_encoders.values():
            if not any(parameter.requires_grad for parameter in encoder.parameters()):
                encoder.eval()
        return self

    def forward(
        self,
        noisy_latents: Tensor,
        timesteps: Tensor,
        conditioning: Conditioning | None,
        tokens: dict[str, Tensor] | None,
        sizes: SizeConditioning,
    ) -> Tensor:
        """The raw prediction, shape of `noisy_latents`; exactly one of `conditioning` and `tokens` is given.
        """
        if conditioning is None:
            assert tokens is not None, "a batch carries either encoded captions or their tokens"
            conditioning = self._family.encode_prompts(dict(self.text_encoders.items()), tokens)
        return self._family.predict(self.denoiser, noisy_latents, timesteps, conditioning, sizes)


def enable_gradient_checkpointing(denoiser: nn.Module, text_encoders: Mapping[str, nn.Module]) -> None:
    """Recompute activations in the backward pass: about a third more time for most of the memory."""
    denoiser.enable_gradient_checkpointing()
    for encoder in text_encoders.values():
        # keep: reentrant checkpointing gives no gradient to adapters behind frozen embeddings.
        encoder.activation_checkpointing_enable({"use_reentrant": False})

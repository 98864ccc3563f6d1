"""PixArt-Sigma: PixArt-alpha with SDXL's autoencoder, prompts of 300 tokens, and no conditions beyond the text."""

from flashdiff.families.pixart import pixart_family

FAMILY = pixart_family("pixart-sigma", "PixArtSigmaPipeline", tokens=300, small_vae="madebyollin/taesdxl")

"""Engines: a base model and LoRAs become a checked bundle, and a bundle becomes components that run."""

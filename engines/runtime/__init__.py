"""Engines that run: an opened bundle, the machine it runs on, and a stand-in for tests."""

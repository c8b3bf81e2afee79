"""Variational autoencoders trained on evidence bounds."""

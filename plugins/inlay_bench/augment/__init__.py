"""Synthetic data: objects inserted into a folder of pictures, with their boxes and masks."""

"""Launchable experiments: `python -m experiments.NAME --help`."""

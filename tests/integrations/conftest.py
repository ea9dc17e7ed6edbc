"""Tests of other libraries' models, skipped where these are not installed."""

import sys

import pytest


@pytest.fixture(autouse=True)
def nothing_said_yet(monkeypatch):
    if "adasplash.integrations.transformers.dense" in sys.modules:
        monkeypatch.setattr("adasplash.integrations.transformers.dense._warned", set())

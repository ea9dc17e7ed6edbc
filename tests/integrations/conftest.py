"""Tests of other libraries' models, skipped where these are not installed."""

import pytest


@pytest.fixture(autouse=True)
def nothing_said_yet(monkeypatch):
    monkeypatch.setattr("adasplash.masked._warned", set())

"""Markers that skip themselves with their reason."""

import pytest
import torch


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run the tests that take more than a minute")
    parser.addoption("--multinode", action="store_true", help="run the tests that build several hosts on this machine")


def pytest_collection_modifyitems(config, items):
    missing = {
        "slow": None if config.getoption("--slow") else "slow; run with --slow",
        "multinode": None if config.getoption("--multinode") else "builds several hosts; run with --multinode",
        "gpu": None if torch.cuda.is_available() else "needs a CUDA device, and there is none",
    }
    for item in items:
        for marker, reason in missing.items():
            if reason and marker in item.keywords:
                item.add_marker(pytest.mark.skip(reason=reason))

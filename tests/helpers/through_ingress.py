"""A plugin of pytest that puts an ingress with one replica in place of every app: ``pytest -p through_ingress``."""

from typing import Any

import pytest
from fastapi import FastAPI
from ingress import ingress_app

from kvfusion_rag import serving


def create_app(generator: Any, *, library: Any = None, **options: Any) -> FastAPI:
    if library is not None:
        pytest.skip("replicas on a cluster have no library of files")
    return ingress_app(generator, **options)


serving.create_app = create_app

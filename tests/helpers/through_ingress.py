"""A plugin of pytest that puts an ingress with one replica in place of every app: ``pytest -p through_ingress``."""

from ingress import ingress_app

from kvfusion_rag import serving

serving.create_app = ingress_app

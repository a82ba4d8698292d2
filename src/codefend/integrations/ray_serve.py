"""The gateway on Ray Serve: replicas that Ray places, scales and replaces.

    CODEFEND_UPSTREAM=http://model:8000/v1 CODEFEND_NOISE_SECRET=... serve run codefend.integrations.ray_serve:app

Settings are those of ``codefend serve``, from ``CODEFEND_*`` variables and the file that ``CODEFEND_CONFIG`` names;
host and port are Ray's. In Python, with settings of your own:

    from ray import serve
    from codefend.integrations.ray_serve import deployment

    serve.run(deployment({"upstream": "http://model:8000/v1", "noise_secret": "..."}), route_prefix="/")
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from codefend.gateway.app import create_app
from codefend.gateway.config import load_settings
from codefend.types import CodefendError


def deployment(settings: Mapping[str, Any], **options: Any) -> Any:
    """A Serve application; ``options`` are those of a deployment, such as ``num_replicas`` or ``autoscaling_config``.

    Raises CodefendError for wrong settings, and without ``noise_secret``: replicas would not agree on an image.
    """
    from ray import serve

    loaded = load_settings(**settings)
    if loaded.noise_secret is None:
        raise CodefendError("replicas need a noise_secret, the same in all: set CODEFEND_NOISE_SECRET")
    given = dict(settings)

    def build() -> Any:  # in each replica: the app holds processes, threads and locks
        return create_app(load_settings(**given))

    @serve.deployment(**{"max_ongoing_requests": 100, **options})
    @serve.ingress(build)
    class Gateway:
        """The gateway, with its own queue and worker processes in each replica."""

    bound: Any = Gateway
    return bound.bind()


def app(arguments: Mapping[str, str]) -> Any:
    """What ``serve run codefend.integrations.ray_serve:app`` calls; ``key=value`` arguments are settings."""
    return deployment(arguments)

"""Cases that hypothesis draws: always the same ones, however long a busy machine takes over them."""

from hypothesis import HealthCheck, settings

UNTIMED = settings(derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])

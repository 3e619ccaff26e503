"""A machine that is busy is no reason to fail: what hypothesis draws has to be right, not fast."""

from hypothesis import HealthCheck, settings

settings.register_profile("idist", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("idist")

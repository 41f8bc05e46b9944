"""The names that config files import, `default_config`, and those that turn it into settings, `resolve`, `Settings`."""

from tvq_pod.config.resolve import default_config, resolve
from tvq_pod.config.settings import Settings

__all__ = ["Settings", "default_config", "resolve"]

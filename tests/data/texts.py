"""A corpus of sixty short texts, and settings for it; conftest.py writes it into a folder."""

from tests.common import small_config
from tvq_pod.config.settings import DataSettings, Settings

TEXTS = [f"the {n}th document says {n * n} and no more. " * (1 + n % 7) for n in range(60)]


def settings_for(corpus, **changes) -> Settings:
    data = DataSettings(**dict(source=str(corpus), validation_share=0.2, test_share=0.1) | changes)
    return Settings(model=small_config(n_vocab=400), data=data)

